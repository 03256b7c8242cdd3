"""The parity contract: an exported graph answers like its checkpoint, shown on real pictures, or it is not shipped.

Reference: the original PyTorch encoder in float32, unfolded; then A_inv and the L2 norm in float64. Candidate: the ONNX
file. Both see the same uint8 pictures and the same ids. `measure` gives a tower's figures, `failures` holds them
against the bounds of a precision; a variant that fails is not written.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.errors import ContractError
from invariclip.export.towers import EMBEDDING, PROBABILITIES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from invariclip.backends import Backend
    from invariclip.export.checkpoint import Checkpoint
    from invariclip.projection import Projection

BATCH = 16
"""Rows per run; the last batch is smaller, which is one more shape that is tried."""
_ALONE = 8
"""Rows that are also run one by one."""


@dataclass(frozen=True)
class Thresholds:
    """Bounds of one precision; the defaults are float32's.

    Attributes:
        max_abs_diff: Largest difference of any component of two unit embeddings.
        min_cosine: Smallest cosine between an embedding and its reference.
        min_top1: Share of inputs whose best match is the reference's.
        max_batch_diff: Largest difference of a row's embedding alone and in a batch.
        max_rerun_diff: Largest difference between two runs on the same input.
        max_probability_diff: Largest difference of a class probability.
    """

    max_abs_diff: float = 1e-5
    min_cosine: float = 0.999999
    min_top1: float = 1.0
    max_batch_diff: float = 1e-5
    max_rerun_diff: float = 0.0
    max_probability_diff: float = 1e-4


FLOAT32 = Thresholds()


@dataclass(frozen=True)
class Figures:
    """What was measured of one tower.

    Attributes:
        items: Pictures or texts.
        max_abs_diff: See `Thresholds`.
        cosine_min: Smallest cosine to the reference.
        cosine_mean: Mean cosine to the reference.
        top1_agreement: Share of inputs whose best match in `bank` is the same.
        top1_of: Rows of the bank that the best match was sought in.
        top1_min_margin: Smallest gap between the reference's two best cosines: differences below it cannot turn a match.
        non_finite: Values of the embedding that are NaN or infinite.
        batch_diff: See `Thresholds`.
        rerun_diff: See `Thresholds`.
        probability_diff: See `Thresholds`; None where no classes are baked in.
    """

    items: int
    max_abs_diff: float
    cosine_min: float
    cosine_mean: float
    top1_agreement: float
    top1_of: int
    top1_min_margin: float
    non_finite: int
    batch_diff: float
    rerun_diff: float
    probability_diff: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The figures as the manifest stores them; NaN, which JSON lacks, becomes None."""
        plain = asdict(self)
        return {name: None if isinstance(value, float) and not np.isfinite(value) else value for name, value in plain.items()}


@dataclass
class Comparison:
    """Reference and candidate answers of one tower, collected batch by batch.

    Attributes:
        reference: float64 [n, d] unit embeddings of each batch.
        candidate: float32 [n, d] of the graph.
        probabilities: Class probabilities of the graph, where it has classes.
        batch_diff: Largest difference seen between a row alone and in a batch.
        rerun_diff: Largest difference seen between two runs.
    """

    reference: list[NDArray[np.float64]] = field(default_factory=list)
    candidate: list[NDArray[np.float32]] = field(default_factory=list)
    probabilities: list[NDArray[np.float32]] = field(default_factory=list)
    batch_diff: float = 0.0
    rerun_diff: float = 0.0


def compare(
    batches: Iterable[NDArray[Any]], reference: Callable[[NDArray[Any]], NDArray[np.float64]], backend: Backend
) -> Comparison:
    """Runs reference and candidate on every batch.

    Args:
        batches: uint8 [n, H, W, 3] or int64 [n, L].
        reference: A batch to float64 [n, d] unit embeddings.
        backend: The loaded graph; it has one input.
    """
    seen = Comparison()
    name = backend.input_names[0]
    for batch in batches:
        answers = backend.run({name: batch})
        embedding = answers[EMBEDDING]
        if not seen.candidate:
            again = backend.run({name: batch})[EMBEDDING]
            alone = np.concatenate([backend.run({name: batch[i : i + 1]})[EMBEDDING] for i in range(min(_ALONE, len(batch)))])
            seen.rerun_diff = _max_diff(embedding, again)
            seen.batch_diff = _max_diff(embedding[: len(alone)], alone)
        seen.reference.append(reference(batch))
        seen.candidate.append(embedding)
        if PROBABILITIES in answers:
            seen.probabilities.append(answers[PROBABILITIES])
    return seen


