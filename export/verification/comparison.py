"""Two towers' answers side by side, and the figures that follow from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.errors import ContractError
from invariclip.export.verification.figures import SIZES, TowerFigures, max_diff

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from invariclip.export.verification.class_head import ClassHead

TIE = 1e-6
"""Cosines closer than this are a tie: float32 unit vectors of a thousand components do not tell them apart."""
TOP = 5


@dataclass
class Comparison:
    """Reference and candidate answers of one tower.

    Attributes:
        reference: float64 [N, d] unit embeddings.
        candidate: float32 [n, d] of the graph, batch by batch.
        probabilities: float32 [n, K] of the graph, where it has classes.
        uncertainty: float32 [n] of the graph, where it has learned templates.
        non_finite: Values that are NaN or infinite, of each float output.
        batch_diff: Largest difference seen between a row alone and in a batch.
        rerun_diff: Largest difference seen between two runs.
        by_size: Batch size to the largest difference from the reference.
        altered_rows: int64 [m], the inputs that were also shown under an intervention.
        altered_reference: float64 [m, d], the reference's answers to those.
        altered: float32 [m, d], the graph's.
        levels: Further figures of the image's path, by their names in `TowerFigures`.
        worst: The batch that is furthest off: by how much, its inputs, the graph's embeddings, its first row's place.
    """

    reference: NDArray[np.float64]
    candidate: list[NDArray[np.float32]] = field(default_factory=list)
    probabilities: list[NDArray[np.float32]] = field(default_factory=list)
    uncertainty: list[NDArray[np.float32]] = field(default_factory=list)
    non_finite: dict[str, int] = field(default_factory=dict)
    batch_diff: float = 0.0
    rerun_diff: float = 0.0
    by_size: dict[int, float] = field(default_factory=dict)
    altered_rows: NDArray[np.int64] | None = None
    altered_reference: NDArray[np.float64] | None = None
    altered: NDArray[np.float32] | None = None
    levels: dict[str, Any] = field(default_factory=dict)
    worst: tuple[float, NDArray[Any], NDArray[np.float32], int] | None = None


def measure(seen: Comparison, bank: NDArray[np.float64], head: ClassHead | None = None) -> TowerFigures:
    """The figures of one tower.

    Args:
        seen: Answers of both sides on at least one input.
        bank: float64 [K, d] unit vectors of the reference in which both sides' best match is sought; where classes are
            baked in, theirs.
        head: What the classes must be answered like, where some are baked in.
    """
    wanted, got = seen.reference, np.concatenate(seen.candidate).astype(np.float64)
    cosines = _cosines(wanted, got)
    scores, candidate_scores = wanted @ bank.T, got @ bank.T
    top1, top1_ties = agreement(scores, candidate_scores, 1)
    top5: tuple[float | None, int | None] = (None, None)
    if len(bank) > TOP:
        top5 = agreement(scores, candidate_scores, TOP)
    said = {} if head is None else _said(seen, *head.answers(wanted))
    by_size: dict[str, Any] = {f"batch_{size}": seen.by_size.get(size, 0.0) for size in SIZES}
    return TowerFigures(
        items=len(wanted),
        max_abs_diff=max_diff(got, wanted),
        cosine_min=float(cosines.min()),
        cosine_mean=float(cosines.mean()),
        top1_agreement=top1,
        top1_ties=top1_ties,
        top1_of=len(bank),
        non_finite=sum(seen.non_finite.values()),
        batch_diff=seen.batch_diff,
        rerun_diff=seen.rerun_diff,
        **by_size,
        top5_agreement=top5[0],
        top5_ties=top5[1],
        **said,
        **_gap(seen, got),
        **seen.levels,
    )


def agreement(wanted: NDArray[np.float64], got: NDArray[np.float64], count: int) -> tuple[float, int]:
    """Share of rows whose `count` best columns are the same set, and how many of them are so by ties alone.

    A chosen column that the reference scores within `TIE` of its own last choice is as good as that: which of two ties
    comes first is nobody's fault.

    Args:
        wanted: float64 [N, K], the reference's scores, K of `count` or more.
        got: float64 [N, K], the candidate's. A row with a NaN agrees with nothing.
        count: How many are chosen.
    """
    rows = np.arange(len(wanted))[:, None]
    best = np.sort(np.argsort(-wanted, axis=1, kind="stable")[:, :count], axis=1)
    chosen = np.sort(np.argsort(-got, axis=1, kind="stable")[:, :count], axis=1)
    same = (best == chosen).all(axis=1)
    last = wanted[rows, best].min(axis=1, keepdims=True)
    # all that was chosen is good enough, and nothing that is clearly better than the last was left out
    fair = (wanted[rows, chosen] >= last - TIE).all(axis=1)
    fair &= (wanted[rows, chosen] > last + TIE).sum(axis=1) == (wanted > last + TIE).sum(axis=1)
    sane = np.isfinite(got).all(axis=1)
    return float(((same | fair) & sane).mean()), int((fair & ~same & sane).sum())


def invariance_gap(plain: NDArray[Any], altered: NDArray[Any]) -> float:
    """Mean over rows of 1 - cos(f(x), f(x̃)) in float64: how far an intervention moves an embedding.

    Args:
        plain: [m, d], the embeddings of images.
        altered: [m, d], of the same images under an intervention.
    """
    one, other = plain.astype(np.float64), altered.astype(np.float64)
    return float(1 - _cosines(one / np.linalg.norm(one, axis=1, keepdims=True), other).mean())


def _cosines(unit: NDArray[np.float64], got: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray((unit * got).sum(axis=1) / np.maximum(np.linalg.norm(got, axis=1), 1e-30))


def _said(
    seen: Comparison, probabilities: NDArray[np.float64], uncertainty: NDArray[np.float64] | None
) -> dict[str, Any]:
    """How far a graph's classes are from what the reference says of its own embeddings.

    Raises:
        ContractError: The graph does not answer what it should.
    """
    pairs = {"probability": (seen.probabilities, probabilities), "uncertainty": (seen.uncertainty, uncertainty)}
    for name, (got, wanted) in pairs.items():
        if bool(got) != (wanted is not None):
            raise ContractError(f"the graph {'answers' if got else 'does not answer'} a class head's {name}")
    return {
        f"{name}_diff": max_diff(np.concatenate(got), wanted)
        for name, (got, wanted) in pairs.items()
        if wanted is not None
    }


def _gap(seen: Comparison, got: NDArray[np.float64]) -> dict[str, Any]:
    if seen.altered_rows is None or seen.altered_reference is None or seen.altered is None:
        return {}
    reference = invariance_gap(seen.reference[seen.altered_rows], seen.altered_reference)
    gap = invariance_gap(got[seen.altered_rows], seen.altered)
    return {
        "gap_reference": reference,
        "gap": gap,
        "gap_increase": gap - reference,
        "gap_items": len(seen.altered_rows),
    }
