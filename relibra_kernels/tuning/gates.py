"""What the machine code of large batches must be like, kernel by kernel: the gates of `relibra compile --device`.

Every bound is one that today's kernels keep under Triton 3.6 to 3.9. Large means at least 1024 rows a slot: smaller
batches wait for memory, whatever their loop looks like.
"""

from collections.abc import Sequence

import torch

from ..compiling.machine_code import MachineCode
from ..configs.config import GEMM_KERNELS
from ..configs.limits import Device, device_for
from ..configs.lookup import config_of
from ..configs.products import Product
from .catalogue import PARTS
from .compile_task import Outcome, Task
from .models import Model
from .search_goal import layer_shape

SLOTS, ROWS_PER_SLOT = 16, 4096
_LEAST_BUFFERS = {"sm_80": 2, "sm_90": 3, "sm_100": 3}
_MOST_SHARED_BYTES = {"grouped_gemm": 128.5}  # a clock; an SM of Hopper moves 128
_MOST_SHARED_BYTES_ELSE = 136.0
_MOST_EPILOGUE = 0.12  # of a tile's matrix clocks
_MOST_EPILOGUE_GRAD_HIDDEN = ((2880, 0.21), (0, 0.26))  # from this hidden size on; the aim is 0.20 (gpt-oss has 0.208)
_NARROW_STORES = {"grad_hidden": 1}  # partial sums, one a row


def large_tasks(models: Sequence[Model], product: Product, replicas: Sequence[int]) -> list[Task]:
    """What the GEMMs of `models` launch on `product` for large batches, each thing once."""
    found = dict[Task, None]()
    for model in models:
        for kernel in GEMM_KERNELS:
            for part in PARTS[kernel]:
                n, d, layout, interleaved = layer_shape(model, kernel, part).sizes(kernel)
                where = (device_for(product), torch.bfloat16, (n, d), SLOTS * ROWS_PER_SLOT, SLOTS, layout, interleaved)
                sizes = (model.hidden_size, model.intermediate_size, model.form)
                config = str(config_of(kernel, *where))
                found |= {Task(product.target, kernel, part, config, *sizes, count): None for count in replicas}
    return list(found)


def machine_faults(task: Task, outcome: Outcome, device: Device) -> list[str]:
    """What is wrong with the machine code of a GEMM that runs on large batches."""
    if isinstance(outcome, str):
        return [f"does not compile: {outcome}"]
    code, kernel = outcome.code, task.kernel
    assert code is not None
    found = [f"spills {outcome.spill_bytes} bytes a thread"] if outcome.spill_bytes else []
    if outcome.shared_bytes > device.shared_bytes:
        found.append(f"takes {outcome.shared_bytes} bytes of shared memory; there are {device.shared_bytes}")
    found += _pipeline_faults(code, device)
    if code.descriptors:
        found.append(f"makes {code.descriptors} descriptors in the tile loop; none are needed")
    if device.name == "sm_90":
        found += _hopper_faults(kernel, code, task.hidden_size)
    if code.amd is not None:
        if code.amd["ds_read_u16"]:
            found.append(f"reads shared memory 2 bytes at a time, {code.amd['ds_read_u16']} times a step")
        if code.amd["global_load"] or not code.amd["buffer_load"]:
            found.append(f"has {code.amd['global_load']} loads by 64-bit addresses a step; all can be buffer loads")
    narrow = code.stores - code.wide_stores
    if narrow > _NARROW_STORES.get(kernel, 0):
        found.append(f"stores {narrow} of {code.stores} times in less than 16 bytes")
    return found


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


def _hopper_faults(kernel: str, code: MachineCode, hidden_size: int) -> list[str]:
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
