"""What the machine code of large batches must be like, kernel by kernel: the gates of `relibra compile --device`.

Every bound is one that today's kernels keep under Triton 3.6 to 3.9. Large means at least 1024 rows a slot: smaller
batches wait for memory, whatever their loop looks like.
"""

from collections.abc import Sequence
from typing import get_args

import torch
import triton

from ..compiling.machine_code import MachineCode
from ..configs.config import GEMM_KERNELS, GemmConfig, parse_config
from ..configs.half_tiles import has_half_tile
from ..configs.limits import Device, device_for
from ..configs.lookup import config_of
from ..configs.products import Product
from ..form import Activation, ExpertForm
from .catalogue import OTHERS, PARTS, REPLICAS
from .compile_task import Outcome, Task
from .models import Model
from .padded_columns import multiply_adds
from .search_goal import layer_shape

SLOTS, ROWS_PER_SLOT = 16, 4096
LARGE = 1024  # rows a slot, from which on a loop must be deep
_LEAST_BUFFERS = {"sm_80": 2, "sm_90": 3, "sm_100": 3, "sm_103": 3}
_MOST_SHARED_BYTES = {"grouped_gemm": 128.5}  # a clock; an SM of Hopper moves 128
_MOST_SHARED_BYTES_ELSE = 136.0
_MOST_EPILOGUE = 0.12  # of a tile's matrix clocks
_MOST_EPILOGUE_GRAD_HIDDEN = ((2880, 0.2), (0, 0.26))  # from this hidden size on
# With concatenated weights, on Hopper: activations whose tile loop is flattened. The others' spilled in grad_hidden.
_FLATTENED: dict[str, tuple[str, ...]] = {"gate_up": get_args(Activation), "grad_hidden": ("silu", "relu2")}
_OTHER_SIZES = 4096, 1536  # hidden and intermediate size: Qwen3-235B-A22B's, no tile half as wide
_MOST_COLUMNS = 1.07  # multiply-adds over those that a weight's columns need
_NARROW_STORES = {"grad_hidden": 1}  # partial sums, one a row
_NARROW_STORES_BY_3_6 = 33  # of grad_hidden with interleaved weights: w*a, 8 columns at a time
_NARROW_LOADS = 1  # a bias, one a column
_NARROW_LOADS_BY_AMD = 16  # the same of the four neighbouring columns that a lane of its matrix units has
_BOUNDS_OF_A_SLOT = 1  # its first row and the next slot's, at once
_MOST_INDICES = 44  # of rows, a thread; grad_weight has up to 42. A tile that is read 4 bytes at a time has more
# In a step, by Triton's minor version: no more than the loops had with two products a step and row indices that were
# loaded where they are used. 3.6 has one more in down and dx.
_MOST_BARRIERS = {6: 3, 7: 3}
_MOST_BARRIERS_ELSE = 4


def large_tasks(models: Sequence[Model], product: Product, replicas: Sequence[int]) -> list[Task]:
    """What the GEMMs of `models` launch on `product` for large batches, each thing once."""
    found = dict[Task, None]()
    for model in models:
        for kernel in GEMM_KERNELS:
            for part in PARTS[kernel]:
                found |= {_large_task(model, kernel, part, product, count): None for count in replicas}
    return list(found)


def activation_tasks(product: Product) -> list[Task]:
    """The same of what computes an activation, for each activation that no shipped model has, with two stores."""
    layers = [Model("", *_OTHER_SIZES, 1, 1, ExpertForm(activation=activation)) for activation in OTHERS]
    return [_large_task(layer, kernel, kernel, product, REPLICAS) for layer in layers for kernel in _FLATTENED]


def _large_task(model: Model, kernel: str, part: str, product: Product, replicas: int) -> Task:
    n, d, layout, interleaved = layer_shape(model, kernel, part).sizes(kernel)
    where = (device_for(product), torch.bfloat16, (n, d), SLOTS * ROWS_PER_SLOT, SLOTS, layout, interleaved)
    config = str(config_of(kernel, *where))
    return Task(product.target, kernel, part, config, model.hidden_size, model.intermediate_size, model.form, replicas)


def machine_faults(task: Task, outcome: Outcome, device: Device) -> list[str]:
    """What is wrong with the machine code of a GEMM that runs on large batches."""
    if isinstance(outcome, str):
        return [f"does not compile: {outcome}"]
    code, kernel = outcome.code, task.kernel
    assert code is not None
    found = [f"spills {outcome.spill_bytes} bytes a thread"] if outcome.spill_bytes else []
    if outcome.shared_bytes > device.shared_bytes:
        found.append(f"takes {outcome.shared_bytes} bytes of shared memory; there are {device.shared_bytes}")
    found += idle_columns(task)
    found += _pipeline_faults(code, device)
    found += _flatness_faults(task, code, device)
    if code.descriptors:
        found.append(f"makes {code.descriptors} descriptors in the tile loop; none are needed")
    if device.name in ("sm_80", "sm_90"):
        most = most_barriers(kernel, triton.__version__)
        if code.barriers > most:
            found.append(f"waits at {code.barriers} barriers in a step; {most} at most")
    if device.name == "sm_90":
        found += _hopper_faults(task, code)
    if code.amd is not None:
        if code.amd["ds_read_u16"]:
            found.append(f"reads shared memory 2 bytes at a time, {code.amd['ds_read_u16']} times a step")
        if code.amd["global_load"] or not code.amd["buffer_load"]:
            found.append(f"has {code.amd['global_load']} loads by 64-bit addresses a step; all can be buffer loads")
    return found + _access_faults(kernel, code, task.form)


