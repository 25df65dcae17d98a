"""Checkpoint folders of Hugging Face: a rank reads its own experts alone, and all ranks write the whole model together.

A model that does not fit beside others in a machine's memory is constructed without weights::

    with meta_parameters():
        model = AutoModelForCausalLM.from_config(config)
    replace_moe_blocks(model)
    ep = ExpertParallel(model, cluster)
    load_pretrained(ep, "checkpoint", device="cuda")
    optimizer = torch.optim.AdamW(model.parameters())
    ...
    save_pretrained(ep, "trained", like="checkpoint")
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..form import ExpertForm
from ..planner.errors import FormatError, InputError, ReLibraError
from .experts.files import Files, Writer
from .experts.logical import factor_of_parameter, layer_of_parameter
from .runtime import ExpertParallel

_SHARD_BYTES = 5 * 10**9


@contextmanager
def meta_parameters() -> Iterator[None]:
    """Modules made within have their parameters on the meta device, without memory, and their buffers as always."""
    register = nn.Module.register_parameter

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:
            module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    nn.Module.register_parameter = without_memory  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def load_pretrained(
    ep: ExpertParallel, folder: str | os.PathLike[str], device: torch.device | str | None = None
) -> int:
    """Read a checkpoint folder into the model, in place: this rank's experts, and all that is no expert. Collective.

    Experts may be one tensor [E, ...] of all, as the model has them, or a tensor each. Values are cast to the
    parameters' dtype. Make the optimizer afterwards: parameters on the meta device are replaced.

    Args:
        folder: with safetensors, in one file or several with an index.
        device: where parameters come to that are on the meta device; None: the CPU.
    Returns: bytes that this rank read.
    Raises: nothing is changed then. FormatError where the folder is not of this model. InputError within a batch, where
        a buffer is on the meta device and not in the files, and on ranks whose own files are right when another rank's
        are not.
    """
    ep._check_between_batches("load_pretrained")
    with ep.groups.agreeing(ep.comm.device, f"loading {folder}"):
        source = Files(Path(folder))
        found = _readers(ep, source)
        for name, buffer in ep.model.named_buffers():
            if buffer.is_meta:
                raise InputError(
                    f"buffer {name} is on the meta device, and files hold no values of it: construct the model within "
                    "meta_parameters(), which leaves buffers alone"
                )
    with torch.no_grad():
        for names, parameter, read in found:
            value = read()
            if not parameter.is_meta:
                parameter.copy_(value)
                continue
            new = nn.Parameter(value.to(device or "cpu", parameter.dtype), parameter.requires_grad)
            for name in names:
                path, _, attribute = name.rpartition(".")
                setattr(ep.model.get_submodule(path), attribute, new)
        persistent = ep.model.state_dict()
        for name, buffer in ep.model.named_buffers():
            if name in persistent and source.has(name):
                buffer.copy_(source.tensor(name))
    return source.bytes_read


def save_pretrained(
    ep: ExpertParallel,
    folder: str | os.PathLike[str],
    like: str | os.PathLike[str] | None = None,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Write the whole model to a new folder, experts in logical order, whole or not at all. Collective.

    One tensor is gathered at a time; the first rank writes.

    Args:
        like: a folder whose names of tensors are used (of each expert, where it has such), and whose other files
            (config, tokenizer) are copied. None: names of the model, and its config where it has one.
        shard_bytes: a file has at most so many, or one tensor.
    Raises: InputError where the folder exists, or within a batch; FormatError where it cannot be written, or `like`
        lacks a parameter of the model. Nothing is written then.
    """
    ep._check_between_batches("save_pretrained")
    target = Path(folder)
    with ep.groups.agreeing(ep.comm.device, f"saving {target}"):
        if target.exists():
            raise InputError(f"{target} exists already; a checkpoint is never overwritten")
        names = None if like is None else Files(Path(like))
        for name, _ in ep.model.named_parameters():
            if names is not None and not names.has(name) and names.of_experts(name) is None:
                raise FormatError(
                    f"like is {like}, which has no name for {name}; without it the model is written under its own names"
                )
    writes = all(comm.rank == 0 for comm in ep.groups.all)
    writer = Writer(target, shard_bytes) if writes else None
    form_of = {id(p): moe.experts.form for moe in ep.layers for p in moe.experts.parameters()}
    parameters = dict(ep.model.named_parameters())
    failure: ReLibraError | None = None
    for name, whole in ep.named_logical_parameters():
        if writer is None or failure is not None:
            continue  # gathering is collective
        assert whole is not None
        try:
            for key, tensor in _as_in(names, name, whole, form_of.get(id(parameters[name]))):
                writer.add(key, tensor)
        except (OSError, ReLibraError) as error:
            failure = error if isinstance(error, ReLibraError) else FormatError(f"{target} cannot be written: {error}")
    if writer is not None:
        try:
            persistent = ep.model.state_dict()
            for name, buffer in ep.model.named_buffers():
                if failure is None and name in persistent:
                    writer.add(name if names is None else names.key(name) or name, buffer)
            writer.finish(None if like is None else Path(like), ep.model, failure is not None)
        except OSError as error:
            failure = failure or FormatError(f"{target} cannot be written: {error}")
    ep.groups.agree(failure, {}, ep.comm.device, f"finishing {target}")


