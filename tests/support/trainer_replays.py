"""What verl and slime put into Megatron's routers to replay: their interfaces, as far as they are fed from outside."""

from enum import Enum

import torch
from torch import nn


class RouterReplayAction(Enum):
    RECORD = 1
    REPLAY_FORWARD = 2
    REPLAY_BACKWARD = 3


class VerlReplay:
    """verl's `RouterReplay`: as Megatron's, with an enumeration of its own and a mask of the rows that are replayed."""

    def __init__(self):
        self.target_topk_idx = self.target_replay_mask = self.router_replay_action = None
        self.replay_backward_list, self.replay_backward_mask_list = [], []

    def set_target_indices(self, topk_indices, replay_mask=None):
        self.target_topk_idx, self.target_replay_mask = topk_indices, replay_mask
        self.replay_backward_list.append(topk_indices)
        self.replay_backward_mask_list.append(replay_mask)

    def set_router_replay_action(self, action):
        self.router_replay_action = action

    def get_replay_topk(self, scores, topk, num_groups=None, group_topk=None, default_compute_topk=None):
        live = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if self.router_replay_action is RouterReplayAction.REPLAY_FORWARD:
            indices, mask = self.target_topk_idx, self.target_replay_mask
        elif self.router_replay_action is RouterReplayAction.REPLAY_BACKWARD:
            indices, mask = self.replay_backward_list.pop(0), self.replay_backward_mask_list.pop(0)
        else:
            return live
        if mask is not None:
            indices = torch.where(mask[:, None], indices, live[1])
        return scores.gather(1, indices), indices


class SlimeReplay:
    """slime's `RoutingReplay`: micro-batches in order, forward and backward each from the first on."""

    def __init__(self):
        self.top_indices_list, self.forward_index, self.backward_index = [], 0, 0

    def record(self, top_indices):
        self.top_indices_list.append(top_indices)

    def pop_forward(self):
        self.forward_index += 1
        return self.top_indices_list[self.forward_index - 1]

    def pop_backward(self):
        self.backward_index += 1
        return self.top_indices_list[self.backward_index - 1]


def slime_topk(replay, stage, old_compute_topk):
    """slime's patched top-k around what Megatron has there, in a stage of ROUTING_REPLAY_STAGE."""

    def compute_topk(scores, topk, num_groups=None, group_topk=None):
        if stage == "fallthrough":
            return old_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        indices = replay.pop_forward() if stage == "replay_forward" else replay.pop_backward()
        assert indices.shape == (len(scores), topk) and indices.dtype == torch.int32
        return scores.gather(1, indices.long()), indices

    return compute_topk


def live_topk(scores, topk, num_groups=None, group_topk=None):
    return scores.topk(topk, dim=1)


class Model(nn.Module):
    """Two layers and one of multi-token prediction; `attribute` of each router is made by `make`."""

    def __init__(self, attribute, make):
        super().__init__()
        self.decoder = nn.ModuleList(nn.Module() for _ in range(2))
        self.mtp = nn.ModuleList([nn.Module()])
        for module in (*self.decoder, *self.mtp):
            module.router = nn.Module()
            setattr(module.router, attribute, make())

    def replays(self, attribute):
        return [getattr(module.router, attribute) for module in self.decoder]
