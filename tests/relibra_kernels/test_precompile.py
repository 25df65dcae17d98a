"""`warmup`: a first training step after it compiles nothing, counted in compile-only form."""

import os
import time
from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from entry_kernels import entry_kernels

pytest.importorskip("triton", reason="needs triton")

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from relibra_kernels import precompile, warmup
from relibra_kernels.compiling import precompiling
from relibra_kernels.compiling.compile_only import launch_digest
from relibra_kernels.configs import lookup
from relibra_kernels.configs.files import Bucket, Entry, path_of, update
from relibra_kernels.configs.limits import device_for
from relibra_kernels.configs.products import PRODUCTS
from relibra_kernels.form import GPT_OSS
from relibra_kernels.kernels.launch import recording
from relibra_kernels.nn import ExpertForm, ReplicatedExperts, ReplicatedMoE, TopKRouter
from relibra_kernels.parallel.comm.collectives import Exchange
from relibra_kernels.parallel.comm.ledger import Ledger
from relibra_kernels.parallel.experts.replicas import ReplicaPushes, ReplicaRoute, Transfers
from relibra_kernels.parallel.session import RuntimeOptions, Session
from relibra_kernels.parallel.tokens.layer import ExpertParallelMLP, LayerSite
from relibra_kernels.parallel.tokens.one_hop import OneHop
from relibra_kernels.parallel.tokens.tables import HopSizes, SendTables, Sizes
from relibra_kernels.parallel.tokens.two_hops import TwoHops
from relibra_kernels.planner.errors import InputError

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: no compiler")
H100, MI300X = (device_for(PRODUCTS[name]) for name in ("H100", "MI300X"))
EXPERTS, TOP_K, HIDDEN, HALF = 8, 2, 256, 128


def make_layer(form=None, recompute=False, scoring="softmax", rank=0):
    how = {"dtype": torch.bfloat16, "device": "meta"}
    router = TopKRouter(HIDDEN, EXPERTS, TOP_K, scoring=scoring, **how)
    experts = ReplicatedExperts(EXPERTS, HIDDEN, HALF, form=form, recompute=recompute, **how)
    if rank:
        experts.adapt(rank)
    return ReplicatedMoE(router, experts)


@pytest.fixture
def compiled(monkeypatch):
    """Digests of what was compiled, by a compiler that only counts."""
    digests = []

    def count(launch, device, *, instructions):
        assert instructions is False
        digests.append((device.name, launch_digest(launch)))

    monkeypatch.setattr(precompiling, "compile_launch", count)
    lookup.forget()
    yield digests
    lookup.forget()


def launches_of(device, step):
    launches = []
    with recording(device, launches.append):
        step()
    return launches


def digests_of(device, step):
    return {(device.name, launch_digest(launch)) for launch in launches_of(device, step)}


def train(model, tokens):
    """A training step as a user writes it."""
    x = torch.empty(tokens, HIDDEN, dtype=torch.bfloat16, device="meta", requires_grad=True)
    model(x).sum().backward()


@pytest.mark.parametrize("device", [H100, MI300X], ids=lambda device: device.product)
@pytest.mark.parametrize(
    ("form", "recompute", "scoring", "main_grad"),
    [(None, False, "softmax", False), (GPT_OSS, True, "softmax", False), (ExpertForm(), False, "sigmoid", True)],
    ids=["plain", "gpt-oss, recompute", "main_grad"],
)
def test_the_first_step_after_it_compiles_nothing(compiled, device, form, recompute, scoring, main_grad):
    model = torch.nn.Sequential(*(make_layer(form, recompute, scoring) for _ in range(2)))
    if main_grad:
        for parameter in model.parameters():
            parameter.main_grad = torch.empty_like(parameter, dtype=torch.float32)
    number = warmup(model, [64, 2048], device=device)
    assert number == len(compiled) == len(set(compiled)) > 10  # each thing once
    for tokens in (64, 2048):
        needed = digests_of(device, lambda tokens=tokens: train(model, tokens))
        assert len(needed) >= 10 and needed <= set(compiled)


def test_adapted_experts_compile_nothing_either(compiled):
    model = make_layer(rank=8)
    warmup(model, 64, device=H100)
    launches = launches_of(H100, lambda: train(model, 64))
    assert len(launches) == 23 and "_swiglu_kernel" in {launch.kernel.__name__ for launch in launches}
    assert digests_of(H100, lambda: train(model, 64)) <= set(compiled)


