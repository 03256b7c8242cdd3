"""The range of each quantised value, with mean and second moments, from calibration images streamed through a graph.

The 256 levels of a value go from its smallest to its largest number, or less far where that errs less. A few numbers
far out make every level wider. Cutting them off costs those few and is finer for all the others; the least mean squared
error says how far to go (Banner et al., arXiv 1810.05723, section 2; searched here on a sample instead of fitting a
density).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime

from invariclip.console import silent
from invariclip.errors import ContractError
from invariclip.export.graphs.writing import write_graph
from invariclip.files import scratch_directory
from invariclip.threads import available_threads

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    import onnx_ir as ir
    from numpy.typing import NDArray

    from invariclip.console import Progress
    from invariclip.export.quantization.products import ConvWindow, Product


LEVELS = 255
SAMPLE = 1 << 18
"""Numbers of each value that are kept."""
_SHARES = np.linspace(1.0, 0.3, 36)
_TURNS = 3


class StreamSample:
    """Some rows of a stream of unknown length, spread evenly over it: never more than `SAMPLE` numbers."""

    def __init__(self) -> None:
        self._kept: list[NDArray[np.float32]] = []
        self._step = 1
        self._seen = 0

    def add(self, rows: NDArray[np.float32]) -> None:
        """Takes rows [n, K] in."""
        places = np.arange(-self._seen % self._step, len(rows), self._step)
        self._seen += len(rows)
        self._kept += [row.copy() for row in rows[places]]
        while len(self._kept) > max(1, SAMPLE // max(1, rows.shape[1])):
            self._kept = self._kept[::2]
            self._step *= 2

    @property
    def rows(self) -> NDArray[np.float32]:
        """float32 [k, K], what was kept."""
        return np.stack(self._kept)


def clipped(numbers: NDArray[np.float32], low: float, high: float) -> tuple[float, float]:
    """The range whose rounding errs least on these numbers, in the mean square.

    Args:
        numbers: A sample, of any shape.
        low: The smallest number that was seen at all, at most 0.
        high: The largest, at least 0.

    Returns:
        A range inside the given one; each end is moved in turn, the other being held.
    """
    flat = np.asarray(numbers, dtype=np.float32).ravel()
    ends = [low, high]
    best = _error(flat, low, high)
    for _ in range(_TURNS):
        before = best
        for end, whole in enumerate((low, high)):
            for share in _SHARES:
                tried = [whole * float(share) if place == end else ends[place] for place in (0, 1)]
                error = _error(flat, *tried)
                if error < best:
                    best, ends = error, tried
        if best == before:
            break
    return ends[0], ends[1]


def step(low: float, high: float) -> tuple[float, int]:
    """What one level is worth and which level is zero: zero is a level of its own, as padding and ReLU need."""
    scale = max((high - low) / LEVELS, 1e-12)
    return scale, int(np.clip(np.rint(-low / scale), 0, LEVELS))


def _error(numbers: NDArray[np.float32], low: float, high: float) -> float:
    scale, zero = step(low, high)
    levels = np.clip(np.rint(numbers / np.float32(scale)) + zero, 0, LEVELS)
    return float(np.square((levels - zero) * np.float32(scale) - numbers).mean())


POSITIONS = 100
"""Of an image's tokens or windows, how many go into means and moments, about; all of them go into the range."""


@dataclass
class Flow:
    """Statistics of what one product multiplies, [..., K], over every row that was seen.

    Attributes:
        low: Smallest number of all, at most 0.
        high: Largest number of all, at least 0.
        peaks: float32 [K], the largest |number| of each channel.
        total: float64 [K], the sum of the rows.
        moments: float32 [K, K], the sum of outer products of the rows.
        rows: How many rows.
        sample: Some of them.
    """

    low: float
    high: float
    peaks: NDArray[np.float32]
    total: NDArray[np.float64]
    moments: NDArray[np.float32]
    rows: int = 0
    sample: StreamSample = field(default_factory=StreamSample)

    @classmethod
    def empty(cls, width: int) -> Flow:
        """Of no row yet."""
        return cls(0.0, 0.0, np.zeros(width, np.float32), np.zeros(width), np.zeros((width, width), np.float32))

    def widen(self, numbers: NDArray[np.float32]) -> None:
        """Takes numbers of any shape into the range.

        Raises:
            ContractError: One of them is NaN or infinite.
        """
        if not np.isfinite(numbers).all():
            raise ContractError("a value inside the graph is NaN or infinite on a calibration image")
        self.low = min(self.low, float(numbers.min()))
        self.high = max(self.high, float(numbers.max()))

    def add(self, rows: NDArray[np.float32]) -> None:
        """Takes rows [n, K] into everything else."""
        np.maximum(self.peaks, np.abs(rows).max(axis=0), out=self.peaks)
        self.total += rows.sum(axis=0, dtype=np.float64)
        self.moments += rows.T @ rows
        self.rows += len(rows)
        self.sample.add(rows)

    @property
    def mean(self) -> NDArray[np.float64]:
        """float64 [K], the mean row."""
        return self.total / max(self.rows, 1)


def flows_of(
    model: ir.Model,
    products: Sequence[Product],
    batches: Iterable[NDArray[np.uint8]],
    *,
    threads: int | None = None,
    progress: Progress = silent,
) -> dict[str, Flow]:
    """Runs calibration images through a float32 graph and looks at what its products multiply.

    Args:
        model: The graph; it is unchanged afterwards.
        products: Those that it has.
        batches: uint8 [n, H, W, 3]; every batch is let go before the next.
        threads: Of ONNX Runtime; None takes what this process may use.
        progress: `console.bar` or `console.silent`.

    Returns:
        By `Product.reading`; of each image about `POSITIONS` rows, evenly spread, and the range of all.

    Raises:
        ContractError: A value is not finite, or no image came.
    """
    readings = {product.reading: product for product in products}
    wanted = list(dict.fromkeys(product.value for product in products))
    flows: dict[str, Flow] = {}
    with scratch_directory() as folder:
        session = _looking(model, wanted, folder / "looking.onnx", threads or available_threads())
        for batch in progress(batches, total=None, desc="calibration images"):
            answers = dict(zip(wanted, session.run(wanted, {session.get_inputs()[0].name: batch}), strict=True))
            for name, product in readings.items():
                answer = np.asarray(answers[product.value], dtype=np.float32)
                rows = _rows(answer, product.window)
                if name not in flows:
                    flows[name] = Flow.empty(rows.shape[1])
                flows[name].widen(answer)
                flows[name].add(rows)
    if wanted and not flows:
        raise ContractError("no calibration image came")
    return flows


def _rows(answer: NDArray[np.float32], window: ConvWindow | None) -> NDArray[np.float32]:
    if window is not None:
        return window.rows(answer, POSITIONS)
    by_image = answer.reshape(len(answer), -1, answer.shape[-1])
    return by_image[:, :: max(1, round(by_image.shape[1] / POSITIONS))].reshape(-1, answer.shape[-1])


def _looking(model: ir.Model, values: Sequence[str], path: Path, threads: int) -> onnxruntime.InferenceSession:
    """A session whose graph also answers the values. The edit of the graph is undone at once."""
    graph, before = model.graph, list(model.graph.outputs)
    named = {value.name: value for node in graph for value in node.outputs}
    more = [named[name] for name in values if name in named and named[name] not in before]
    graph.outputs.extend(more)
    try:
        write_graph(model, path)
    finally:
        for _ in more:  # one by one: deleting a slice leaves the values marked as outputs
            graph.outputs.pop()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
