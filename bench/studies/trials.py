"""What the tables of projections share: trials and selections kept by what goes into them, baselines, intervals."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from invariclip.artifact.projection import Projection, identity
from invariclip.calibrate.data.pairs import ALL_SOURCES, EmbeddingTable, Sources
from invariclip.calibrate.evaluation import baselines, erasure, text_baselines
from invariclip.calibrate.projection.bootstrap import LEVEL, RESAMPLES
from invariclip.calibrate.projection.estimators import fit
from invariclip.calibrate.projection.folds import CONCEPT_PARTS
from invariclip.calibrate.projection.selection import Selection, select
from invariclip.console import Progress, silent
from invariclip.errors import MissingExtraError
from invariclip.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.calibrate.data.moments import Moments
    from invariclip.calibrate.evaluation.baselines import Map
    from invariclip.calibrate.evaluation.text_baselines import Projectors, StylePrompts
    from invariclip.calibrate.projection.bootstrap import Scores
    from invariclip.calibrate.projection.candidates import Objective, ProjectionCandidate


ESTIMATORS = ("icm", "generalised", "shrinkage")
ICM_STRENGTHS = (1.0, 10.0)
"""λ of `icm` that are tried in a wide space: each costs an eigendecomposition in every fold."""


def bound_blas(threads: int = 1) -> None:
    """Bounds the threads of the BLAS that NumPy has loaded, for the rest of the process.

    On a busy machine its threads wait for each other and take four times the processor.

    Args:
        threads: How many; engines of models have their own.

    Raises:
        MissingExtraError: scikit-learn, which brings threadpoolctl, is not installed.
    """
    try:
        pools: Any = import_module("threadpoolctl")
    except ImportError:
        raise MissingExtraError('this study needs scikit-learn: pip install "invariclip[bench]"') from None
    pools.threadpool_limits(limits=threads, user_api="blas")


class Resampler(Protocol):
    """`Bootstrap`, or `Stratified`."""

    @property
    def codes(self) -> NDArray[np.int64]:
        """The environments' codes, in the order of the columns."""

    def samples(self, correct: Scores) -> NDArray[np.float64]:
        """Percent right, [1 + resamples, environments + 1], as `Bootstrap.samples` has it."""


class Stratified:
    """Accuracies per environment and their mean, images resampled within every environment and class.

    For sets whose classes are so few that they are no sample of classes.
    """

    def __init__(
        self, classes: NDArray[np.int64], environments: NDArray[np.int64], *, resamples: int = RESAMPLES, seed: int = 0
    ) -> None:
        """Draws the resamples.

        Args:
            classes: int64 [N].
            environments: int64 [N].
            resamples: How many.
            seed: Of the draws.
        """
        self.codes, self._environment = np.unique(environments, return_inverse=True)
        self._sizes = np.bincount(self._environment)
        cells = np.unique(np.stack([self._environment, classes]), axis=1, return_inverse=True)[1]
        rng = np.random.default_rng(seed)
        self._cells = []
        for cell in range(cells.max() + 1):
            members = np.flatnonzero(cells == cell)
            draws = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=resamples)
            weights = np.concatenate([np.ones((1, len(members)), np.int16), draws.astype(np.int16)])
            self._cells.append((members, int(self._environment[members[0]]), weights))
        self._resamples = resamples

    def samples(self, correct: Scores) -> NDArray[np.float64]:
        """Percent right, [1 + resamples, environments + 1]: row 0 as observed, the last column the environments' mean.

        Args:
            correct: bool [N], or shares of right answers from 0 to 1.
        """
        right = np.zeros((1 + self._resamples, len(self.codes)))
        for members, environment, weights in self._cells:
            right[:, environment] += weights @ correct[members].astype(np.float64)
        share = 100 * right / self._sizes
        return np.concatenate([share, share.mean(axis=1, keepdims=True)], axis=1)


def ends(samples: NDArray[np.float64], axis: int | None = None) -> tuple[Any, Any]:
    """The interval at `LEVEL` of resampled figures: both ends, of each column where `axis` is 0."""
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.nanpercentile(samples, [tail, 100 - tail], axis=axis)
    return low, high


def packed(right: NDArray[np.bool_]) -> str:
    """Answers as files hold them."""
    return np.packbits(right).tobytes().hex()


def unpack(text: str, count: int) -> NDArray[np.bool_]:
    """Answers as `packed` wrote them, bool [count]."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8), count=count).astype(np.bool_)


def kept_trial(folder: Path, name: str, key: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A trial's JSON-ready result, from its file if it was run before.

    Args:
        folder: Where results are kept.
        name: What the file's name begins with.
        key: Everything that goes into the result, as text: its digest ends the name.
        run: Makes the result.
    """
    file = folder / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if file.is_file():
        return dict(json.loads(file.read_text(encoding="utf-8")))
    result = run()
    write_atomically(file, json.dumps(result, ensure_ascii=False) + "\n")
    return result


