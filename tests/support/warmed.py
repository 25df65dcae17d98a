"""A rank with configs of its own that is warmed up with the others."""

import os

import torch
import torch.distributed as dist

from relibra_kernels import warmup
from relibra_kernels.compiling import precompiling
from relibra_kernels.configs import lookup
from relibra_kernels.configs.files import Bucket, Entry, path_of, update
from relibra_kernels.configs.limits import device_for
from relibra_kernels.configs.products import PRODUCTS
from relibra_kernels.nn import ReplicatedExperts, ReplicatedMoE, TopKRouter

CONFIGS = ("64x64x64w4s2", "64x128x64w4s2")  # by rank
HIDDEN, HALF, EXPERTS = 256, 128, 8


def answers_before_and_after(folder: str) -> list[tuple[str, str]]:
    """What a rank gets for 64 and for 4096 rows a slot, where its own file has a config for both."""
    rank, h100 = dist.get_rank(), device_for(PRODUCTS["H100"])
    os.environ["RELIBRA_CONFIG_DIR"] = f"{folder}/{rank}"
    shape = ("down", "bf16", HIDDEN, HALF, False, False)
    buckets = tuple(Bucket(EXPERTS, rows, CONFIGS[rank], 1.0) for rows in (64, 4096))
    entry = Entry(*shape, "measured", "3.7.1", "1", "2026-11-24", buckets)
    path = path_of(lookup.user_folder(), "H100", "grouped_gemm")
    update(path, "H100", "grouped_gemm", lambda old: [entry])
    lookup.forget()

    def ask(rows: int) -> str:
        sizes = (HIDDEN, HALF)
        return str(lookup.config_of("grouped_gemm", h100, torch.bfloat16, sizes, rows * EXPERTS, EXPERTS, True))

    before = ask(64), ask(4096)
    lookup.forget()
    precompiling.compile_launch = lambda *args, **kwargs: None
    how = {"dtype": torch.bfloat16, "device": "meta"}
    model = ReplicatedMoE(TopKRouter(HIDDEN, EXPERTS, 2, **how), ReplicatedExperts(EXPERTS, HIDDEN, HALF, **how))
    warmup(model, 256, device=h100)  # 64 rows a slot
    after = ask(64), ask(4096)
    lookup.forget()
    del os.environ["RELIBRA_CONFIG_DIR"]
    return [before, after]
