"""From homes and kept replicas to a whole solution: the exact split, and fetched replicas where they pay."""

from dataclasses import dataclass, replace

import numpy as np

from ..cluster import ClusterSpec
from ..plan import held_experts
from ..pricing.cost import Setting
from .exact import PairFlow, spans
from .fetched import FetchPrice, Slots, fetch
from .fetched_by_flow import fetch_by_flow, level_slots
from .hosts import Hosts, Sums
from .kept import KeptReplicas
from .relaxed import preference, relaxed_split, whole_split

_MISSED = 0.002  # above its target by more than this after few were fetched, a pair gets many
_FEW = 2.6  # ranks' loads that are above the target in all: what few fetched replicas may take away
_AGAIN_SWEEPS = 3  # between rounds of fetching many
_FIRST_SWEEPS = 4  # of the exact split before replicas are fetched


@dataclass(frozen=True)
class Effort:
    """How hard is worked on the split of one micro-batch in one layer, a pair below.

    Attributes:
        rounds, node_rounds: of the relaxed split, over ranks and over nodes.
        sweeps: of the exact split.
        slack: a rank may be above the mean by this part of it, where full balance is not asked for.
        within: a pair that the relaxed split leaves further above the mean than this part is not split exactly.
            None: all are.
        few: rounds that add single fetched replicas and split exactly after each. Pairs for which these do not do are
            fetched for in one pass, which is faster and takes more replicas.
        again: rounds of such passes, for pairs that are above their target by more than the part `near` of it.
        few_last: as `few`, once more in the end.
    """

    rounds: int
    node_rounds: int
    sweeps: int
    slack: float
    within: float | None
    few: int = 0
    again: int = 0
    few_last: int = 0
    near: float = 0.0


@dataclass(eq=False)
class Solution:
    """home: int32 [L, E]. replicas, quota: int32 [L, M, R, S]. kept: bool [L, R, S]."""

    home: np.ndarray
    replicas: np.ndarray
    quota: np.ndarray
    kept: np.ndarray


