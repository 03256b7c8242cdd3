"""What the page shows beyond a calibration's own figures, computed again from the cached embeddings.

The invariance gap and the domain leakage are measured on concepts that the projection was not fitted on, before and
after it.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from invariclip.calibrate.data.embed import embed_table, encoder_input
from invariclip.calibrate.data.images import SkippedImageWarning
from invariclip.calibrate.data.pairs import EmbeddingTable, fitted_moments, natural_pairs
from invariclip.calibrate.evaluation.invariance import (
    Reader,
    classes_in_several,
    group_distances,
    pair_distances,
    reader_hits,
)
from invariclip.calibrate.fit import bank_of
from invariclip.calibrate.projection.bootstrap import AccuracyInterval, Bootstrap
from invariclip.calibrate.projection.candidates import TEXT_OBJECTIVES, ProjectionCandidate
from invariclip.calibrate.projection.estimators import fit
from invariclip.calibrate.projection.folds import concept_masks
from invariclip.calibrate.report.retrieval import Retrieval, retrieve
from invariclip.console import Progress, silent
from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.artifact.projection import Projection
    from invariclip.calibrate.data.embed import RowOrigins
    from invariclip.calibrate.data.encoders import Encoder
    from invariclip.calibrate.data.images import ImageRecord
    from invariclip.calibrate.data.pairs import EmbeddingTable
    from invariclip.calibrate.fit import Calibration, FitOptions
    from invariclip.preprocessing.pixels import PixelSpec

PARTS = 4
MAX_ROWS = 20_000
"""Images that the environment is read from: a classifier gains nothing from more."""
READERS: tuple[Reader, ...] = ("centroid", "linear")
NATURAL = "natural pairs"


@dataclass(frozen=True)
class Space:
    """A projection and the concepts that it was not fitted on.

    Attributes:
        held: bool [N], rows of those concepts; all rows where concepts are too few to leave some out.
        projection: None for no projection.
    """

    held: NDArray[np.bool_]
    projection: Projection | None

    def see(self, vectors: NDArray[np.float64]) -> NDArray[np.float64]:
        """Embeddings [N, D] as this space shows them, unit length."""
        return vectors if self.projection is None else self.projection.apply(vectors)


@dataclass(frozen=True)
class Change:
    """One measure without and with the projection; `after` is None where there is none."""

    name: str
    count: int
    before: AccuracyInterval
    after: AccuracyInterval | None


@dataclass(frozen=True)
class Gaps:
    """How far apart the members of a pair are, by kind, in percent of how far images of two classes are.

    Attributes:
        kinds: Mean 1 - cos over the pairs of a kind, over `apart`.
        apart: Mean 1 - cos of two images of different classes, before and after.
    """

    kinds: tuple[Change, ...]
    apart: tuple[float, float | None]


def held_out_spaces(
    table: EmbeddingTable, fit_on: Callable[[EmbeddingTable], Projection | None], seed: int
) -> list[Space]:
    """Fits on three quarters of the concepts in turn; one space that has seen everything where there are too few.

    Args:
        table: All rows.
        fit_on: Rows → projection; None for no projection.
        seed: Distributes the concepts over the parts.
    """
    parts = concept_masks(table, PARTS, seed)
    if len(parts) > 1:
        try:
            return [Space(part, fit_on(table.where(~part))) for part in parts]
        except InputError:
            pass  # too few pairs without a part: what is fitted on all of them is shown, and that it saw all
    return [Space(np.ones(len(table.vectors), dtype=np.bool_), fit_on(table))]


def gaps(table: EmbeddingTable, spaces: list[Space], seed: int) -> Gaps | None:
    """The gap of every kind of intervention and of natural pairs; None where no two classes could be compared.

    The gap alone falls whenever a projection draws all embeddings together; over the distance of different classes
    it falls only if the members of a pair come closer than other images do.
    """
    before = _apart(table, [Space(space.held, None) for space in spaces])
    projected = spaces[0].projection is not None
    after = _apart(table, spaces) if projected else None
    if not before or (projected and not after):
        return None
    natural = natural_pairs(table, seed=seed)
    changed = np.flatnonzero(~table.unchanged)
    first = np.concatenate([table.origins[changed], natural.first])
    second = np.concatenate([changed, natural.second])
    kinds = np.concatenate([table.kinds[changed], np.full(len(natural), len(table.kind_names))])
    if not len(first):
        return None
    bootstrap = Bootstrap(table.concepts[first], kinds, seed=seed)
    old = bootstrap.intervals(pair_distances(table.vectors[first], table.vectors[second]) / before)
    new: list[AccuracyInterval | None] = [None] * len(old)
    if after:
        # Both members of a pair are of one concept, hence of one space.
        projected_vectors = np.empty((len(table.vectors), spaces[0].see(table.vectors[:1]).shape[1]))
        for space in spaces:
            projected_vectors[space.held] = space.see(table.vectors[space.held])
        new = list(bootstrap.intervals(pair_distances(projected_vectors[first], projected_vectors[second]) / after))
    names = (*table.kind_names, NATURAL)
    return Gaps(
        tuple(
            Change(names[code], int((kinds == code).sum()), old[place], new[place])
            for place, code in enumerate(bootstrap.codes)
        ),
        (before, after),
    )


def leakage(table: EmbeddingTable, spaces: list[Space], ranks: NDArray[np.int64], seed: int) -> list[Change]:
    """How often a reader names the environment of an embedding: percent right, mean over environments.

    Two readers (see `invariance.Reader`), each of which reads embeddings as they are, and less the mean of their class:
    what is left of the environment within a class. Readers are tried on images that they did not learn from, of
    concepts that neither they nor the projection have seen.

    Returns:
        Four measures, or none where there are fewer than two environments.
    """
    rows = np.flatnonzero(table.unchanged)
    rows = np.sort(rows[np.argsort(ranks[rows])][:MAX_ROWS])
    if len(np.unique(table.environments[rows])) < 2:
        return []
    changes: list[Change] = []
    shared = rows[classes_in_several(table.labels[rows], table.environments[rows])]
    for within, where in ((False, rows), (True, shared)):
        if len(np.unique(table.environments[where])) < 2:
            continue
        bootstrap = Bootstrap(table.concepts[where], table.environments[where], seed=seed)
        labels = table.labels[where] if within else None
        plain = _read(table, [Space(space.held, None) for space in spaces], where, ranks, labels)
        projected = _read(table, spaces, where, ranks, labels) if spaces[0].projection is not None else None
        changes += [
            Change(
                f"{reader}, {'within class' if within else 'any class'}",
                len(where),
                bootstrap.intervals(plain[reader])[-1],
                bootstrap.intervals(projected[reader])[-1] if projected else None,
            )
            for reader in plain
        ]
    return changes


def _apart(table: EmbeddingTable, spaces: list[Space]) -> float | None:
    """Mean 1 - cos over all pairs of unchanged images of different classes in one space; None without such."""
    total = count = 0.0
    for space in spaces:
        rows = np.flatnonzero(space.held & table.unchanged)
        distances, pairs = group_distances(space.see(table.vectors[rows]), table.labels[rows])
        total, count = total + distances, count + pairs
    return total / count if count and total > 0 else None


def _read(
    table: EmbeddingTable,
    spaces: list[Space],
    rows: NDArray[np.int64],
    ranks: NDArray[np.int64],
    labels: NDArray[np.int64] | None,
) -> dict[Reader, NDArray[np.bool_]]:
    """Which rows' environment each reader names, bool [len(rows)]."""
    environments = table.environments[rows]
    correct = {name: np.zeros(len(rows), dtype=np.bool_) for name in READERS}
    for space in spaces:
        vectors = space.see(table.vectors[rows])
        tests = [space.held[rows]]
        if tests[0].all():
            # Concepts are too few to be left out: images are, in the order in which they would be drawn.
            turn = np.argsort(np.argsort(ranks[rows])) % PARTS
            tests = [turn == part for part in range(PARTS)]
        for test in tests:
            for name in READERS:
                correct[name] |= reader_hits(vectors, environments, test, name, labels=labels)
    return correct


