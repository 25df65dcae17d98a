"""`relibra convert`: recorded routing, in the form of an engine or a trainer, to the canonical trace.

Sequences are converted a few at a time and spooled to disk, so that the size of a trace is no question of memory.
"""

import argparse
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..planner import RoutingTrace, formats
from ..planner.errors import FormatError, InputError, ReLibraError, one_of
from ..planner.files import load_npz, save_npz
from ..planner.formats.reading import read_arrays, read_json, read_json_lines
from ..planner.formats.registry import LOADERS
from ..planner.formats.response_fields import BESIDE, INSIDE, LENGTHS, fields_of
from ..planner.formats.sequences import HOLES, SequenceOptions
from ..planner.trace_writer import TraceWriter
from .function_file import load_function
from .inputs import check_output

WHOLE = {  # what is no record a sequence
    "sglang": "JSON lines with `routed_experts`, also inside `meta_info`; needs --num-layers and --top-k",
    "sglang-statistics": "JSON with `logical_count` [L][E]; what is written is a load table, not a trace",
    "verl": ".npz with `routed_experts` and `attention_mask` (`response_mask`, `replay_mask`) or `cu_seqlens`",
    "megatron": "JSON lines of the router trace: step, layer, rank, num_tokens, topk, top_indices",
}
INPUTS = {name: each.holds for name, each in LOADERS.items()} | WHOLE
AT_ONCE = 64  # sequences in memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "IN, by --from:\n" + "\n".join(f"  {name:18} {text}" for name, text in INPUTS.items())
    parser.epilog += (
        "\n  FILE.py:FUNCTION   a loader of your own; a folder of .npy arrays, or JSON lines with `routed_experts`"
    )
    parser.add_argument("input", metavar="IN", type=Path, help="file or folder that the engine's routing is in")
    parser.add_argument(
        "--from", dest="form", required=True, metavar="FORM", help=f"of {', '.join(INPUTS)}, or FILE.py:FUNCTION"
    )
    parser.add_argument("--num-experts", type=int, required=True, metavar="E", help="routed experts of a layer")
    parser.add_argument("--out", type=Path, required=True, metavar="TRACE.npz")
    parser.add_argument(
        "--moe-layers",
        type=_layer_list,
        metavar="I,J,...",
        help="MoE layers among those recorded; default: all but layers of zeros at the beginning",
    )
    parser.add_argument(
        "--tokens", type=Path, metavar="TOKENS.jsonl", help="one list of token ids a sequence, to check"
    )
    parser.add_argument(
        "--holes",
        choices=HOLES,
        default="refuse",
        help="tokens that were not recorded in every layer: refuse (default), or keep them as unknown",
    )
    parser.add_argument("--num-layers", type=int, metavar="L", help="for sglang: all hidden layers")
    parser.add_argument("--top-k", type=int, metavar="K", help="for sglang")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def run(args: argparse.Namespace) -> int:
    if ":" in args.form:
        _loader(args.form)
    else:
        args.form = one_of("--from", args.form, INPUTS, ", or FILE.py:FUNCTION")
    _check_arguments(args)
    logging.getLogger("relibra_kernels").addHandler(logging.NullHandler())  # what loaders warn of is printed below
    try:
        if args.form == "sglang-statistics":
            report = _save_loads(formats.loads_from_sglang(read_json(args.input), args.num_experts), args.out)
        else:
            report = _save_trace(_traces(args), args.out)
    except FormatError as error:
        named = str(error).startswith(str(args.input))
        raise FormatError(str(error) if named else f"{args.input}: {error}") from None
    except ReLibraError as error:
        raise type(error)(f"{args.input}: {error}") from None
    if args.json:
        print(json.dumps(report))
    return 0


