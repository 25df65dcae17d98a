"""`relibra convert`: recorded routing, in the form of an engine or a trainer, to the canonical trace."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..planner import RoutingTrace, formats
from ..planner.errors import FormatError, InputError, ReLibraError
from ..planner.files import load_npz, save_npz
from ..planner.formats.reading import read_arrays, read_json, read_json_lines
from ..planner.formats.sequences import HOLES

INPUTS = {
    "vllm": "a folder of .npy arrays [N-1, L, K], one a sequence in name order, or JSON lines with `routed_experts`",
    "sglang": "JSON lines with `routed_experts`, also inside `meta_info`; needs --num-layers and --top-k",
    "sglang-statistics": "JSON with `logical_count` [L][E]; what is written is a load table, not a trace",
    "verl": ".npz with `routed_experts` and `attention_mask` or `cu_seqlens`",
    "slime": "a folder of .npy arrays [N-1, L, K], one a sample in name order",
    "prime-rl": "JSON lines with `routed_experts`: {data (base64), shape, dtype}",
    "nemo-rl": "JSON lines with `routed_experts`: 'nrlre1:...'",
    "megatron": "JSON lines of the router trace: step, layer, rank, num_tokens, topk, top_indices",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "IN, by --from:\n" + "\n".join(f"  {name:18} {text}" for name, text in INPUTS.items())
    parser.add_argument("input", metavar="IN", type=Path, help="file or folder that the engine's routing is in")
    parser.add_argument("--from", dest="form", required=True, choices=list(INPUTS), help="who wrote it")
    parser.add_argument("--num-experts", type=int, required=True, metavar="E", help="routed experts of a layer")
    parser.add_argument("--out", type=Path, required=True, metavar="TRACE.npz")
    parser.add_argument(
        "--moe-layers", type=_layer_list, metavar="I,J,...", help="MoE layers among those recorded; default: not zeros"
    )
    parser.add_argument(
        "--tokens", type=Path, metavar="TOKENS.jsonl", help="one list of token ids a sequence, to check"
    )
    parser.add_argument(
        "--holes",
        choices=HOLES,
        default="refuse",
        help="tokens inside a sequence that were not recorded; default refuse",
    )
    parser.add_argument("--num-layers", type=int, metavar="L", help="for sglang: all hidden layers")
    parser.add_argument("--top-k", type=int, metavar="K", help="for sglang")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def run(args: argparse.Namespace) -> int:
    if args.num_experts < 1:
        raise InputError(f"--num-experts is {args.num_experts}, but must be positive")
    if not args.out.parent.is_dir() or (args.out.exists() and not args.out.is_file()):
        raise InputError(f"--out is {args.out}, but must be a file in a directory that exists")
    if args.out.resolve() == args.input.resolve():
        raise InputError(f"--out is {args.out}, which is the input")
    for_sglang = args.form == "sglang"
    if for_sglang != (args.num_layers is not None) or for_sglang != (args.top_k is not None):
        raise InputError(
            "--num-layers and --top-k go with --from sglang, whose arrays have no header: give both or none"
        )
    if args.form in ("megatron", "sglang-statistics") and (args.moe_layers is not None or args.tokens is not None):
        raise InputError(f"--moe-layers and --tokens do not go with --from {args.form}")
    token_ids = None if args.tokens is None else _read_token_ids(args.tokens)
    try:
        result = READERS[args.form](args, token_ids)
    except FormatError as error:
        named = str(error).startswith(str(args.input))
        raise FormatError(str(error) if named else f"{args.input}: {error}") from None
    except ReLibraError as error:
        raise type(error)(f"{args.input}: {error}") from None
    report = _save(result, args.out)
    if args.json:
        print(json.dumps(report))
    return 0


def _save(result: RoutingTrace | np.ndarray, out: Path) -> dict[str, Any]:
    if isinstance(result, np.ndarray):
        save_npz(out, loads=result)
        layers, _, experts = result.shape
        print(f"load table of {layers} layers and {experts} experts, {result.sum()} assignments, written to {out}")
        return {"layers": layers, "num_experts": experts, "assignments": int(result.sum())}
    result.save(out)
    report = {
        "sequences": result.num_sequences,
        "tokens": result.num_tokens,
        "layers": result.num_layers,
        "top_k": result.top_k,
        "num_experts": result.num_experts,
        "moe_layer_ids": list(result.moe_layer_ids),
        "unknown_tokens": int(result.unknown.sum()),
    }
    print(
        f"{report['sequences']} sequences, {report['tokens']} tokens ({report['unknown_tokens']} of unknown routing), "
        f"{report['layers']} layers, top {report['top_k']} of {report['num_experts']} experts"
    )
    print(f"MoE layers: {', '.join(map(str, result.moe_layer_ids))}")
    print(f"trace written to {out}")
    return report


def _layer_list(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be layer numbers with commas between them") from None


def _read_token_ids(path: Path) -> list[list[int]]:
    lines = read_json_lines(path)
    for number, ids in enumerate(lines, 1):
        if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
            raise FormatError(f"{path}: entry {number} is no list of token ids")
    return lines


def _read_samples(path: Path) -> tuple[list[dict[str, Any]], list[list[int]] | None]:
    """The JSON lines that hold `routed_experts`, and the token ids of every sequence where all have them.

    An HTTP response holds its sequences in `choices`, with the prompt's ids beside them; SGLang has `meta_info`.
    """
    samples = []
    for number, line in enumerate(read_json_lines(path), 1):
        if not isinstance(line, dict):
            raise FormatError(f"{path}: line {number} is no object")
        for choice in line.get("choices", [line]):
            sample = {**line, **choice, **choice.get("meta_info", {})}
            if sample.get("routed_experts") is None:
                raise FormatError(f"{path}: line {number} has no 'routed_experts', only {sorted(sample)}")
            samples.append(sample)
    ids = [_token_ids(sample) for sample in samples]
    return samples, None if any(tokens is None for tokens in ids) else ids  # type: ignore[return-value]


def _token_ids(sample: dict[str, Any]) -> list[int] | None:
    """`prompt_token_ids` and `token_ids` after each other, or `tokens`."""
    if "token_ids" in sample and "prompt_token_ids" in sample:
        return [*sample["prompt_token_ids"], *sample["token_ids"]]
    return sample.get("tokens")


def _from_vllm(args: argparse.Namespace, token_ids: list[list[int]] | None) -> RoutingTrace:
    if args.input.is_dir():
        arrays: Sequence[Any] = read_arrays(args.input)
        prompts: list[Any] | None = None
    else:
        samples, ids = _read_samples(args.input)
        token_ids = token_ids or ids
        arrays = [_text(sample["routed_experts"], args.input) for sample in samples]
        prompts = [sample.get("prompt_routed_experts") for sample in samples]
        if not all(prompts):
            prompts = None
    options = {"token_ids": token_ids, "moe_layer_ids": args.moe_layers, "holes": args.holes}
    return formats.from_vllm(arrays, args.num_experts, prompt_routed_experts=prompts, **options)


def _from_json_lines(load: Callable[..., RoutingTrace]) -> Callable[..., RoutingTrace]:
    def read(args: argparse.Namespace, token_ids: list[list[int]] | None) -> RoutingTrace:
        samples, ids = _read_samples(args.input)
        options: dict[str, Any] = {"num_layers": args.num_layers, "top_k": args.top_k} if args.form == "sglang" else {}
        options |= {"token_ids": token_ids or ids, "moe_layer_ids": args.moe_layers, "holes": args.holes}
        return load([sample["routed_experts"] for sample in samples], args.num_experts, **options)

    return read


def _from_verl(args: argparse.Namespace, token_ids: list[list[int]] | None) -> RoutingTrace:
    arrays = load_npz(args.input, ("routed_experts",), ("attention_mask", "cu_seqlens"))
    ids = arrays.pop("routed_experts")
    options: dict[str, Any] = {"token_ids": token_ids, "moe_layer_ids": args.moe_layers, "holes": args.holes, **arrays}
    return formats.from_verl(ids, args.num_experts, **options)


def _from_slime(args: argparse.Namespace, token_ids: list[list[int]] | None) -> RoutingTrace:
    options: dict[str, Any] = {"token_ids": token_ids, "moe_layer_ids": args.moe_layers, "holes": args.holes}
    return formats.from_slime(read_arrays(args.input), args.num_experts, **options)


def _text(value: Any, path: Path) -> str:
    if not isinstance(value, str):
        raise FormatError(f"{path}: routed_experts is a {type(value).__name__}, but must be the base64 of a .npy file")
    return value


READERS: dict[str, Callable[[argparse.Namespace, list[list[int]] | None], RoutingTrace | np.ndarray]] = {
    "vllm": _from_vllm,
    "sglang": _from_json_lines(formats.from_sglang),
    "sglang-statistics": lambda args, _: formats.loads_from_sglang(read_json(args.input), args.num_experts),
    "verl": _from_verl,
    "slime": _from_slime,
    "prime-rl": _from_json_lines(formats.from_prime_rl),
    "nemo-rl": _from_json_lines(formats.from_nemo_rl),
    "megatron": lambda args, _: formats.from_megatron_lines(read_json_lines(args.input), args.num_experts),
}
