"""What reference and graph answer to the same inputs, streamed, and the figures that follow from the two side by side.

The reference is asked once; each graph in its turn, in every batch size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.artifact.manifest import EMBEDDING, LOGITS, PROBABILITIES, UNCERTAINTY
from invariclip.errors import CheckpointError, ContractError
from invariclip.export.verification.evidence import altered
from invariclip.export.verification.figures import SIZES, TowerFigures, max_diff
from invariclip.text_tower import cut_to_longest

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from numpy.typing import NDArray

    from invariclip.artifact.projection import Projection
    from invariclip.backends import Backend
    from invariclip.export.verification.class_head import ClassHead
    from invariclip.preprocessing.tokenizer import TextSpec
    from invariclip.sites.site import Site

_FIRST = max(SIZES)
_RUNS = 3
"""Further runs of the first batch, which must answer the same."""
TIE = 1e-6
"""Cosines closer than this are a tie: float32 unit vectors of a thousand components do not tell them apart."""
TOP = 5


@dataclass(frozen=True)
class ReferenceTarget:
    """One tower's inputs, and what the reference answers.

    Attributes:
        batches: Gives the inputs again, batch by batch: uint8 [n, H, W, 3] or int64 [n, L].
        raw: float32 [N, D], the reference's raw embeddings.
        first: The first inputs, as many as the largest of `SIZES`; fewer repeat themselves.
        altered_rows: int64 [m], inputs that are also shown under an intervention.
        altered: Those, changed; None for texts.
        altered_raw: float32 [m, D], the reference's answers to them.
        spec: How texts became ids; None for images.
    """

    batches: Callable[[], Iterable[NDArray[Any]]]
    raw: NDArray[np.float32]
    first: NDArray[Any]
    altered_rows: NDArray[np.int64]
    altered: NDArray[np.uint8] | None = None
    altered_raw: NDArray[np.float32] | None = None
    spec: TextSpec | None = None


def show(
    batches: Callable[[], Iterable[NDArray[Any]]],
    encode: Callable[[NDArray[Any]], NDArray[np.float32]],
    *,
    alter: Collection[int] = (),
    spec: TextSpec | None = None,
) -> ReferenceTarget:
    """Runs the reference on every input once.

    Args:
        batches: Gives the inputs, batch by batch, the same at every call.
        encode: The reference encoder, a batch to raw float32 [n, D].
        alter: Inputs, by their place, that are also shown under an intervention.
        spec: See `ReferenceTarget`.

    Raises:
        CheckpointError: The checkpoint itself answers with NaN or infinity.
    """
    raw, first, chosen, rows = [], [], [], []
    count = 0
    for batch in batches():
        raw.append(encode(batch))
        if count < _FIRST:
            first.append(batch[: _FIRST - count])
        places = [place for place in range(len(batch)) if count + place in alter]
        rows += [count + place for place in places]
        chosen += [batch[place] for place in places]
        count += len(batch)
    answers, start = np.concatenate(raw), np.concatenate(first)
    changed = altered(np.stack(chosen)) if chosen else None
    changed_raw = None if changed is None else encode(changed)
    bad = sum(int((~np.isfinite(part)).sum()) for part in (answers, changed_raw) if part is not None)
    if bad:
        raise CheckpointError(f"the checkpoint itself answers {bad} values that are NaN or infinite; take another")
    start = start[np.arange(_FIRST) % len(start)]
    return ReferenceTarget(batches, answers, start, np.array(rows, dtype=np.int64), changed, changed_raw, spec)


def compare(
    backend: Backend,
    target: ReferenceTarget,
    projection: Projection | None,
    batches: Iterable[NDArray[Any]],
    site: Site | None = None,
) -> Comparison:
    """Runs one graph on every input.

    Args:
        backend: The loaded graph; it has one input.
        target: The inputs and the reference's answers.
        projection: What the graph claims to hold.
        batches: `target.batches()`, or the same in a progress display.
        site: Whose shift the graph claims to take away, or None.

    Raises:
        ContractError: The graph cannot answer a batch, or its embeddings are of another width.
    """
    comparison = Comparison(reference=project(target.raw, projection, site))
    served = _served(backend, target)
    count = 0
    for batch in batches:
        answers = _ask(backend, served(batch))
        wanted = comparison.reference[count : count + len(batch)]
        if answers[EMBEDDING].shape != wanted.shape:
            raise ContractError(
                f"its embeddings are {list(answers[EMBEDDING].shape)} where checkpoint and projection give "
                f"{list(wanted.shape)}; it was made with another projection or model"
            )
        if not count:
            comparison.rerun_diff = _rerun(backend, served(batch), answers)
        off = _off(answers[EMBEDDING], wanted)
        if comparison.worst is None or off > comparison.worst[0]:
            comparison.worst = off, batch, answers[EMBEDDING], count
        comparison.candidate.append(answers[EMBEDDING])
        heads = {
            LOGITS: comparison.logits, PROBABILITIES: comparison.probabilities, UNCERTAINTY: comparison.uncertainty,
        }  # fmt: skip
        for name, kept in heads.items():
            kept += [answers[name]] if name in answers else []
        for name, value in answers.items():
            if np.issubdtype(value.dtype, np.floating):
                comparison.non_finite[name] = comparison.non_finite.get(name, 0) + int((~np.isfinite(value)).sum())
        count += len(batch)
    if count != len(target.raw):
        raise ContractError(f"{count} inputs came where {len(target.raw)} were shown first; a file changed meanwhile")
    _try_sizes(backend, target, comparison)
    if target.altered is not None and target.altered_raw is not None:
        starts = range(0, len(target.altered), _FIRST)
        parts = [_ask(backend, target.altered[start : start + _FIRST])[EMBEDDING] for start in starts]
        comparison.altered_rows, comparison.altered = target.altered_rows, np.concatenate(parts)
        comparison.altered_reference = project(target.altered_raw, projection, site)
    return comparison


def project(raw: NDArray[np.float32], projection: Projection | None, site: Site | None = None) -> NDArray[np.float64]:
    """Raw embeddings [N, D] to unit embeddings [N, d] in float64, through A_inv and less a site's shift where given."""
    rows = raw.astype(np.float64)
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True) if projection is None else projection.apply(rows)
    return rows if site is None else site.exactly(rows)


