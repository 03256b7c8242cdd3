"""Checkpoint and projection to a verified artifact: fold, trace, verify, and only then take the name."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
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
from invariclip.backends.onnxruntime import OnnxRuntimeBackend
from invariclip.console import silent
from invariclip.errors import InputError
from invariclip.export import evidence, verify
from invariclip.export.fold import Folded, fold_images, fold_texts, probe_pictures
from invariclip.export.towers import IMAGE_INPUT, TEXT_INPUT, ImageTower, TextTower
from invariclip.export.trace import OPSET, trace
from invariclip.files import new_directory, write_atomically
from invariclip.projection import write_projection
from invariclip.prompts import DEFAULT_TEMPLATES, class_bank

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from invariclip.backends import Backend
    from invariclip.console import Progress
    from invariclip.export.checkpoint import Checkpoint
    from invariclip.export.evidence import Pictures
    from invariclip.export.verify import Thresholds
    from invariclip.projection import Projection

IMAGE_FILE, TEXT_FILE, TOKENIZER_FILE, PROJECTION_FILE = "image.onnx", "text.onnx", "tokenizer.json", "projection.safetensors"
FLOAT32 = "float32"


@dataclass(frozen=True)
class Job:
    """What one artifact is made from.

    Attributes:
        checkpoint: The original model.
        projection: A_inv, or None.
        classes: Names to bake in.
        templates: Prompt templates of the classes.
        bank: float64 [K, d] unit class embeddings of the reference, or None without classes.
    """

    checkpoint: Checkpoint
    projection: Projection | None
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    bank: NDArray[np.float64] | None


def export_artifact(
    checkpoint: Checkpoint,
    out: str | os.PathLike[str],
    *,
    projection: Projection | None = None,
    classes: Sequence[str] = (),
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    pictures: Sequence[str | Path] | None = None,
    thresholds: Thresholds = verify.FLOAT32,
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
    job = prepare(checkpoint, projection, tuple(classes), tuple(templates))
    with new_directory(target) as folder:
        manifest = _write(job, folder, progress)
        image = OnnxRuntimeBackend(folder / IMAGE_FILE, threads=threads)
        text = OnnxRuntimeBackend(folder / TEXT_FILE, threads=threads)
        parity, broken = check(job, checked, image, text, thresholds, progress)
        verify.require(broken, f"{target.name}: the {FLOAT32} variant")
        files = describe_file(folder, IMAGE_FILE), describe_file(folder, TEXT_FILE)
        manifest = replace(manifest, variants={FLOAT32: Variant(FLOAT32, *files, parity)})
        write_manifest(folder, manifest)
    return manifest


def prepare(
    checkpoint: Checkpoint, projection: Projection | None, classes: tuple[str, ...], templates: tuple[str, ...]
) -> Job:
    """A job whose class embeddings come from the reference: PyTorch in float32, projection and mean in float64.

    Raises:
        InputError: Bad classes or templates.
    """
    reference = verify.text_reference(checkpoint, projection)
    bank = class_bank(lambda texts: reference(checkpoint.tokenizer(texts)), classes, templates) if classes else None
    return Job(checkpoint, projection, classes, templates, bank)


def check(
    job: Job, pictures: Pictures, image: Backend, text: Backend, bounds: Thresholds, progress: Progress = silent
) -> tuple[dict[str, Any], list[str]]:
    """Holds both graphs against the checkpoint.

    Pictures are matched with the baked classes, or with a list of prompts; texts with those pictures. Both banks are
    the reference's own embeddings.

    Returns:
        The parity table as the manifest stores it, and every bound that is broken, in words.

    Raises:
        InputError: No picture can be read.
    """
    checkpoint, projection = job.checkpoint, job.projection
    of_texts = verify.text_reference(checkpoint, projection)
    total = -(-len(pictures.paths) // verify.BATCH)
    batches = progress(pictures.batches(verify.BATCH), total=total, desc="verify image tower")
    seen = verify.compare(batches, verify.image_reference(checkpoint, projection), image)
    bank = job.bank if job.bank is not None else of_texts(evidence.ids_of(evidence.PROMPTS, checkpoint.tokenizer))
    image_figures = verify.measure(seen, bank, logits=verify.class_probabilities(checkpoint) if job.classes else None)

    ids = evidence.ids_of(evidence.TEXTS, checkpoint.tokenizer)
    starts = range(0, len(ids), verify.BATCH)
    parts = progress((ids[start : start + verify.BATCH] for start in starts), total=len(starts), desc="verify text tower")
    text_seen = verify.compare(parts, of_texts, text)
    text_figures = verify.measure(text_seen, np.concatenate(seen.reference))

    broken = verify.failures("image", image_figures, bounds) + verify.failures("text", text_figures, bounds)
    parity = {
        "reference": f"torch {torch.__version__} float32, projection and norm in float64",
        "image": image_figures.to_json(),
        "text": text_figures.to_json(),
        "unreadable_pictures": len(pictures.unreadable),
        "thresholds": asdict(bounds),
        "passed": not broken,
    }
    return parity, broken


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


def _write(job: Job, folder: Path, progress: Progress) -> Manifest:
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
        projection=projection
        and ProjectionFacts(
            projection.digest, projection.estimator, projection.strength, projection.rank, image.how, text.how
        ),
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


def producer(checkpoint: Checkpoint) -> dict[str, str]:
    """Versions that made an artifact, and where its weights came from."""
    packages = {"torch": "torch", "onnx": "onnx", "open_clip": "open_clip_torch", "timm": "timm", "onnxruntime": "onnxruntime"}
    return {
        "invariclip": __version__,
        "python": platform.python_version(),
        **{name: version(package) for name, package in packages.items()},
        "weights": checkpoint.source,
    }

