"""Calibration from sources of any size: their moments are collected, and a bounded set of images is selected on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from invariclip.calibrate.data.stream.collect import collect, encoder_digest
from invariclip.calibrate.data.stream.state import read_state
from invariclip.calibrate.fit import bank_of, choose, conclude, tabulate
from invariclip.calibrate.projection.scorer import TEXT_OBJECTIVES
from invariclip.console import Progress, silent
from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from invariclip.calibrate.data.encoder import Encoder
    from invariclip.calibrate.data.encoders import EncoderOpening
    from invariclip.calibrate.data.images import ImageRecord
    from invariclip.calibrate.data.stream.collect import ShardReader
    from invariclip.calibrate.data.stream.state import MomentsState
    from invariclip.calibrate.fit import Calibration, FitOptions

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
            from invariclip.calibrate.data.stream.cluster import Cluster
            from invariclip.calibrate.data.stream.ray_engine import RayEngine

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
        options: What to fit; pairs with captions are those of the sources, so `captions` has no say here.
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
        table, told = tabulate(encoder, sample, options, cache=cache, progress=progress)
        bank = bank_of(encoder, table.label_names, options.templates) if options.objective in TEXT_OBJECTIVES else None
        selection, fixed = choose(table, bank, options, progress)
        facts["selected_on"] = told
    if fixed is None:
        raise InputError(_NOTHING_TO_CHOOSE_ON)
    return conclude(encoder, fixed, selection, moments, state.groups(weights), facts, options, table)
