"""Checkpoint folders of Hugging Face, on every rank of a group."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from hf_all_families import tiny_model
from hf_families import FAMILIES, make_model, make_tokens
from toy_plans import shuffled_plan

from relibra_kernels.integrations.transformers import replace_moe_blocks
from relibra_kernels.parallel import ExpertParallel, RoutedBatch, load_pretrained, meta_parameters, save_pretrained
from relibra_kernels.planner import ClusterSpec, ReLibraError, RoutingTrace


def known_model(family: str) -> torch.nn.Module:
    """The same on every rank."""
    return make_model(family) if family in FAMILIES else tiny_model(family)


def without_weights(family: str) -> torch.nn.Module:
    """The family's model with parameters on the meta device."""
    known = known_model(family)
    with meta_parameters():
        model = type(known)(known.config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    replace_moe_blocks(model)
    return model.to(next(known.parameters()).dtype)


def load_move_and_save(family: str, folder: str, target: str, fused: str) -> dict[str, Any]:
    """Load without ever having the whole model; then logits, and two folders written after experts have moved."""
    ranks = dist.get_world_size()
    cluster = ClusterSpec(1, ranks)
    ep = ExpertParallel(without_weights(family), cluster)
    read = load_pretrained(ep, folder)
    with torch.no_grad():
        logits = ep.model(make_tokens(2, 7)).logits
    moved = move(ep, cluster)
    save_pretrained(ep, target, like=folder, shard_bytes=20_000)
    save_pretrained(ep, fused)
    refused = []
    for save in (ep.model.save_pretrained, partial(save_pretrained, ep)):
        try:
            save(target)
        except ReLibraError as error:
            refused.append(str(error))
    own = sum(p.numel() * p.element_size() for p in ep.expert_parameters())
    dense = sum(p.numel() * p.element_size() for p in ep.dense_parameters())
    return {"read": read, "own": own, "dense": dense, "logits": logits, "moved": moved, "refused": refused}


def move(ep: ExpertParallel, cluster: ClusterSpec) -> int:
    """Move experts to random homes; how many moved."""
    layers, top_k = len(ep.layers), ep.layers[0].router.top_k
    random = np.random.default_rng(dist.get_rank())
    ids = np.stack([random.permutation(ep.num_experts)[:top_k] for _ in range(20 * layers)])
    trace = RoutingTrace(
        ids.reshape(20, layers, top_k).astype(np.int16), np.array([0, 20]), ep.num_experts, tuple(range(layers))
    )
    batch = RoutedBatch(trace, np.zeros(1, np.int64), 1)
    before = ep.home.copy()
    with ep.batch(shuffled_plan(ep.gather_loads(batch), cluster, 0), batch, None):
        pass
    return int((ep.home != before).sum())


def refusals(family: str, folder: str, good: str) -> list[str]:
    """Errors of folders that do not fit, and of a buffer without memory beside a good one; nothing is loaded."""
    errors = []
    ep = ExpertParallel(without_weights(family), ClusterSpec(1, dist.get_world_size()))
    for name in sorted(path.name for path in Path(folder).iterdir()):
        errors.append(error_of(ep, str(Path(folder) / name)))
        assert all(parameter.is_meta for parameter in ep.model.parameters())
    with torch.device("meta"):
        ep.model.register_buffer("table", torch.zeros(3), persistent=False)
    errors.append(error_of(ep, good))
    assert all(parameter.is_meta for parameter in ep.model.parameters())
    return errors


def saved_like_another(like: str, target: str) -> str:
    """The error of a folder that names other tensors; nothing is written."""
    ep = ExpertParallel(replaced(make_model("qwen3_moe")), ClusterSpec(1, dist.get_world_size()))
    try:
        save_pretrained(ep, target, like=like)
    except ReLibraError as error:
        assert not Path(target).exists() and not Path(target + ".partial").exists()
        return f"{type(error).__name__}: {error}"
    return "no error"


def replaced(model: torch.nn.Module) -> torch.nn.Module:
    replace_moe_blocks(model)
    return model


def error_of(ep: ExpertParallel, folder: str) -> str:
    try:
        load_pretrained(ep, folder)
    except ReLibraError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
