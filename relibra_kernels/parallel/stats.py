"""What one batch did, as figures to log."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass

_KINDS = {"replica_weights": "fetched", "replica_gradients": "fetched", "migration": "migration"}
_KINDS |= {"kept_weights": "kept", "kept_gradients": "kept"}


@dataclass(frozen=True)
class BatchStats:
    """Figures of one batch on one rank. A name says the unit; without one it is a ratio or a number of things.

    Over the expert-parallel group:
        static_max_mean, planned_max_mean, actual_max_mean: assignments of the busiest rank over the mean of ranks, mean
            over layers and micro-batches: with contiguous homes and no replicas, as planned, and as it ran. Static is
            None where no routing was recorded.
        saved_seconds: compute time that the plan saved on the busiest rank, less the time of replicas and migration.
            Modelled from measured seconds: mean compute seconds of the ranks * (static_max_mean - actual_max_mean)
            - mean seconds of replicas and migration. It leaves out exchanges, which balance shortens too. None where
            static_max_mean is.
        layers_run: (layer, micro-batch) pairs that ran. unknown_tokens: tokens without a record. differing_tokens:
            (token, layer) pairs that chose other experts than recorded. agreeing_share: part of the compared top-k sets
            that agree with the record, see `RuntimeOptions.on_shift`; None where none was compared. replicas,
            replicas_kept: replicas of the plan, and kept ones among them.
    Of this rank, rank:
        *_seconds: CUDA events, or the host's clock; `live` is unrecorded tokens, `tables` the preparation of a
            micro-batch. Parts may overlap.
        *_fast_bytes, *_slow_bytes: sent to ranks of the same node, and of others. `token` is rows of tokens with all
            that goes with them; fetched, kept, migration are weights and gradients of experts.
    """

    rank: int
    static_max_mean: float | None
    planned_max_mean: float
    actual_max_mean: float
    saved_seconds: float | None
    layers_run: int
    unknown_tokens: int
    differing_tokens: int
    agreeing_share: float | None
    replicas: int
    replicas_kept: int
    dispatch_seconds: float
    compute_seconds: float
    combine_seconds: float
    replica_seconds: float
    live_seconds: float
    migration_seconds: float
    tables_seconds: float
    token_fast_bytes: int
    token_slow_bytes: int
    fetched_fast_bytes: int
    fetched_slow_bytes: int
    kept_fast_bytes: int
    kept_slow_bytes: int
    migration_fast_bytes: int
    migration_slow_bytes: int

    def scalars(self) -> dict[str, float]:
        """Name -> value of everything that is known, as loggers take it."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def json_line(self) -> str:
        """One line of JSON without a newline, names in a fixed order."""
        return json.dumps(asdict(self), allow_nan=False)


def bytes_of_kinds(sent: Mapping[tuple[str, str], int]) -> Counter[tuple[str, str]]:
    """(token, fetched, kept or migration; "fast" or "slow") -> bytes, from the kinds that the ledger has.

    A kind that is of no expert counts as token.
    """
    found: Counter[tuple[str, str]] = Counter()
    for (kind, network), count in sent.items():
        found[_KINDS.get(kind, "token"), network] += count
    return found
