"""Live routing: layers that run while no batch is open, with the experts where they are.

For validation, generation, old log-probabilities, and training without replay. Counts are exchanged in every layer, so
every rank must run the same number of forwards.
"""

import time

import numpy as np
import torch
from torch import Tensor

from ..planner.errors import CommunicationError
from .comm.devices import upload
from .session import RuntimeOptions, Session
from .tokens.destinations import shared_destinations
from .tokens.layer import Experts, LayerSite, run_layer
from .tokens.live import live_path
from .tokens.transport import Transport

_PAUSE = 1.0  # seconds between forwards of which one follows the other


class LiveRouting:
    """Runs the layers of a model under the placement of now.

    Args:
        home_LE: int [L, E]; it may change between forwards.
    """

    def __init__(self, transport: Transport, home_LE: np.ndarray, options: RuntimeOptions):
        self.home: np.ndarray = home_LE
        self._transport, self._options = transport, options
        self._ended = float("-inf")  # when the last layer ran
        self._session = Session(options, transport.host.ledger)
        self._placed: dict[int, tuple[bytes, Tensor, Tensor]] = {}  # of each layer: its home, and what follows from it

    def copy(self) -> "LiveRouting":
        """Live routing for a copy of the model. Its experts stay where they are now."""
        return LiveRouting(self._transport, self.home.copy(), self._options)

    def recorded(self, _layer: int) -> tuple[Tensor, bool] | None:
        """Nothing: routers choose."""
        return None

    def alignment(self, _layer: int) -> None:
        """Nothing: there is nothing to compare with."""

    def run(self, layer: int, experts: Experts, x_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The experts of one layer: [tokens, H]. Collective."""
        session, where = self._session, f"layer {layer}, live"
        follows = time.monotonic() - self._ended < _PAUSE  # other ranks that run forwards now begin one too
        patience = self._options.live_wait_seconds if layer == 0 and follows else None
        home_slots = len(experts.weights.down)
        with session.ledger.layer_span("live", x_TH.device, timed=False):
            share, slots = self._placement(layer, x_TH.device)
            try:
                destinations = shared_destinations(index_TK, share, slots)
                path = live_path(self._transport, destinations, home_slots, where, patience=patience)
            except CommunicationError as error:
                raise CommunicationError(
                    f"{error}. Outside of a batch every rank must run the same forwards: with generate, "
                    "synced_gpus=True; where one only takes longer in between, raise RuntimeOptions.live_wait_seconds"
                ) from error
        site = LayerSite(
            session=session,
            layer=layer,
            micro_batch=-1,
            tag=torch.tensor([session.serial, -1, layer]),
            path=path,
            pushes=None,
            kept=None,
            replicas=None,
            weight_of_slot=None,
            next_routes=(None, None),
            device=x_TH.device,
        )
        out_TH = run_layer(x_TH, weights_TK, site, experts)
        self._ended = time.monotonic()
        return out_TH

    def _placement(self, layer: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(int64 [E, R], 1 at an expert's home; int16 [E, R], its slot there)."""
        home = self.home[layer]
        known = self._placed.get(layer)
        if known is None or known[0] != home.tobytes() or known[1].device != device:
            ranks = self._transport.host.size
            at_home = home[:, None] == np.arange(ranks)
            slots = np.where(at_home, at_home.cumsum(0) - 1, -1).astype(np.int16)
            known = home.tobytes(), upload(at_home.astype(np.int64), device), upload(slots, device)
            self._placed[layer] = known
        return known[1], known[2]
