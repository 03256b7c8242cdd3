"""Calibration as a whole: data → embeddings → pairs → selection → the projection and its provenance.

`calibrate` fits from images in memory. `calibrate_sources` fits from sources of any size: it collects their moments,
and selects on a bounded set of images.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

import invariclip
from invariclip.artifact.projection import Projection, identity
from invariclip.calibrate.data.embed import embed_table
from invariclip.calibrate.data.encode import embed_texts
from invariclip.calibrate.data.pairs import (
    EmbeddingTable,
    fitted_moments,
    grouped_moments,
    taken_pairs,
)
from invariclip.calibrate.data.problems import problems
from invariclip.calibrate.data.stream.collect import collect, encoder_digest
from invariclip.calibrate.data.stream.state import read_state
from invariclip.calibrate.projection.candidates import TEXT_OBJECTIVES, Objective, ProjectionCandidate, grid
from invariclip.calibrate.projection.diagnostics import confidence, diagnose
from invariclip.calibrate.projection.estimators import fit
from invariclip.calibrate.projection.parallel import few_blas_threads
from invariclip.calibrate.projection.selection import Selection, concept_gains, select
from invariclip.console import Progress, silent
from invariclip.errors import InputError
from invariclip.preprocessing.interventions import InterventionRequest, Kind, resolve
from invariclip.preprocessing.prompts import DEFAULT_TEMPLATES, class_bank

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.calibrate.data.encoders import Encoder, EncoderOpening, TextEncoder
    from invariclip.calibrate.data.images import ImageRecord
    from invariclip.calibrate.data.moments import Moments
    from invariclip.calibrate.data.stream.collect import ShardReader
    from invariclip.calibrate.data.stream.state import MomentsState

_NOTHING_TO_CHOOSE_ON = (
    "estimator, rank and λ cannot be chosen from moments alone: name images to choose on with --images, or all "
    "that the estimator needs with --estimator, --rank and --strength"
)


@dataclass(frozen=True)
class Collecting:
    """Where pairs come from, and where their moments go.

    Attributes:
        sources: YAML or JSON list of sources, see docs/sources.md; None fits on what is collected already.
        kept: The file that keeps moments.
        engine: `local`, or `ray`.
        ray_address: An existing cluster's.
        workers: Ray workers at most.
    """

    sources: Path | None
    kept: Path
    engine: str = "local"
    ray_address: str | None = None
    workers: int | None = None


def calibrate_sources(
    collecting: Collecting,
    opening: EncoderOpening,
    options: FitOptions,
    *,
    sample: Sequence[ImageRecord] = (),
    cache: Path | None = None,
    progress: Progress = silent,
) -> Calibration:
    """Collects what is not collected yet, then fits: see `calibrate_moments`.

    Args:
        collecting: Where pairs come from, and where their moments go.
        opening: The encoder, which is opened only where something has to be embedded.
        options: What to fit.
        sample: Images to select on.
        cache: Keeps the sample's embeddings.
        progress: Progress display.

    Raises:
        InputError: A source cannot be used, the moments are of another encoder, or see `calibrate_moments`.
        ProjectionError: The options name an estimator that cannot be fitted.
        MissingExtraError: A package that a source or an engine needs is not installed.
    """
    if not sample and options.fixed() is None:
        raise InputError(_NOTHING_TO_CHOOSE_ON)  # before hours of collecting, not after
    if collecting.sources is None:
        encoder = opening.open() if sample else None
        state, weights = read_state(collecting.kept), {}
        if encoder is not None and state.encoder not in ("", encoder_digest(encoder)):
            raise InputError(f"{collecting.kept}: was collected with another encoder; name the same one to select with")
    else:
        from invariclip.calibrate.data.sources.config import sources_of

        sources = sources_of(collecting.sources)
        weights = {source.name: source.weight for source in sources}
        embeds = any(source.needs_encoder for source in sources)
        encoder = opening.open() if embeds or sample else None
        engine: ShardReader | None = None
        if collecting.engine == "ray":
            from invariclip.calibrate.data.stream.cluster import Cluster, RayEngine

            engine = RayEngine(Cluster(collecting.ray_address, collecting.workers), opening.open)
        state = collect(
            sources, encoder if embeds else None, state_file=collecting.kept, engine=engine, progress=progress
        )
    return calibrate_moments(
        state, options, weights=weights, encoder=encoder, sample=sample, cache=cache, progress=progress
    )


def calibrate_moments(
    state: MomentsState,
    options: FitOptions,
    *,
    weights: Mapping[str, float] | None = None,
    encoder: Encoder | None = None,
    sample: Sequence[ImageRecord] = (),
    cache: Path | None = None,
    progress: Progress = silent,
) -> Calibration:
    """Fits from collected moments; estimator, rank and λ are given, or chosen on a sample of labelled images.

    What is collected has neither labels nor single embeddings any more, so nothing can be scored on it. A few thousand
    images are enough to choose on, however many pairs are fitted on.

    Args:
        state: What was collected.
        options: What to fit; pairs with captions are those of the sources, so `captions` is ignored.
        weights: Source → what its pairs count; 1 where none is named.
        encoder: Of the sample; None without one.
        sample: Images of several environments, or of one to be scored under interventions.
        cache: Keeps the sample's embeddings.
        progress: Progress display.

    Raises:
        InputError: There is no pair, or neither a sample nor a candidate that is named in full.
        ProjectionError: The options name an estimator that cannot be fitted.
    """
    moments = state.combined(weights)
    if not moments.pairs:
        raise InputError("the moments hold no pair; name a source that has pairs")
    options = replace(options, captions=False)
    facts = {
        "sources": state.counts(),
        "weights": dict(weights or {}),
        "shards": len(state.done),
        "left_out": {source: tally.to_json() for source, tally in sorted(state.tallies.items()) if tally.counts},
        "encoder": state.encoder or None,
    }
    selection, fixed, table = None, options.fixed(), None
    if sample and encoder is not None:
        if encoder.embed_dim != state.width:
            raise InputError(
                f"the moments are of width {state.width}, and what would be selected on has {encoder.embed_dim}: name "
                "the model that made the embeddings with --model or --artifact"
            )
        table, sample_facts = tabulate(encoder, sample, options, cache=cache, progress=progress)
        bank = bank_of(encoder, table.label_names, options.templates) if options.objective in TEXT_OBJECTIVES else None
        selection, fixed = choose(table, bank, options, progress)
        facts["selected_on"] = sample_facts
    if fixed is None:
        raise InputError(_NOTHING_TO_CHOOSE_ON)
    return conclude(encoder, fixed, selection, moments, state.groups(weights), facts, options, table)


@dataclass(frozen=True)
class FitOptions:
    """What to fit; None means that selection chooses.

    Attributes:
        interventions: Kinds to draw from for every image, a name standing for the kind with its defaults; empty for
            natural pairs alone.
        draws: Changed versions of every image.
        estimator: `auto`, or one of `estimators.ESTIMATORS`.
        rank: d.
        strength: λ.
        objective: What selection scores.
        captions: Pair images with their class's caption; None tries both where the objective has a zero-shot part.
        templates: Prompts of the zero-shot objective and of the classes that `build` bakes in.
        seed: Of everything that is drawn.
    """

    interventions: tuple[Kind, ...] = ()
    draws: int = 2
    estimator: str = "auto"
    rank: int | None = None
    strength: float | None = None
    objective: Objective = "prototypes"
    captions: bool | None = None
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    seed: int = 0

    @property
    def kinds(self) -> tuple[InterventionRequest, ...]:
        """The interventions with their labels and parameters."""
        return tuple(resolve(kind) for kind in self.interventions)

    @property
    def tried_captions(self) -> tuple[bool, ...]:
        """With captions as pairs, without, or both."""
        if self.captions is None:
            return (False, True) if self.objective in TEXT_OBJECTIVES else (False,)
        return (self.captions,)

    def fixed(self) -> ProjectionCandidate | None:
        """The candidate that the options leave no choice about, if they name one."""
        needs_strength = self.estimator in ("icm", "shrinkage")
        needs_rank = self.estimator in ("icm", "generalised")
        if self.estimator == "auto" or (needs_strength and self.strength is None) or (needs_rank and self.rank is None):
            return None
        return ProjectionCandidate(self.estimator, self.rank, self.strength, bool(self.captions))

    def to_json(self) -> dict[str, Any]:
        """All of them, every intervention with its label, kind and parameters."""
        return asdict(self) | {"interventions": [kind.to_json() for kind in self.kinds]}


@dataclass(frozen=True)
class Calibration:
    """A fitted projection, with facts about it.

    Attributes:
        projection: To be written; its provenance holds the rest as JSON.
        selection: Scores of every candidate, or None where nothing could be left out.
        facts: JSON-ready: counts of images, pairs and skipped files, what `diagnostics.diagnose` returns, and
            `confidence`, None where there is nothing to be unsure of.
    """

    projection: Projection
    selection: Selection | None
    facts: dict[str, Any]


def calibrate(
    encoder: Encoder,
    images: Sequence[ImageRecord],
    options: FitOptions,
    *,
    cache: Path | None = None,
    progress: Progress = silent,
) -> Calibration:
    """Fits the invariant projection of an encoder.

    Where nothing that was scored beats no projection, the identity is what comes out.

    Args:
        encoder: The checkpoint; for the zero-shot objective with a text tower.
        images: Of training environments alone: what is here is fitted and selected on.
        options: What to fit.
        cache: Keeps embeddings across runs.
        progress: Progress display.

    Raises:
        InputError: No pair can be made, or nothing can be left out to select by.
        ProjectionError: The options name an estimator that cannot be fitted.
    """
    table, facts = tabulate(encoder, images, options, cache=cache, progress=progress)
    needs_bank = options.captions or options.objective in TEXT_OBJECTIVES
    bank = bank_of(encoder, table.label_names, options.templates) if needs_bank else None
    pairs = taken_pairs(table, seed=options.seed)
    facts |= {
        "natural_pairs": len(pairs["natural"]),
        "interventional_pairs": len(pairs["interventions"]),
        "problems": problems(table, images, pairs, facts["skipped"], seed=options.seed).to_json(),
    }
    if not facts["natural_pairs"] and not facts["interventional_pairs"]:
        raise InputError(
            f"no pair: {facts['unpaired_concepts']} of {facts['concepts']} concepts stand in one environment only, and "
            "there are no interventions; add other environments, or --interventions all"
        )
    selection, chosen = choose(table, bank, options, progress)
    captions = bank if chosen.captions else None
    facts["caption_pairs"] = int(table.unchanged.sum()) if chosen.captions else 0
    moments = fitted_moments(table, captions=captions, seed=options.seed)
    parts = grouped_moments(table, captions=captions, seed=options.seed)
    return conclude(encoder, chosen, selection, moments, parts, facts, options, table)


def conclude(
    encoder: Encoder | None,
    chosen: ProjectionCandidate,
    selection: Selection | None,
    moments: Moments,
    parts: Sequence[Moments],
    facts: dict[str, Any],
    options: FitOptions,
    table: EmbeddingTable | None = None,
) -> Calibration:
    """Fits the chosen candidate, and gathers the facts about it.

    Args:
        encoder: Whose projection it is; None where embeddings were given, whose encoder nobody knows.
        chosen: The candidate.
        selection: What it was chosen from, if anything.
        moments: What to fit on.
        parts: The same, apart by groups of pairs: see `diagnostics.confidence`.
        facts: JSON-ready, of the data.
        options: Its options.
        table: Embedded images, whose mean sites will be measured against; None where there are none.

    Raises:
        ProjectionError: The candidate cannot be fitted.
    """
    with few_blas_threads(moments.width):
        projection = (
            identity(moments.width)
            if chosen.estimator == "identity"
            else fit(moments, chosen.estimator, chosen.rank, chosen.strength)
        )
        sure = confidence(parts, chosen.estimator, chosen.rank, chosen.strength, seed=options.seed)
        facts = {**facts, **diagnose(projection, moments), "confidence": sure.to_json() if sure else None}
    provenance = {
        "invariclip": invariclip.__version__,
        "numpy": np.__version__,
        "checkpoint_sha256": encoder.sha256 if encoder else None,
        "options": options.to_json(),
        "images": facts,
        "selection": selection.to_json() if selection else None,
    }
    mean = np.empty(0) if table is None else training_mean(projection, table)
    return Calibration(replace(projection, provenance=provenance, training_mean=mean), selection, facts)


def training_mean(projection: Projection, table: EmbeddingTable) -> NDArray[np.float64]:
    """m₀ of the space that a projection makes: the mean over environments of their unchanged images' means.

    Args:
        projection: A_inv.
        table: Embedded images.

    Returns:
        float64 [d].
    """
    plain = table.where(table.unchanged)
    vectors = projection.apply(plain.vectors)
    means = [vectors[plain.environments == code].mean(axis=0) for code in np.unique(plain.environments)]
    return np.asarray(np.mean(means, axis=0))


def tabulate(
    encoder: Encoder,
    images: Sequence[ImageRecord],
    options: FitOptions,
    *,
    cache: Path | None = None,
    progress: Progress = silent,
) -> tuple[EmbeddingTable, dict[str, Any]]:
    """The table of images and their changed versions, and JSON-ready counts; see `embed.embed_table`.

    Raises:
        InputError: No image could be used, or an intervention needs a second image and there is none.
    """
    kinds, draws, seed = options.kinds, options.draws, options.seed
    table, facts, _ = embed_table(encoder, images, kinds, draws=draws, seed=seed, cache=cache, progress=progress)
    return table, facts


def choose(
    table: EmbeddingTable, bank: NDArray[np.float64] | None, options: FitOptions, progress: Progress
) -> tuple[Selection | None, ProjectionCandidate]:
    """The candidate to fit, and the scores if any could be had; a fully named candidate needs none."""
    fixed = options.fixed()
    if fixed is not None:
        candidates = list(dict.fromkeys([ProjectionCandidate("identity"), fixed]))
    else:
        width = table.vectors.shape[1]
        candidates = grid(
            width,
            estimator=options.estimator,
            rank=options.rank,
            strength=options.strength,
            captions=options.tried_captions,
        )
    try:
        selection = select(
            table,
            candidates,
            objective=options.objective,
            bank=bank,
            seed=options.seed,
            progress=progress,
        )
    except InputError:
        if fixed is None:
            raise
        return None, fixed
    if fixed is not None:
        selection = replace(selection, chosen=fixed)
    gains = concept_gains(table, selection, bank=bank, seed=options.seed)
    return replace(selection, by_concept=gains), selection.chosen


def bank_of(encoder: Encoder, names: Sequence[str], templates: Sequence[str]) -> NDArray[np.float64]:
    """Class embeddings [K, D], unit length, before any projection.

    With several templates a projection of their mean differs in the last digits from the mean of their projections,
    which serving uses; selection does not depend on that.

    Raises:
        InputError: The encoder has no text tower.
    """
    if not hasattr(encoder, "encode_texts"):
        raise InputError("this checkpoint takes no texts; use --objective prototypes")
    texts = cast("TextEncoder", encoder)
    return class_bank(lambda prompts: embed_texts(texts, prompts), list(names), list(templates))