def target_load(table_LME: np.ndarray, ranks: int, balance: float | None, slack: float) -> np.ndarray:
    """int64 [L, M]: what a rank should carry at most."""
    total = table_LME.sum(2)
    allowed = np.floor(total * (1 + slack if balance is None else balance) / ranks).astype(np.int64)
    return np.maximum(-(-total // ranks), allowed)


def fetch_price(
    setting: Setting,
    dense_seconds: float,
    cluster: ClusterSpec,
    balance: float | None,
    slots: int,
    tolerance: float | np.ndarray = 0.0,
    hottest: bool = False,
) -> FetchPrice:
    """What the search weighs fetched replicas with. With a balance to reach, an assignment less is worth any of
    them."""
    model, device = setting.model, setting.device
    link = device.fast if cluster.num_nodes == 1 else device.slow
    assignment = model.step_flops() / device.grouped_flops + 4 * 2 * model.hidden_size / link
    if balance is not None:
        return FetchPrice(slots, 1.0, 1e-6, 1e-6)
    trip = (2 * model.expert_bytes + model.gradient_bytes) / device.fast
    exposed = max(trip - dense_seconds, 0) / max(trip, 1e-30)
    each = trip * (exposed + (1 - exposed) * device.contention)
    return FetchPrice(slots, assignment, each, 3 * device.transfer_launch, tolerance, hottest)


def solve(
    table_LME: np.ndarray,
    wanted_LMNE: np.ndarray,
    home: np.ndarray,
    kept_replicas: KeptReplicas,
    cluster: ClusterSpec,
    target_LM: np.ndarray,
    effort: Effort,
    price: FetchPrice,
) -> Solution:
    """Split the loads over homes and kept replicas, and fetch what pays. wanted_LMNE: as
    `pricing.outcome.wanted_by_nodes` has it."""
    _, micro_batches, experts = table_LME.shape
    ranks, gpus = cluster.num_ranks, cluster.gpus_per_node
    hosts = Hosts.of(home, kept_replicas.layer, kept_replicas.expert, kept_replicas.rank, gpus, ranks)
    load_FM = np.ascontiguousarray(table_LME.swapaxes(1, 2), np.float64).reshape(-1, micro_batches)
    dense = _Dense.of(home, kept_replicas, cluster)
    may_fetch = gpus > 1 and bool(dense.free(price.slots).any())
    if not len(kept_replicas.layer):
        split = load_FM.astype(np.int64)
    else:
        prior = preference(hosts, _wanted(hosts, wanted_LMNE), load_FM)
        relaxed = relaxed_split(hosts, load_FM, prior, effort.rounds, effort.slack)
        split = whole_split(hosts, relaxed, load_FM)
        # Where replicas may follow, the exact split comes after them.
        first = replace(effort, sweeps=min(effort.sweeps, _FIRST_SWEEPS)) if may_fetch else effort
        _level(hosts, split, target_LM, first)
    best = dense.fill(hosts, split)
    if may_fetch:
        busiest = best.sum(3).max(2)
        layer, micro_batch = np.nonzero(busiest > target_LM)
        if len(layer):
            pairs = layer, micro_batch
            looser = 1 + np.broadcast_to(price.tolerance, len(target_LM))[layer]
            target = np.maximum(target_LM[pairs], np.floor(target_LM[pairs] * looser).astype(np.int64))
            if len(kept_replicas.layer) and cluster.num_nodes > 1:
                split = _level_nodes(hosts, relaxed, load_FM, target_LM, effort)
            slots = dense.slots(layer, best[pairs], price.slots)
            if price.hottest:
                fetch(slots, target, gpus, hottest=True)
            elif effort.few and len(kept_replicas.layer):
                _fetch_few(slots, target, experts, gpus, effort)
            missed = np.flatnonzero(slots.load.sum(2).max(1) > target * (1 + (_MISSED if effort.few else 0.0)))
            if len(missed) and not price.hottest:
                at = layer[missed], micro_batch[missed]
                many = dense.slots(at[0], dense.fill(hosts, split)[at], price.slots)
                _fetch_many(many, target[missed], experts, gpus, effort)
                better = many.load.sum(2).max(1) < slots.load[missed].sum(2).max(1)
                slots.put(missed[better], many.of_pairs(better))
            sent = _most_sent(slots, gpus)
            after = slots.load.sum(2).max(1)
            gain = (busiest[layer, micro_batch] - after) * price.assignment
            pays = gain > np.where(sent > 0, price.any + price.replica * sent, 0.0)
            best[layer[pays], micro_batch[pays]] = slots.load[pays]
            return dense.solution(best, (layer[pays], micro_batch[pays], slots.expert[pays], slots.fetched[pays]))
    return dense.solution(best, None)


def _level_nodes(
    hosts: Hosts, relaxed_HM: np.ndarray, load_FM: np.ndarray, target_LM: np.ndarray, effort: Effort
) -> np.ndarray:
    """int64 [H, M]: a relaxed split made level over nodes, exactly; inside each, hosts share as before."""
    nodes, group, gpus = hosts.nodes, hosts.node_group, hosts.gpus_per_node
    before = Sums.by(group, len(nodes.expert))(relaxed_HM)
    of_node = relaxed_split(nodes, load_FM, before, effort.node_rounds, effort.slack)
    of_node = whole_split(nodes, of_node, load_FM)
    _level(nodes, of_node, target_LM * gpus, replace(effort, within=None))
    each = of_node / np.maximum(before, 1e-300)  # no host's part is 0 but where its expert has no load
    return whole_split(hosts, relaxed_HM * each[group], load_FM)


def _level(hosts: Hosts, split: np.ndarray, target_LM: np.ndarray, effort: Effort) -> None:
    """Exact splits, in place, of the pairs in which a rank is above the target."""
    layers, ranks, micro_batches = hosts.layers, hosts.ranks, split.shape[1]
    at_rank = hosts.by_rank(split).reshape(layers, ranks, micro_batches)
    busiest = at_rank.max(1)
    over = busiest > target_LM
    if effort.within is not None:  # a split that is far from level will not be after a few sweeps either
        over &= busiest <= target_LM * (1 + effort.within)
    layer, micro_batch = np.nonzero(over)
    if not len(layer) or not effort.sweeps:
        return
    which, pair = _hosts_of_layers(hosts, layer)
    several = hosts.count[hosts.expert[which]] > 1
    which, pair = which[several], pair[several]
    flow = PairFlow(
        hosts.expert[which] % hosts.experts + pair * hosts.experts,
        hosts.rank[which] % ranks + pair * ranks,
        split[which, micro_batch[pair]],
        at_rank[layer, :, micro_batch].reshape(-1),
        hosts.experts,
        ranks,
    )
    flow.level(target_LM[layer, micro_batch], effort.sweeps)
    split[which, micro_batch[pair]] = flow.split


def _fetch_few(slots: Slots, target_P: np.ndarray, experts: int, gpus_per_node: int, effort: Effort) -> None:
    """Fetch in place, replica by replica, in the pairs where little is left over."""
    above = np.maximum(slots.load.sum(2) - target_P[:, None], 0).sum(1)
    little = np.flatnonzero(above <= _FEW * target_P)
    part = slots.of_pairs(little)
    fetch_by_flow(part, target_P[little], experts, gpus_per_node, effort.few, effort.sweeps)
    slots.put(little, part)


def _fetch_many(slots: Slots, target_P: np.ndarray, experts: int, gpus_per_node: int, effort: Effort) -> None:
    """Fetch in place as fast as it goes, then split over what is there and fetch again, as long as a rank is well
    above its target, then few at a time."""
    fetch(slots, target_P, gpus_per_node)
    if not effort.sweeps:  # nothing has moved that could be fetched now
        return
    for turn in range(effort.again + 1):
        over = np.flatnonzero(slots.load.sum(2).max(1) > target_P * (1 + effort.near))
        if not len(over):
            return
        part = slots.of_pairs(over)
        if turn < effort.again:
            level_slots(part, target_P[over], experts, min(effort.sweeps, _AGAIN_SWEEPS))
            fetch(part, target_P[over], gpus_per_node)
        else:
            fetch_by_flow(part, target_P[over], experts, gpus_per_node, effort.few_last, effort.sweeps)
            fetch(part, target_P[over], gpus_per_node)
        slots.put(over, part)


def _most_sent(slots: Slots, gpus_per_node: int) -> np.ndarray:
    """int64 [P]: replicas that the busiest sender of each pair sends, an estimate: fetched ones of a node, over what
    its ranks can share."""
    of_node = (slots.fetched & (slots.load > 0)).sum(2).reshape(len(slots.expert), -1, gpus_per_node).sum(2)
    return -(-of_node.max(1) // 2)


@dataclass(frozen=True, eq=False)
class _Dense:
    """Slots of all ranks: home slots, then replica slots, of which kept replicas take the first.

    expert: int64 [L, R, Q], -1 in empty ones. places: int64 [L, E] and [C], the slot of each home and of each kept
    replica.
    """

    home: np.ndarray
    kept_replicas: KeptReplicas
    expert: np.ndarray
    home_places: np.ndarray
    kept_places: np.ndarray
    home_slots: int

    @staticmethod
    def of(home: np.ndarray, kept_replicas: KeptReplicas, cluster: ClusterSpec) -> "_Dense":
        ranks = cluster.num_ranks
        held = held_experts(home, ranks)
        layers, _, home_slots = held.shape
        expert = np.full((layers, ranks, home_slots + cluster.replica_slots), -1, np.int64)
        expert[:, :, :home_slots] = held
        layer, rank, slot = np.nonzero(held >= 0)
        home_places = np.empty(home.shape, np.int64)
        home_places[layer, held[layer, rank, slot]] = slot
        kept_places = kept_replicas.places(ranks) + home_slots
        expert[kept_replicas.layer, kept_replicas.rank, kept_places] = kept_replicas.expert
        return _Dense(home, kept_replicas, expert, home_places, kept_places, home_slots)

    def fill(self, hosts: Hosts, split_HM: np.ndarray) -> np.ndarray:
        """int64 [L, M, R, Q]: a split, by slot."""
        layers, ranks, places = self.expert.shape
        out = np.zeros((layers, split_HM.shape[1], ranks, places), np.int64)
        width = layers * ranks
        key = hosts.expert * width + hosts.rank
        every = np.arange(self.home.size)
        layer = every // self.home.shape[1]
        at = np.searchsorted(key, every * width + layer * ranks + self.home.reshape(-1))
        out[layer, :, self.home.reshape(-1), self.home_places.reshape(-1)] = split_HM[at]
        kept_replicas = self.kept_replicas
        whose = kept_replicas.layer * self.home.shape[1] + kept_replicas.expert
        at = np.searchsorted(key, whose * width + kept_replicas.layer * ranks + kept_replicas.rank)
        out[kept_replicas.layer, :, kept_replicas.rank, self.kept_places] = split_HM[at]
        return out

    def free(self, fetched_slots: int) -> np.ndarray:
        """int64 [L, R]: replica slots in which replicas may be fetched."""
        used = (self.expert[:, :, self.home_slots :] >= 0).sum(2)
        return np.minimum(self.expert.shape[2] - self.home_slots - used, fetched_slots)

    def slots(self, layer: np.ndarray, load_PRQ: np.ndarray, fetched_slots: int) -> Slots:
        """The slots of some pairs, for `fetch`."""
        expert = self.expert[layer]
        # A home slot that is empty, where homes are uneven, is no place for a replica.
        expert[:, :, : self.home_slots] = np.where(
            expert[:, :, : self.home_slots] < 0, self.home.shape[1], expert[:, :, : self.home_slots]
        )
        return Slots(expert, load_PRQ.copy(), self.free(fetched_slots)[layer], np.zeros(expert.shape, np.bool_))

    def solution(
        self,
        load_LMRQ: np.ndarray,
        fetched: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None,
    ) -> Solution:
        """As a plan has it. fetched: layer, micro-batch, experts and which are fetched, of pairs that fetch."""
        quota = load_LMRQ[..., self.home_slots :].astype(np.int32)
        replicas = np.broadcast_to(self.expert[:, None, :, self.home_slots :], quota.shape).astype(np.int32)
        kept = self.expert[:, :, self.home_slots :] >= 0
        if fetched is not None:
            layer, micro_batch, expert, new = fetched
            part = slice(self.home_slots, None)
            replicas[layer, micro_batch] = np.where(
                new[..., part] & (quota[layer, micro_batch] > 0), expert[..., part], replicas[layer, micro_batch]
            )
        return Solution(self.home, replicas, quota, kept)


def _wanted(hosts: Hosts, wanted_LMNE: np.ndarray) -> np.ndarray:
    """[V, M]: what the tokens of each node that hosts an expert want of it."""
    start = hosts.first_of_node
    layer, expert = hosts.expert[start] // hosts.experts, hosts.expert[start] % hosts.experts
    node = hosts.rank[start] % hosts.ranks // hosts.gpus_per_node if wanted_LMNE.shape[2] > 1 else 0
    return wanted_LMNE[layer, :, node, expert].astype(np.float64)


def _hosts_of_layers(hosts: Hosts, layer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every host of each of these layers, in turn, and which of them it is for."""
    bounds = np.append(hosts.first[:: hosts.experts], len(hosts.expert))
    size = np.diff(bounds)[layer]
    pair = np.repeat(np.arange(len(layer)), size)
    return spans(bounds[layer], size), pair
