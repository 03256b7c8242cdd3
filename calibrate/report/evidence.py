"""What the page shows beyond a calibration's own figures, computed again from the kept embeddings for those who ask."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from invariclip.calibrate.data.embed import EmbeddingJob, embed, shown
from invariclip.calibrate.data.images import SkippedImageWarning
from invariclip.calibrate.data.pairs import EmbeddingTable, fitted_moments
from invariclip.calibrate.data.versions import changed_versions
from invariclip.calibrate.fit import bank_of, tabulate
from invariclip.calibrate.projection.candidates import ProjectionCandidate
from invariclip.calibrate.projection.estimators import fit
from invariclip.calibrate.report.measures import Change, Gaps, gaps, held_out_spaces, leakage
from invariclip.calibrate.report.retrieval import Retrieval, retrieve
from invariclip.console import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.artifact.projection import Projection
    from invariclip.calibrate.data.encoder import Encoder
    from invariclip.calibrate.data.images import ImageRecord
    from invariclip.calibrate.fit import Calibration, FitOptions
    from invariclip.preprocessing.pixels import PixelSpec


@dataclass(frozen=True)
class ReportEvidence:
    """Everything the page needs beside the calibration.

    Attributes:
        table: The rows that were fitted on.
        images: Of every row, the image that it is or was made from.
        digests: Of every row, the sha256 of that image's file.
        ranks: int64 [N], the order in which rows are drawn as examples: by content and seed, whatever their order.
        spec: How the encoder wants its images.
        jobs: Of every row, how its image was made.
        seed: Of everything that is drawn.
        retrieval: Nearest images and class texts, before and after.
        gaps: How far pairs are apart, before and after.
        leakage: How well an environment can be told, before and after.
        concepts_left_out: Whether `gaps` and `leakage` are of concepts that the projection had not seen.
        given: The paths of all images, of those that were skipped too.
    """

    table: EmbeddingTable
    images: tuple[ImageRecord, ...]
    digests: tuple[str, ...]
    ranks: NDArray[np.int64]
    spec: PixelSpec
    jobs: tuple[EmbeddingJob, ...]
    seed: int
    retrieval: Retrieval | None
    gaps: Gaps | None
    leakage: tuple[Change, ...]
    concepts_left_out: bool
    given: frozenset[str]

    def shown(self, row: int) -> NDArray[np.uint8]:
        """What the encoder saw for a row, uint8 [H, W, 3].

        Raises:
            InputError: The file cannot be read any more.
        """
        return shown(self.jobs[row], self.digests[row], self.spec)


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
        # Calibration has told of them, and the page lists them.
        warnings.simplefilter("ignore", SkippedImageWarning)
        plain = embed(encoder, [EmbeddingJob(image.path) for image in images], cache=cache, progress=progress)
        table, _ = tabulate(encoder, images, options, cache=cache, progress=progress)
    used = [images[index] for index in plain.kept]
    digests = [plain.digests[index] for index in plain.kept]
    versions = changed_versions(used, digests, options.kinds, draws=options.draws, seed=options.seed)
    changed = {(version.origin, version.kind): version.job for version in versions}
    rows = list(zip(table.origins.tolist(), table.kinds.tolist(), strict=True))
    jobs = tuple(changed[row] if row in changed else EmbeddingJob(used[row[0]].path) for row in rows)
    ranks = _ranks(table, digests, options.seed)
    candidate = chosen_candidate(options, result)
    bank = None
    if candidate.captions or options.objective in ("zero-shot", "both"):
        bank = bank_of(encoder, table.label_names, options.templates)
    fit_on = _fitter(candidate, bank if candidate.captions else None, options.seed)
    spaces = held_out_spaces(table, fit_on, options.seed)
    return ReportEvidence(
        table=table,
        images=tuple(used[origin] for origin in table.origins),
        digests=tuple(digests[origin] for origin in table.origins),
        ranks=ranks,
        spec=encoder.pixels,
        jobs=jobs,
        seed=options.seed,
        retrieval=retrieve(table, fit_on, bank=bank, ranks=ranks, seed=options.seed, progress=progress),
        gaps=gaps(table, spaces, options.seed),
        leakage=tuple(leakage(table, spaces, ranks, options.seed)),
        concepts_left_out=len(spaces) > 1,
        given=frozenset(str(image.path) for image in images),
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