def test_it_is_the_tokens_that_count(compiled):
    """Few rows a slot get other tiles than many: what was not asked for is not there."""
    model = make_layer()
    warmup(model, 2048, device="H100")  # by name
    assert digests_of(H100, lambda: train(model, 2048)) <= set(compiled)
    assert not digests_of(H100, lambda: train(model, 64)) <= set(compiled)


class NoNetwork:
    """A group of one rank whose exchanges move tensors without memory."""

    rank, size = 0, 1

    def start(self, send, send_counts, receive_counts, kind, phase, into=None):
        received = send.new_empty(sum(receive_counts), *send.shape[1:]) if into is None else into
        return Exchange(self, received, None, phase, send)


@pytest.fixture
def blocks_by_tokens(monkeypatch, tmp_path):
    """A user's file in which permute has another config for each number of tokens."""
    monkeypatch.setenv("RELIBRA_CONFIG_DIR", str(tmp_path))
    names = {64: "32w1", 128: "64w1", 256: "128w1", 512: "256w1", 1024: "256w1"}
    buckets = tuple(Bucket(1, tokens, config, 1.0) for tokens, config in names.items())
    entries = [
        Entry(part, "bf16", HIDDEN, 0, False, False, "measured", "", None, "2026-11-24", buckets)
        for part in ("pack", "unpermute")
    ]
    update(path_of(tmp_path, "H100", "permute"), "H100", "permute", lambda old: entries)
    lookup.forget()


