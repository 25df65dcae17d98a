"""Random routing for tests: one factory, and the shapes that every grouped operation must survive."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RoutingCase:
    """Slots `[T, K]` with a name; `weight_of_slot` where several slots share an expert."""

    name: str
    slots: torch.Tensor
    num_slots: int
    num_home: int
    num_replicas: int = 0
    weight_of_slot: torch.Tensor | None = None

    def __str__(self) -> str:
        return self.name


def random_slots(
    tokens: int, top_k: int, num_slots: int, *, seed: int = 0, skew: float = 1.0, dropped: float = 0.0
) -> torch.Tensor:
    """Distinct slots a token, int64 `[T, K]`, log-normally popular with `skew`; a share `dropped` of them is -1."""
    generator = torch.Generator().manual_seed(seed)
    popularity = (torch.randn(num_slots, generator=generator) * skew).exp()
    scores = torch.rand(tokens, num_slots, generator=generator).log() / popularity
    slots = scores.topk(top_k, dim=1).indices
    slots[torch.rand(tokens, top_k, generator=generator) < dropped] = -1
    return slots


def routing_cases() -> list[RoutingCase]:
    """The table of shapes; small enough for Triton's interpreter."""
    only_slot_1 = torch.full((19, 2), -1)
    only_slot_1[:, 0] = 1
    empty_slots = random_slots(21, 2, 3, seed=1) * 2  # slots 1 and 3 stay empty
    two_replicas = torch.tensor([0, 1, 2, 1, 3], dtype=torch.int32)  # slot 3 is home 1 again, slot 4 is replica 0
    last_is_empty = torch.tensor([0, 1, 1], dtype=torch.int32)  # slot 2, home 1 again, has no row
    return [
        RoutingCase("skewed", random_slots(45, 3, 5, seed=0), 5, 5),
        RoutingCase("empty slots", empty_slots, 6, 6),
        RoutingCase("one row", torch.tensor([[2]]), 4, 4),
        RoutingCase("all rows on one slot", only_slot_1, 3, 3),
        RoutingCase("dropped assignments", random_slots(37, 4, 6, seed=2, dropped=0.4), 6, 6),
        RoutingCase("every assignment dropped", torch.full((5, 2), -1), 3, 3),
        RoutingCase("no tokens", torch.zeros((0, 2), dtype=torch.int64), 3, 3),
        RoutingCase("replicas of one expert", random_slots(40, 2, 5, seed=3), 5, 3, 1, two_replicas),
        RoutingCase("replica without rows", random_slots(20, 1, 2, seed=4), 3, 2, 0, last_is_empty),
    ]
