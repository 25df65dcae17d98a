"""Experts of torchtitan's own models, replaced by ours. `make test-extras` installs torchtitan and runs this."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("torchtitan", reason="torchtitan is not installed: make test-extras runs this")
from torchtitan.models.common.config_utils import make_moe_config, make_routed_experts_config, make_router_config
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.models.common.linear import Linear
from torchtitan.models.common.moe import GroupedExperts

from relibra_kernels.integrations.torchtitan import RelibraGroupedExperts, RelibraRoutedExperts, replace_experts
from relibra_kernels.planner.errors import InputError

D, F, E, K = 48, 40, 6, 2


def make_layer(backend="standard", shared=False, groups=None, score="softmax"):
    """torchtitan's MoE module from its own config builders, with weights large enough that experts matter."""
    init = {"weight": lambda w: torch.nn.init.normal_(w, std=0.3), "bias": torch.nn.init.zeros_}
    experts = dict.fromkeys(("w1_EFD", "w2_EDF", "w3_EFD"), init["weight"])
    limited = {} if groups is None else {"num_expert_groups": groups, "num_limited_groups": 1}
    router = make_router_config(
        dim=D, num_experts=E, gate_param_init=init, top_k=K, score_func=score, route_norm=True, **limited
    )
    routed = make_routed_experts_config(
        dim=D, hidden_dim=F, num_experts=E, top_k=K, param_init=experts, comm_backend=backend
    )
    more = {}
    if shared:

        def linear(i, o):
            return Linear.Config(in_features=i, out_features=o, param_init=init)

        more = {"shared_experts": FeedForward.Config(w1=linear(D, F), w2=linear(F, D), w3=linear(D, F))}
    layer = make_moe_config(num_experts=E, router=router, routed_experts=routed, **more).build()
    torch.manual_seed(0)
    layer.init_states()
    return layer


def exact(layer, x_BLD):
    """The same layer in float64 with its own choices, which are made in float32: out."""
    scores_BLK, ids_BLK, _ = layer.router(x_BLD, layer.expert_bias_E)
    inner = layer.routed_experts.inner_experts
    w1, w2, w3 = (w.bfloat16().double() for w in (inner.w1_EFD, inner.w2_EDF, inner.w3_EFD))
    x = x_BLD.bfloat16().double()
    out = torch.zeros_like(x)
    for e in range(E):
        y = (torch.nn.functional.silu(x @ w1[e].T) * (x @ w3[e].T)) @ w2[e].T
        out = out + y * (scores_BLK * (ids_BLK == e)).sum(-1, keepdim=True)
    return out if layer.shared_experts is None else out + layer.shared_experts(x_BLD)


def gradients(layer, out, x):
    names, leaves = zip(*[("x", x), *layer.named_parameters()], strict=True)
    return dict(zip(names, torch.autograd.grad(out, leaves, torch.ones_like(out)), strict=True))


@pytest.mark.parametrize(
    ("dtype", "how"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.float32, {"shared": True, "score": "sigmoid"}),
        (torch.float32, {"groups": 3, "score": "sigmoid"}),
    ],
    ids=["fp32", "bf16", "shared", "groups"],
)
def test_as_close_to_float64_as_their_own(dtype, how):
    theirs = make_layer(**how).to(dtype)
    ours = copy.deepcopy(theirs)
    assert replace_experts(ours) == 1 and type(ours.routed_experts) is RelibraRoutedExperts
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(3, 7, D, generator=torch.Generator().manual_seed(1)).to(dtype)
    errors = []
    twins = [x.clone().requires_grad_() for _ in range(3)]
    wanted = exact(theirs, twins[0])
    of_wanted = gradients(theirs, wanted, twins[0])
    for layer, leaf in ((theirs, twins[1]), (ours, twins[2])):
        out = layer(leaf)
        assert out.dtype == dtype
        found = {"out": out, **gradients(layer, out, leaf)}
        expected = {"out": wanted, **of_wanted}
        assert found.keys() == expected.keys()
        errors.append(
            {
                n: float((found[n].double() - g.double()).detach().norm() / g.detach().double().norm())
                for n, g in expected.items()
            }
        )
    for name, error in errors[1].items():
        assert error <= max(1.2 * errors[0][name], 1e-6) and error < 0.02, (name, error, errors[0][name])
    assert ours.tokens_per_expert_E.equal(theirs.tokens_per_expert_E)  # what its load balancing goes by


def test_rows_that_its_dispatcher_has_sorted():
    """Experts alone, as a rank has them between torchtitan's exchanges: an empty expert, and rows behind the last."""
    inner = make_layer().routed_experts.inner_experts
    ours = copy.deepcopy(inner)
    ours.__class__ = RelibraGroupedExperts
    counts = torch.tensor([3, 0, 5, 1, 0, 2])
    x = torch.randn(int(counts.sum()) + 4, D, requires_grad=True)
    out = ours(x, counts)
    assert not out[-4:].any()
    out[:-4].sum().backward()
    assert not x.grad[-4:].any() and not ours.w2_EDF.grad[1].any() and ours.w2_EDF.grad[2].any()
    expected = inner(x[:-4], counts)
    assert float((out[:-4] - expected).norm() / expected.norm()) < 0.01