@dataclass(frozen=True)
class ReportEvidence:
    """Everything the page needs beside the calibration.

    Attributes:
        table: The rows that were fitted on.
        origins: What its rows were made from.
        ranks: int64 [N], the order in which rows are drawn as examples: by content and seed, whatever their order.
        spec: How the encoder wants its images.
        seed: Of everything that is drawn.
        retrieval: Nearest images and class texts, before and after.
        gaps: How far apart pairs are, before and after.
        leakage: How well a reader names the environment, before and after.
        concepts_left_out: Whether `gaps` and `leakage` are of concepts that the projection had not seen.
        paths: Those of all images, skipped ones too.
    """

    table: EmbeddingTable
    origins: RowOrigins
    ranks: NDArray[np.int64]
    spec: PixelSpec
    seed: int
    retrieval: Retrieval | None
    gaps: Gaps | None
    leakage: tuple[Change, ...]
    concepts_left_out: bool
    paths: frozenset[str]

    def encoder_input(self, row: int) -> NDArray[np.uint8]:
        """What the encoder saw for a row, uint8 [H, W, 3].

        Raises:
            InputError: The file cannot be read any more.
        """
        return encoder_input(self.origins.jobs[row], self.origins.digests[row], self.spec)


def gather(
    encoder: Encoder,
    images: Sequence[ImageRecord],
    options: FitOptions,
    result: Calibration,
    *,
    cache: Path | None = None,
    progress: Progress = silent,
) -> ReportEvidence:
    """Reads the embeddings back and fits the chosen candidate on parts of them, to show it on the rest.

    A calibration keeps no embeddings, so that its memory does not depend on whether a page is wanted; with `cache`
    nothing is embedded twice.

    Args:
        encoder: As for `calibrate`.
        images: As for `calibrate`.
        options: As for `calibrate`.
        result: What `calibrate` returned for them.
        cache: The folder that `calibrate` kept embeddings in.
        progress: Progress display.

    Raises:
        InputError: No image can be used.
    """
    with warnings.catch_warnings():
        # Calibration has warned of them, and the page lists them.
        warnings.simplefilter("ignore", SkippedImageWarning)
        kinds, draws, seed = options.kinds, options.draws, options.seed
        table, _, origins = embed_table(encoder, images, kinds, draws=draws, seed=seed, cache=cache, progress=progress)
    ranks = _ranks(table, origins.digests, options.seed)
    candidate = chosen_candidate(options, result)
    bank = None
    if candidate.captions or options.objective in TEXT_OBJECTIVES:
        bank = bank_of(encoder, table.label_names, options.templates)
    fit_on = _fitter(candidate, bank if candidate.captions else None, options.seed)
    spaces = held_out_spaces(table, fit_on, options.seed)
    return ReportEvidence(
        table=table,
        origins=origins,
        ranks=ranks,
        spec=encoder.pixels,
        seed=options.seed,
        retrieval=retrieve(table, fit_on, bank=bank, ranks=ranks, seed=options.seed, progress=progress),
        gaps=gaps(table, spaces, options.seed),
        leakage=tuple(leakage(table, spaces, ranks, options.seed)),
        concepts_left_out=len(spaces) > 1,
        paths=frozenset(str(image.path) for image in images),
    )