def _check_arguments(args: argparse.Namespace) -> None:
    if args.num_experts < 1:
        raise InputError(f"--num-experts is {args.num_experts}, but must be positive")
    check_output("--out", args.out)
    if args.out.resolve() == args.input.resolve():
        raise InputError(f"--out is {args.out}, which is the input")
    for_sglang = args.form == "sglang"
    if for_sglang != (args.num_layers is not None) or for_sglang != (args.top_k is not None):
        raise InputError(
            "--num-layers and --top-k go with --from sglang, whose arrays have no header: give both or none"
        )
    if args.form in ("megatron", "sglang-statistics") and (args.moe_layers is not None or args.tokens is not None):
        raise InputError(f"--moe-layers and --tokens do not go with --from {args.form}")


def _save_loads(loads: np.ndarray, out: Path) -> dict[str, Any]:
    save_npz(out, loads=loads)
    layers, _, experts = loads.shape
    print(f"load table of {layers} layers and {experts} experts, {loads.sum()} assignments, written to {out}")
    return {"layers": layers, "num_experts": experts, "assignments": int(loads.sum())}


def _save_trace(traces: Iterable[RoutingTrace], out: Path) -> dict[str, Any]:
    writer = TraceWriter(out)
    for trace in traces:
        if writer.first is not None and trace.unknown.all() and trace.num_layers >= writer.first.num_layers:
            trace = trace.slice_layers(writer.first.moe_layer_ids)  # nothing here says which layers are dense
        writer.append(trace)
    found = writer.report
    first = writer.first
    assert first is not None
    writer.close()
    unknown = sum(found.unknown.values())
    print(
        f"{writer.num_sequences} sequences, {found.tokens} tokens ({unknown} of unknown routing), "
        f"{first.num_layers} layers, top {first.top_k} of {first.num_experts} experts"
    )
    print(f"MoE layers: {', '.join(map(str, first.moe_layer_ids))}")
    for line in found.lines():
        print(line)
    print(f"trace written to {out}")
    return {
        "sequences": writer.num_sequences,
        "tokens": found.tokens,
        "layers": first.num_layers,
        "top_k": first.top_k,
        "num_experts": first.num_experts,
        "moe_layer_ids": list(first.moe_layer_ids),
        "unknown_tokens": unknown,
        "report": asdict(found),
    }


def _traces(args: argparse.Namespace) -> Iterator[RoutingTrace]:
    """The trace of a few sequences after the other. Token ids go along where every sequence has them."""
    if args.form == "megatron":
        lines = (line for _, line in read_json_lines(args.input))
        yield formats.from_megatron_lines(lines, args.num_experts, holes=args.holes)
    elif args.form == "verl":
        yield _verl_trace(args)
    else:
        yield from _traces_of_samples(args)


def _verl_trace(args: argparse.Namespace) -> RoutingTrace:
    masks = ("attention_mask", "cu_seqlens", "response_mask", "replay_mask")
    arrays = load_npz(args.input, ("routed_experts",), masks)
    return formats.from_verl(
        arrays["routed_experts"],
        args.num_experts,
        attention_mask=arrays.get("attention_mask"),
        cu_seqlens=arrays.get("cu_seqlens"),
        response_mask=arrays.get("response_mask"),
        replay_mask=arrays.get("replay_mask"),
        token_ids=None if args.tokens is None else list(_token_id_lists(args.tokens)),
        moe_layer_ids=args.moe_layers,
        holes=args.holes,
    )


def _traces_of_samples(args: argparse.Namespace) -> Iterator[RoutingTrace]:
    samples = _samples(args.input, args.form)
    given = None if args.tokens is None else iter(_token_id_lists(args.tokens))
    done = 0
    while batch := list(itertools.islice(samples, AT_ONCE)):
        ids: list[Any] = [sample.pop("token_ids", None) for sample in batch]
        if given is not None:
            ids = list(itertools.islice(given, len(batch)))
            if len(ids) < len(batch):
                raise InputError(f"--tokens has {done + len(ids)} sequences, but there are more")
        options: SequenceOptions = {
            "token_ids": None if any(tokens is None for tokens in ids) else ids,
            "moe_layer_ids": args.moe_layers,
            "holes": args.holes,
            "first_sequence": done,
        }
        payloads = [sample if len(sample) > 1 else sample["routed_experts"] for sample in batch]
        if args.form == "sglang":
            yield formats.from_sglang(
                payloads, args.num_experts, num_layers=args.num_layers, top_k=args.top_k, **options
            )
        else:
            yield _loader(args.form)(payloads, args.num_experts, **options)
        done += len(batch)
    if given is not None and next(given, None) is not None:
        raise InputError(f"num_tokens has more entries than the {done} sequences")


