"""Calibration from sources of any size: their moments are collected, and a bounded set of pictures is selected on."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from invariclip.calibrate.fit import bank_of, choose, conclude, tabulate
from invariclip.calibrate.select import TEXT_OBJECTIVES
from invariclip.console import Progress, silent
from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from invariclip.calibrate.embed import Encoder
    from invariclip.calibrate.fit import Calibration, Options
    from invariclip.calibrate.pictures import Picture
    from invariclip.calibrate.stream.state import State


def calibrate_moments(
    state: State,
    options: Options,
    *,
    weights: Mapping[str, float] | None = None,
    encoder: Encoder | None = None,
    sample: Sequence[Picture] = (),
    cache: Path | None = None,
    progress: Progress = silent,
) -> Calibration:
    """Fits from collected moments; estimator, rank and λ are given, or chosen on a sample of labelled pictures.

    What is collected has neither labels nor single embeddings any more, so nothing can be scored on it. A few thousand
    pictures are enough to choose on, however many pairs are fitted on.

    Args:
        state: What was collected.
        options: What to fit; pairs with captions are those of the sources, so `captions` has no say here.
        weights: Source → what its pairs count; 1 where none is named.
        encoder: Of the sample; None without one.
        sample: Pictures of several environments, or of one to be scored under interventions.
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
    selection, fixed = None, options.fixed()
    if sample and encoder is not None:
        table, told = tabulate(encoder, sample, options, cache=cache, progress=progress)
        bank = bank_of(encoder, table.label_names, options.templates) if options.objective in TEXT_OBJECTIVES else None
        selection, fixed = choose(table, bank, options, progress)
        facts["selected_on"] = told
    if fixed is None:
        raise InputError(
            "estimator, rank and λ cannot be chosen from moments alone: name pictures to choose on with --pictures, or "
            "all three with --estimator, --rank and --strength"
        )
    return conclude(encoder, fixed, selection, moments, state.groups(weights), facts, options)
