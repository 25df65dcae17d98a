"""In which dtype a device multiplies matrices fastest, without losing precision.

Where oneDNN has no kernels for bf16 or fp16 (x86 without AVX-512, for one), torch multiplies them in plain loops: 0.3
to 20 GFLOP/s on one thread where fp32 reaches 85 (measured, AVX2). Casting the operands costs a few percent of that.
"""

from functools import cache

import torch

# Asked for by an operator each, since torch has no public name for it.
_ONEDNN_HAS = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


def operand_dtype(tensor: torch.Tensor) -> torch.dtype:
    """What the operands of a product should be cast to: fp32 for 2-byte types on a CPU that has no kernels for them."""
    if tensor.device.type == "cpu" and not _multiplies_well(tensor.dtype):
        return torch.float32
    return tensor.dtype


@cache
def _multiplies_well(dtype: torch.dtype) -> bool:
    if dtype not in _ONEDNN_HAS:
        return True
    asked = getattr(torch.ops.mkldnn, _ONEDNN_HAS[dtype], None)
    return asked is not None and torch.backends.mkldnn.is_available() and bool(asked())