def _loader(form: str) -> Callable[..., RoutingTrace]:
    return load_function("--from", form).call if ":" in form else LOADERS[form].load


def _samples(path: Path, form: str) -> Iterator[dict[str, Any]]:
    """`routed_experts` of each sequence, with its start, version and token ids where the file says them.

    An HTTP response holds its sequences in `choices`, with the prompt's ids beside them; SGLang has `meta_info`, or
    `sglext` with the routing of the first choice.
    """
    if form == "slime" or path.is_dir():
        yield from ({"routed_experts": array} for array in read_arrays(path))
        return
    for number, line in read_json_lines(path):
        choices = line.get("choices", [line]) if isinstance(line, dict) else None
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise FormatError(f"{path}: line {number} is no object, or its choices are none")
        for index, choice in enumerate(choices):
            said = _fields(line, choice, index, len(choices))
            if any(not isinstance(said.get(key, {}), dict) for key in INSIDE):
                raise FormatError(f"{path}: line {number} has a meta_info or sglext that is no object")
            answered = any(key in said for key in INSIDE)  # an aborted request has them without routing
            fields = fields_of(said)
            if "routed_experts" not in fields and not answered:
                raise FormatError(f"{path}: line {number} has no 'routed_experts', only {sorted(fields)}")
            sample = {key: fields[key] for key in BESIDE if fields.get(key) is not None}
            sample["routed_experts"] = _joined_prompt(fields)
            tokens = _token_ids(fields, f"{path}: line {number}")
            yield sample if tokens is None else {**sample, "token_ids": tokens}


def _fields(line: dict[str, Any], choice: dict[str, Any], index: int, choices: int) -> dict[str, Any]:
    """What a response says of a choice. Beside its choices stand the tokens of all, and SGLang's of the first."""
    usage = line.get("usage")
    lengths = {key: usage.get(key) for key in LENGTHS} if isinstance(usage, dict) and choices == 1 else {}
    shared = {key: value for key, value in line.items() if index == 0 or key != "sglext"}
    return {**shared, **lengths, **choice}


def _joined_prompt(fields: Mapping[str, Any]) -> Any:
    """The payload; older vLLM releases hand the prompt's rows over apart."""
    prompt, rows = fields.get("prompt_routed_experts"), fields.get("routed_experts")
    return rows if prompt is None else [prompt, rows]


def _token_ids(fields: Mapping[str, Any], where: str) -> list[Any] | None:
    """The ids of the prompt and of what was generated, after each other, or `tokens`."""
    pairs = [(prompt, answer) for prompt in ("prompt_token_ids", "input_ids") for answer in ("token_ids", "output_ids")]
    keys = next((pair for pair in pairs if all(fields.get(key) is not None for key in pair)), ("tokens",))
    found = [fields[key] for key in keys if fields.get(key) is not None]
    if keys[-1] == "output_ids" and isinstance(found[1], list) and found[1] and isinstance(found[1][0], list):
        found[1] = found[1][0]  # of every choice, the first is that of the routing
    if any(not isinstance(ids, list) for ids in found):
        raise FormatError(f"{where} has {' or '.join(keys)} that are no lists")
    return [token for ids in found for token in ids] if found else None


def _token_id_lists(path: Path) -> Iterator[list[int]]:
    for number, ids in read_json_lines(path):
        if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
            raise FormatError(f"{path}: entry {number} is no list of token ids")
        yield ids


def _layer_list(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be layer numbers with commas between them") from None
