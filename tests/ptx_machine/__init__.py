"""Executes kernels that Triton compiled for NVIDIA GPUs, on a CPU: their PTX, in NumPy.

The threads of many programs run in lock-step. Global memory is this process's own, so that CPU tensors are a GPU's.
Each access is checked: it must lie in a tensor, be aligned to its size, and not race with another thread's. What a
kernel stores must not depend on a register or on shared memory that nothing was written to.

Not modelled: ptxas, which may contract a multiplication and an addition of PTX where the kernel was compiled with
fusion; caches, timing, memory order between programs, and matrix instructions. An approximate function gives the
nearest number, or one that is off by as much as PTX allows, never the bits of the hardware.
"""