def chosen_candidate(options: FitOptions, result: Calibration) -> ProjectionCandidate:
    """What was fitted: as selection chose it, or as the options name it."""
    if result.selection is not None:
        return result.selection.chosen
    return options.fixed() or ProjectionCandidate("identity")


def _fitter(
    candidate: ProjectionCandidate, captions: NDArray[np.float64] | None, seed: int
) -> Callable[[EmbeddingTable], Projection | None]:
    """How rows of a table become the candidate's projection; None for no projection."""

    def fit_on(rows: EmbeddingTable) -> Projection | None:
        if candidate.estimator == "identity":
            return None
        moments = fitted_moments(rows, captions=captions, seed=seed)
        return fit(moments, candidate.estimator, candidate.rank, candidate.strength)

    return fit_on


def _ranks(table: EmbeddingTable, digests: Sequence[str], seed: int) -> NDArray[np.int64]:
    """Every row's place in a random order that content and seed alone decide."""
    columns = (table.origins, table.kinds, table.concepts, table.environments)
    keys = [
        hashlib.sha256(f"{seed}\n{digests[origin]}\n{kind}\n{concept}\n{environment}".encode()).digest()
        for origin, kind, concept, environment in zip(*columns, strict=True)
    ]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    ranks = np.empty(len(keys), dtype=np.int64)
    ranks[order] = np.arange(len(keys))
    return ranks
