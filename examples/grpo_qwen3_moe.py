"""GRPO of a tiny Qwen3-MoE on two expert-parallel ranks: routing recorded and replayed, a plan for every batch.

    python examples/grpo_qwen3_moe.py --seeds 0 1 2 --out grpo-output

The task is to sort four digits; the reward is the share of the answer that is right, so no model judges it. Each rank
rolls out its own prompts with a copy of the whole model, as a rollout engine beside the trainer would, and trains with
its share of the experts. `--engine vllm` takes rollouts from a vLLM process instead, through files: see
examples/setup_vllm.sh. Curves are saved as grpo.png, figures as grpo.json.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from relibra_kernels import ClusterSpec, ExpertParallel, RoutingTrace
from relibra_kernels.cli.demo.grpo import answer_tokens, make_inputs, sequence_losses
from relibra_kernels.cli.demo.rollout import GROUP, Rollouts
from relibra_kernels.cli.demo.toy import EOS, VOCABULARY, make_prompts, right_answers
from relibra_kernels.integrations.transformers import record_routing, replace_moe_blocks
from relibra_kernels.planner import PlanOptions, static_plan

RANKS, MICRO_BATCHES = 2, 2
CLUSTER = ClusterSpec(num_nodes=1, gpus_per_node=RANKS, replica_slots=2)
DIGITS, PAD = 4, 15
LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class Step:
    """What is plotted. max_mean: busiest rank over the mean, with experts where they started, and under the plan."""

    reward: float
    max_mean_static: float
    max_mean_planned: float
    seconds: float
    replicas: float
    experts_moved: int
    log_prob_gap: float


@dataclass(frozen=True)
class Samples:
    """Rollouts of one rank: token ids and log-probabilities of the answers, and the routing that was recorded."""

    token_ids: list[list[int]]
    log_probs: list[np.ndarray]
    trace: RoutingTrace


class Engine(Protocol):
    """Samples one answer of up to DIGITS + 1 tokens for every prompt [B, P], with the trainer's current weights."""

    def load(self, state: dict[str, torch.Tensor], step: int) -> None: ...

    def sample(self, prompts: np.ndarray, step: int) -> Samples: ...


def build_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        moe_intermediate_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,  # the smallest that vLLM's CPU attention takes
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        eos_token_id=EOS,
        pad_token_id=PAD,
        bos_token_id=None,
        experts_implementation="relibra",
    )
    return Qwen3MoeForCausalLM(config)


class TransformersEngine:
    """`generate` of transformers in this process, with `record_routing`."""

    def __init__(self, seed: int):
        self._model = build_model(seed).eval()

    def load(self, state: dict[str, torch.Tensor], step: int) -> None:
        self._model.load_state_dict(state)

    @torch.no_grad()
    def sample(self, prompts: np.ndarray, step: int) -> Samples:
        fed = torch.from_numpy(prompts)
        options: dict[str, Any] = {"do_sample": True, "top_k": 0, "max_new_tokens": DIGITS + 1}
        options |= {"return_dict_in_generate": True, "output_logits": True}
        with record_routing(self._model) as record:
            out = self._model.generate(fed, attention_mask=torch.ones_like(fed), **options)
        answers = out.sequences[:, fed.shape[1] :]
        scores = torch.stack(out.logits, 1).log_softmax(-1).gather(-1, answers[..., None]).squeeze(-1)
        token_ids, log_probs = [], []
        for prompt, answer, score in zip(prompts, answers.numpy(), scores.numpy(), strict=True):
            length = int(np.argmax(np.append(answer == EOS, True))) + 1
            token_ids.append([*prompt.tolist(), *answer[:length].tolist()])
            log_probs.append(score[: len(answer[:length])])
        return Samples(token_ids, log_probs, record.trace(token_ids))


