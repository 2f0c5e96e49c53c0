"""Everything that Triton compiles: the rules, the primitives they are written with, and the kernel that runs them."""
