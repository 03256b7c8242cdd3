"""Inputs in a process of their own, watched: what crashes, hangs or takes too much memory is counted and named."""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from fuzz.base import CRASH, GOOD, HANG, OUTCOMES, Try
from invariclip.files import write_atomically

ROOT = Path(__file__).parents[1]
AT_ONCE = 4000
"""Inputs to a process: what a library does not give back is given back then."""
STARTING = 900
"""Seconds that a process may take before its first input: the first of all exports artifacts."""
SAVED = 10.0
"""Seconds between two writes of how far a run is."""
MOST_KEPT = 50
"""Findings that are kept in words; all are counted."""


class FuzzError(RuntimeError):
    """A family cannot be opened: the fuzzer itself is broken, or what it starts from is refused."""


@dataclass
class Tally:
    """What the inputs of a family came to.

    Attributes:
        done: Inputs that were tried, from number 0 on.
        kinds: Kind to outcome to how many.
        findings: Number, kind, outcome and reason of what is not as it must be.
    """

    done: int = 0
    kinds: dict = field(default_factory=dict)
    findings: list = field(default_factory=list)

    def add(self, number, tried):
        """Counts one input, the next."""
        self.done = number + 1
        counts = self.kinds.setdefault(tried.kind, {})
        counts[tried.outcome] = counts.get(tried.outcome, 0) + 1
        if tried.outcome not in GOOD and len(self.findings) < MOST_KEPT:
            self.findings.append([number, tried.kind, tried.outcome, tried.why])

    def totals(self):
        """Outcome to how many, in the order of `OUTCOMES`."""
        total = Counter()
        for counts in self.kinds.values():
            total.update(counts)
        return {outcome: total[outcome] for outcome in OUTCOMES}

    def to_json(self):
        """The tally as it is kept."""
        return {"done": self.done, "kinds": self.kinds, "findings": self.findings}


def run(name, family, count, folder, *, state=None, key="", tell=None):
    """Tries inputs 0 to `count` of a family.

    Args:
        name: The family's.
        family: Its bounds.
        count: How many.
        folder: Where undamaged files are made, and damaged ones for a moment.
        state: A file that keeps how far it is; the run goes on from there if `key` is the same.
        key: Of all that an outcome depends on.
        tell: Called with the tally after every input.
    """
    tally = _resumed(state, key)
    saved = time.monotonic()
    while tally.done < count:
        for number, tried in _part(name, family, folder, tally.done, min(count, tally.done + AT_ONCE)):
            tally.add(number, tried)
            if tell:
                tell(tally)
            if state and time.monotonic() - saved > SAVED:
                saved = time.monotonic()
                _save(state, key, tally)
    if state:
        _save(state, key, tally)
    return tally


def _part(name, family, folder, start, stop):
    """Tries some inputs in one process; ends with the first that ends the process."""
    log = Path(folder) / f"{name}.log"
    with log.open("wb") as errors:
        command = [sys.executable, "-m", "fuzz.worker", name, str(folder), str(start), str(stop)]
        worker = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, env=_environment()
        )
    try:
        lines = _lines(worker, STARTING, family.seconds)
        if next(lines, None) != "ready":
            raise FuzzError(f"{name}: cannot be opened:\n{_tail(log)}")
        for number in range(start, stop):
            line = next(lines, None)
            if line is None:
                yield number, Try("any", CRASH, f"{_how(worker.wait())}: {_tail(log, 300)}")
                return
            if line == HANG:
                yield number, Try("any", HANG, f"no answer in {family.seconds} s")
                return
            found, kind, outcome, why = json.loads(line)
            if found != number:
                raise FuzzError(f"{name}: answered {found} in place of {number}")
            yield number, Try(kind, outcome, why)
    finally:
        worker.kill()
        worker.wait()
        worker.stdout.close()


def _lines(worker, first, later):
    """What a process writes, line by line; `HANG` where it writes nothing for so many seconds; ends where it does."""
    held, allowed = b"", first
    with selectors.DefaultSelector() as waiting:
        waiting.register(worker.stdout, selectors.EVENT_READ)
        while True:
            line, end, rest = held.partition(b"\n")
            if end:
                held, allowed = rest, later
                yield line.decode()
                continue
            if not waiting.select(allowed):
                yield HANG
                return
            part = os.read(worker.stdout.fileno(), 1 << 16)
            if not part:
                return
            held += part


def _environment():
    # one thread each: stacks and heaps of many would count as memory that an input took
    return {
        **os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "PYTHONHASHSEED": "0", "RAYON_NUM_THREADS": "1",
        "RUST_BACKTRACE": "0", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip


def _how(code):
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"


def _tail(log, characters=2000):
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    return text[-characters:]


def _save(state, key, tally):
    write_atomically(state, json.dumps({"key": key, **tally.to_json()}))


def _resumed(state, key):
    if state is None or not state.is_file():
        return Tally()
    kept = json.loads(state.read_text(encoding="utf-8"))
    return Tally(kept["done"], kept["kinds"], kept["findings"]) if kept["key"] == key else Tally()