def _served(backend: Backend, target: ReferenceTarget) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """How serving would feed a batch: a text graph of free length gets rows no longer than the longest text."""
    spec = target.spec
    if spec is None or backend.input_shapes[backend.input_names[0]][-1] is not None:
        return lambda batch: batch
    return lambda batch: cut_to_longest(batch, spec)


def _ask(backend: Backend, batch: NDArray[Any]) -> dict[str, NDArray[Any]]:
    try:
        return backend.run({backend.input_names[0]: batch})
    except Exception as error:  # engines' exceptions share no base class of their own
        reason = " ".join(str(error).split())
        raise ContractError(f"the graph cannot answer a batch of {list(batch.shape)}: {reason}") from error


def _rerun(backend: Backend, batch: NDArray[Any], answers: dict[str, NDArray[Any]]) -> float:
    """Largest difference of any output between runs on the same input."""
    again = [_ask(backend, batch) for _ in range(_RUNS)]
    pairs = [(run[name], value) for run in again for name, value in answers.items()]
    # the same NaN again is no difference between runs; that it is NaN is another figure's business
    same = [0.0 if np.array_equal(one, other, equal_nan=True) else max_diff(one, other) for one, other in pairs]
    return float(np.max(same))  # Python's max would lose a NaN that is not the first


def _try_sizes(backend: Backend, target: ReferenceTarget, comparison: Comparison) -> None:
    """The first inputs in batches of every size: against the reference, and against themselves alone."""
    rows = np.arange(_FIRST) % len(comparison.reference)
    wanted = comparison.reference[rows]
    together = np.concatenate(comparison.candidate)[rows]
    alone = np.empty((0,))
    for size in SIZES:
        starts = range(0, _FIRST - _FIRST % size, size)
        got = np.concatenate([_ask(backend, target.first[start : start + size])[EMBEDDING] for start in starts])
        comparison.by_size[size] = max_diff(got, wanted[: len(got)])
        if size == 1:
            alone = got
        comparison.batch_diff = float(np.maximum(comparison.batch_diff, max_diff(got, alone[: len(got)])))
    comparison.batch_diff = float(np.maximum(comparison.batch_diff, max_diff(together, alone)))


def _off(got: NDArray[Any], wanted: NDArray[np.float64]) -> float:
    """How wrong a batch is, for finding the worst: NaN counts as infinitely wrong."""
    return float(np.nan_to_num(np.abs(got - wanted), nan=np.inf, posinf=np.inf).max())


