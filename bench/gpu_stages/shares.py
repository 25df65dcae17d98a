"""The layers that are timed: one rank's share of a model, and how many tokens it gets. No torch in here."""

from typing import NamedTuple


class Share(NamedTuple):
    """`experts` of a model's experts; the rank computes tokens * top_k rows on average, as in the whole group."""

    model: str
    experts: int


SHARES = (Share("Qwen3-30B-A3B", 16), Share("gpt-oss-120b", 16), Share("DeepSeek-V3", 8))
TOKENS = (256, 2048, 8192, 32768)  # of the kernels
LAYER_TOKENS = 8192
REPLICAS = 2
SKEWS = {"balanced": 0.0, "skewed": 1.1}
TUNED = ("Qwen3-30B-A3B", "gpt-oss-120b")
TUNED_SLOTS, TUNED_ROWS = (32, 128), (256, 1024, 4096)