def test_its_exchange_stays():
    """A dispatcher that does more than sort gets the rows, and gives the experts theirs."""
    layer = make_layer()
    x, seen = torch.randn(2, 5, D), []
    exact_out = exact(layer, x)
    dispatcher = layer.routed_experts.token_dispatcher

    class Exchange(type(dispatcher)):
        def dispatch(self, *args):
            seen.append(args[0].shape)
            return super().dispatch(*args)

    dispatcher.__class__ = Exchange
    replace_experts(layer)
    assert float((layer(x) - exact_out).detach().norm() / exact_out.norm()) < 0.01
    assert seen == [(10, D)]


def exchanged(x):
    """On a rank of two: (its output, gradient of its own w2), with torchtitan's all-to-all between the ranks."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torchtitan.distributed.utils import set_spmd_backend

    set_spmd_backend("default")  # groups of the dispatcher's own mesh
    layer, rank, ranks = make_layer(), dist.get_rank(), dist.get_world_size()
    inner = layer.routed_experts.inner_experts
    mine = slice(rank * E // ranks, (rank + 1) * E // ranks)
    for name, weight in dict(inner.named_parameters()).items():
        setattr(inner, name, torch.nn.Parameter(weight.detach()[mine].clone()))
    replace_experts(layer)
    layer.routed_experts.token_dispatcher.wire_meshes(ep_mesh=init_device_mesh("cpu", (ranks,)))
    out = layer(x[rank])
    out.sum().backward()
    return out.detach(), inner.w2_EDF.grad


def test_between_its_exchanges_over_two_ranks():
    from ranks import Ranks

    x = torch.randn(2, 3, 7, D, generator=torch.Generator().manual_seed(1))
    layer = make_layer()
    wanted = torch.stack([exact(layer, part) for part in x])
    (of_w2,) = torch.autograd.grad(wanted.sum(), [layer.routed_experts.inner_experts.w2_EDF])
    group = Ranks(2)
    try:
        results = group.run(exchanged, x)
    finally:
        group.close()
    for rank, (out, grad) in enumerate(results):
        assert float((out - wanted[rank]).norm() / wanted[rank].norm()) < 0.01
        expected = of_w2[rank * E // 2 : (rank + 1) * E // 2]
        assert float((grad - expected).norm() / expected.norm()) < 0.01


def test_a_replaced_layer_is_pickled_and_replaced_once():
    layer = make_layer()
    replace_experts(layer)
    assert replace_experts(layer) == 1
    x = torch.randn(1, 4, D)
    again = copy.deepcopy(layer)
    assert again(x).equal(layer(x))
    inner = pickle.loads(pickle.dumps(layer.routed_experts.inner_experts.state_dict()))
    assert inner.keys() == {"w1_EFD", "w2_EDF", "w3_EFD"}


def test_as_one_graph():
    layer = make_layer()
    replace_experts(layer)
    routed, x = layer.routed_experts, torch.randn(2, 5, D)
    scores, ids, _ = layer.router(x, layer.expert_bias_E)
    compiled = torch.compile(routed, fullgraph=True, backend="aot_eager")
    counts = torch.bincount(ids.flatten(), minlength=E)
    torch.testing.assert_close(compiled(x, scores, ids, counts), routed(x, scores, ids, counts))


def test_a_whole_model_trains():
    """Two layers of torchtitan's Qwen3 without its attention, which is for GPUs: loss falls, every expert moves."""
    model = torch.nn.Sequential(make_layer(), make_layer(shared=True))
    assert replace_experts(model) == 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x, wanted = torch.randn(4, 9, D), torch.randn(4, 9, D)
    before, losses = [p.detach().clone() for p in model.parameters()], []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (model(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(not a.equal(b) for a, b in zip(before, model.parameters(), strict=True))


def test_what_it_cannot_replace_is_named():
    with pytest.raises(InputError, match="Linear without a GroupedExperts"):
        replace_experts(torch.nn.Linear(2, 2))
    layer = make_layer()
    layer.routed_experts.inner_experts.__class__ = type("Quantised", (GroupedExperts,), {})
    with pytest.raises(InputError, match=r"routed_experts\.inner_experts is a Quantised; it must be"):
        replace_experts(layer)
    layer = make_layer()
    layer.routed_experts.forward = layer.routed_experts.forward
    with pytest.raises(InputError, match="RoutedExperts is parallelized already"):
        replace_experts(layer)
    assert type(layer.routed_experts.inner_experts) is GroupedExperts