def _access_faults(kernel: str, code: MachineCode, form: ExpertForm) -> list[str]:
    found = []
    narrow, allowed = code.stores - code.wide_stores, _NARROW_STORES.get(kernel, 0)
    if kernel == "grad_hidden" and not form.is_concatenated and triton.__version__.startswith("3.6."):
        allowed = _NARROW_STORES_BY_3_6
    if narrow > allowed:
        found.append(f"stores {narrow} of {code.stores} times in less than 16 bytes")
    if code.narrow_loads > _most_narrow_loads(kernel, form, on_amd=code.amd is not None):
        found.append(f"loads {code.narrow_loads} of {code.loads} times in 1, 2 or 8 bytes")
    if code.indices > _MOST_INDICES:
        found.append(f"loads {code.indices} times in 4 bytes; indices need {_MOST_INDICES} at most")
    return found


def _most_narrow_loads(kernel: str, form: ExpertForm, *, on_amd: bool) -> int:
    if on_amd and kernel == "grad_weight":
        return _BOUNDS_OF_A_SLOT
    return (_NARROW_LOADS_BY_AMD if on_amd else _NARROW_LOADS) if form.has_bias else 0


def most_barriers(kernel: str, version: str) -> int:
    """The most barriers that a step may have, in code that this version of Triton compiles for sm_80 and sm_90."""
    minor = int(version.split(".")[1])
    return _MOST_BARRIERS.get(minor, _MOST_BARRIERS_ELSE) + (minor == 6 and kernel == "grouped_gemm")


def same_code(compiled: Sequence[tuple[str, str, str]]) -> list[str]:
    """Pairs of configs of one launch that compile to the same code, as "first = second: launch".

    Args:
        compiled: (what is launched, config, digest of the instructions) of each.
    """
    first: dict[tuple[str, str], str] = {}
    found = []
    for what, config, digest in compiled:
        before = first.setdefault((what, digest), config)
        if before != config:
            found.append(f"{before} = {config}: {what}")
    return found


def idle_columns(task: Task) -> list[str]:
    """What is wrong with how many columns a config's tiles have beyond the weight's: at most one fault."""
    issued, needed = multiply_adds(task)
    if issued <= _MOST_COLUMNS * needed:
        return []
    return [f"multiplies {issued / needed:.3f} times the columns that there are; {_MOST_COLUMNS} at most"]


def is_shallow(code: MachineCode | None, device: Device) -> bool:
    """Whether the main loop has fewer buffers than a large batch needs; False where it was not read."""
    return code is not None and bool(code.buffers) and min(code.buffers) < _LEAST_BUFFERS.get(device.name, 1)


def _pipeline_faults(code: MachineCode, device: Device) -> list[str]:
    least = _LEAST_BUFFERS.get(device.name, 1)
    found = []
    if not code.buffers or min(code.buffers) < least:
        found.append(f"has {code.buffers} buffers of its operands; {least} are needed")
    if code.loads_in_flight == 0:
        found.append("waits for all of its loads in every step")
    if device.name == "sm_90" and not code.products_in_flight:
        found.append("waits for all of its products in every step")
    return found


def _flatness_faults(task: Task, code: MachineCode, device: Device) -> list[str]:
    if device.name == "sm_90" and _is_flattened(task):
        return [] if code.is_flat else ["loads nothing of the next tile before this one is stored"]
    return ["is flattened; `_FLATTENED` of the gates must name what is"] if code.is_flat else []


def _is_flattened(task: Task) -> bool:
    """Whether the tile loop is to be flattened on Hopper."""
    if task.kernel == "grouped_gemm":
        return True
    config = parse_config(task.config)
    assert isinstance(config, GemmConfig)
    is_whole = not has_half_tile(task.kernel, task.intermediate_size, config.block_n)
    return is_whole and task.form.is_concatenated and task.form.activation in _FLATTENED.get(task.kernel, ())


def _hopper_faults(task: Task, code: MachineCode) -> list[str]:
    kernel, hidden_size = task.kernel, task.hidden_size
    found = []
    most = _MOST_SHARED_BYTES.get(kernel, _MOST_SHARED_BYTES_ELSE)
    if code.shared_bytes_a_clock > most:
        found.append(f"moves {code.shared_bytes_a_clock} bytes of shared memory a matrix clock; {most} at most")
    share = _MOST_EPILOGUE
    if kernel == "grad_hidden":
        share = next(bound for size, bound in _MOST_EPILOGUE_GRAD_HIDDEN if hidden_size >= size)
    if code.epilogue_share is None or code.epilogue_share > share:
        found.append(f"has an epilogue of {code.epilogue_share} of a tile's matrix clocks; {share} at most")
    return found
