"""Which transport a run uses: the one that was asked for, or the one that costs less on this cluster."""

import torch
import torch.distributed as dist

from ..planner import DEVICES, ClusterSpec, ModelShape
from ..planner.pricing.devices import DEFAULT_DEVICE, DeviceSpec, machine_of
from ..planner.pricing.transports import cheaper_transport
from .comm.groups import Groups
from .session import TRANSPORTS
from .tokens.one_hop import OneHop
from .tokens.transport import Transport
from .tokens.two_hops import TwoHops


def chosen_transport(wanted: str, groups: Groups, cluster: ClusterSpec, shape: ModelShape) -> str:
    """The name of a run's transport. Collective where the cluster has several nodes of several ranks.

    Other clusters always get one hop.

    Args:
        wanted: "one", "two", or "auto": what costs less by the price model, decided by the first rank.
        shape: sizes of the model's MoE layers.
    Raises: InputError where ranks want different ones.
    """
    if min(cluster.num_nodes, cluster.gpus_per_node) == 1:
        return "one"
    best = wanted if wanted != "auto" else cheaper_transport(shape, _machine(groups), cluster)
    facts, mine = {"RuntimeOptions.transport": TRANSPORTS.index(wanted)}, [TRANSPORTS.index(best)]
    everyone = groups.host.agree(None, facts, torch.device("cpu"), "choosing the transport", mine)
    return TRANSPORTS[int(everyone[0, 0])]


def make_transport(name: str, groups: Groups, cluster: ClusterSpec, shape: ModelShape) -> Transport:
    """The transport of this name, as `chosen_transport` has it. Collective."""
    if name == "one":
        return OneHop(groups.experts, groups.host)
    node, rail = groups.split()
    return TwoHops(rail, node, groups.host, cluster.home_slots(shape.experts) + cluster.replica_slots)


def _machine(groups: Groups) -> DeviceSpec:
    if dist.get_backend(groups.experts.group) == "gloo":
        return DEVICES["CPU"]
    return machine_of(torch.cuda.get_device_name()) or DEVICES[DEFAULT_DEVICE]
