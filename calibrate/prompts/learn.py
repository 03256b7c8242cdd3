"""CDC as a whole: images → split → views → learned vectors → evidence → threshold, learned or recalled from a file."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

import invariclip
from invariclip.artifact.learned_prompts import LearnedPrompts
from invariclip.calibrate.prompts.scales import Scales, fit_scales
from invariclip.calibrate.prompts.scores import ScoredImages, fused_answers, scored_of, scores_json
from invariclip.calibrate.prompts.texts import LearnedTexts, hand_written_bank
from invariclip.calibrate.prompts.threshold import Threshold, choose_threshold
from invariclip.calibrate.prompts.training import Task, Trained, train
from invariclip.calibrate.prompts.views import LabelledEmbeddings, Split, augmented, embed_images, split_rows
from invariclip.console import Progress, silent
from invariclip.errors import SemanticsError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.artifact.projection import Projection
    from invariclip.calibrate.data.encoders import TextEncoder
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
) -> LearnedResult:
    """Reads the embeddings back and scores again; nothing is trained.

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
    embedded = embed_images(checkpoint, images, projection, cache=cache, progress=progress)
    facts = semantics.provenance.get("facts")
    if not isinstance(facts, dict) or facts.get("images_sha256") != images_digest(embedded):
        raise SemanticsError(
            "the templates were learnt from other images than these, so what was held back is not known; "
            "learn them again"
        )
    split = _split(embedded, options)
    hand_written = hand_written_bank(cast("TextEncoder", checkpoint), embedded.names, semantics.templates, projection)
    bank = full_bank(checkpoint, semantics.context, hand_written, embedded.names, projection)
    scales = Scales(semantics.evidence_scale, semantics.evidence_bias, semantics.background, facts["evidence_loss"])
    scored = scored_of(embedded, split, bank, checkpoint.logit_scale, scales, checkpoint.pixels)
    threshold = Threshold.from_json(facts["threshold"]) if facts["threshold"] else None
    return LearnedResult(semantics, threshold, facts, scored, projection)


@dataclass(frozen=True, eq=False)
class LearnedResult:
    """What `learn` gives.

    Attributes:
        semantics: To be written; its provenance holds the rest as JSON.
        threshold: What was found for the target risk, or None without a target risk.
        facts: JSON-ready: counts, the training's course, scores on images that training did not see.
        scored: Those images, and what answers about them are made of.
        projection: In whose space all of it is, or None.
    """

    semantics: LearnedPrompts
    threshold: Threshold | None
    facts: dict[str, Any]
    scored: ScoredImages
    projection: Projection | None


def learn(
    checkpoint: Checkpoint,
    images: Sequence[ImageRecord],
    options: PromptOptions,
    projection: Projection | None = None,
    *,
    cache: Path | None = None,
    progress: Progress = silent,
) -> LearnedResult:
    """Learns templates for a checkpoint, in the space of a projection if there is one.

    Args:
        checkpoint: The encoder; it stays frozen.
        images: Of training environments alone.
        options: What to learn.
        projection: A_inv, or None.
        cache: Keeps embeddings, and where the training stands, across runs.
        progress: Progress display.

    Raises:
        InputError: Images or options leave nothing to learn from.
        CheckpointError: The text tower takes no learned vectors.
        ProjectionError: The projection is of another width.
    """
    if projection:
        projection.require_width(checkpoint.embed_dim, checkpoint.name)
    embedded = embed_images(checkpoint, images, projection, cache=cache, progress=progress)
    split = _split(embedded, options)
    return learn_from(checkpoint, embedded, split, options, projection, cache=cache, progress=progress)


