"""vLLM: `CompletionOutput.routed_experts`, numpy [N - 1, L, K] for each sequence of N tokens.

uint8 (up to 256 experts), uint16 or (older releases) int16; prompt rows included; every hidden layer, so dense layers
appear as zeros; ids are logical and not ordered by score; the row of the last sampled token does not exist. Rows begin
at `SamplingParams.routed_experts_prompt_start` where that was set. Older releases hand the prompt's rows over apart, as
`RequestOutput.prompt_routed_experts`. Over HTTP an array is the base64 of a .npy file. An aborted request has None.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Unpack

import numpy as np

from ..errors import InputError
from ..trace import RoutingTrace
from .encoded import array_of_npy, decode_base64
from .registry import loader
from .sequences import SequenceOptions, trace_of_sequences


@loader(
    "vllm", "a folder of .npy arrays [N-1, L, K], one a sequence in name order, or JSON lines with `routed_experts`"
)
def from_vllm(
    routed_experts: Iterable[Any],
    num_experts: int,
    *,
    prompt_routed_experts: Sequence[Any] | None = None,
    **options: Unpack[SequenceOptions],
) -> RoutingTrace:
    """A trace of these sequences, with the last sampled token of each unknown.

    routed_experts:        an entry for each sequence: an array [N - 1, L, K] of any integer dtype that holds the ids;
                           the base64 of its .npy file; a mapping with `routed_experts` and
                           `routed_experts_prompt_start`; a list of these, if it was generated in parts; or None
    prompt_routed_experts: rows that go before them, from releases that hand them over apart
    options:               as `SequenceOptions` has them
    """
    if prompt_routed_experts is not None:
        completions = list(routed_experts)
        if len(prompt_routed_experts) != len(completions):
            raise InputError(
                f"prompt_routed_experts has {len(prompt_routed_experts)} entries, but routed_experts has "
                f"{len(completions)}"
            )
        routed_experts = [_joined(pair) for pair in zip(prompt_routed_experts, completions, strict=True)]
    return trace_of_sequences(routed_experts, num_experts, last_token="left out", decode=_decode, **options)


def _joined(pair: tuple[Any, Any]) -> Any:
    """Prompt and completion, which were recorded in one go, as one array."""
    parts = [_decode(part, "routed_experts") for part in pair if part is not None]
    arrays = [np.asarray(part) for part in parts]
    if any(array.ndim != 3 or array.shape[1:] != arrays[0].shape[1:] for array in arrays):
        raise InputError(f"prompt and completion have the shapes {[array.shape for array in arrays]}, not [rows, L, K]")
    return np.concatenate(arrays) if arrays else None


def _decode(payload: Any, name: str) -> Any:
    return array_of_npy(decode_base64(payload, name), name) if isinstance(payload, str | bytes) else payload
