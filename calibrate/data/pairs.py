"""What belongs together: a concept in two environments, an image and its changed version or its caption."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from invariclip.calibrate.data.moments import combined, of_pairs, of_points

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from invariclip.calibrate.data.moments import Moments

GROUPS = 20
"""Groups that a bootstrap draws from: D = 512 then takes 84 MB, however many pairs there are."""
UNCHANGED = -1
"""The kind of a row that is an image as it is."""

SAME_DISTANCE = 1e-5
"""Two unit vectors nearer than this are one, but for the rounding of float32 in another batch."""
_CHUNK = 4096
"""Pairs that are compared at a time."""

PAIRS_PER_GROUP = 64
"""Most pairs of one concept between two environments: all of them up to eight images in each."""


@dataclass(frozen=True)
class EmbeddingTable:
    """Embedded images and what is known of them, row by row; codes are 0, 1, … into the lists of names.

    Attributes:
        vectors: float64 [N, D], unit length.
        concepts: int64 [N].
        labels: int64 [N], the class that a prediction must name; several concepts may share one.
        environments: int64 [N].
        kinds: int64 [N], the intervention that made the row, or `UNCHANGED`.
        origins: int64 [N], for a changed row the row of its image; for others the row itself.
        concept_names: By code.
        label_names: By code.
        environment_names: By code.
        kind_names: By code.
    """

    vectors: NDArray[np.float64]
    concepts: NDArray[np.int64]
    labels: NDArray[np.int64]
    environments: NDArray[np.int64]
    kinds: NDArray[np.int64]
    origins: NDArray[np.int64]
    concept_names: tuple[str, ...]
    label_names: tuple[str, ...]
    environment_names: tuple[str, ...]
    kind_names: tuple[str, ...] = ()

    @property
    def unchanged(self) -> NDArray[np.bool_]:
        """Rows that are images as they are, bool [N]."""
        return np.asarray(self.kinds == UNCHANGED)

    def where(self, mask: NDArray[np.bool_]) -> EmbeddingTable:
        """The rows of a mask; a changed row goes with its image.

        Args:
            mask: bool [N].
        """
        mask = mask & mask[self.origins]
        place = np.cumsum(mask) - 1
        return replace(
            self,
            vectors=self.vectors[mask],
            concepts=self.concepts[mask],
            labels=self.labels[mask],
            environments=self.environments[mask],
            kinds=self.kinds[mask],
            origins=place[self.origins[mask]],
        )


@dataclass(frozen=True)
class Pairs:
    """Pairs of rows: `first`, `second` int64 [P], `weights` float64 [P]."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    weights: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.first)

    def where(self, mask: NDArray[np.bool_]) -> Pairs:
        """The pairs of a mask, bool [P]."""
        return Pairs(self.first[mask], self.second[mask], self.weights[mask])

    def moments(self, table: EmbeddingTable) -> Moments:
        """Moments of the differences; pairs of k images of one concept count as k - 1 independent ones at most."""
        members = np.unique(np.concatenate([self.first, self.second]))
        independent = len(members) - len(np.unique(table.concepts[members]))
        return of_pairs(table.vectors[self.first], table.vectors[self.second], self.weights, independent=independent)


@dataclass(frozen=True)
class Sources:
    """Where pairs come from; each source counts the same, however many pairs it has.

    Attributes:
        natural: One concept in two environments.
        interventions: An image and its changed versions.
    """

    natural: bool = True
    interventions: bool = True


ALL_SOURCES = Sources()


