"""GPUs as :mod:`triton_optim.audit.gpu_model` sees them: figures of their datasheets, and what is assumed beside them.

No datasheet was opened here: their figures were compared with what third parties list of them.
"""

from __future__ import annotations

from typing import NamedTuple

KIB = 1024


class Unit(NamedTuple):
    """An SM (NVIDIA) or a CU (AMD), with 4 schedulers (on AMD: SIMDs).

    Attributes:
        warp_size: threads a warp.
        cycles: in which a scheduler issues an instruction of one warp.
        warps: resident on a scheduler at most.
        registers, register_step: of a scheduler for each of a warp's threads; allocated in such steps.
        programs: resident at most.
        shared_memory, reserved: bytes, and those of them that each program takes beside what it asks for.
    """

    warp_size: int
    cycles: int
    warps: int
    registers: int
    register_step: int
    programs: int
    shared_memory: int
    reserved: int


SCHEDULERS = 4  # a unit

# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
SM_80 = Unit(
    warp_size=32, cycles=1, warps=16, registers=512, register_step=8, programs=32, shared_memory=164 * KIB, reserved=KIB
)
SM_90 = SM_100 = SM_80._replace(shared_memory=228 * KIB)
# A wave goes through 16 lanes: AMD CDNA 3 ISA guide. Waves, registers and groups: LLVM's AMDGPU target.
CDNA_3 = Unit(
    warp_size=64, cycles=4, warps=8, registers=512, register_step=8, programs=16, shared_memory=64 * KIB, reserved=0
)


class Gpu(NamedTuple):
    """One GPU.

    Attributes:
        title: what it is.
        device: what ``torch.cuda.get_device_name`` says, as a regular expression.
        arch: what is compiled for it, a key of ``audit.TARGETS``.
        unit, units, clock: how many of which, and cycles a second at the boost clock.
        memory: bytes.
        bandwidth: bytes a second, of the datasheet.
        share: of the bandwidth, that a long copy reaches.
        source: of the figures.
    """

    title: str
    device: str
    arch: str
    unit: Unit
    units: int
    clock: float
    memory: float
    bandwidth: float
    share: float
    source: str


# 4.3 TB/s of the H200's 4.8 were seen in a copy by torch on one. Of the others the share is assumed.
SHARE, SHARE_OF_CDNA = 0.9, 0.8

GPUS = {
    "h200": Gpu(
        title="H200 SXM",
        device=r"\bH200$",
        arch="sm_90",
        unit=SM_90,
        units=132,
        clock=1.98e9,
        memory=141e9,
        bandwidth=4.8e12,
        share=SHARE,
        source="NVIDIA H200 datasheet; SMs: Hopper whitepaper; clock: from 67 TFLOPS of float32",
    ),
    "b200": Gpu(
        title="B200 SXM",
        device=r"\bB200$",
        arch="sm_100",
        unit=SM_100,
        units=148,
        clock=1.98e9,
        memory=180e9,
        bandwidth=8e12,
        share=SHARE,
        source="NVIDIA HGX B200 datasheet; SMs and clock: hmc-tech.com, which fit its 75 TFLOPS of float32",
    ),
    "a100": Gpu(
        title="A100 SXM 80GB",
        device=r"\bA100-SXM4-80GB$",
        arch="sm_80",
        unit=SM_80,
        units=108,
        clock=1.41e9,
        memory=80e9,
        bandwidth=2.039e12,
        share=SHARE,
        source="NVIDIA A100 80GB datasheet; SMs and clock: Ampere GA100 whitepaper",
    ),
    "mi300x": Gpu(
        title="MI300X",
        device=r"\bMI300X\b",
        arch="gfx942",
        unit=CDNA_3,
        units=304,
        clock=2.1e9,
        memory=192e9,
        bandwidth=5.3e12,
        share=SHARE_OF_CDNA,
        source="AMD Instinct MI300X datasheet",
    ),
}
