"""What a plan is to achieve, under which caps, and what it is priced for: one object, the same everywhere."""

import math
from dataclasses import dataclass, replace

from .errors import InputError
from .pricing.cost import Setting
from .pricing.devices import DEFAULT_DEVICE, DEVICES, DeviceSpec
from .pricing.models import DEFAULT_MODEL, MODELS, SEQUENCE_LENGTH, ModelShape

EFFORTS = ("full", "fast")
TRANSPORTS = ("one", "two", "auto")
KEPT_SHARE = 0.1  # of the device's memory, for kept replicas where no cap is given


@dataclass(frozen=True)
class PlanOptions:
    """How `plan_batch` plans, as `ep.plan`, the trainers' helpers and `relibra plan` take it too.

    Attributes:
        balance: reach this max/mean over ranks at the least cost; 1 is full balance, whatever it costs. None: whatever
            takes the least time.
        effort: "full", or "fast" for one attempt of each kind.
        kept_bytes: memory of a rank for kept replicas, over all layers of the table; one takes `shape.copy_bytes`. 0:
            none are kept. None: a tenth of the device's memory. The runtime keeps whatever a plan keeps.
        fetched_slots: at most so many of a rank's replica slots are fetched; 0: replicas are only kept. None: all.
        max_moves: at most so many experts of a layer change their home; 0: homes stay. None: as many as pay.
        transport: how tokens travel between nodes, which the price depends on: "one" hop, straight to the rank; "two"
            hops, once to a node and then inside it; "auto", the cheaper of the two.
        shape: sizes of the model that is priced. device: the machine. sequence_length: tokens of a sequence, for
        attention.
    """

    balance: float | None = None
    effort: str = "full"
    kept_bytes: int | None = None
    fetched_slots: int | None = None
    max_moves: int | None = None
    transport: str = "one"
    shape: ModelShape = MODELS[DEFAULT_MODEL]
    device: DeviceSpec = DEVICES[DEFAULT_DEVICE]
    sequence_length: int = SEQUENCE_LENGTH

    def __post_init__(self) -> None:
        if self.balance is not None and not 1 <= self.balance < 1e6:
            raise InputError(f"balance is {self.balance}, but must be at least 1: it is max/mean over ranks")
        for name, known in (("effort", EFFORTS), ("transport", TRANSPORTS)):
            if getattr(self, name) not in known:
                raise InputError(f"{name} is {getattr(self, name)!r}, but must be one of {', '.join(known)}")
        for name, least, most in (
            ("kept_bytes", 0, 1 << 62),
            ("fetched_slots", 0, 1 << 32),
            ("max_moves", 0, 1 << 32),
            ("sequence_length", 1, 1 << 32),
        ):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and least <= value < most and value == int(value)):
                raise InputError(f"{name} is {value}, but must be an integer from {least} to {most - 1}")

    @property
    def kept_copies(self) -> int:
        """Kept replicas for which a rank has memory, over all layers."""
        cap = self.device.memory * KEPT_SHARE if self.kept_bytes is None else self.kept_bytes
        return int(cap // self.shape.copy_bytes)

    def setting(self, experts: int, gpus_per_node: int, *, keep_replicas: bool = False) -> Setting:
        """What a batch of so many experts a layer is priced for."""
        shape = replace(self.shape, experts=experts)
        return Setting(shape, self.device, gpus_per_node, self.sequence_length, self.transport, keep_replicas)