def score(prompts: np.ndarray, samples: Samples) -> Rollouts:
    """Rewards, and advantages within each group of answers to one prompt."""
    rewards = []
    for ids, right in zip(samples.token_ids, right_answers(prompts), strict=True):
        answer = np.array(ids[prompts.shape[1] :])
        shared = min(len(answer), len(right))
        rewards.append((answer[:shared] == right[:shared]).sum() / max(len(answer), len(right)))
    by_group = np.array(rewards).reshape(-1, GROUP)
    advantages = (by_group - by_group.mean(1, keepdims=True)) / (by_group.std(1, keepdims=True) + 1e-4)
    return Rollouts(
        tokens=[np.array(ids) for ids in samples.token_ids],
        prompt_lengths=np.full(len(prompts), prompts.shape[1]),
        log_probs=samples.log_probs,
        advantages=advantages.reshape(-1).astype(np.float32),
        reward=float(by_group.mean()),
        trace=samples.trace,
    )


class Trainer:
    """One rank: its share of the experts, an optimizer, and GRPO steps under a plan."""

    def __init__(self, seed: int):
        self.model = build_model(seed)
        replace_moe_blocks(self.model)
        self.ep = ExpertParallel(self.model, CLUSTER, model_name="grpo-qwen3-moe")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, fused=True)

    def step(self, rollouts: Rollouts) -> Step:
        start = time.perf_counter()
        groups = np.arange(len(rollouts.tokens)) * MICRO_BATCHES // len(rollouts.tokens)
        before = self.ep.home.copy()
        loads = self.ep.gather_loads(rollouts.trace, groups, MICRO_BATCHES)
        plan = self.ep.plan(rollouts.trace, groups, MICRO_BATCHES, options=PlanOptions(balance=1.0))
        total = torch.tensor([float(answer_tokens(rollouts))])
        dist.all_reduce(total)
        gap = 0.0
        self.optimizer.zero_grad()
        with self.ep.batch(plan, rollouts.trace, groups, self.optimizer):
            for m in range(MICRO_BATCHES):
                inputs = make_inputs(rollouts, np.flatnonzero(groups == m))
                with self.ep.micro_batch(m, inputs.rows):
                    (sequence_losses(self.model, inputs).sum() / total.item()).backward()
                    if m == 0:
                        gap = self._log_prob_gap(inputs)
        self.ep.reduce_gradients()
        self.optimizer.step()
        mean = torch.tensor([rollouts.reward, gap, time.perf_counter() - start])
        dist.all_reduce(mean)
        reward, gap, seconds = (mean / RANKS).tolist()
        return Step(
            reward=reward,
            max_mean_static=static_plan(loads, CLUSTER).imbalance_mean(loads),
            max_mean_planned=plan.imbalance_mean(loads),
            seconds=seconds,
            replicas=float((plan.replicas >= 0).sum((2, 3)).mean()),
            experts_moved=int((plan.home != before).sum()),
            log_prob_gap=gap,
        )

    @torch.no_grad()
    def _log_prob_gap(self, inputs: Any) -> float:
        """Largest difference of an answer token's log-probability to the one it was sampled with: replay's check."""
        logits = self.model(inputs.ids, use_cache=False).logits[:, :-1]
        now = logits.log_softmax(-1).gather(-1, inputs.ids[:, 1:, None]).squeeze(-1)
        return float(((now - inputs.log_probs).abs() * inputs.answer).max())


def train(rank: int, store: str, seed: int, steps: int, prompts_a_rank: int, engine_folder: str | None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}/store-{seed}", rank=rank, world_size=RANKS)
    trainer = Trainer(seed)
    engine: Engine = TransformersEngine(seed)
    if engine_folder is not None:
        from vllm_files import VllmEngine

        engine = VllmEngine(Path(engine_folder), rank, build_model(seed))
    random = np.random.default_rng([seed, rank])
    torch.manual_seed(seed * RANKS + rank)
    history = []
    for step in range(steps):
        state = {name: tensor for name, tensor in trainer.ep.named_logical_parameters() if tensor is not None}
        engine.load(state, step)
        prompts = make_prompts(random, prompts_a_rank, DIGITS).repeat(GROUP, 0)
        history.append(trainer.step(score(prompts, engine.sample(prompts, step))))
        if rank == 0 and (step % 10 == 9 or step == steps - 1):
            last = history[-10:]
            print(
                f"seed {seed} step {step + 1:4}: reward {np.mean([s.reward for s in last]):.3f}, max/mean "
                f"{np.mean([s.max_mean_static for s in last]):.3f} -> "
                f"{np.mean([s.max_mean_planned for s in last]):.3f}, {np.mean([s.seconds for s in last]):.2f} s a step",
                flush=True,
            )
    if rank == 0:
        Path(store, f"history-{seed}.json").write_text(json.dumps([asdict(step) for step in history]))
    dist.destroy_process_group()


