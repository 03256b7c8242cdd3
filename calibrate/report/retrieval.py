"""What images retrieve, before and after a projection that did not see them: nearest images and nearest class texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from invariclip.calibrate.projection.folds import CHANGED, Fold, make_folds
from invariclip.console import Progress, silent
from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from invariclip.artifact.projection import Projection
    from invariclip.calibrate.data.pairs import EmbeddingTable

NEAREST = 3
MAX_QUERIES = 4000
_CELLS = 1 << 23
"""Similarities held at a time: 64 MiB."""


@dataclass(frozen=True)
class RetrievedRanks:
    """What every query finds, by cosine: codes of images (rows of the table) or of classes, the nearest first.

    Attributes:
        before: int64 [Q, T], without a projection.
        after: int64 [Q, T], with it; None where there is no projection.
    """

    before: NDArray[np.int64]
    after: NDArray[np.int64] | None


@dataclass(frozen=True)
class Retrieval:
    """Queries, and what they find.

    Attributes:
        queries: int64 [Q], rows of the table.
        groups: The name under which each query counts, see `folds.Fold`.
        images: The nearest rows of the support.
        texts: The nearest class text, T = 1; None where no class texts were embedded.
        left_out: Whether each query was left out of the fit (see `folds`), or was fitted on.
    """

    queries: NDArray[np.int64]
    groups: tuple[str, ...]
    images: RetrievedRanks
    texts: RetrievedRanks | None
    left_out: bool


def retrieve(
    table: EmbeddingTable,
    fit_on: Callable[[EmbeddingTable], Projection | None],
    *,
    bank: NDArray[np.float64] | None,
    ranks: NDArray[np.int64],
    seed: int,
    progress: Progress = silent,
) -> Retrieval | None:
    """Asks what selection asks (see `folds`), for the nearest images instead of the nearest class mean.

    The projection of every fold is fitted without the query's environment, concept and kind of intervention, as far as
    each can be left out. Where nothing can, it has seen all, and `left_out` says so.

    Args:
        table: All rows.
        fit_on: Rows → projection; None for no projection.
        bank: [K, D], unit length: class texts by label code, before any projection.
        ranks: int64 [N], the order in which rows are drawn where there are more than `MAX_QUERIES`.
        seed: Of the folds.
        progress: Progress display.

    Returns:
        None where no image has another one to find.
    """
    try:
        folds, left_out = make_folds(table, seed=seed)[1], True
    except InputError:
        folds, left_out = _everything(table), False
    open_rows = _drawn(folds, ranks)
    queries, groups, images, texts = [], [], [], []
    for fold in progress(folds, total=len(folds), desc="retrieving"):
        rows, support = np.flatnonzero(fold.queries & open_rows), np.flatnonzero(fold.support)
        if not len(rows) or not len(support):
            continue
        # Several folds may ask about one row, with other kinds left out; the first one counts.
        open_rows[rows] = False
        names = dict(zip(np.flatnonzero(fold.queries).tolist(), fold.groups, strict=True))
        queries.append(rows)
        groups += [names[row] for row in rows.tolist()]
        projection = fit_on(table.where(fold.fit))
        sides = [_unchanged] if projection is None else [_unchanged, projection.apply]
        nearest = [_nearest(see(table.vectors[rows]), see(table.vectors[support]), NEAREST) for see in sides]
        images.append([support[places] for places in nearest])
        if bank is not None:
            texts.append([_nearest(see(table.vectors[rows]), see(bank), 1) for see in sides])
    if not queries:
        return None
    return Retrieval(
        np.concatenate(queries), tuple(groups), _joined(images), _joined(texts) if texts else None, left_out
    )


def _unchanged(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    return vectors


def _drawn(folds: list[Fold], ranks: NDArray[np.int64]) -> NDArray[np.bool_]:
    """The rows that are asked about, bool [N]: all that a fold asks about, or the first ones drawn of them."""
    rows = np.flatnonzero(np.any([fold.queries for fold in folds], axis=0))
    mask = np.zeros(len(ranks), dtype=np.bool_)
    mask[rows[np.argsort(ranks[rows])][:MAX_QUERIES]] = True
    return mask


def _joined(parts: list[list[NDArray[np.int64]]]) -> RetrievedRanks:
    """Folds below each other; a small one may have found fewer."""
    width = min(part[0].shape[1] for part in parts)
    sides = [np.concatenate([part[side][:, :width] for part in parts]) for side in range(len(parts[0]))]
    return RetrievedRanks(sides[0], sides[1] if len(sides) > 1 else None)


def _everything(table: EmbeddingTable) -> list[Fold]:
    """Where nothing can be left out: each environment asks the others, or changed images those as they are."""
    codes = np.unique(table.environments)
    everything = np.ones(len(table.vectors), dtype=np.bool_)
    folds = []
    for code in codes:
        own = table.environments == code
        queries, support = (own, ~own) if len(codes) > 1 else (~table.unchanged, own)
        name = table.environment_names[int(code)]
        groups = tuple(name if plain else name + CHANGED for plain in table.unchanged[queries])
        folds.append(Fold(everything, table.unchanged & support, queries, groups))
    return folds


def _nearest(queries: NDArray[np.float64], pool: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """The rows of a pool nearest to each query by cosine, int64 [Q, T], T at most `count`.

    Args:
        queries: [Q, d], unit length.
        pool: [M, d], unit length.
        count: How many.
    """
    count, step = min(count, len(pool)), max(1, _CELLS // len(pool))
    parts = []
    for start in range(0, len(queries), step):
        cosines = queries[start : start + step] @ pool.T
        some = np.sort(np.argpartition(-cosines, count - 1, axis=1)[:, :count], axis=1)
        order = np.argsort(-np.take_along_axis(cosines, some, axis=1), axis=1, kind="stable")
        parts.append(np.take_along_axis(some, order, axis=1))
    return np.concatenate(parts)
