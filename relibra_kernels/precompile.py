"""`warmup`: compile what a run will need before its first step, with configs that all ranks share."""

import json
import numbers
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call

from . import ops
from .autograd import moe_mlp, moe_mlp_backward, moe_mlp_forward
from .nn import ReplicatedExperts, ReplicatedMoE
from .parallel import ExpertParallel
from .parallel.experts.adapters import adapted_weights, find_adapters
from .parallel.experts.parameters import take_over
from .payload import PayloadLayout
from .planner.errors import InputError
from .schedule import Schedule
from .weights import ExpertWeights, zeros_fp32

if TYPE_CHECKING:
    from .configs.limits import Device
    from .kernels.launch import Launch

_OCTAVES = 24  # of rows a slot that ranks agree on: up to 16 million


def warmup(
    model: nn.Module | ExpertParallel,
    tokens: int | Iterable[int],
    *,
    device: "Device | str | None" = None,
    group: dist.ProcessGroup | None = None,
    jobs: int | None = None,
) -> int:
    """Compile every kernel that a training step of `model` launches; return how many were new to this process.

    With an initialised process group it is collective: the group's first rank looks its configs up, for any number of
    rows, and all ranks use them from then on; the ranks of a machine share the work through Triton's cache.

    Args:
        model: holds MoE layers, as for `ExpertParallel`; of an `ExpertParallel`, what runs with replicas and without
            is compiled.
        tokens: of a micro-batch on this rank, one number or all that occur. Under a plan the rows that a rank gets vary
            around that: half and twice as many are compiled for as well.
        device: compile for this GPU, which need not be here: its name ("H100") or its limits; None: for the model's.
        jobs: compilers at a time; None: as many as there are cores, shared by the machine's ranks.

    Raises: InputError where the model has no such layer, or is not on a GPU and no `device` is given, or where no GPU
    has the name.
    """
    counts = _counts(tokens)
    module: nn.Module = model.model if isinstance(model, ExpertParallel) else model
    replica_slots = model.cluster.replica_slots if isinstance(model, ExpertParallel) else None
    layers = take_over(module)
    find_adapters(module, layers)
    where = layers[0].experts.down_proj.device
    if device is None and where.type != "cuda":
        raise InputError(f"the model is on {where}; kernels are compiled for a GPU: move it there, or give a device")
    from .compiling.precompiling import compile_for, compile_on
    from .configs.limits import device_for, device_of
    from .configs.products import product_named

    if isinstance(device, str):
        device = device_for(product_named(device))
    target = device or device_of(where)

    def launches() -> "list[Launch]":
        return _launches(layers, counts, target, replica_slots)

    launches()  # shows what will be looked up
    _agree_on_configs(group, where)
    wanted = launches()
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    jobs = jobs or max(1, (os.cpu_count() or 1) // local_size)
    if device is not None:
        return compile_for(device, wanted, jobs)
    compiled = compile_on(where, wanted[local_rank::local_size], jobs)
    if dist.is_initialized() and local_size > 1:
        dist.barrier(group)
    return compiled + compile_on(where, wanted, jobs)


def _counts(tokens: int | Iterable[int]) -> list[int]:
    """The numbers of tokens, ascending. Raises: InputError."""
    if isinstance(tokens, torch.Tensor):
        raise InputError(
            f"tokens is a tensor of shape {list(tokens.shape)}, but must be how many tokens a micro-batch has on this "
            f"rank: {tokens.numel()} for that one, tokens.numel()"
        )
    given = list(tokens) if isinstance(tokens, Iterable) else [tokens]
    if not given or not all(isinstance(count, numbers.Integral) and count >= 1 for count in given):
        raise InputError(f"tokens is {tokens!r}; it must be positive, one whole number or several")
    return sorted({int(count) for count in given})


def config_sources(model: nn.Module, tokens: int, device: str) -> dict[str, list[str]]:
    """Kernel -> where its configs come from, for forward and backward of `tokens` tokens. Nothing is compiled.

    What else was asked for on this device in this process counts too.

    Args:
        model: as for `warmup`; it may be without memory. device: a GPU by name, which need not be here.
    """
    from .configs import lookup
    from .configs.limits import device_for
    from .configs.products import product_named

    target = device_for(product_named(device))
    layers = take_over(model)
    _launches(layers, [tokens], target, None)
    found: dict[str, set[str]] = {}
    for key, answer in lookup.answers().items():
        if key.device == target:
            found.setdefault(key.kernel, set()).add(answer.source)
    return {kernel: sorted(sources) for kernel, sources in sorted(found.items())}


def _launches(
    layers: list[ReplicatedMoE], counts: list[int], target: "Device", replica_slots: int | None
) -> "list[Launch]":
    """What one forward and backward of every different layer launches, each thing once."""
    from .compiling.compile_only import launch_digest
    from .kernels.launch import recording

    found: list[Launch] = []
    with recording(target, found.append):
        for step in _steps(layers, counts, replica_slots):
            step()
    return list({launch_digest(launch): launch for launch in found}.values())


def _steps(layers: list[ReplicatedMoE], counts: list[int], replica_slots: int | None) -> Iterator[Callable[[], None]]:
    seen = set()
    for layer in layers:
        key = (*_shape(layer.experts), layer.router.top_k, getattr(layer, "shared_experts", None) is not None)
        if key in seen:
            continue
        seen.add(key)
        if replica_slots is None:
            for count in counts:
                yield partial(_step_alone, layer, count)
        else:
            for count in sorted({max(rows, 1) for n in counts for rows in (n // 2, n, 2 * n)}):
                for replicas in {0, replica_slots}:
                    yield partial(_step_exchanged, layer, count, replicas)


def _shape(experts: ReplicatedExperts) -> tuple:
    main = getattr(experts.down_proj, "main_grad", None) is not None
    weights = [None if p is None else (tuple(p.shape), p.dtype, p.requires_grad) for p in adapted_weights(experts)]
    return (experts.form, experts.recompute, main, *weights)


def _meta(like: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.empty(shape or like.shape, dtype=dtype or like.dtype, device="meta")


def _step_alone(layer: ReplicatedMoE, count: int) -> None:
    """The layer itself, or the experts of another framework's, forward and backward, on tensors without memory."""
    module: nn.Module = layer if isinstance(layer, nn.Module) else layer.experts
    tensors = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        tensors[name] = twin = _meta(tensor).requires_grad_(tensor.requires_grad)
        main_grad = getattr(tensor, "main_grad", None)
        if main_grad is not None:
            twin.main_grad = _meta(main_grad)  # type: ignore[attr-defined]
    weight = layer.experts.down_proj
    x = _meta(weight, count, layer.experts.hidden_size).requires_grad_()
    if module is layer:
        functional_call(module, tensors, (x,)).sum().backward()
        return
    index = torch.empty(count, layer.router.top_k, dtype=torch.int64, device="meta")
    for dtype in {weight.dtype, torch.float32}:  # of gate weights, which is the family's choice
        gates = _meta(x, *index.shape, dtype=dtype).requires_grad_()
        if layer.experts.adapters:  # around the module, so that it does not know them
            own = adapted_weights(layer.experts).map(lambda t: _meta(t).requires_grad_(t.requires_grad))
            schedule = ops.build_schedule(index, layer.experts.num_experts)
            moe_mlp(x, gates, schedule, own, layer.experts.form, recompute=layer.experts.recompute).sum().backward()
        else:
            functional_call(module, tensors, (x, index, gates)).sum().backward()


def _step_exchanged(layer: ReplicatedMoE, count: int, replicas: int) -> None:
    """What `parallel.layer` computes between its exchanges, for `count` tokens' worth of assignments."""
    experts, top_k = layer.experts, layer.router.top_k
    # A received row visits one to K slots, so there are 1 to K times `count` of them.
    received = [min(count << i, count * top_k) for i in range(top_k.bit_length() + 1)]
    slots = experts.num_experts + replicas
    schedules = [
        ops.build_schedule(torch.empty(rows, top_k, dtype=torch.int16, device="meta"), slots, num_rows=count * top_k)
        for rows in received
    ]
    for rows in received:  # of several layers at once
        of_layers = torch.empty(2 * rows, top_k, dtype=torch.int16, device="meta")
        ops.build_schedules(of_layers, [rows] * 2, slots, [count * top_k] * 2)
    x = _meta(experts.down_proj, received[-1], experts.hidden_size)
    gates = _meta(x, received[-1], top_k, dtype=torch.promote_types(x.dtype, torch.float32))
    returned = _step_of_received(experts, x, gates, schedules[-1], replicas)
    _pack_and_unpack(x, gates, count, received)
    for of_rows in schedules:  # how rows are summed may depend on how many there are
        ops.unpermute(returned[0], _meta(gates, of_rows.num_tokens, top_k), of_rows)
        for each in returned:
            ops.unpermute(each, None, of_rows)


def _step_of_received(
    experts: ReplicatedExperts, x: torch.Tensor, gates: torch.Tensor, schedule: Schedule, replicas: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Forward and backward over received rows, and the replicas' way: (out, dx, gradients of the gate weights)."""
    own = adapted_weights(experts)
    home = own.map(_meta)
    replica = home.map(lambda weight: _meta(weight, replicas, *weight.shape[1:])) if replicas else None
    table = torch.empty(schedule.num_slots, dtype=torch.int32, device="meta") if replicas else None
    out, h = moe_mlp_forward(x, gates, schedule, home, experts.form, replica=replica, weight_of_slot=table)
    grad = own.map(lambda weight: zeros_fp32(_meta(weight)) if weight.requires_grad else None)
    replica_grad = None
    if replica is not None:
        trained = (None if total is None else weight for weight, total in zip(replica, grad, strict=True))
        replica_grad = ExpertWeights(*trained).map(zeros_fp32)
    # New gradients are written by the first rows and added to by others; where there is a `.main_grad`, all are added.
    for accumulate in {True, hasattr(experts.down_proj, "main_grad")}:
        dx, dgates = moe_mlp_backward(
            _meta(x),
            x,
            None if experts.recompute else h,
            gates,
            schedule,
            home,
            experts.form,
            grad=grad,
            replica=replica,
            replica_grad=replica_grad,
            weight_of_slot=table,
            accumulate=accumulate,
        )
    if replica_grad is not None:
        owners = torch.empty(replicas, dtype=torch.int64, device="meta")
        for weight in home.tensors():
            ops.pack_replicas(weight, owners)
        for shard, owner in zip(replica_grad.tensors(), grad.tensors(), strict=True):
            ops.replica_reduce(owner, shard, owners)
    return out, dx, dgates


def _pack_and_unpack(x: torch.Tensor, gates: torch.Tensor, count: int, received: list[int]) -> None:
    """Payloads on both ways: of `count` tokens here, and of received rows, which two hops hand on."""
    most, hidden, top_k = len(x), x.shape[1], gates.shape[1]
    there = PayloadLayout(hidden, top_k, x.dtype, gates.dtype)
    back = there._replace(has_slots=False)
    sent = torch.empty(most, dtype=torch.int32, device="meta")
    slots = _meta(sent, most, top_k, dtype=torch.int16)
    # tokens are sent with gate weights in the dtype in which routers give them, rows are handed on with theirs
    passes = [(count, dtype) for dtype in {x.dtype, gates.dtype}] + [(rows, None) for rows in received]
    for tokens, dtype in passes:
        send = Schedule(_meta(sent, 2), sent, _meta(sent, tokens, top_k))
        given = _meta(gates, tokens, top_k, dtype=dtype or gates.dtype)
        ops.pack_payload(_meta(x, tokens, hidden), given, slots, send, there.new(most, x.device))
        ops.unpack_gradients(back.new(most, x.device), send, back, weights_dtype=dtype)
    for rows in received:
        ops.unpack_payload(there.new(rows, x.device), there)
        ops.pack_gradients(_meta(x, rows, hidden), _meta(gates, rows, top_k), back.new(rows, x.device))


def _agree_on_configs(group: dist.ProcessGroup | None, where: torch.device) -> None:
    """The first rank's answer to everything that was looked up, for any number of rows a slot, on all ranks."""
    from .configs import lookup
    from .configs.config import parse_config

    table = [
        [key.kernel, str(key.dtype).removeprefix("torch."), *key[3:], str(answer.config)]
        for key, answer in lookup.answers_for_all_rows(_OCTAVES).items()
    ]
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    text = json.dumps(table).encode()
    on = where if where.type == "cuda" else torch.device("cpu")
    size = torch.tensor([len(text)], device=on)
    dist.broadcast(size, group=group, group_src=0)
    data = torch.zeros(int(size), dtype=torch.uint8, device=on)
    if dist.get_rank(group) == 0:
        data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    dist.broadcast(data, group=group, group_src=0)
    rows = json.loads(data.cpu().numpy().tobytes())
    lookup.agree({(k, getattr(torch, t), *rest): parse_config(config) for k, t, *rest, config in rows})
