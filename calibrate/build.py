"""The stages of `build`, each kept under a digest of all its inputs, so that a second run resumes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import invariclip
from invariclip.artifact.folder import checked_path, read_manifest
from invariclip.artifact.learned_prompts import read_semantics, write_semantics
from invariclip.artifact.projection import read_projection, write_projection
from invariclip.calibrate.fit import Calibration, FitOptions, calibrate
from invariclip.calibrate.projection.selection import Selection
from invariclip.console import Progress, silent
from invariclip.errors import ArtifactError, InputError, ProjectionError, SemanticsError
from invariclip.files import sha256_file, write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from invariclip.artifact.learned_prompts import LearnedPrompts
    from invariclip.artifact.manifest import Manifest
    from invariclip.artifact.projection import Projection
    from invariclip.calibrate.data.images import ImageRecord
    from invariclip.calibrate.prompts.options import PromptOptions
    from invariclip.export.checkpoints.checkpoint import Checkpoint
    from invariclip.export.config import ExportConfig

EXPORTED = "exported.json"


def run_build(
    checkpoint: Checkpoint,
    images: Sequence[ImageRecord],
    options: FitOptions,
    config: ExportConfig,
    *,
    out: Path,
    work: Path,
    cache: Path,
    learning: PromptOptions | None = None,
    progress: Progress = silent,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[Calibration, dict[str, Any]]:
    """Calibrates, learns templates if asked, exports and verifies; what has the same inputs as before is not run again.

    Args:
        checkpoint: The original model.
        images: What to fit on; the artifact is verified on them as well.
        options: What to fit.
        config: How the artifact is made and what it must keep; templates and images are those of the fit.
        out: The artifact's folder.
        work: Keeps `projection-<digest>.safetensors` and which artifact was made from what.
        cache: Keeps embeddings.
        learning: What templates to learn (CDC), in the projection's space; None learns none.
        progress: Progress display.
        tell: Takes one line about every stage.

    Returns:
        The calibration, and JSON-ready facts of the artifact.

    Raises:
        InputError: See `fit.calibrate`.
        ContractError: The exported graph does not answer like the checkpoint.
    """
    config = replace(config, templates=options.templates)
    stages, contents = 2 if learning is None else 3, _contents(images)
    key = _digest(["calibrate-3", invariclip.__version__, checkpoint.sha256, options.to_json(), contents])
    stored = work / f"projection-{key[:16]}.safetensors"
    result = _read_calibration(stored)
    if result is None:
        tell(f"1/{stages} calibrate")
        result = calibrate(checkpoint, images, options, cache=cache, progress=progress)
        write_projection(stored, result.projection)
    else:
        tell(f"1/{stages} calibrate: done before, {stored.name}")
    projection = served_projection(result)
    digest = projection.digest if projection else "identity"
    semantics = None
    if learning is not None:
        # Which images are learned from is drawn by their order
        ordered = _contents(images, in_order=True)
        key = _digest(["cdc-2", invariclip.__version__, checkpoint.sha256, digest, learning.to_json(), ordered])
        file = work / f"cdc-{key[:16]}.safetensors"
        semantics = _learned_prompts(checkpoint, images, learning, projection, file, cache, progress, tell)
    prompts = [semantics.digest, semantics.abstain_above] if semantics else []
    key = _digest(["export-3", invariclip.__version__, checkpoint.sha256, digest, asdict(config), *prompts])
    manifest = _read_artifact(out, work, key)
    if manifest is None:
        tell(f"{stages}/{stages} export and verify")
        from invariclip.export.build import export_artifact

        paths = [str(image.path) for image in images]
        config = replace(config, images=paths)
        if config.variants and len(paths) > 1:  # what variants are calibrated on must not be what they are judged on
            config = replace(config, images=paths[::2], calibration_images=paths[1::2])
        manifest = export_artifact(
            checkpoint, out, config, projection=projection, learned_prompts=semantics, progress=progress
        )
        write_atomically(work / EXPORTED, json.dumps({str(out.resolve()): [key, manifest.space_id]}))
    else:
        tell(f"{stages}/{stages} export and verify: done before, {out}")
    parity = {name: variant.parity for name, variant in manifest.variants.items()}
    facts = {"artifact": str(out), "space": manifest.space_id, "parity": parity}
    return result, facts | ({"templates": str(file)} if semantics else {})


def served_projection(result: Calibration) -> Projection | None:
    """The projection, or None for the identity: no fold, no multiplication, the artifact of the checkpoint alone."""
    return None if result.projection.estimator == "identity" else result.projection


def _learned_prompts(
    checkpoint: Checkpoint,
    images: Sequence[ImageRecord],
    learning: PromptOptions,
    projection: Projection | None,
    file: Path,
    cache: Path,
    progress: Progress,
    tell: Callable[[str], None],
) -> LearnedPrompts:
    """The learned templates, from their file if they were learned before."""
    try:
        semantics = read_semantics(file)
    except SemanticsError:
        tell("2/3 learn templates")
    else:
        tell(f"2/3 learn templates: done before, {file.name}")
        return semantics
    from invariclip.calibrate.prompts.learn import learn

    result = learn(checkpoint, images, learning, projection, cache=cache, progress=progress)
    if result.threshold is not None:
        tell(result.threshold.sentence())
    write_semantics(file, result.semantics)
    return result.semantics


def _read_calibration(stored: Path) -> Calibration | None:
    """A calibration that was finished before; None if there is none that can be read."""
    if not stored.is_file():
        return None
    try:
        projection = read_projection(stored)
        facts, selection = projection.provenance["images"], projection.provenance["selection"]
        return Calibration(projection, Selection.from_json(selection) if selection else None, facts)
    except (ProjectionError, KeyError, TypeError):
        return None


def _read_artifact(out: Path, work: Path, key: str) -> Manifest | None:
    """The artifact, if it was made from the same inputs and every file is still what was written."""
    try:
        recorded = json.loads((work / EXPORTED).read_text(encoding="utf-8")).get(str(out.resolve()))
        manifest = read_manifest(out)
        if recorded != [key, manifest.space_id]:
            return None
        for entry in manifest.files:
            checked_path(out, entry)
    except (OSError, ValueError, AttributeError, ArtifactError):
        return None
    return manifest


def _contents(images: Sequence[ImageRecord], *, in_order: bool = False) -> list[list[str]]:
    """What the images are, by content, in an order of its own or in theirs."""
    rows = []
    for image in images:
        try:
            digest = sha256_file(image.path)
        except OSError:
            digest = "unreadable"
        rows.append([digest, image.concept, image.name, image.environment])
    if not rows:
        raise InputError("there are no images to build from")
    return rows if in_order else sorted(rows)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
