"""Two stores of experts' tensors, homes and replicas, as one numbered store where they lie whole experts apart.

One TMA descriptor then reaches both by index and is made once a program. A descriptor of its own for every tile costs a
flush and a cold fetch each time.
"""

import math
from typing import NamedTuple

import torch

_MOST = 2**31  # a descriptor's sizes are 32-bit integers


class Stores(NamedTuple):
    """What a kernel is given for two stores.

    Attributes:
        base: the store at the lower address, or home's where the two cannot be numbered together.
        other: the replica store where they cannot, else None.
        home_first, replica_first: numbers of the first home and the first replica, counted from `base`.
        end: tensors from `base` to the end of both.
    """

    base: torch.Tensor
    other: torch.Tensor | None
    home_first: int
    replica_first: int
    end: int

    @property
    def arguments(self) -> tuple[int, int, int]:
        return self.home_first, self.replica_first, self.end


def two_stores(home: torch.Tensor, replica: torch.Tensor | None) -> Stores:
    """Number `home` `[E, ...]` and `replica` `[S, ...]` together where their distance is a whole number of experts.

    What lies between them is never read: it only counts.
    """
    if replica is None:
        return Stores(home, None, 0, 0, home.shape[0])
    size = math.prod(home.shape[1:]) * home.element_size()
    apart, rest = divmod(replica.data_ptr() - home.data_ptr(), size)
    home_first, replica_first = max(-apart, 0), max(apart, 0)
    count = max(home_first + len(home), replica_first + len(replica))
    if rest or count >= _MOST:
        return Stores(home, replica, 0, 0, len(home))
    return Stores(home if apart >= 0 else replica, None, home_first, replica_first, count)
