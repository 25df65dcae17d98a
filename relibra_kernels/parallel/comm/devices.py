"""Host arrays on the device, and device tensors on the host, without a wait in between."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on the device; through pinned memory, so that the host does not wait for a GPU."""
    host = torch.from_numpy(np.ascontiguousarray(array))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def download_later(tensor: Tensor) -> Callable[[], np.ndarray]:
    """Begin to bring a tensor to the host; what is returned gives it, and waits only where it is not there yet."""
    if tensor.device.type != "cuda":
        return lambda: tensor.numpy(force=True)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    there = torch.cuda.Event()
    there.record()

    def get() -> np.ndarray:
        there.synchronize()
        return host.numpy()

    return get
