"""What an artifact's manifest says and serving relies on, held against the checkpoint itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from invariclip.artifact.folder import checked_path
from invariclip.artifact.manifest import space_id
from invariclip.export.checkpoints import check_texts
from invariclip.preprocessing.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from invariclip.artifact.learned_prompts import LearnedPrompts
    from invariclip.artifact.manifest import Manifest
    from invariclip.artifact.projection import Projection
    from invariclip.export.checkpoints.checkpoint import Checkpoint


OTHER: Final = "other"
"""In place of the projection: the artifact is held against another one than its own, so its facts about it are left."""


def disagreements(
    manifest: Manifest,
    artifact: Path,
    checkpoint: Checkpoint,
    projection: Projection | Literal["other"] | None,
    semantics: LearnedPrompts | None = None,
) -> list[str]:
    """Every fact of a manifest that is not the checkpoint's, in words; empty if they agree.

    A graph may be right and its answers wrong all the same, when images or texts are prepared as the manifest says
    and the manifest says something else than the checkpoint.

    Args:
        manifest: The artifact's.
        artifact: Its folder.
        checkpoint: The original model.
        projection: What the artifact is said to hold, or `OTHER`.
        semantics: Learned templates that lie in it, or None.

    Raises:
        ArtifactError: The tokenizer is missing, changed, or not one.
    """
    pairs: dict[str, tuple[object, object]] = {
        "pixels": (manifest.pixels.to_json(), checkpoint.pixels.to_json()),
        "text": (manifest.text.to_json(), checkpoint.tokenizer.spec.to_json()),
        "embed_dim": (manifest.model.embed_dim, checkpoint.embed_dim),
        "logit_scale": (manifest.model.logit_scale, checkpoint.logit_scale),
        "logit_bias": (manifest.model.logit_bias, checkpoint.logit_bias),
    }
    if semantics is not None or manifest.cdc is not None:
        pairs["cdc"] = manifest.cdc, semantics.facts if semantics else None
        pairs["templates"] = manifest.templates, semantics.templates if semantics else None
    if projection != OTHER:
        digest = projection.digest if projection else None
        space = space_id(checkpoint.sha256, digest, checkpoint.pixels, checkpoint.tokenizer.spec)
        pairs["projection"] = manifest.projection.sha256 if manifest.projection else None, digest
        pairs["space_id"] = manifest.space_id, space
    found = [
        f"the manifest says {name} {said}, the checkpoint {wanted}"
        for name, (said, wanted) in pairs.items()
        if said != wanted
    ]
    tokenizer = Tokenizer.from_file(checked_path(artifact, manifest.tokenizer), manifest.text)
    ours, theirs = (check_texts.ids_of(check_texts.TEXTS, one) for one in (tokenizer, checkpoint.tokenizer))
    if ours.shape != theirs.shape or not np.array_equal(ours, theirs):
        found.append("tokenizer.json makes other ids of the texts than the checkpoint's tokenizer")
    return found