def measure(
    seen: Comparison,
    bank: NDArray[np.float64],
    *,
    logits: Callable[[NDArray[np.float64]], NDArray[np.float64]] | None = None,
) -> Figures:
    """The figures of one tower.

    Args:
        seen: Answers of both sides on at least one input.
        bank: float64 [K, d] unit vectors of the reference that the best match is sought in, the same for both sides.
        logits: Cosines [N, K] with the baked classes to probabilities [N, K], to compare the graph's own with.
    """
    wanted, got = np.concatenate(seen.reference), np.concatenate(seen.candidate).astype(np.float64)
    cosines = (wanted * got).sum(axis=1) / np.maximum(np.linalg.norm(got, axis=1), 1e-30)
    scores = wanted @ bank.T
    best_two = np.sort(scores, axis=1)[:, -2:]
    difference = None
    if seen.probabilities and logits is not None:
        difference = _max_diff(np.concatenate(seen.probabilities), logits(scores))
    return Figures(
        items=len(wanted),
        max_abs_diff=_max_diff(got, wanted),
        cosine_min=float(cosines.min()),
        cosine_mean=float(cosines.mean()),
        top1_agreement=float((scores.argmax(axis=1) == (got @ bank.T).argmax(axis=1)).mean()),
        top1_of=len(bank),
        top1_min_margin=float((best_two[:, -1] - best_two[:, 0]).min()) if len(bank) > 1 else 2.0,
        non_finite=int((~np.isfinite(got)).sum()),
        batch_diff=seen.batch_diff,
        rerun_diff=seen.rerun_diff,
        probability_diff=difference,
    )


def failures(tower: str, figures: Figures, bounds: Thresholds) -> list[str]:
    """Every bound that a tower's figures break, in words; empty if it passed. A figure that is NaN breaks its bound."""
    found = [f"{tower} answers {figures.non_finite} values that are NaN or infinite"] if figures.non_finite else []
    upper = {
        "max |Δ|": (figures.max_abs_diff, bounds.max_abs_diff),
        "batch consistency, max |Δ|": (figures.batch_diff, bounds.max_batch_diff),
        "run-to-run, max |Δ|": (figures.rerun_diff, bounds.max_rerun_diff),
        "probability, max |Δ|": (figures.probability_diff, bounds.max_probability_diff),
    }
    lower = {
        "cosine, min": (figures.cosine_min, bounds.min_cosine),
        "top-1 agreement": (figures.top1_agreement, bounds.min_top1),
    }
    for name, (value, bound) in upper.items():
        if value is not None and not value <= bound:
            found.append(f"{tower} {name} {value:.3g} is above {bound:.3g}")
    for name, (share, bound) in lower.items():
        if not share >= bound:
            found.append(f"{tower} {name} {share:.7g} is below {bound:.7g}")
    return found


def require(broken: list[str], what: str) -> None:
    """Fails if any bound is broken.

    Raises:
        ContractError: Naming each figure that failed, and by how much.
    """
    if broken:
        raise ContractError(f"{what} does not answer like its checkpoint: {'; '.join(broken)}")


def image_reference(checkpoint: Checkpoint, projection: Projection | None) -> Callable[[NDArray[Any]], NDArray[np.float64]]:
    """uint8 [N, H, W, 3] → float64 [N, d]: encoder in float32, then projection and norm in float64."""
    return lambda batch: project(checkpoint.encode_images(batch), projection)


def text_reference(checkpoint: Checkpoint, projection: Projection | None) -> Callable[[NDArray[Any]], NDArray[np.float64]]:
    """int64 [N, L] → float64 [N, d]: encoder in float32, then projection and norm in float64."""
    return lambda ids: project(checkpoint.encode_texts(ids), projection)


def project(raw: NDArray[np.float32], projection: Projection | None) -> NDArray[np.float64]:
    """Raw embeddings to unit embeddings in float64, through A_inv where there is one."""
    if projection is not None:
        return projection.apply(raw)
    wide = raw.astype(np.float64)
    return np.asarray(wide / np.linalg.norm(wide, axis=1, keepdims=True))


def class_probabilities(checkpoint: Checkpoint) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """Cosines [N, K] to probabilities [N, K] in float64, as the checkpoint scores: softmax, or sigmoid with a bias."""

    def of(cosines: NDArray[np.float64]) -> NDArray[np.float64]:
        scores = cosines * checkpoint.logit_scale
        if checkpoint.logit_bias is not None:
            return np.asarray(1 / (1 + np.exp(-(scores + checkpoint.logit_bias))))
        powers = np.exp(scores - scores.max(axis=1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=1, keepdims=True))

    return of


def _max_diff(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Largest |difference|; NaN if either side has one."""
    return float(np.abs(one.astype(np.float64) - other.astype(np.float64)).max())