def best_of(selection: Selection, estimator: str) -> ProjectionCandidate:
    """One estimator's best candidate on what was left out, also where no projection is better."""
    own = [scored for scored in selection.curve if scored.candidate.estimator == estimator]
    return max(own, key=lambda scored: scored.behind).candidate


def fitted(moments: Moments, pick: ProjectionCandidate) -> Projection:
    """What was chosen, fitted."""
    if pick.estimator == "identity":
        return identity(moments.width)
    return fit(moments, pick.estimator, pick.rank, pick.strength)


def published_baselines(
    moments: Moments,
    icm: ProjectionCandidate,
    vectors: NDArray[np.float64],
    labels: NDArray[np.int64],
    environments: NDArray[np.int64],
    bank: NDArray[np.float64] | None,
    layers: Projectors | None,
    styles: StylePrompts | None,
) -> dict[str, Map]:
    """What others take away from embeddings, by name, at the rank and λ that were chosen for `icm`.

    Args:
        moments: Of the training images.
        icm: The candidate of `icm` that selection puts first.
        vectors: float64 [N, D], the training images.
        labels: int64 [N], their classes.
        environments: int64 [N], their environments.
        bank: float64 [K, D], class embeddings; None leaves `gr-clip` out.
        layers: Both towers' last linear layers; None leaves `isoclip` out.
        styles: What the text tower makes of the environments; None leaves the projections of prompts out.
    """
    rank = icm.rank or moments.width
    directions = erasure.room(environments, labels, vectors, rank)
    found: dict[str, Map] = {
        "published": baselines.published(moments, rank, icm.strength or 1.0),
        "leace": erasure.leace(vectors, environments),
        "leace, shrunk": erasure.leace(vectors, environments, shrink=True),
        "splince": erasure.splince(vectors, environments, labels, directions=directions),
    }
    if bank is not None:
        found["gr-clip"] = text_baselines.gr_clip(vectors, bank)
    if layers is not None:
        found["isoclip"] = text_baselines.isoclip(layers, text_baselines.rank_or_default(layers, rank))
    if styles is not None:
        found |= text_baselines.by_name(styles, rank)
    return found


VERSION = 1
"""Changes when `select` would choose differently."""


def kept_selection(
    folder: Path | None,
    table: EmbeddingTable,
    candidates: Sequence[ProjectionCandidate],
    *,
    objective: Objective,
    bank: NDArray[np.float64] | None = None,
    sources: Sources = ALL_SOURCES,
    concept_parts: int = CONCEPT_PARTS,
    seed: int = 0,
    progress: Progress = silent,
) -> Selection:
    """`select.select`, or what it said the last time; rounded as `Selection.to_json` is either way.

    A bank counts only where it is looked at, so texts that change leave selections by images alone as they are.

    Args:
        folder: Where selections are kept; None keeps nothing.
        table: See `select.select`, as are the others.
        candidates: What to choose from.
        objective: What is scored.
        bank: Class embeddings by label code.
        sources: Which pairs are fitted on.
        concept_parts: See `folds.make_folds`.
        seed: Of the folds, the pairs and the bootstrap.
        progress: Progress display.
    """
    looked_at = objective in ("zero-shot", "both") or any(candidate.captions for candidate in candidates)
    bank = bank if looked_at else None
    digest = hashlib.sha256()
    plain = [VERSION, objective, asdict(sources), concept_parts, seed, [asdict(each) for each in candidates]]
    names = [table.concept_names, table.label_names, table.environment_names, table.kind_names]
    digest.update(json.dumps([plain, names]).encode())
    given = (table.vectors, table.concepts, table.labels, table.environments, table.kinds, table.origins)
    for array in (*given, *(() if bank is None else (bank,))):
        digest.update(str(array.shape).encode())
        digest.update(array.tobytes())
    file = folder / f"{digest.hexdigest()[:32]}.json" if folder else None
    if file is not None and file.is_file():
        return Selection.from_json(json.loads(file.read_text(encoding="utf-8")))
    found = select(
        table,
        candidates,
        objective=objective,
        bank=bank,
        sources=sources,
        concept_parts=concept_parts,
        seed=seed,
        screen=False,  # the tables show every estimator's best
        progress=progress,
    ).to_json()
    if file is not None:
        write_atomically(file, json.dumps(found, ensure_ascii=False) + "\n")
    return Selection.from_json(found)
