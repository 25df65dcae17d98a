"""Run a command and fail where it took more CPU time than it may: `python .ci/cpu_seconds.py LIMIT COMMAND...`.

CPU time of the command and all that it waited for, not what a clock on the wall says of a busy machine.
"""

import resource
import subprocess
import sys


def main(limit: float, command: list[str]) -> int:
    status = subprocess.run(command).returncode
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = usage.ru_utime + usage.ru_stime
    print(f"{' '.join(command)}: {seconds:.1f} s of CPU time, {limit:g} at most")
    return status or int(seconds > limit)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