def natural_pairs(table: EmbeddingTable, *, seed: int = 0) -> Pairs:
    """Images of one concept in two environments, all unordered pairs of environments.

    A concept seen in k environments weighs k - 1, shared evenly by its k(k-1)/2 pairs of environments and within
    each by the pairs of images. That is the pooled within-concept covariance (times two), in which every concept
    counts by its degrees of freedom: one in all five styles says more than one in two, but not ten times as much.

    Args:
        table: Changed rows are not paired here.
        seed: Draws the pairs where a concept has more than `PAIRS_PER_GROUP` between two environments; by the names of
            the three, so that a part of the concepts gives the same pairs as all of them.
    """
    order = np.flatnonzero(table.unchanged)
    order = order[np.lexsort((order, table.environments[order], table.concepts[order]))]
    codes = np.stack([table.concepts[order], table.environments[order]])
    cuts = np.flatnonzero(np.any(codes[:, 1:] != codes[:, :-1], axis=0)) + 1
    groups: dict[int, list[NDArray[np.int64]]] = {}
    for rows in np.split(order, cuts):
        if len(rows):
            groups.setdefault(int(table.concepts[rows[0]]), []).append(rows)
    first, second, weights = [], [], []
    for members in groups.values():
        for a, b in combinations(members, 2):
            count = len(a) * len(b)
            if count <= PAIRS_PER_GROUP:
                chosen = np.arange(count)
            else:
                named = [table.concept_names[table.concepts[a[0]]]]
                named += [table.environment_names[table.environments[rows[0]]] for rows in (a, b)]
                chosen = np.sort(seeded(seed, *named).choice(count, PAIRS_PER_GROUP, replace=False))
            first.append(a[chosen // len(b)])
            second.append(b[chosen % len(b)])
            weights.append(np.full(len(chosen), 2 / len(members) / len(chosen)))
    return _pairs(first, second, weights)


def interventional_pairs(table: EmbeddingTable, *, kinds: Sequence[int] | None = None) -> Pairs:
    """Images and their changed versions; an image weighs one, shared by its versions.

    Args:
        table: The rows.
        kinds: Codes of the interventions to take; all by default.
    """
    changed = ~table.unchanged if kinds is None else np.isin(table.kinds, list(kinds)) & ~table.unchanged
    second = np.flatnonzero(changed)
    first = table.origins[second]
    versions = np.bincount(first, minlength=len(table.origins))
    return Pairs(first, second, 1.0 / versions[first])


def fitted_moments(
    table: EmbeddingTable, sources: Sources = ALL_SOURCES, *, captions: NDArray[np.float64] | None = None, seed: int = 0
) -> Moments:
    """Moments of the unchanged images and of all pairs that a table holds.

    The sources come in very different numbers; each is therefore scaled to a weight of one, and the counts tell how
    many pairs there were.

    An image and its class's caption can be a pair for the same reason as images in two styles are: they share what
    the class depends on and differ in the rest, here in the modality. Contrastive encoders keep images and texts in
    two separate cones (Liang et al., Mind the Gap, arXiv 2203.02053), and pairs of images never move along the
    direction between the cones. Where the gap is wide, a projection that shortens everything else but not that
    direction leaves class embeddings nearly parallel, and zero-shot answers collapse onto a few classes; where it is
    narrow, such pairs take away more than they should. Selection tries both.

    Args:
        table: The rows.
        sources: Which pairs to take.
        captions: [K, D], unit length, the embedding of every label's caption by code: every unchanged image is
            then paired with its own.
        seed: See `natural_pairs`.
    """
    plain = table.unchanged
    pairs_by_source = taken_pairs(table, sources, seed=seed)
    parts = [pairs.moments(table) for pairs in pairs_by_source.values() if len(pairs)]
    if captions is not None and plain.any():
        parts.append(of_pairs(table.vectors[plain], captions[table.labels[plain]]))
    return combined([of_points(table.vectors[plain]), *parts], [1.0] * (len(parts) + 1))


def grouped_moments(
    table: EmbeddingTable, sources: Sources = ALL_SOURCES, *, captions: NDArray[np.float64] | None = None, seed: int = 0
) -> list[Moments]:
    """The same moments apart, as `diagnostics.confidence` draws from them: concepts are spread over groups by name.

    Args:
        table: See `fitted_moments`, as are the others.
        sources: Which pairs to take.
        captions: [K, D], unit length, or None.
        seed: Of the pairs and of the groups.

    Returns:
        One for every group that holds a concept; they add up to `fitted_moments`.
    """
    plain = table.unchanged
    pairs_of_sources = [pairs for pairs in taken_pairs(table, sources, seed=seed).values() if len(pairs)]
    weights = [float(pairs.weights.sum()) for pairs in pairs_of_sources]
    group = np.asarray([group_of(name, seed) for name in table.concept_names])[table.concepts]
    parts = []
    for code in np.unique(group):
        rows = plain & (group == code)
        part = of_points(table.vectors[rows])
        for pairs, weight in zip(pairs_of_sources, weights, strict=True):
            own = pairs.where(group[pairs.first] == code)
            if len(own):
                mine = own.moments(table)
                part = part + mine.crowded(mine.crowding).scaled(1 / weight)
        if captions is not None and rows.any():
            part = part + of_pairs(table.vectors[rows], captions[table.labels[rows]]).scaled(1 / float(plain.sum()))
        parts.append(part)
    return parts


def taken_pairs(table: EmbeddingTable, sources: Sources = ALL_SOURCES, *, seed: int = 0) -> dict[str, Pairs]:
    """The pairs of every source, by its name, without those whose members are the same (see `same_pairs`).

    Args:
        table: The rows.
        sources: Which pairs to take.
        seed: See `natural_pairs`.
    """
    return {name: pairs.where(~same_pairs(table, pairs)) for name, pairs in all_pairs(table, sources, seed).items()}


def all_pairs(table: EmbeddingTable, sources: Sources = ALL_SOURCES, seed: int = 0) -> dict[str, Pairs]:
    """The pairs of every source, by its name, the useless ones too."""
    pairs = {"natural": natural_pairs(table, seed=seed)} if sources.natural else {}
    return pairs | ({"interventions": interventional_pairs(table)} if sources.interventions else {})


def same_pairs(table: EmbeddingTable, pairs: Pairs) -> NDArray[np.bool_]:
    """Which pairs have one embedding twice, bool [P]: one file in two environments, greyscale of a grey image."""
    same = np.zeros(len(pairs), dtype=np.bool_)
    for start in range(0, len(pairs), _CHUNK):
        part = slice(start, start + _CHUNK)
        delta = table.vectors[pairs.first[part]] - table.vectors[pairs.second[part]]
        same[part] = np.einsum("ij,ij->i", delta, delta) <= SAME_DISTANCE**2
    return same


def seeded(*parts: str | int) -> np.random.Generator:
    """A generator for every combination of parts."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def codes(names: Sequence[str]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Codes int64 [N] into the names in sorted order, and those names."""
    values, places = np.unique(np.asarray(names, dtype=np.str_), return_inverse=True)
    return places.astype(np.int64), tuple(str(value) for value in values)


def _pairs(
    first: list[NDArray[np.int64]], second: list[NDArray[np.int64]], weights: list[NDArray[np.float64]]
) -> Pairs:
    if not first:
        nothing = np.empty(0, dtype=np.int64)
        return Pairs(nothing, nothing, np.empty(0))
    return Pairs(np.concatenate(first), np.concatenate(second), np.concatenate(weights))


def group_of(key: str, seed: int = 0) -> int:
    """The group of whatever has this key, by its content and the seed alone: it does not depend on order.

    Args:
        key: What must stay together, such as a concept's name or a pair's digest.
        seed: Of the bootstrap.
    """
    digest = hashlib.sha256(f"group\n{seed}\n{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % GROUPS
