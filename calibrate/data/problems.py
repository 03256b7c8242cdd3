"""What is wrong with the images of a calibration: each kind of problem counted, with examples by name.

Some things are left out (files that cannot be read, embeddings that are none, pairs that are no pairs); others are
taken and weaken the result (a concept with one image gives no pair, an environment whose images all look alike
tells nothing). All are told.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import numpy as np

from invariclip.calibrate.data.embed import NO_EMBEDDING
from invariclip.calibrate.data.pairs import SAME_DISTANCE, EmbeddingTable, all_pairs, same_pairs
from invariclip.calibrate.data.stream.tally import (
    ALIKE,
    EMPTY,
    LONE,
    NOT_FINITE,
    SAME,
    SINGLE,
    SINGLE_OF_CLASS,
    UNREADABLE,
    ProblemCounts,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from invariclip.calibrate.data.images import ImageRecord
    from invariclip.calibrate.data.pairs import Pairs


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
    seen = table.unchanged
    _count_concepts(table, tally)
    labels = Counter(table.labels[seen].tolist())
    tally.add(SINGLE_OF_CLASS, [table.label_names[code] for code, number in sorted(labels.items()) if number == 1])
    have = {table.environment_names[code] for code in np.unique(table.environments[seen])}
    tally.add(EMPTY, sorted({image.environment for image in images} - have))
    for code in np.unique(table.environments[seen]):
        rows = table.vectors[seen & (table.environments == code)]
        if len(rows) > 1 and np.linalg.norm(rows - rows.mean(axis=0), axis=1).max() <= SAME_DISTANCE:
            tally.add(ALIKE, [table.environment_names[code]])
    return tally


def _count_concepts(table: EmbeddingTable, tally: ProblemCounts) -> None:
    """Concepts that give no natural pair."""
    environments: dict[int, set[int]] = defaultdict(set)
    images: Counter[int] = Counter()
    for concept, environment in zip(table.concepts[table.unchanged], table.environments[table.unchanged], strict=True):
        environments[int(concept)].add(int(environment))
        images[int(concept)] += 1
    lone = [code for code in sorted(environments) if len(environments[code]) < 2]
    tally.add(SINGLE, [table.concept_names[code] for code in lone if images[code] == 1])
    tally.add(LONE, [table.concept_names[code] for code in lone if images[code] > 1])
