"""One tiny layer, forward and backward, with replicas and without: what compute-sanitizer looks at."""

import torch

from relibra_kernels.tuning.launch_model import skewed

from .problems import FORMS, Model, layer_of, parts_of


class _Here:
    device = torch.device("cuda")


def main() -> None:
    for form in ("qwen", "gpt-oss"):
        model = Model("tiny", 136, 72, 5, 3, FORMS[form])  # rows of 16 bytes, and no multiple of a block
        for replicas in (0, 2):
            layer = layer_of(_Here(), model, skewed(5, 29), replicas=replicas, accumulate=replicas > 0)  # type: ignore[arg-type]
            for kernel, part in parts_of(model):
                layer.call(kernel, part, None)()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
