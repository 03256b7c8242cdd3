"""What is timed, and what was measured of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LatencyCandidate:
    """One way to run a tower, or to multiply matrices.

    Attributes:
        name: How the table calls it.
        kind: One of `engines.KINDS`: `pytorch` (the original checkpoint's image tower), `artifact` (an artifact's, as
            `load` serves it), `graph` (an ONNX file of either tower in one of our backends),
            `whole` (the same of an image tower, asked for its classes too), `onnxruntime`, `openvino`
            (a file in an engine as its documentation says, without us) or `peak` (large matrix products).
        model: open_clip model for `pytorch`, artifact folder for `artifact`, file for the others, empty for `peak`.
        checkpoint: Weights file for `pytorch`, or None.
        backend: Engine of `graph` and `artifact`.
        ids: Ids per text that a text `graph` is fed; None feeds images.
        compute: What the arithmetic is: `float32`, `bfloat16`, for `peak` also `int8`. Artifacts know it themselves.
        variant: The variant of `artifact`.
        compiled: `pytorch` through torch.compile.
        tokenizer: Of `pytorch`, where its model needs one that is not its own.
    """

    name: str
    kind: str
    model: str
    checkpoint: str | None = None
    backend: str = "onnxruntime"
    ids: int | None = None
    compute: str = "float32"
    variant: str = "float32"
    compiled: bool = False
    tokenizer: str | None = None


@dataclass(frozen=True)
class Timing:
    """What was measured of one candidate at one batch size; times in milliseconds per batch.

    Attributes:
        median_ms: Over all repetitions.
        p95_ms: 95th percentile.
        ratio: Median over rounds of (first candidate's median / this one's): above 1 is faster than the first.
        ratio_low: Lower end of the 95 % bootstrap interval of that median over rounds.
        ratio_high: Upper end.
        repetitions: How many batches were timed.
        rounds: In how many rounds; 0 where that was not kept.
        steal: Share of processor time, mean over rounds, that went to other machines of the host; None if not known.
        others: The same of other programs; see `noise.busy_machine` for what follows from both.
    """

    name: str
    batch: int
    median_ms: float
    p95_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    repetitions: int
    rounds: int = 0
    steal: float | None = None
    others: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain fields."""
        return asdict(self)
