"""Generation by a model whose experts are spread over ranks: what one process generates, on every rank."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("safetensors")
from hf_generate import generated

from relibra_kernels.planner import ClusterSpec


@pytest.mark.parametrize(
    ("cluster", "transport"),
    [(ClusterSpec(1, 2), "one"), (ClusterSpec(2, 2), "one"), (ClusterSpec(2, 2), "two")],
    ids=["two ranks", "four ranks, one hop", "four ranks, two hops"],
)
def test_is_what_one_process_generates(ranks, cluster, transport):
    """With `synced_gpus`, ranks run other numbers of forwards."""
    results = ranks(cluster.num_ranks).run(generated, "qwen3_moe", cluster, transport)
    assert results == [(transport, True, 3 + 2 * rank) for rank in range(cluster.num_ranks)]
