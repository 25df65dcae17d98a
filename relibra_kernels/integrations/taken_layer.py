"""An MoE layer whose block is another framework's, as the runtime sees it."""

from dataclasses import dataclass
from typing import Any

from ..nn import ReplicatedExperts


@dataclass(eq=False)
class TakenLayer:
    """One MoE layer in another framework's block: our experts, and the object through which its routing is replayed.

    router: has `top_k`, and `replay`, which the runtime sets: it gives (recorded ids int64 `[T, K]`, whether no row is
        -1) for the forward that runs now, or None where that is routed live.
    """

    experts: ReplicatedExperts
    router: Any
