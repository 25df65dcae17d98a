"""`generate` of a Hugging Face model whose experts are spread over ranks."""

import torch
import torch.distributed as dist
from ep_pretrained import move
from hf_families import make_model, make_tokens

from relibra_kernels.integrations.transformers import replace_moe_blocks
from relibra_kernels.parallel import ExpertParallel, RuntimeOptions
from relibra_kernels.planner import ClusterSpec


def generated(family: str, cluster: ClusterSpec, transport: str) -> tuple[str, bool, int]:
    """(the transport, whether this rank's tokens are those of one process, how many it asked for).

    Experts have moved before. Every rank has another prompt and asks for another number of tokens.
    """
    rank = dist.get_rank()
    prompt, count = make_tokens(2, 3 + rank, seed=rank), 3 + 2 * rank
    how = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
    expected = make_model(family).double().eval().generate(prompt, **how)
    model = make_model(family).double().eval()
    replace_moe_blocks(model)
    ep = ExpertParallel(model, cluster, options=RuntimeOptions(transport=transport))
    assert move(ep, cluster) > 0
    with torch.no_grad():
        got = model.generate(prompt, synced_gpus=True, **how)
    return ep._transport.name, torch.equal(got, expected), got.shape[1] - prompt.shape[1]