@pytest.mark.parametrize("tuned", [False, True], ids=["heuristic", "tuned"])
@pytest.mark.parametrize("form", [ExpertForm(), GPT_OSS], ids=["plain", "gpt-oss"])
@pytest.mark.parametrize("hops", [1, 2])
def test_the_layer_under_a_plan_compiles_nothing(compiled, form, tuned, hops, request):
    """The layer of the runtime itself, with a plan's replicas and without, for as many rows as a rank may get."""
    if tuned:
        request.getfixturevalue("blocks_by_tokens")
    tokens, slots, replicas = 256, 4, 2
    layer = make_layer(form)
    experts = ReplicatedExperts(slots, HIDDEN, HALF, form=form, dtype=torch.bfloat16, device="meta")
    layer.experts = experts
    parallel = object.__new__(precompile.ExpertParallel)
    parallel.model, parallel.cluster = layer, SimpleNamespace(replica_slots=replicas)
    warmup(parallel, tokens, device=H100)
    assert compiled

    network = NoNetwork()

    def index(*shape):
        return torch.empty(shape, dtype=torch.int32, device="meta")

    def step(received, visits, held):
        tables = SendTables(
            assignment_of=index(1, received),
            token_of=index(1, received),
            slots=torch.empty(1, received, TOP_K, dtype=torch.int16, device="meta"),
            position_of=index(1, tokens, TOP_K),
            offsets=index(1, 2),
            counts=index(1, 3),
        )
        places = -(-visits // received)
        hop, none = HopSizes([received], [received]), HopSizes([0], [0])
        sizes = Sizes((hop, hop, none)[: 2 * hops - 1], places, (visits, 0))
        transport = OneHop(network, network) if hops == 1 else TwoHops(network, network, network, slots + held)
        path = transport.path(tables.of_layers([sizes.hops[0]])[0], sizes, slots + held, "here", False)
        sent = index(held).long()
        pushed = Transfers(sent, sent, [held], [held], np.arange(held), anywhere=held > 0, sends_kept=False)
        site = LayerSite(
            session=Session(RuntimeOptions(), Ledger()),
            layer=0,
            micro_batch=0,
            tag=torch.zeros(3, dtype=torch.int64),
            path=path,
            pushes=ReplicaPushes(network, lambda layer: experts.weights, lambda layer: None),
            kept=SimpleNamespace(weights=lambda layer: None),
            replicas=ReplicaRoute(pushed, 0, index(slots + held)) if held else None,
            weight_of_slot=index(slots + held) if held else None,
            next_routes=(None, None),
            device=torch.device("meta"),
        )
        x = torch.empty(tokens, HIDDEN, dtype=torch.bfloat16, device="meta", requires_grad=True)
        gates = torch.empty(tokens, TOP_K, dtype=torch.float32, device="meta", requires_grad=True)
        ExpertParallelMLP.apply(x, gates, site, form, False, *experts.weights).sum().backward()

    # 75 rows a slot get other tiles than 128 do
    for received, visits in ((256, 512), (512, 512), (400, 480), (180, 300), (500, 1000)):
        for held in (0, replicas):
            needed = digests_of(H100, lambda r=received, v=visits, h=held: step(r, v, h))
            assert len(needed) >= 10 and needed <= set(compiled)


@pytest.mark.parametrize(("tokens", "most"), [(64, 10), (4096, 10), (65536, 12)])
def test_launches_of_a_layer(tokens, most):
    """Forward and backward of a layer without biases, as many experts a token as the models have."""
    how = {"dtype": torch.bfloat16, "device": "meta"}
    layer = ReplicatedMoE(TopKRouter(HIDDEN, 16, 10, **how), ReplicatedExperts(16, HIDDEN, HALF, **how))
    launches = []
    with recording(H100, launches.append):
        train(layer, tokens)
    assert len(launches) == most


def test_every_kernel_is_launched_by_a_layer_or_by_the_runtime():
    """A kernel that nothing launches does not exist: all entry points of the package, counted."""
    found = entry_kernels()
    launched = set()
    for form in (ExpertForm(), GPT_OSS):
        plain, adapted = make_layer(form), make_layer(form, rank=8)
        for replica_slots in (None, 2):
            launches = precompile._launches([plain, adapted], [64, 1 << 16], H100, replica_slots)
            launched |= {launch.kernel.__name__ for launch in launches}
    assert len(found) > 10
    assert launched == found


def test_threads_that_compile_parse_in_turn(monkeypatch):
    """CPython 3.11 fails where two threads parse at once."""
    inside, most = [], []

    def parse(kernel):
        inside.append(kernel)
        most.append(len(inside))
        time.sleep(0.01)
        inside.pop()

    monkeypatch.setattr(precompiling.JITCallable, "parse", parse)
    kernel = precompile._launches([make_layer()], [64], MI300X, None)[0].kernel
    monkeypatch.setattr(precompiling, "compile_launch", lambda launch, device, instructions: kernel.parse())
    assert precompiling.compile_for(MI300X, [None] * 8, 4) == 8
    assert len(most) == 8 and max(most) == 1
    assert precompiling.JITCallable.parse is parse


def test_it_really_compiles(monkeypatch):
    """One small layer for one GPU through the real compiler: spot check of what the others count."""
    lookup.forget()
    launches = precompile._launches([make_layer()], [64], MI300X, None)
    assert precompiling.compile_for(MI300X, launches[:3], 1) == 3


BAD = [
    (torch.nn.Linear(2, 2), 8, "model Linear has no ReplicatedMoE"),
    (None, 0, "tokens is 0"),
    (None, [], r"tokens is \[\]"),
    (None, [4, -1], r"tokens is \[4, -1\]"),
    (None, [4, 2.5], r"tokens is \[4, 2.5\]"),
    (None, torch.zeros(4, 10), r"tokens is a tensor of shape \[4, 10\], but must be how many .*: 40 for that one"),
]


@pytest.mark.parametrize(("model", "tokens", "message"), BAD)
def test_bad_input(model, tokens, message):
    with pytest.raises(InputError, match=message):
        warmup(model or make_layer(), tokens, device=H100)


def test_a_model_that_is_not_on_a_gpu():
    with pytest.raises(InputError, match="the model is on meta; kernels are compiled for a GPU"):
        warmup(make_layer(), 8)


class NoGpu:
    """As much of Triton's driver as compiling asks for."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def test_a_launch_finds_what_was_compiled_for_it(monkeypatch):
    """Triton's own path on a GPU, up to the launch: stand-ins compile the kernel that real tensors then ask for."""
    launches = precompile._launches([make_layer()], [64], H100, None)
    chosen = [launch for launch in launches if launch.kernel.__name__ in ("_schedule_kernel", "_unpermute_kernel")]
    assert len(chosen) >= 2
    monkeypatch.setattr(torch.cuda, "device", lambda where: nullcontext())
    asked = []
    monkeypatch.setattr(driver, "_active", NoGpu())
    for launch in chosen:
        monkeypatch.setattr(launch.kernel, "device_caches", defaultdict(launch.kernel.create_binder))
    assert precompiling.compile_on(torch.device("cuda"), chosen, 2) == len(chosen)
    assert precompiling.compile_on(torch.device("cuda"), chosen, 2) == 0
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **about: asked.append(about))
    for launch in chosen:
        real = [torch.empty_like(arg, device="cpu") if torch.is_tensor(arg) else arg for arg in launch.args]
        launch.kernel.warmup(*real, grid=launch.grid, **launch.options)
    assert not asked  # nothing was missing
    launch.kernel.warmup(*real, grid=launch.grid, **{**launch.options, "num_warps": 16})
    assert len(asked) == 1
