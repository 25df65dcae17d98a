"""Which way of tokens between nodes costs less, before there is a batch to price."""

from dataclasses import replace

import numpy as np

from ..cluster import ClusterSpec
from .cost import Setting, exchange
from .devices import DeviceSpec
from .models import ModelShape
from .outcome import Outcome


def cheaper_transport(model: ModelShape, device: DeviceSpec, cluster: ClusterSpec, tokens: int = 4096) -> str:
    """ "one" or "two": the hops of `PlanOptions.transport` whose exchanges take less time under even load (modelled).

    Args:
        tokens: of a rank and micro-batch.
    """
    load = np.full((1, 1, cluster.num_ranks, 1), tokens * model.top_k)
    setting = Setting(model, device, cluster.gpus_per_node)
    one, two = (
        float(exchange(Outcome.of(load), replace(setting, transport=way)).seconds.sum()) for way in ("one", "two")
    )
    return "two" if two < one else "one"
