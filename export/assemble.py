"""Checkpoint and projection to a verified artifact: fold, trace, verify, and only then take the name."""

from __future__ import annotations

import platform
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from invariclip import __version__
from invariclip.artifact import (
    MANIFEST,
    Manifest,
    ModelFacts,
    ProjectionFacts,
    Variant,
    describe_file,
    space_id,
    write_manifest,
)
from invariclip.console import silent
from invariclip.errors import InputError
from invariclip.export import evidence, figures, verify
from invariclip.export.fold import Folded, fold_images, fold_texts, probe_pictures
from invariclip.export.towers import IMAGE_INPUT, TEXT_INPUT, ImageTower, TextTower
from invariclip.export.trace import OPSET, trace
from invariclip.files import new_directory, write_atomically
from invariclip.projection import write_projection
from invariclip.prompts import DEFAULT_TEMPLATES

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from invariclip.console import Progress
    from invariclip.export.checkpoint import Checkpoint
    from invariclip.export.figures import Thresholds
    from invariclip.export.verify import Job
    from invariclip.projection import Projection

IMAGE_FILE, TEXT_FILE, TOKENIZER_FILE, PROJECTION_FILE = (
    "image.onnx",
    "text.onnx",
    "tokenizer.json",
    "projection.safetensors",
)
FLOAT32 = "float32"


def export_artifact(
    checkpoint: Checkpoint,
    out: str | os.PathLike[str],
    *,
    projection: Projection | None = None,
    classes: Sequence[str] = (),
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    pictures: Sequence[str | Path] | None = None,
    thresholds: Thresholds = figures.FLOAT32,
    threads: int | None = None,
    progress: Progress = silent,
) -> Manifest:
    """Writes a verified artifact, or nothing.

    Args:
        checkpoint: The original model; it stays unchanged.
        out: The artifact's folder, by convention `name.icm`. An artifact that stands there is replaced.
        projection: A_inv to fold in, or None.
        classes: Class names to bake into the image graph.
        templates: Prompt templates of the classes.
        pictures: Files and folders to verify on; None takes the bundled ones.
        thresholds: Bounds of the contract.
        threads: ONNX Runtime's threads; None takes what this process may use.
        progress: `console.bar` or `console.silent`.

    Returns:
        The manifest that was written.

    Raises:
        ProjectionError: The projection is of another width.
        ContractError: The graph cannot be exported, or does not answer like the checkpoint.
        InputError: Bad classes or templates, no readable picture, or a folder that cannot be written.
    """
    target = Path(out)
    if target.is_dir() and any(target.iterdir()) and not (target / MANIFEST).is_file():
        raise InputError(f"{target}: is a folder with other things in it, not an artifact; name another output")
    if projection is not None:
        projection.require_width(checkpoint.embed_dim, checkpoint.name)
    checked = evidence.pictures_of(pictures, checkpoint.pixels)
    checked.require_readable()
    job = verify.prepare(checkpoint, projection, tuple(classes), tuple(templates))
    with new_directory(target) as folder:
        manifest = write_files(job, folder, progress)
        candidate = verify.Candidate.open(folder / IMAGE_FILE, folder / TEXT_FILE, job, threads=threads)
        verdict = verify.check({FLOAT32: candidate}, checked, thresholds, progress=progress)[FLOAT32]
        verdict.require(f"{target.name}: the {FLOAT32} variant")
        files = describe_file(folder, IMAGE_FILE), describe_file(folder, TEXT_FILE)
        manifest = replace(manifest, variants={FLOAT32: Variant(FLOAT32, *files, verdict.parity)})
        write_manifest(folder, manifest)
    return manifest


def fold_towers(job: Job) -> tuple[Folded, Folded]:
    """Both towers with the projection in them; without one they are the originals."""
    checkpoint, projection = job.checkpoint, job.projection
    if projection is None:
        plain = Folded(checkpoint.module, "folded", None, "")
        return plain, plain
    ids = torch.from_numpy(evidence.ids_of(evidence.PROMPTS[:3], checkpoint.tokenizer))
    return (
        fold_images(checkpoint.module, projection.A_inv, probe_pictures(*checkpoint.pixels.image_size)),
        fold_texts(checkpoint.module, projection.A_inv, ids),
    )


def write_files(job: Job, folder: Path, progress: Progress) -> Manifest:
    """Writes every file but the manifest; the result lists no variant yet."""
    checkpoint, projection = job.checkpoint, job.projection
    image, text = fold_towers(job)
    write_atomically(folder / TOKENIZER_FILE, checkpoint.tokenizer.model_json)
    if projection is not None:
        write_projection(folder / PROJECTION_FILE, projection)
    manifest = Manifest(
        model=ModelFacts(
            checkpoint.name, checkpoint.sha256, checkpoint.embed_dim, checkpoint.logit_scale, checkpoint.logit_bias
        ),
        pixels=checkpoint.pixels,
        text=checkpoint.tokenizer.spec,
        tokenizer=describe_file(folder, TOKENIZER_FILE),
        projection=facts_of(projection, image, text) if projection else None,
        projection_file=describe_file(folder, PROJECTION_FILE) if projection else None,
        classes=job.classes,
        templates=job.templates,
        variants={},
        space_id=space_id(checkpoint.sha256, projection.digest if projection else None),
        opset=OPSET,
        producer=producer(checkpoint),
    )
    image_tower = ImageTower(
        image,
        checkpoint.pixels,
        bank=job.bank,
        logit_scale=checkpoint.logit_scale,
        logit_bias=checkpoint.logit_bias,
    )
    height, width = checkpoint.pixels.image_size
    steps: list[tuple[ImageTower | TextTower, torch.Tensor, str, str]] = [
        (image_tower, torch.zeros((2, height, width, 3), dtype=torch.uint8), IMAGE_FILE, IMAGE_INPUT),
        (TextTower(text), torch.from_numpy(checkpoint.tokenizer(["a", "b"])), TEXT_FILE, TEXT_INPUT),
    ]
    for tower, example, name, input_name in progress(steps, total=len(steps), desc="trace"):
        facts = {**{key: value for key, value in manifest.to_json().items() if key != "variants"}, "tower": name}
        trace(tower, example, folder / name, input_name=input_name, output_names=tower.output_names, facts=facts)
    return manifest


def facts_of(projection: Projection, image: Folded, text: Folded) -> ProjectionFacts:
    """What the manifest says of a projection."""
    return ProjectionFacts(
        sha256=projection.digest,
        estimator=projection.estimator,
        strength=projection.strength,
        rank=projection.rank,
        image_fold=image.how,
        text_fold=text.how,
    )


def producer(checkpoint: Checkpoint) -> dict[str, str]:
    """Versions that made an artifact, and where its weights came from."""
    packages = {
        "torch": "torch",
        "onnx": "onnx",
        "open_clip": "open_clip_torch",
        "timm": "timm",
        "onnxruntime": "onnxruntime",
    }
    return {
        "invariclip": __version__,
        "python": platform.python_version(),
        **{name: version(package) for name, package in packages.items()},
        "weights": checkpoint.source,
    }
