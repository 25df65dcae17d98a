"""The way of rows whose experts are known only when the router has run: counts are exchanged, then all is as planned.

It costs the host one wait a layer, for the device's counts and the other ranks'.
"""

from .destinations import Destinations
from .transport import TokenPath, Transport, exchange_messages


def live_path(
    transport: Transport,
    destinations: Destinations,
    num_slots: int,
    where: str,
    overlap: bool = False,
    patience: float | None = None,
) -> TokenPath:
    """The way of one layer's tokens to these destinations. Collective.

    Args:
        destinations: rank and slot [T, K] of every assignment.
        patience: seconds to wait at most for the other ranks.
    """
    transport.buffers.forget_rows()  # other rows come every time
    tables = transport.tables(Destinations(*(table[None] for table in destinations)))
    counts = tables.counts.cpu().numpy()
    phase = f"the exchange of live counts of {where}"
    received = exchange_messages(transport.host, transport.messages(counts), phase, patience)
    sizes = transport.sizes(counts, received)[0]
    return transport.path(tables.of_layers([sizes.hops[0]])[0], sizes, num_slots, where, overlap)
