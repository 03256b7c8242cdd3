"""What a map does to attributes that its pairs did not target: each attribute's accuracy before and after.

A projection away from one concept can make a model lean more on others that nobody looked at (Gerych et al., "WRING Out
The Bias", ICLR 2026). This checks it in that manner, not by that paper's measure of bias: for every attribute that
labels are at hand for, how well it can be read from embeddings that the reader was not fitted on, before and after.
An attribute that got worse is one that somebody may miss. Whether that is meant, the caller knows: of the environment,
which pairs do target, it is what was asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.calibrate.evaluation.leakage import PARTS, Reader, fold_numbers, told
from invariclip.calibrate.projection.evaluate import RESAMPLES, AccuracyInterval, Bootstrap
from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray


@dataclass(frozen=True)
class SideEffect:
    """One attribute before and after; accuracies are averaged over the attribute's values.

    Attributes:
        attribute: Its name.
        before: Accuracy in percent, with its interval.
        after: The same after the map.
        difference: After less before, in points; paired.
        chance: Percent right by chance.
        worse: The whole interval of the difference lies below minus the tolerance.
    """

    attribute: str
    before: AccuracyInterval
    after: AccuracyInterval
    difference: AccuracyInterval
    chance: float
    worse: bool

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, under the attributes' names."""
        return {
            "attribute": self.attribute,
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "difference": self.difference.to_json(),
            "chance": round(self.chance, 3),
            "worse": self.worse,
        }


def side_effects(
    before: NDArray[np.floating[Any]],
    after: NDArray[np.floating[Any]],
    attributes: Mapping[str, NDArray[np.int64]],
    *,
    groups: NDArray[np.int64] | None = None,
    reader: Reader = "centroid",
    tolerance: float = 0.0,
    parts: int = PARTS,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> list[SideEffect]:
    """Cross-validated accuracy of every attribute before and after a map, with paired bootstrap intervals.

    Intervals are each attribute's own at 95 %: of forty attributes that a map does not harm, one is flagged by chance.

    Args:
        before: [N, D], unit length.
        after: [N, d], the same rows through the map, unit length.
        attributes: Name → int64 [N]; -1 where a row's value is not known: it is left out for that attribute.
        groups: int64 [N], rows that must not be told from each other, as images of one concept: a group is fitted on
            or tested as a whole, and is what the bootstrap draws. None makes every row its own.
        reader: `centroid` (nearest prototype, what a cosine sees), `linear` or `probe`, see `leakage.Reader`.
        tolerance: Points that an attribute may lose before it is flagged.
        parts: Into how many parts groups are split; each is left out in turn.
        seed: Of the split and the bootstrap.
        resamples: Of the bootstrap.

    Returns:
        One for each attribute, in the given order.

    Raises:
        InputError: Numbers of rows differ, an embedding is not finite, the tolerance is below zero, there is no
            attribute, or one has fewer than two values that two groups have each.
        MissingExtraError: The reader is `probe` and scikit-learn is not installed.
    """
    count = len(before)
    own = np.arange(count) if groups is None else groups
    if not attributes:
        raise InputError("there is no attribute to look at")
    if tolerance < 0:
        raise InputError(f"tolerance is in points and not below zero; {tolerance} is")
    for name, rows in (("`after`", after), ("`groups`", own), *attributes.items()):
        if len(rows) != count:
            raise InputError(f"{count} embeddings before the map, and {len(rows)} rows of {name}")
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise InputError("an embedding has values that are not finite; leave that row out")
    found = []
    for name, values in attributes.items():
        known = _usable(name, values, own)
        labels, members = values[known], own[known]
        fold = _folds(labels, members, parts, seed)
        right = []
        for vectors in (before[known], after[known]):
            answers = np.zeros(len(labels), dtype=np.bool_)
            for part in range(parts):
                answers |= told(vectors, labels, fold == part, reader)
            right.append(answers)
        bootstrap = Bootstrap(members, labels, resamples=resamples, seed=seed)
        # The last interval is that of the mean over values: each counts the same, however many rows it has.
        first, second = (bootstrap.intervals(answers)[-1] for answers in right)
        change = bootstrap.intervals(right[1], right[0])[-1]
        found.append(SideEffect(name, first, second, change, 100 / len(bootstrap.codes), change.high < -tolerance))
    return found


def _usable(name: str, values: NDArray[np.int64], groups: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Rows whose value is known and that two groups have, so that one can be fitted on while the other is tested."""
    pairs = np.unique(np.stack([values, groups]), axis=1)
    codes, counts = np.unique(pairs[0], return_counts=True)
    kept = codes[(codes >= 0) & (counts > 1)]
    if len(kept) < 2:
        raise InputError(f"attribute {name!r} needs two values that two groups have each, and has {len(kept)}")
    return np.isin(values, kept)


def _folds(labels: NDArray[np.int64], groups: NDArray[np.int64], parts: int, seed: int) -> NDArray[np.int64]:
    """A part for every row, int64 [N]: whole groups, dealt out within the value of each group's first row."""
    _, first, place = np.unique(groups, return_index=True, return_inverse=True)
    return np.asarray(fold_numbers(labels[first][None], parts, seed)[place])
