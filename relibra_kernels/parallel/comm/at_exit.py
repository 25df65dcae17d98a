"""Let gloo's workers finish before Python does.

A worker lets go of the last collective's tensors after that collective has returned, and needs the interpreter for it.
`dist.destroy_process_group` waits for workers only where nobody else holds the group, and a run does. A worker that
comes when Python is ending aborts the process (seen with torch 2.13: "terminate called without an active exception").
"""

import atexit
import functools
import time

_SECONDS = 0.05  # a worker needs microseconds once the interpreter is free


@functools.cache
def wait_for_workers() -> None:
    """Leave the interpreter to them for a moment when the process ends. Once a process."""
    atexit.register(time.sleep, _SECONDS)
