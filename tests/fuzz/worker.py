"""The process that inputs are tried in: `python -m fuzz.worker FAMILY FOLDER START STOP`, a line of JSON for each.

Its memory is bounded before the first input. A crash or a hang ends this process alone: the one that started it
knows which input was under way, and starts another behind it.
"""

import json
import os
import resource
import sys
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")


def main(name, folder, start, stop):
    """Tries inputs start to stop of a family, in order."""
    lines = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # whatever libraries print is not mistaken for an answer

    from fuzz.base import attempt
    from fuzz.families import family

    warnings.simplefilter("ignore")
    opened = family(name)
    opened.open(Path(folder))
    _bound(opened.memory)
    lines.write("ready\n")
    for number in range(start, stop):
        tried = attempt(opened, name, number)
        lines.write(json.dumps([number, tried.kind, tried.outcome, tried.why]) + "\n")


def _bound(more):
    """Lets the address space grow by so many bytes and no further."""
    if sys.platform != "linux":  # other systems have no such bound
        return
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    now = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