@dataclass
class Comparison:
    """Reference and candidate answers of one tower.

    Attributes:
        reference: float64 [N, d] unit embeddings.
        candidate: float32 [n, d] of the graph, batch by batch.
        logits: float32 [n, K] of the graph, where it has classes.
        probabilities: float32 [n, K] of the graph, likewise.
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
    logits: list[NDArray[np.float32]] = field(default_factory=list)
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


def measure(comparison: Comparison, bank: NDArray[np.float64], head: ClassHead | None = None) -> TowerFigures:
    """The figures of one tower.

    Args:
        comparison: Answers of both sides on at least one input.
        bank: float64 [K, d] unit vectors of the reference in which both sides' best match is sought; where classes are
            baked in, theirs.
        head: What the classes must be answered like, where some are baked in.
    """
    wanted, got = comparison.reference, np.concatenate(comparison.candidate).astype(np.float64)
    cosines = _cosines(wanted, got)
    scores, candidate_scores = wanted @ bank.T, got @ bank.T
    top1, top1_ties = agreement(scores, candidate_scores, 1)
    top5: tuple[float | None, int | None] = (None, None)
    if len(bank) > TOP:
        top5 = agreement(scores, candidate_scores, TOP)
    said = {} if head is None else _said(comparison, *head.answers(wanted))
    if head is not None:  # of learned templates, the hand-written one's
        own = got / np.linalg.norm(got, axis=1, keepdims=True)
        cosines_of_classes = own @ (head.bank if head.learned is None else head.bank[0]).T
        said["order_gap"] = order_gap(np.concatenate(comparison.logits), cosines_of_classes)
    by_size: dict[str, Any] = {f"batch_{size}": comparison.by_size.get(size, 0.0) for size in SIZES}
    return TowerFigures(
        items=len(wanted),
        max_abs_diff=max_diff(got, wanted),
        cosine_min=float(cosines.min()),
        cosine_mean=float(cosines.mean()),
        top1_agreement=top1,
        top1_ties=top1_ties,
        top1_of=len(bank),
        non_finite=sum(comparison.non_finite.values()),
        batch_diff=comparison.batch_diff,
        rerun_diff=comparison.rerun_diff,
        **by_size,
        top5_agreement=top5[0],
        top5_ties=top5[1],
        **said,
        **_gap(comparison, got),
        **comparison.levels,
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


def order_gap(logits: NDArray[np.floating], cosines: NDArray[np.float64]) -> float:
    """The largest cosine by which a class is ranked below one that is less like the image; 0 for the right ranking.

    Args:
        logits: [N, K], by which classes are ranked; the first of equal ones comes first.
        cosines: float64 [N, K], what the ranking should follow.

    Returns:
        NaN where a logit is not finite.
    """
    if not np.isfinite(logits).all():
        return float("nan")
    ranked = np.take_along_axis(cosines, np.argsort(-logits, axis=1, kind="stable"), axis=1)
    return float((ranked - np.minimum.accumulate(ranked, axis=1)).max(initial=0.0))


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
    comparison: Comparison, probabilities: NDArray[np.float64], uncertainty: NDArray[np.float64] | None
) -> dict[str, Any]:
    """How far a graph's classes are from what the reference says of its own embeddings.

    Raises:
        ContractError: The graph does not answer what it should.
    """
    pairs = {
        "probability": (comparison.probabilities, probabilities),
        "uncertainty": (comparison.uncertainty, uncertainty),
    }
    for name, (got, wanted) in pairs.items():
        if bool(got) != (wanted is not None):
            raise ContractError(f"the graph {'answers' if got else 'does not answer'} a class head's {name}")
    return {
        f"{name}_diff": max_diff(np.concatenate(got), wanted)
        for name, (got, wanted) in pairs.items()
        if wanted is not None
    }


def _gap(comparison: Comparison, got: NDArray[np.float64]) -> dict[str, Any]:
    if comparison.altered_rows is None or comparison.altered_reference is None or comparison.altered is None:
        return {}
    reference = invariance_gap(comparison.reference[comparison.altered_rows], comparison.altered_reference)
    gap = invariance_gap(got[comparison.altered_rows], comparison.altered)
    return {
        "gap_reference": reference,
        "gap": gap,
        "gap_increase": gap - reference,
        "gap_items": len(comparison.altered_rows),
    }
