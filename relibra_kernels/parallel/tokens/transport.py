"""What carries tokens to the ranks that compute them and brings partial results back.

`Transport` is all that the layers, recorded and live, know of it. There are two: `OneHop`, straight to the rank, and
`TwoHops`, to a node once and inside it then.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..comm.collectives import Comm
from ..session import RuntimeOptions
from .arrivals import Arrivals
from .buffers import Buffers
from .chunks import Chunk, Group
from .destinations import Destinations
from .hop import buffer_bytes
from .tables import LayerTables, SendTables, Sizes


class TokenPath(Protocol):
    """The rows of one (layer, micro-batch): from their tokens to the ranks that compute them, and back.

    Every rank of the group calls the same methods in the same order; nothing here waits for the device.
    """

    @property
    def groups(self) -> dict[int, Group]:
        """Which rows each chunk has for which slot, once a dispatch has arrived."""

    def prepare(self, hidden: int, dtype: torch.dtype, out: torch.dtype) -> None:
        """Do what can be done before the layer runs.

        Args:
            hidden, dtype: elements of a token's row. out: dtype of partial sums.
        """

    @property
    def assignments(self) -> int:
        """How many (row, expert) pairs this rank computes."""

    def dispatch(self, x_TH: Tensor, weights_TK: Tensor, kind: str) -> Sequence[Callable[[], Chunk]]:
        """Begin to send tokens, each with its gate weights. What arrives, as chunks to be waited for in turn."""

    def dispatch_rows(self, rows_TH: Tensor, kind: str) -> Sequence[Callable[[], Tensor]]:
        """Send rows alone: [rows, H] of every chunk, in the order of `dispatch`, valid until the next call."""

    def room(self, index: int, width: int, dtype: torch.dtype) -> Tensor:
        """Where to write the partial results [rows, width] of a chunk, once it has arrived."""

    def combine(self, kind: str) -> Tensor:
        """Send every chunk's partial results back to their tokens, added up there: [T, H], in their dtype."""

    def combine_gradients(
        self, partials: Sequence[tuple[Tensor, Tensor]], kind: str, weights_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """As `combine`, of gradients of rows [rows, H] and of their gate weights [rows, K]: [T, H] and [T, K].

        Args:
            weights_dtype: of what is returned for the gate weights.
        """


class Transport(Protocol):
    """How the tokens of one expert-parallel group travel, seen from one of its ranks.

    One that uses DeepEP or symmetric memory is one file with a class like this one and its `TokenPath`, and a name in
    `make_transport`. In the order in which a micro-batch calls them:

    1. `tables`, on a side stream, a micro-batch ahead: from the (rank, slot) of every assignment of all layers to
       whatever the transport needs on the device. Nothing may wait for it. For DeepEP that is `topk_idx` as ranks want
       it; for symmetric memory the row of a peer's buffer that each token is written to, which `counts` must tell.
    2. `messages` and `sizes`, on the host: `counts` of the tables have come down through pinned memory; what each rank
       must know of them travels between the hosts, in one all-to-all. A transport that exchanges counts by itself
       (DeepEP's notify) sends empty messages, but then its layers wait for the host, which a recorded layer must not.
    3. `arrivals`, once what is sent and received is known: ranks tell each other's devices the slots of all rows of
       all layers, so that no layer makes a table of what it receives. Nothing waits for it. A live layer leaves it out.
    4. `hops`, to make all memory before the first layer: none is allocated in one.
    5. `path` of each, before the first layer too: then their methods, forward and backward, as often as activations are
       recomputed.

    What must hold, and what tests/relibra_kernels/parallel asserts of each: a chunk has the rows of all tokens that
    chose a slot of this rank, each once, in an order that only the routing decides; `combine` adds up a token's partial
    sums in a fixed order and in fp32 at least, so that the same inputs give the same bits; a token without a
    destination gets zeros; bytes that leave the rank are written to the ledger of its `Comm`, as "slow" where they
    cross between nodes; and a wait for other ranks goes through `Comm.wait`, so that a rank that stops is named.

    Attributes:
        name: "one", "two", ...: what the price model calls it, which plans are made for.
        host: the group, with collectives between the hosts.
        buffers: memory in which rows are sent and received, shared by all layers.
    """

    name: str
    host: Comm
    buffers: Buffers

    def tables(self, destinations: Destinations) -> SendTables:
        """What this rank sends in every layer, on the device."""

    def messages(self, counts_LC: np.ndarray) -> list[np.ndarray]:
        """For each rank, int64 [n]: what its host must know. Two ranks send each other messages of one length.

        Args:
            counts_LC: those of the tables.
        """

    def sizes(self, counts_LC: np.ndarray, received: Sequence[np.ndarray]) -> list[Sizes]:
        """Of every layer, from this rank's counts and the messages of all ranks."""

    def arrivals(
        self, tables: SendTables, sizes: Sequence[Sizes], num_slots: int, overlap: bool, what: str
    ) -> list[Arrivals]:
        """What every layer receives. Collective.

        Args:
            num_slots: the most slots of this rank that rows may visit in a layer. overlap: as for `path`.
            what: "micro-batch m", for errors.
        """

    def hops(self, sizes: Sizes, overlap: bool) -> list[tuple[str, int]]:
        """The exchanges of a layer: what the names of its buffers begin with, and the rows that one holds."""

    def path(
        self,
        tables: LayerTables,
        sizes: Sizes,
        num_slots: int,
        where: str,
        overlap: bool,
        arrivals: Arrivals | None = None,
    ) -> TokenPath:
        """The way of the rows of a layer.

        Args:
            tables: for the model's input.
            num_slots: slots of this rank that rows may visit.
            where: "layer l, micro-batch m", for errors.
            overlap: give what is near as a chunk of its own, to be computed while the rest is under way.
            arrivals: of the layer; None: its tables are made of what comes with the rows.
        """


def exchange_messages(
    host: Comm, messages: Sequence[np.ndarray], phase: str, patience: float | None = None
) -> list[np.ndarray]:
    """What every rank told this one. Between hosts: a GPU goes on with what it has. Collective.

    Args:
        messages: int64 [n] for each rank; two ranks send each other messages of one length.
        patience: seconds to wait at most; None: as long as the process group does.
    """
    lengths = [len(message) for message in messages]
    sent = torch.from_numpy(np.concatenate(messages))
    received = host.start(sent, lengths, lengths, "counts", phase).wait(patience).numpy()
    return np.split(received, np.cumsum(lengths)[:-1])


def reserve(
    transport: Transport,
    sizes: Sequence[Sizes],
    top_k: int,
    rows: Sequence[tuple[int, torch.dtype]],
    options: RuntimeOptions,
    device: torch.device,
) -> None:
    """Make the buffers as large as any layer of the micro-batch needs, so that no layer has to.

    Args:
        rows: (elements, dtype) of a token's row in every layer.
    """
    needed = Counter[str]()
    for of_layer, (hidden, dtype) in zip(sizes, rows, strict=True):
        for name, count in transport.hops(of_layer, options.overlap):
            out = options.combine_dtype or dtype
            for part, size in buffer_bytes(count, hidden, top_k, dtype, out, redispatch=options.redispatch).items():
                needed[name + part] = max(needed[name + part], size)
    transport.buffers.reserve(needed, device)
