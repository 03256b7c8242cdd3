"""What `learn` gave, from the file of templates that it wrote: for `build`, which learns them once."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from invariclip.calibrate.prompts.learn import Learnt, full_bank, images_digest
from invariclip.calibrate.prompts.scales import Scales
from invariclip.calibrate.prompts.scored import scored_of
from invariclip.calibrate.prompts.splits import split_rows
from invariclip.calibrate.prompts.texts import hand_written_bank
from invariclip.calibrate.prompts.threshold import Threshold
from invariclip.calibrate.prompts.views import embed_images
from invariclip.console import Progress, silent
from invariclip.errors import SemanticsError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from invariclip.artifact.learned_prompts import LearnedPrompts
    from invariclip.artifact.projection import Projection
    from invariclip.calibrate.data.encoder import TextEncoder
    from invariclip.calibrate.data.images import ImageRecord
    from invariclip.calibrate.prompts.options import PromptOptions
    from invariclip.export.checkpoints.checkpoint import Checkpoint


def recall(
    checkpoint: Checkpoint,
    images: Sequence[ImageRecord],
    options: PromptOptions,
    semantics: LearnedPrompts,
    projection: Projection | None = None,
    *,
    cache: Path | None = None,
    progress: Progress = silent,
) -> Learnt:
    """Reads the embeddings back and scores again; nothing is learnt.

    Args:
        checkpoint: As for `learn`.
        images: As for `learn`, in the same order: which are held back is drawn by it.
        options: As for `learn`.
        semantics: What `learn` gave for them.
        projection: As for `learn`.
        cache: The folder that `learn` kept embeddings in.
        progress: Progress display.

    Raises:
        InputError: The images leave nothing to score.
        SemanticsError: The templates belong to another checkpoint, projection, or other images.
    """
    semantics.require_owner(checkpoint.sha256, projection.digest if projection else None)
    seen = embed_images(checkpoint, images, projection, cache=cache, progress=progress)
    facts = semantics.provenance.get("facts")
    if not isinstance(facts, dict) or facts.get("images_sha256") != images_digest(seen):
        raise SemanticsError(
            "the templates were learnt from other images than these, so what was held back is not known; "
            "learn them again"
        )
    split = split_rows(
        seen.labels, shots=options.shots, validation=options.validation, held=options.held, seed=options.seed
    )
    hand_written = hand_written_bank(cast("TextEncoder", checkpoint), seen.names, semantics.templates, projection)
    bank = full_bank(checkpoint, semantics.context, hand_written, seen.names, projection)
    scales = Scales(semantics.evidence_scale, semantics.evidence_bias, semantics.background, facts["evidence_loss"])
    scored = scored_of(seen, split, bank, checkpoint.logit_scale, scales, checkpoint.pixels)
    threshold = Threshold.from_json(facts["threshold"]) if facts["threshold"] else None
    return Learnt(semantics, threshold, facts, scored, projection)
