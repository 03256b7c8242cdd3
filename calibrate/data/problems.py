"""What is wrong with the data of a calibration: problems counted by kind, with a few examples by name.

Some data are left out (unreadable files, zero or non-finite embeddings, pairs of one thing with itself); others are
used and weaken the result (a concept with one image gives no pair, an environment whose images all look alike tells
nothing). Both are counted.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.calibrate.data.pairs import SAME_DISTANCE, EmbeddingTable, all_pairs, same_pairs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from invariclip.calibrate.data.images import ImageRecord
    from invariclip.calibrate.data.pairs import Pairs

NO_EMBEDDING = "its embedding is zero or not finite"
EXAMPLES = 5
"""Examples that are kept of every problem."""

UNREADABLE = "unreadable"
NOT_FINITE = "not finite"
ZERO = "zero embedding"
SAME = "pair of one thing with itself"
LONE = "without a partner"
SINGLE = "concept with a single image"
SINGLE_OF_CLASS = "class with a single image"
EMPTY = "environment without an image"
ALIKE = "environment without variance"
EMPTY_HERE = "environment without an image in a shard"
ALIKE_HERE = "environment without variance in a shard"
"""Reasons that several sources have; a source may have others."""

WORDS = {
    UNREADABLE: "left out: cannot be read or decoded",
    NOT_FINITE: "left out: their embedding holds NaN or infinity",
    ZERO: "left out: their embedding is zero",
    SAME: "left out: both members of the pair are the same",
    LONE: "concepts of several images in one environment alone: no natural pair",
    SINGLE: "concepts with a single image: no natural pair",
    SINGLE_OF_CLASS: "classes with a single image",
    EMPTY: "environments without an image that can be used",
    ALIKE: "environments whose images all have one embedding: no variance to tell from movement",
    EMPTY_HERE: "times that an environment has no image in a shard that can be used",
    ALIKE_HERE: "times that all of an environment's images in a shard have one embedding",
}
"""What each is called in a line."""


@dataclass
class ProblemCounts:
    """Counts of problems. Tallies of shards add up.

    Attributes:
        counts: Reason → how many rows, pairs or files.
        examples: Reason → the first few by name.
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, names: Sequence[str] = (), count: int | None = None) -> None:
        """Counts something that was left out.

        Args:
            reason: One of the constants above, or words of the source's own.
            names: What it was.
            count: How many; as many as there are names by default.
        """
        number = len(names) if count is None else count
        if number:
            self.counts[reason] += number
            examples = self.examples.setdefault(reason, [])
            examples.extend(list(names)[: EXAMPLES - len(examples)])

    def merge(self, other: ProblemCounts) -> None:
        """Adds another tally's counts, and its examples as far as there is room."""
        for reason, number in other.counts.items():
            self.add(reason, other.examples.get(reason, ()), number)

    def subtract(self, other: ProblemCounts) -> None:
        """Takes another tally's counts out; the examples stay as far as something is left of their reason."""
        self.counts.subtract(other.counts)
        for reason in [reason for reason, number in self.counts.items() if number <= 0]:
            del self.counts[reason]
            self.examples.pop(reason, None)

    def lines(self) -> list[str]:
        """One line for every reason."""
        return [
            f"{number:,} {WORDS.get(reason, reason)}" + self._such(reason)
            for reason, number in sorted(self.counts.items())
        ]

    def _such(self, reason: str) -> str:
        named = self.examples.get(reason)
        return f", such as {named[0]}" if named else ""

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            reason: {"count": number, "examples": self.examples.get(reason, [])}
            for reason, number in sorted(self.counts.items())
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> ProblemCounts:
        """Reads what `to_json` wrote.

        Raises:
            KeyError: Something is missing.
        """
        tally = cls()
        for reason, entry in plain.items():
            tally.add(reason, entry["examples"], entry["count"])
        return tally


def problems(
    table: EmbeddingTable,
    images: Sequence[ImageRecord],
    taken: Mapping[str, Pairs],
    skipped: Sequence[str],
    *,
    seed: int,
) -> ProblemCounts:
    """Every problem of a set of images.

    Args:
        table: What could be embedded.
        images: All that were given.
        taken: The pairs that are fitted on, see `pairs.taken_pairs`.
        skipped: Why images were skipped, `path: reason`.
        seed: Of the pairs.
    """
    tally = ProblemCounts()
    for reason in skipped:
        tally.add(NOT_FINITE if reason.endswith(NO_EMBEDDING) else UNREADABLE, [reason.partition(": ")[0]])
    for name, pairs in all_pairs(table, seed=seed).items():
        if len(pairs) > len(taken[name]):
            rows = pairs.first[same_pairs(table, pairs)]
            tally.add(SAME, [table.concept_names[table.concepts[row]] for row in rows])
    plain = table.unchanged
    count_unpaired(table, tally)
    labels = Counter(table.labels[plain].tolist())
    tally.add(SINGLE_OF_CLASS, [table.label_names[code] for code, number in sorted(labels.items()) if number == 1])
    have = {table.environment_names[code] for code in np.unique(table.environments[plain])}
    tally.add(EMPTY, sorted({image.environment for image in images} - have))
    for code in np.unique(table.environments[plain]):
        rows = table.vectors[plain & (table.environments == code)]
        if len(rows) > 1 and np.linalg.norm(rows - rows.mean(axis=0), axis=1).max() <= SAME_DISTANCE:
            tally.add(ALIKE, [table.environment_names[code]])
    return tally


def count_unpaired(table: EmbeddingTable, tally: ProblemCounts) -> None:
    """Counts the concepts of a table that give no natural pair."""
    environments: dict[int, set[int]] = defaultdict(set)
    images: Counter[int] = Counter()
    for concept, environment in zip(table.concepts[table.unchanged], table.environments[table.unchanged], strict=True):
        environments[int(concept)].add(int(environment))
        images[int(concept)] += 1
    lone = [code for code in sorted(environments) if len(environments[code]) < 2]
    tally.add(SINGLE, [table.concept_names[code] for code in lone if images[code] == 1])
    tally.add(LONE, [table.concept_names[code] for code in lone if images[code] > 1])