def summarise(histories: dict[int, list[dict[str, float]]]) -> dict[str, Any]:
    """First and last rewards are means over a tenth of the steps."""
    summary: dict[str, Any] = {}
    for seed, history in histories.items():
        tenth = max(1, len(history) // 10)
        rewards = [step["reward"] for step in history]
        first, last = float(np.mean(rewards[:tenth])), float(np.mean(rewards[-tenth:]))
        summary[str(seed)] = {
            "first_reward": first,
            "last_reward": last,
            "improvement": last / first,
            "max_mean_static": float(np.mean([step["max_mean_static"] for step in history])),
            "max_mean_planned": float(np.mean([step["max_mean_planned"] for step in history])),
            "largest_log_prob_gap": max(step["log_prob_gap"] for step in history),
        }
    return summary


def plot(histories: dict[int, list[dict[str, float]]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    reward, balance, seconds, replicas = figure.subplots(2, 2, sharex=True).flat
    for index, (seed, history) in enumerate(histories.items()):
        color = f"C{index}"
        reward.plot([step["reward"] for step in history], color=color, label=f"seed {seed}")
        balance.plot([step["max_mean_static"] for step in history], color=color, alpha=0.4, label="experts in place")
        balance.plot([step["max_mean_planned"] for step in history], color=color, label="under the plan")
        seconds.plot([step["seconds"] for step in history], color=color)
        replicas.plot([step["replicas"] for step in history], color=color)
        if index == 0:
            balance.legend()
    reward.legend()
    for axis, title in (
        (reward, "reward"),
        (balance, "busiest rank / mean, over layers and micro-batches"),
        (seconds, "seconds of a training step (measured, CPU)"),
        (replicas, "replicas a layer and micro-batch"),
    ):
        axis.set_title(title)
        axis.set_xlabel("step")
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument(
        "--prompts", type=int, default=16, help=f"a rank and step; {GROUP} answers are sampled for each"
    )
    parser.add_argument("--out", type=Path, default=Path("grpo-output"))
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--vllm-python", type=Path, help="the interpreter that examples/setup_vllm.sh made")
    args = parser.parse_args()
    if args.engine == "vllm" and args.vllm_python is None:
        parser.error("--engine vllm needs --vllm-python (examples/setup_vllm.sh makes it)")
    args.out.mkdir(parents=True, exist_ok=True)
    start, histories = time.perf_counter(), {}
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            server = None
            if args.engine == "vllm":
                from vllm_files import start_server

                server = start_server(args.vllm_python, Path(folder), RANKS)
            try:
                arguments = (folder, seed, args.steps, args.prompts, None if server is None else folder)
                mp.start_processes(train, arguments, nprocs=RANKS, start_method="spawn")
            finally:
                if server is not None:
                    server.kill()
                    server.wait()
            histories[seed] = json.loads(Path(folder, f"history-{seed}.json").read_text())
    summary = summarise(histories)
    seconds = time.perf_counter() - start
    (args.out / "grpo.json").write_text(
        json.dumps({"seconds": seconds, "seeds": summary, "steps": histories}, indent=1)
    )
    plot(histories, args.out / "grpo.png")
    for seed, figures in summary.items():
        print(
            f"seed {seed}: reward {figures['first_reward']:.3f} -> {figures['last_reward']:.3f} "
            f"({figures['improvement']:.1f}x), max/mean {figures['max_mean_static']:.3f} -> "
            f"{figures['max_mean_planned']:.3f}, log-probabilities within {figures['largest_log_prob_gap']:.1e}"
        )
    print(f"{seconds:.0f} s in all; curves in {args.out / 'grpo.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
