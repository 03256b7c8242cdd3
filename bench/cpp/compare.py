"""One frame answered by Python and by C++ again and again, in two processes that take turns.

`python -m invariclip.bench.cpp.compare` is the process in Python, with the arguments of `ask.cpp`:

    FRAME COLUMNS ROWS OUT pixels SIDE
    FRAME COLUMNS ROWS OUT classify ARTIFACT ENGINE THREADS
    FRAME COLUMNS ROWS OUT load ARTIFACT ENGINE THREADS
    FRAME COLUMNS ROWS OUT unverified ARTIFACT ENGINE THREADS

The last two open the artifact and close it again; `unverified` is C++ without a look at digests, beside
the engine alone.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

import invariclip
from invariclip.artifact.folder import read_manifest
from invariclip.errors import InputError
from invariclip.measure.statistics import percentiles, ratio, spread
from invariclip.measure.worker import Served, Worker, WorkerError, module, serve, take_turns
from invariclip.preprocessing.pixels import PixelSpec, pixels

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from invariclip.console import Progress

MOST_REPETITIONS = 500


@dataclass(frozen=True)
class CppTiming:
    """One question, answered by Python and by C++; times in milliseconds.

    Attributes:
        name: The question.
        python_ms: Median over every time.
        cpp_ms: The same.
        python_best_ms: The shortest time of all, which a busy machine disturbs least.
        cpp_best_ms: The same.
        python_spread: The slowest round's median over the fastest's, less one.
        cpp_spread: The same.
        faster: Python's median over C++'s of the same round; the median over rounds.
        low: Lower end of its 95 % interval.
        high: Upper end.
        equal: Whether both first answers were the same bytes.
    """

    name: str
    python_ms: float
    cpp_ms: float
    python_best_ms: float
    cpp_best_ms: float
    python_spread: float
    cpp_spread: float
    faster: float
    low: float
    high: float
    equal: bool


def compare(
    name: str, ask: Path, words: Sequence[str], folder: Path, *, rounds: int, seconds: float, progress: Progress
) -> CppTiming:
    """Times one question.

    Args:
        name: What the table calls it.
        ask: The C++ program.
        words: Frame, columns and rows; then what follows OUT.
        folder: For the first answers.
        rounds: Turns that each gets; each begins every other one.
        seconds: How long a turn should last.
        progress: Wraps the rounds.

    Raises:
        WorkerError: A process stopped.
    """
    outs = {key: folder / f"{key}.answer" for key in ("python", "cpp")}
    commands = {"python": module("invariclip.bench.cpp.compare"), "cpp": [str(ask)]}
    turns: dict[str, list[list[float]]] = {key: [] for key in commands}
    with ExitStack() as stack:
        workers = {
            f"{key}, {name}": stack.enter_context(
                Worker(
                    f"{key}, {name}",
                    [*command, *words[:3], str(outs[key]), *words[3:]],
                    environment={"OMP_NUM_THREADS": "1"},
                )
            )
            for key, command in commands.items()
        }
        counts = {one: worker.repetitions(seconds, most=MOST_REPETITIONS) for one, worker in workers.items()}
        for round_ in progress(range(rounds), total=rounds, desc=name):
            taken, stopped = take_turns(list(workers.values()), counts, round_)
            for one, reason in stopped.items():
                raise WorkerError(one, "stopped", reason)
            for key in turns:
                turns[key].append([1e3 * second for second in taken[f"{key}, {name}"].times])
    faster = ratio(turns["python"], turns["cpp"])
    slowest = {key: spread(taken) for key, taken in turns.items()}
    best = {key: min(map(min, taken)) for key, taken in turns.items()}
    return CppTiming(
        name, percentiles(turns["python"])["p50"], percentiles(turns["cpp"])["p50"], best["python"], best["cpp"],
        slowest["python"], slowest["cpp"], faster.value, faster.low, faster.high,
        outs["python"].read_bytes() == outs["cpp"].read_bytes(),
    )  # fmt: skip


def served(words: Sequence[str]) -> Served:
    """Writes the first answer to OUT; a turn gives the same answer again."""
    path, columns, rows, out, what, *rest = words
    frame = np.fromfile(path, dtype=np.uint8).reshape(int(rows), int(columns), 3)
    answer: Callable[[], Any]
    if what == "pixels":
        answer = _pixels(frame, int(rest[0]))
    elif what == "classify":
        answer = _classify(frame, rest[0], rest[1], int(rest[2]))
    else:
        answer = _load(rest[0], rest[1], int(rest[2]), engine_alone=what == "unverified")
    Path(out).write_bytes(answer().tobytes())
    return Served({}, lambda: answer)


def _pixels(frame: NDArray[np.uint8], side: int) -> Callable[[], NDArray[np.uint8]]:
    """Pillow alone is timed: its image is made once."""
    spec = PixelSpec((side, side), (0.5,) * 3, (0.5,) * 3)
    image = Image.fromarray(frame)
    return lambda: pixels(image, spec)


def _classify(frame: NDArray[np.uint8], artifact: str, engine: str, threads: int) -> Callable[[], Any]:
    """Probabilities, through the very call that a program makes."""
    model = invariclip.load(artifact, backend=engine, variant="float32", threads=threads)
    everything = len(model.classes)

    def answer() -> NDArray[np.float32]:
        found = dict(model.classify([frame], top_k=everything)[0].ranking)
        return np.array([found[name] for name in model.classes], dtype=np.float32)

    return answer


def _load(artifact: str, engine: str, threads: int, *, engine_alone: bool) -> Callable[[], Any]:
    """The artifact's space, once it is open."""
    manifest = read_manifest(artifact)
    graph = Path(artifact) / manifest.variants["float32"].image.path
    space = np.frombuffer(manifest.space_id.encode(), np.uint8)

    def alone() -> NDArray[np.uint8]:
        engine_of(engine, graph, threads)
        return space

    def opened() -> NDArray[np.uint8]:
        model = invariclip.load(artifact, backend=engine, variant="float32", threads=threads)
        return np.frombuffer(model.space_id.encode(), np.uint8)

    return alone if engine_alone else opened


def engine_of(engine: str, graph: Path, threads: int) -> object:
    """The engine alone with a graph, set as the runtime sets it for float32.

    Raises:
        InputError: No engine is called so.
    """
    if engine == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    if engine == "openvino":
        import openvino

        properties = {
            "INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY", "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False,
        }  # fmt: skip
        return openvino.Core().compile_model(openvino.Core().read_model(graph), "CPU", properties)
    raise InputError(f"no engine '{engine}'; available: onnxruntime, openvino")


if __name__ == "__main__":
    serve(lambda: served(sys.argv[1:]))
