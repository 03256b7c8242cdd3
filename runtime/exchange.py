"""Whether a projection may take the place of the one that an artifact was exported with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from invariclip.errors import ArtifactError, InputError, ProjectionError

if TYPE_CHECKING:
    from pathlib import Path

    from invariclip.manifest import Manifest
    from invariclip.projection import Projection

EXCHANGING_BACKENDS = ("onnxruntime",)
"""Engines that let an initializer be overridden at a run; the others read it as a constant."""


def require_exchangeable(folder: Path, manifest: Manifest, backend: str, projection: Projection) -> None:
    """Refuses a projection that an artifact cannot take.

    Raises:
        ArtifactError: The artifact was exported with its projection folded in, or without one.
        InputError: The engine cannot exchange it, or learned templates were trained in the artifact's own space.
        ProjectionError: It is of another shape.
    """
    if manifest.cdc is not None:
        raise InputError(
            f"{folder}: its learned templates were trained in the space of its own projection, so that one cannot be "
            "exchanged; train templates with the other one and export again"
        )
    facts, model = manifest.projection, manifest.model
    how = "none" if facts is None else f"image {facts.image_fold}, text {facts.text_fold}"
    if facts is None or {facts.image_fold, facts.text_fold} != {"input"}:
        raise ArtifactError(
            f"{folder}: its projection cannot be exchanged ({how}); export it again with "
            "--projection FILE --projection-as-input-initializer"
        )
    if backend not in EXCHANGING_BACKENDS:
        raise InputError(
            f"backend {backend!r} cannot exchange the projection; available: {', '.join(EXCHANGING_BACKENDS)}"
        )
    if projection.A_inv.shape != (model.embed_dim, facts.rank):
        raise ProjectionError(
            f"the projection is {projection.embed_dim} → {projection.rank}, the artifact's towers take "
            f"{model.embed_dim} → {facts.rank}; calibrate with --rank {facts.rank}, or export again"
        )
