"""The process of one candidate: one question per line of standard input, one answer per line of standard output.

The first line it writes, unasked, says that it is loaded and has answered once. It sleeps while nothing is asked.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.bench.latency.engines import open_candidate
from invariclip.bench.latency.machine import peak_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from invariclip.bench.latency.engines import Opened


def answer_time(opened: Opened, question: dict[str, Any]) -> dict[str, Any]:
    """`batch`, `repetitions` → seconds of each batch, and the processor seconds of all."""
    batch = opened.make(question["batch"])
    times = []
    cpu = time.process_time()
    for _ in range(question["repetitions"]):
        start = time.perf_counter()
        opened.run(batch)
        times.append(time.perf_counter() - start)
    return {"times": times, "cpu_s": time.process_time() - cpu}


def answer_memory(opened: Opened, question: dict[str, Any]) -> dict[str, Any]:
    """→ the most memory that this process ever had resident, in bytes."""
    del opened, question
    return {"peak_bytes": peak_bytes()}


def answer_embed(opened: Opened, question: dict[str, Any]) -> dict[str, Any]:
    """`images` (a .npy of uint8 [N, H, W, 3]), `batch`, `out` → embeddings float32 [N, d] in the .npy file `out`.

    The last batch is filled up, so that a compiled tower sees no other size.
    """
    images = np.load(question["images"], mmap_mode="r", allow_pickle=False)
    size, parts = question["batch"], []
    for start in range(0, len(images), size):
        rows = np.minimum(np.arange(start, start + size), len(images) - 1)
        parts.append(np.array(opened.run(np.ascontiguousarray(images[rows]))))
    np.save(question["out"], np.concatenate(parts)[: len(images)], allow_pickle=False)
    return {"rows": len(images)}


def answer_stages(opened: Opened, question: dict[str, Any]) -> dict[str, Any]:
    """`artifact`, `variant`, `backend`, `threads`, `images` (a folder), `rounds` → see `stages.time_stages`."""
    from invariclip.bench.latency.stages import time_stages

    del opened
    return time_stages(question)


def answer_head(opened: Opened, question: dict[str, Any]) -> dict[str, Any]:
    """`bare`, `headed`, `backend`, `compute`, `threads`, `repetitions` → see `stages.time_head`."""
    from invariclip.bench.latency.stages import time_head

    del opened
    return time_head(question)


QUESTIONS: dict[str, Callable[[Opened, dict[str, Any]], dict[str, Any]]] = {
    "time": answer_time,
    "memory": answer_memory,
    "embed": answer_embed,
    "stages": answer_stages,
    "head": answer_head,
}


def main() -> None:
    """Serves questions until standard input ends."""
    # Libraries print to standard output as they like: it becomes standard error, and answers get a pipe of their own
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")  # libraries' remarks on their future; ours were heard when the files were prepared
    try:
        _serve(lambda answer: print_line(pipe, answer))
    except BrokenPipeError:  # nobody is left to hear it; exiting in order would try to write what is left once more
        os._exit(1)
    except BaseException as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        print_line(pipe, {"error": reason[:500]})
        sys.exit(1)


def print_line(pipe: Any, answer: dict[str, Any]) -> None:
    """Writes one answer."""
    pipe.write(json.dumps(answer) + "\n")
    pipe.flush()


def _serve(tell: Callable[[dict[str, Any]], None]) -> None:
    from invariclip.bench.latency.candidates import LatencyCandidate

    candidate, threads = LatencyCandidate(**json.loads(sys.argv[1])), int(sys.argv[2])
    start = time.perf_counter()
    opened = open_candidate(candidate, threads)
    loaded = time.perf_counter()
    opened.run(opened.make(1))
    tell({"engine": opened.engine, "load_s": loaded - start, "first_s": time.perf_counter() - loaded})
    slept = time.process_time()
    for line in sys.stdin:
        idle = time.process_time() - slept
        question = json.loads(line)
        kind = question.pop("do")
        answer = QUESTIONS[kind](opened, question)
        tell({**answer, "idle_cpu_s": idle} if kind == "time" else answer)
        slept = time.process_time()


if __name__ == "__main__":
    main()