def learn_from(
    checkpoint: Checkpoint,
    embedded: LabelledEmbeddings,
    split: Split,
    options: PromptOptions,
    projection: Projection | None = None,
    *,
    encoder: Any = None,
    cache: Path | None = None,
    progress: Progress = silent,
) -> LearnedResult:
    """`learn` of images that are embedded and split.

    Args:
        checkpoint: As in `learn`.
        embedded: The embedded images.
        split: Which are learned from, validated on, held back.
        options: As in `learn`.
        projection: As in `learn`.
        encoder: What embeds augmented images, if not the checkpoint itself.
        cache: As in `learn`.
        progress: As in `learn`.
    """
    rows = np.sort(np.concatenate([split.train, split.validation]))
    views, declined = augmented(
        encoder or checkpoint, embedded, rows, options.views, projection,
        seed=options.augmentation_seed, cache=cache, progress=progress,
    )  # fmt: skip
    trains, checks = np.isin(rows, split.train), np.isin(rows, split.validation)
    hand_written = hand_written_bank(cast("TextEncoder", checkpoint), embedded.names, options.templates, projection)
    # Augmented versions count too: evidence has to be earned under change as well
    checked = np.concatenate([embedded.vectors[split.validation], *views[:, checks]])
    checked_labels = np.tile(embedded.labels[split.validation], 1 + options.learned)
    task = Task(
        names=embedded.names,
        hand_written=hand_written,
        views=views[:, trains],
        labels=embedded.labels[rows[trains]],
        validation=checked,
        validation_labels=checked_labels,
    )
    trained = train(checkpoint, task, options, projection, work=cache / "cdc" if cache else None, progress=progress)
    bank = full_bank(checkpoint, trained.context, hand_written, embedded.names, projection)
    scales = fit_scales(checked, checked_labels, bank, checkpoint.logit_scale, seed=options.seed)
    threshold = None
    if options.target_risk is not None:
        threshold = threshold_of(embedded, split, bank, checkpoint.logit_scale, scales, options)
    facts = _facts(embedded, split, declined, trained, scales, threshold)
    scored = scored_of(embedded, split, bank, checkpoint.logit_scale, scales, checkpoint.pixels)
    facts["scores"] = scores_json(scored)
    semantics = LearnedPrompts(
        context=trained.context,
        evidence_scale=scales.scale,
        evidence_bias=scales.bias,
        background=scales.background,
        templates=options.templates,
        checkpoint_sha256=checkpoint.sha256,
        projection_sha256=projection.digest if projection else None,
        abstain_above=threshold.value if threshold else None,
    )
    provenance = {
        "invariclip": invariclip.__version__,
        "numpy": np.__version__,
        "torch": torch.__version__,
        "options": options.to_json(),
        "facts": facts,
    }
    return LearnedResult(replace(semantics, provenance=provenance), threshold, facts, scored, projection)


def full_bank(
    checkpoint: Checkpoint,
    context: NDArray[np.float32],
    hand_written: NDArray[np.float64],
    names: Sequence[str],
    projection: Projection | None,
) -> NDArray[np.float64]:
    """Every template's class embeddings, float64 [M + 1, K, d], the hand-written one's first."""
    texts = LearnedTexts(checkpoint, torch.from_numpy(context), projection)
    return np.concatenate([hand_written[None], texts.bank(texts.ids(names))])


def threshold_of(
    embedded: LabelledEmbeddings,
    split: Split,
    bank: NDArray[np.float64],
    logit_scale: float,
    scales: Scales,
    options: PromptOptions,
) -> Threshold:
    """The threshold for the target risk, tested on the held-back images.

    Raises:
        InputError: None is held back.
    """
    grid = fused_answers(embedded.vectors[split.validation], bank, logit_scale, *scales.numbers)
    held = fused_answers(embedded.vectors[split.held], bank, logit_scale, *scales.numbers)
    return choose_threshold(
        held.uncertainty,
        held.probabilities.argmax(axis=1) != embedded.labels[split.held],
        grid.uncertainty,
        target=options.target_risk or 0.0,
        confidence=options.confidence,
    )


def _split(embedded: LabelledEmbeddings, options: PromptOptions) -> Split:
    return split_rows(
        embedded.labels, shots=options.shots, validation=options.validation, held=options.held, seed=options.seed
    )


def images_digest(embedded: LabelledEmbeddings) -> str:
    """sha256 over all images' contents, classes and environments, whatever their order."""
    lines = sorted(f"{d}\t{p.name}\t{p.environment}" for d, p in zip(embedded.digests, embedded.used, strict=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _facts(
    embedded: LabelledEmbeddings,
    split: Split,
    declined: dict[str, int],
    trained: Trained,
    scales: Scales,
    threshold: Threshold | None,
) -> dict[str, Any]:
    return {
        "images": len(embedded.labels),
        "classes": len(embedded.names),
        "environments": dict(sorted(Counter(image.environment for image in embedded.used).items())),
        "train": len(split.train),
        "validation": len(split.validation),
        "held": len(split.held),
        "skipped": list(embedded.skipped),
        "declined": declined,
        "images_sha256": images_digest(embedded),
        "steps": trained.steps,
        "best_step": trained.best_step,
        "curve": [[step, loss] for step, loss in trained.curve],
        "evidence_loss": scales.loss,
        "threshold": threshold.to_json() if threshold else None,
    }
