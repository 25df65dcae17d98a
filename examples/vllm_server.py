"""Rollouts from a vLLM process through files: vLLM's side, run by the interpreter that setup_vllm.sh made.

    python vllm_server.py FOLDER RANKS

On a CPU vLLM records routing with its second model runner, which looks for a Triton driver: its few kernels run in
Triton's interpreter here, behind a driver that only says that it is there.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

SETTINGS = {
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def pretend_a_triton_driver() -> None:
    """A driver for "cpu" among Triton's back ends, so that vLLM takes Triton for usable."""
    import torch
    from triton.backends import Backend, backends
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class CpuDriver(DriverBase):
        def __init__(self) -> None:
            pass

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cpu", 0, 1)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_current_device(self) -> int:
            return 0

        def get_benchmarker(self) -> Any:
            raise NotImplementedError("nothing is timed here")

    for name in list(backends):
        del backends[name]
    backends["cpu"] = Backend(compiler=None, driver=CpuDriver)


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.05)


def answer(llm: Any, request: Path) -> None:
    """Sample one answer to every prompt, and write routing, samples and `done`."""
    import numpy as np
    from vllm import SamplingParams

    content = json.loads((request / "prompts.json").read_text())
    params = [
        SamplingParams(
            temperature=1.0,
            max_tokens=content["max_tokens"],
            stop_token_ids=[content["eos"]],
            logprobs=0,
            detokenize=False,
            seed=content["seed"] * len(content["prompts"]) + i,
        )
        for i in range(len(content["prompts"]))
    ]
    prompts = [{"prompt_token_ids": prompt} for prompt in content["prompts"]]
    (request / "routed").mkdir()
    lines = []
    for i, out in enumerate(llm.generate(prompts, params, use_tqdm=False)):
        sample = out.outputs[0]
        np.save(request / "routed" / f"{i:06}.npy", np.asarray(sample.routed_experts))
        log_probs = [step[token].logprob for step, token in zip(sample.logprobs, sample.token_ids, strict=True)]
        lines.append(json.dumps({"token_ids": [*out.prompt_token_ids, *sample.token_ids], "log_probs": log_probs}))
    (request / "samples.jsonl").write_text("\n".join(lines) + "\n")
    (request / "done").touch()


def main() -> None:
    folder, ranks, step = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0
    os.environ.update(SETTINGS)
    try:
        pretend_a_triton_driver()
        from vllm import LLM

        wait_for(folder / f"rank0-step{step}" / "prompts.json")
        llm = LLM(
            str(folder / f"weights-{step}"),
            skip_tokenizer_init=True,
            enable_return_routed_experts=True,
            enforce_eager=True,
            enable_prefix_caching=True,  # which recorded routing requires
            dtype="float32",
            max_model_len=64,
            max_num_seqs=256,
        )
        for rank in range(ranks):
            request = folder / f"rank{rank}-step{step}"
            wait_for(request / "prompts.json")
            answer(llm, request)
    except BaseException:
        traceback.print_exc()  # before the trainer is told to look
        (folder / "ended").touch()
        raise
    # A new process for new weights: reloaded in place, some stay as they were on the CPU (vLLM 0.32).
    os.execv(sys.executable, [sys.executable, __file__, str(folder), str(ranks), str(step + 1)])


if __name__ == "__main__":
    main()
