"""From rows in slot order back to tokens, a weighted sum: in fp32, stored in the input dtype."""

import torch

from ..operands import check_gate_weights, check_rows
from ..schedule import Schedule

CHUNK_BYTES = 1 << 20  # rows gathered at a time: stays in a core's L2 cache


def unpermute(
    y_RH: torch.Tensor,
    weights_TK: torch.Tensor | None,
    schedule: Schedule,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`out[t] = sum_k weights[t, k] * y[position(t, k)]`; dropped assignments add nothing, weights None means 1.

    Args:
        out: [T, H], contiguous, where to write; new memory in y's dtype where None.
    """
    check_rows("y", y_RH, schedule.num_rows)
    if weights_TK is not None:
        check_gate_weights(weights_TK, schedule)
    if out is not None:
        check_rows("out", out, schedule.num_tokens)
    return added_up(y_RH, weights_TK, schedule, out=out)


def added_up(
    y_RH: torch.Tensor, weights_TK: torch.Tensor | None, schedule: Schedule, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`unpermute` of rows that may lie apart in memory, unchecked."""
    T, K, H = schedule.num_tokens, schedule.top_k, y_RH.shape[1]
    accumulate = torch.promote_types(y_RH.dtype, torch.float32)
    used = int(schedule.slot_offsets[-1])
    if used == 0:
        return y_RH.new_zeros(T, H) if out is None else out.zero_()
    all_used = used == T * K
    chunk = max(1, CHUNK_BYTES // (K * H * y_RH.element_size()))
    out_TH = y_RH.new_empty(T, H) if out is None and chunk < T else out
    for start in range(0, T, chunk):
        position = schedule.position_of[start : start + chunk].reshape(-1)
        rows = y_RH.index_select(0, position if all_used else position.clamp(min=0))
        if not all_used:
            rows.masked_fill_((position < 0)[:, None], 0)
        rows_TKH = rows.view(-1, K, H)
        if weights_TK is None:
            total_TH = rows_TKH.sum(1, dtype=accumulate)
        else:
            weights = weights_TK[start : start + chunk, None].to(accumulate)
            total_TH = torch.bmm(weights, rows_TKH.to(accumulate)).squeeze(1)
        if out_TH is None:  # all in one chunk
            return total_TH.to(y_RH.dtype)
        out_TH[start : start + chunk] = total_TH
    assert out_TH is not None
    return out_TH