def _readers(ep: ExpertParallel, source: Files) -> list[tuple[list[str], nn.Parameter, Callable[[], Tensor]]]:
    """(names, parameter, what reads its value) of every parameter. Raises: FormatError, before anything is read."""
    names: dict[int, list[str]] = {}
    of_id: dict[int, nn.Parameter] = {}
    for name, parameter in ep.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        of_id[id(parameter)] = parameter
    layer_of, factors = layer_of_parameter(ep.layers), factor_of_parameter(ep.layers)
    forms = {id(p): moe.experts.form for moe in ep.layers for p in moe.experts.parameters()}
    found = []
    for number, parameter in of_id.items():
        shape, mine = tuple(parameter.shape), None
        if number in factors:
            raise InputError(f"{names[number][0]} is of an adapter: load the model before PEFT wraps it")
        if number in layer_of:
            mine = np.flatnonzero(ep.home[layer_of[number]] == ep.comm.rank).tolist()
            shape = (ep.num_experts, *shape[1:])
        in_files = next((name for name in names[number] if source.has(name)), None)
        by_expert = None if mine is None or in_files else source.of_experts(names[number][0])
        if by_expert is not None and mine is not None:
            _check_split(names[number][0], forms[number], by_expert, source, shape)
            found.append((names[number], parameter, _reader_by_expert(source, by_expert, mine, len(parameter))))
            continue
        if in_files is None:
            raise FormatError(f"{source.folder} lacks {names[number][0]}")
        key = source.key(in_files)
        assert key is not None
        if source.shape(key) != shape:
            raise FormatError(f"{key} in {source.folder} is {source.shape(key)}; the model's is {shape}")
        if mine is None:
            found.append((names[number], parameter, _reader(source, in_files)))
        else:
            found.append((names[number], parameter, _reader_of_rows(source, in_files, mine, len(parameter))))
    return found


def _check_split(
    name: str, form: ExpertForm, by_expert: tuple[str, tuple[str, ...]], source: Files, shape: tuple[int, ...]
) -> None:
    """Refuse files of single experts that do not make up the model's tensor."""
    if form.is_transposed or not form.is_concatenated:
        raise FormatError(f"{source.folder} has single experts, from which {name} of this family is not made")
    prefix, parts = by_expert
    for expert in range(shape[0]):
        shapes = [source.shape(prefix.format(expert) + part) for part in parts]
        if (sum(of_part[0] for of_part in shapes), *shapes[0][1:]) != shape[1:]:
            raise FormatError(f"{prefix.format(expert)}{parts[0]} in {source.folder} is {shapes[0]}, unfit for {shape}")


def _reader(source: Files, name: str) -> Callable[[], Tensor]:
    return lambda: source.tensor(name)


def _reader_of_rows(source: Files, name: str, mine: list[int], slots: int) -> Callable[[], Tensor]:
    return lambda: _slots([source.tensor(name, expert) for expert in mine], slots)


def _reader_by_expert(
    source: Files, by_expert: tuple[str, tuple[str, ...]], mine: list[int], slots: int
) -> Callable[[], Tensor]:
    prefix, parts = by_expert
    return lambda: _slots(
        [torch.cat([source.tensor(prefix.format(expert) + part) for part in parts]) for expert in mine], slots
    )


def _slots(rows: list[Tensor], slots: int) -> Tensor:
    """[slots, ...]; a slot beyond the rows is zeros."""
    return torch.stack(rows + [torch.zeros_like(rows[0])] * (slots - len(rows)))


def _as_in(names: Files | None, name: str, whole: Tensor, form: ExpertForm | None) -> Iterator[tuple[str, Tensor]]:
    """A parameter under the names that files use."""
    by_expert = None if names is None or form is None or names.has(name) else names.of_experts(name)
    if by_expert is None:
        yield (name if names is None else names.key(name) or name), whole
        return
    prefix, parts = by_expert
    for expert, value in enumerate(whole):
        for part, piece in zip(parts, value.chunk(len(parts)), strict=True):
            yield prefix.format(expert) + part, piece
