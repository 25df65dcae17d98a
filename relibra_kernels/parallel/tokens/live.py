"""The way of rows whose experts are known only when the router has run: counts are exchanged, then all is as planned.

It costs the host one wait a layer, for the device's counts and the other ranks'.
"""

from ..comm.groups import Groups
from .buffers import Buffers
from .destinations import Destinations
from .path import TokenPath
from .tables import send_tables, sizes_of_layers


def live_path(
    groups: Groups, buffers: Buffers, destinations: Destinations, num_slots: int, where: str, overlap: bool = False
) -> TokenPath:
    """The way of one layer's tokens to these destinations. Collective.

    Args:
        destinations: rank and slot [T, K] of every assignment.
    """
    host = groups.host
    tables = send_tables(Destinations(*(table[None] for table in destinations)), host.size, host.rank)
    sent_LR3 = tables.counts.cpu()
    message = sent_LR3.transpose(0, 1).reshape(host.size, 3).contiguous()
    one_each = [1] * host.size
    received = host.exchange(message, one_each, one_each, "counts", f"the exchange of live counts of {where}")
    sizes = sizes_of_layers(sent_LR3.numpy(), received.view(host.size, 1, 3).numpy(), host.rank)
    return TokenPath(groups.experts, buffers, tables, 0, sizes[0], num_slots, where, overlap)
