"""Each picture's nearest pictures of the other environments, before and after a projection that did not see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from invariclip.calibrate.folds import Fold, make_folds
from invariclip.console import Progress, silent
from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from invariclip.calibrate.pairs import Table
    from invariclip.projection import Projection

NEAREST = 3
MAX_QUERIES = 4000
_CELLS = 1 << 23
"""Similarities held at a time: 64 MiB."""


@dataclass(frozen=True)
class Retrieval:
    """Rows of the table, by cosine.

    Attributes:
        queries: int64 [Q], the rows asked about.
        before: int64 [Q, T], the nearest rows without a projection, nearest first.
        after: int64 [Q, T], with it; None where there is no projection.
        left_out: Whether each query was left out of the fit (see `folds`), or was fitted on.
    """

    queries: NDArray[np.int64]
    before: NDArray[np.int64]
    after: NDArray[np.int64] | None
    left_out: bool


def right(table: Table, queries: NDArray[np.int64], nearest: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each query's nearest picture shows its class, bool [Q]."""
    return np.asarray(table.labels[nearest[:, 0]] == table.labels[queries])


def retrieve(
    table: Table,
    fit_on: Callable[[Table], Projection | None],
    ranks: NDArray[np.int64],
    seed: int,
    *,
    progress: Progress = silent,
) -> Retrieval:
    """Asks each picture for the nearest ones of the other environments; with one environment, changed pictures ask.

    The projection of every fold is fitted without the query's environment and concept (with one environment: without
    its kind of intervention). Where nothing can be left out it has seen all, and `left_out` says so.

    Args:
        table: All rows.
        fit_on: Rows → projection; None for no projection.
        ranks: int64 [N], the order in which rows are drawn where there are more than `MAX_QUERIES`.
        seed: Of the folds.
        progress: Progress display.
    """
    try:
        folds, left_out = make_folds(table, seed=seed)[1], True
    except InputError:
        folds, left_out = _everything(table), False
    whole = fit_on(table) if not left_out else None
    open_rows = _askable(table, ranks)
    found: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64] | None]] = []
    for fold in progress(folds, total=len(folds), desc="retrieving"):
        queries, support = np.flatnonzero(fold.queries & open_rows), np.flatnonzero(fold.support)
        if not len(queries) or not len(support):
            continue
        # Several folds may ask about one row, with other kinds left out; the first one counts.
        open_rows[queries] = False
        projection = fit_on(table.where(fold.fit)) if left_out else whole
        before = _nearest(table.vectors, queries, support)
        after = None if projection is None else _nearest(projection.apply(table.vectors), queries, support)
        found.append((queries, before, after))
    if not found:
        nothing = np.empty(0, dtype=np.int64)
        return Retrieval(nothing, nothing.reshape(0, NEAREST), None, left_out)
    width = min(before.shape[1] for _, before, _ in found)
    afters = [after[:, :width] for _, _, after in found if after is not None]
    return Retrieval(
        queries=np.concatenate([queries for queries, _, _ in found]),
        before=np.concatenate([before[:, :width] for _, before, _ in found]),
        after=np.concatenate(afters) if afters else None,
        left_out=left_out,
    )


def _askable(table: Table, ranks: NDArray[np.int64]) -> NDArray[np.bool_]:
    """The rows that may ask, bool [N]: pictures as they are, or changed ones where there is one environment."""
    many = len(np.unique(table.environments)) > 1
    rows = np.flatnonzero(table.unchanged if many else ~table.unchanged)
    mask = np.zeros(len(table.vectors), dtype=np.bool_)
    mask[rows[np.argsort(ranks[rows])][:MAX_QUERIES]] = True
    return mask


def _everything(table: Table) -> list[Fold]:
    """Where nothing can be left out: all is fitted on; each environment asks the others, a single one itself."""
    codes = np.unique(table.environments)
    all_rows = np.ones(len(table.vectors), dtype=np.bool_)
    if len(codes) == 1:
        return [Fold(all_rows, table.unchanged, ~table.unchanged, ())]
    return [
        Fold(all_rows, table.unchanged & (table.environments != code), table.environments == code, ()) for code in codes
    ]


def _nearest(vectors: NDArray[np.float64], queries: NDArray[np.int64], support: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows of `support` nearest to each query by cosine, int64 [Q, T], T at most `NEAREST`."""
    count, pool = min(NEAREST, len(support)), vectors[support].T
    step = max(1, _CELLS // len(support))
    parts = []
    for start in range(0, len(queries), step):
        cosines = vectors[queries[start : start + step]] @ pool
        some = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
        order = np.argsort(-np.take_along_axis(cosines, some, axis=1), axis=1, kind="stable")
        parts.append(support[np.take_along_axis(some, order, axis=1)])
    return np.concatenate(parts)
