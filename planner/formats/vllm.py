"""vLLM: `CompletionOutput.routed_experts`, numpy [N - 1, L, K] for each sequence of N tokens.

uint8 (up to 256 experts), uint16 or (older releases) int16; prompt rows included; every hidden layer, so dense layers
appear as zeros; ids are logical and not ordered by score; the row of the last sampled token does not exist. Older
releases hand the prompt's rows over apart, as `RequestOutput.prompt_routed_experts`. Over HTTP an array is the base64
of a .npy file.
"""

import io
from collections.abc import Sequence
from typing import Unpack

import numpy as np

from ..errors import FormatError, InputError
from ..trace import RoutingTrace
from .encoded import decode_base64
from .sequences import SequenceOptions, trace_of_sequences

DTYPES = (np.uint8, np.uint16, np.int16)


def from_vllm(
    routed_experts: Sequence[np.ndarray | str],
    num_experts: int,
    *,
    prompt_routed_experts: Sequence[np.ndarray | str] | None = None,
    **options: Unpack[SequenceOptions],
) -> RoutingTrace:
    """A trace of these sequences, with a -1 row for the last sampled token of each.

    routed_experts:        [N - 1, L, K] of each sequence, or its .npy in base64
    prompt_routed_experts: rows that go before them, from releases that hand them over apart
    options:               num_tokens, token_ids, moe_layer_ids, holes, as `SequenceOptions` has them
    """
    arrays = [decode_npy(array) if isinstance(array, str) else np.asarray(array) for array in routed_experts]
    if prompt_routed_experts is not None:
        if len(prompt_routed_experts) != len(arrays):
            raise InputError(
                f"prompt_routed_experts has {len(prompt_routed_experts)} entries, but routed_experts has {len(arrays)}"
            )
        prompts = [
            decode_npy(array) if isinstance(array, str) else np.asarray(array) for array in prompt_routed_experts
        ]
        arrays = [np.concatenate(parts) for parts in zip(prompts, arrays, strict=True)]
    return trace_of_sequences(arrays, num_experts, last_token="left out", dtypes=DTYPES, **options)


def decode_npy(text: str) -> np.ndarray:
    """The array of a .npy file in base64. Raises: FormatError."""
    data = decode_base64(text, "routed_experts")
    try:
        return np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise FormatError(f"routed_experts is not the base64 of a .npy file: {error}") from None
