"""One config to compile for a GPU that need not be here, and what comes of it."""

from dataclasses import astuple, dataclass
from functools import cache

from ..compiling.compile_only import compile_launch, launch_digest
from ..configs.config import GEMM_KERNELS, ROW_KERNELS, parse_config
from ..configs.limits import device_named
from ..form import ExpertForm
from ..kernels.launch import Launch
from .catalogue import Layer, meta_schedule, recorded
from .launch_model import Resources


@dataclass(frozen=True)
class Task:
    """One thing to compile: a part of a layer with a config, in bf16, for a target of `limits.DEVICES`."""

    target: str
    kernel: str
    part: str
    config: str
    hidden_size: int
    intermediate_size: int
    form: ExpertForm
    replicas: int

    @property
    def key(self) -> str:
        form = ",".join(str(value) for value in astuple(self.form))
        sizes = f"{self.hidden_size}x{self.intermediate_size}"
        return f"{self.kernel} {self.part} {self.config} {sizes} {form} replicas={self.replicas}"


Outcome = Resources | str  # what it needs, or why it could not be compiled


@cache
def launches_of(task: Task) -> list[Launch]:
    """The launches of a training step that depend on the config."""
    layer = Layer(
        task.hidden_size,
        task.intermediate_size,
        task.form,
        meta_schedule(),
        task.replicas,
        accumulate=task.replicas > 0,
    )
    found = recorded(device_named(task.target), layer.call(task.kernel, task.part, parse_config(task.config)))
    return found if task.kernel in ROW_KERNELS else found[:1]


@cache
def digest_of(task: Task) -> str:
    """A digest of everything that decides what is compiled for `task`."""
    return "-".join(launch_digest(launch) for launch in launches_of(task))


def compile_task(task: Task) -> Outcome:
    """In this process: the most that any of its launches needs. An error of the compiler is an answer, no exception."""
    device = device_named(task.target)
    try:
        reads = task.kernel in GEMM_KERNELS
        found = [compile_launch(launch, device, instructions=reads) for launch in launches_of(task)]
    except Exception as error:  # whatever a compiler may raise
        last = ([line.strip() for line in str(error).splitlines() if line.strip()] or [""])[-1]
        return f"{type(error).__name__}: {last[:200]}"  # what comes before is the kernel's source
    bugs = [report.known_bug for report in found if report.known_bug]
    if bugs:
        return bugs[0]
    return Resources(
        max(report.registers for report in found),
        max(report.spill_bytes for report in found),
        max(report.shared_bytes for report in found),
        min(report.warps_per_sm for report in found),
        found[0].code if reads else None,
    )
