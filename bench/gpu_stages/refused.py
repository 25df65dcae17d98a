# mypy: disallow-incomplete-defs=False, disallow-untyped-defs=False
"""A kernel that Triton refuses to compile, for the rehearsal."""

import triton
import triton.language as tl


@triton.jit
def refused_kernel(x_ptr):
    tl.static_assert(False, "deliberately")
    tl.store(x_ptr, 0.0)
