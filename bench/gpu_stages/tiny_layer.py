"""One tiny layer, forward and backward, with replicas and without: what compute-sanitizer looks at."""

from typing import Any

import torch

from relibra_kernels.tuning.launch_model import skewed
from relibra_kernels.tuning.models import Model

from .problems import FORMS, layer_of, parts_of


class OnTheGpu:
    device = torch.device("cuda")


def call_all(setting: Any) -> None:
    """Every part once; rows of 16 bytes, and no multiple of a block."""
    for form in ("qwen", "gpt-oss"):
        model = Model("tiny", 136, 72, 5, 3, FORMS[form])
        for replicas in (0, 2):
            layer = layer_of(setting, model, skewed(5, 29), replicas=replicas, accumulate=replicas > 0)
            for kernel, part in parts_of(model):
                layer.call(kernel, part, None)()


if __name__ == "__main__":
    call_all(OnTheGpu())
    torch.cuda.synchronize()
