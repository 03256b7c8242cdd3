"""A checkpoint to a verified artifact: graphs, verification, variants, files, and only then the artifact's name."""

from __future__ import annotations

import platform
import warnings
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from invariclip.artifact.folder import describe_file, new_artifact, require_replaceable, write_manifest
from invariclip.artifact.learned_prompts import write_semantics
from invariclip.artifact.manifest import Manifest, ModelFacts, ProjectionFacts, Variant, space_id
from invariclip.artifact.projection import write_projection
from invariclip.console import silent
from invariclip.errors import InputError, LeftOutWarning
from invariclip.export.config import ExportConfig
from invariclip.export.graph_files import write_image_graph, write_text_graph
from invariclip.export.graphs.trace import OPSET
from invariclip.export.graphs.writing import write_facts
from invariclip.export.variants import BASE, with_variants
from invariclip.export.verification.candidate import VerificationCandidate, prepare
from invariclip.export.verification.evidence import images_of
from invariclip.export.verification.pixel_checks import check_fast_pixels
from invariclip.export.verification.verify import check, look
from invariclip.files import write_atomically
from invariclip.preprocessing.prompts import DEFAULT_TEMPLATES
from invariclip.version import __version__

if TYPE_CHECKING:
    import os

    from invariclip.artifact.learned_prompts import LearnedPrompts
    from invariclip.artifact.projection import Projection
    from invariclip.console import Progress
    from invariclip.export.checkpoints.checkpoint import Checkpoint
    from invariclip.export.graphs.tower_graph import TowerFacts
    from invariclip.export.verification.candidate import ExportJob
    from invariclip.export.verification.evidence import ImageBatches
    from invariclip.export.verification.verify import ReferenceEvidence

IMAGE_FILE, TEXT_FILE, LEARNED_TEXT_FILE = "image.onnx", "text.onnx", "text.cdc.onnx"
TOKENIZER_FILE, PROJECTION_FILE, LEARNED_FILE = "tokenizer.json", "projection.safetensors", "cdc.safetensors"


def export_artifact(
    checkpoint: Checkpoint,
    out: str | os.PathLike[str],
    config: ExportConfig | None = None,
    *,
    projection: Projection | None = None,
    learned_prompts: LearnedPrompts | None = None,
    progress: Progress = silent,
) -> Manifest:
    """Writes a verified artifact, or nothing.

    Args:
        checkpoint: The original model; it stays unchanged.
        out: The artifact's folder, by convention `name.icm`. An artifact that stands there is replaced.
        config: How it is made and what it must keep; None takes the defaults.
        projection: A_inv to fold in, or None.
        learned_prompts: Learned templates: the classes are answered by all of them, with an uncertainty, and the text
            graph reads their vectors.
        progress: `console.bar` or `console.silent`.

    Returns:
        The manifest that was written.

    Raises:
        ProjectionError: The projection is of another width.
        SemanticsError: The learned templates belong to another checkpoint or projection.
        ContractError: The graph cannot be exported, or does not answer like the checkpoint.
        InputError: No readable image, options that exclude each other, or a folder that cannot be written.
    """
    config, target = config or ExportConfig(), Path(out)
    require_replaceable(target)
    if projection is not None:
        projection.require_width(checkpoint.embed_dim, checkpoint.name)
    images = images_of(config.images, checkpoint.pixels)
    images.require_readable()
    job = prepare(checkpoint, projection, tuple(config.classes), _templates(config, learned_prompts), learned_prompts)
    with new_artifact(target) as folder:
        manifest = _write_files(job, folder, config, learned_prompts, progress)
        reference = look(job.checkpoint, images, progress)
        manifest = _verified(manifest, target.name, folder, job, config, reference, progress)
        manifest = with_variants(manifest, folder, job, config, reference, progress)
        if config.fast_pixels:
            manifest = _with_fast_pixels(manifest, job, config, images, progress)
        write_manifest(folder, manifest)
    return manifest


def _templates(config: ExportConfig, learned_prompts: LearnedPrompts | None) -> tuple[str, ...]:
    """The hand-written prompts.

    Raises:
        InputError: Other templates than the learned ones were trained beside, or an exchangeable projection with them.
    """
    if learned_prompts is None:
        return tuple(config.templates or DEFAULT_TEMPLATES)
    if config.templates is not None and tuple(config.templates) != learned_prompts.templates:
        raise InputError(
            f"the learned templates were trained beside the prompts {' | '.join(learned_prompts.templates)}; leave "
            "other templates out, or train with them"
        )
    if config.projection_as_input:
        raise InputError(
            "learned templates were trained in the space of one projection, so it cannot stay exchangeable; leave "
            "--cdc or --projection-as-input-initializer out"
        )
    return learned_prompts.templates


def _write_files(
    job: ExportJob, folder: Path, config: ExportConfig, learned_prompts: LearnedPrompts | None, progress: Progress
) -> Manifest:
    """Writes every file but the manifest; the one it returns lists float32, not yet verified on any engine."""
    checkpoint, projection = job.checkpoint, job.projection
    write_atomically(folder / TOKENIZER_FILE, checkpoint.tokenizer.model_json)
    if projection is not None:
        write_projection(folder / PROJECTION_FILE, projection)
    if learned_prompts is not None:
        write_semantics(folder / LEARNED_FILE, learned_prompts)
    files = {"image": IMAGE_FILE, "text": LEARNED_TEXT_FILE if learned_prompts else TEXT_FILE}
    graphs: dict[str, TowerFacts] = {}
    # One tower at a time: of a large model two graphs beside the checkpoint would not fit
    for tower, file in progress(list(files.items()), total=len(files), desc="trace"):
        write = write_image_graph if tower == "image" else write_text_graph
        graphs[tower] = write(job, config, folder / file)
    manifest = Manifest(
        model=ModelFacts(
            checkpoint.name, checkpoint.sha256, checkpoint.embed_dim, checkpoint.logit_scale, checkpoint.logit_bias
        ),
        pixels=checkpoint.pixels,
        text=checkpoint.tokenizer.spec,
        tokenizer=describe_file(folder, TOKENIZER_FILE),
        projection=_projection_facts(projection, graphs) if projection else None,
        projection_file=describe_file(folder, PROJECTION_FILE) if projection else None,
        classes=job.classes,
        templates=job.templates,
        plan={tower: graph.plan for tower, graph in graphs.items()},
        variants={},
        space_id=space_id(
            checkpoint.sha256,
            projection.digest if projection else None,
            checkpoint.pixels,
            checkpoint.tokenizer.spec,
        ),
        opset=OPSET,
        producer=_producer(checkpoint),
        cdc=job.learned,
        cdc_file=describe_file(folder, LEARNED_FILE) if learned_prompts else None,
    )
    for file in files.values():
        write_facts(folder / file, manifest.facts(file))
    variant = Variant(
        BASE,
        describe_file(folder, files["image"]),
        describe_file(folder, files["text"]),
        {},
        "dynamic" if graphs["text"].applied("text-cut") else "fixed",
        config.pixels_in_graph or "host",
    )
    return replace(manifest, variants={BASE: variant})


def _verified(
    manifest: Manifest,
    name: str,
    folder: Path,
    job: ExportJob,
    config: ExportConfig,
    reference: ReferenceEvidence,
    progress: Progress,
) -> Manifest:
    """The manifest with what float32 reaches on every engine.

    Raises:
        ContractError: It does not answer like its checkpoint on one of them.
    """
    variant = manifest.variants[BASE]
    towers = folder / variant.image.path, folder / variant.text.path
    candidates = {
        backend: VerificationCandidate.open(*towers, job, backend=backend, threads=config.threads)
        for backend in config.backends
    }
    verdicts = check(candidates, reference.images, config.thresholds, reference=reference, progress=progress)
    for backend, verdict in verdicts.items():
        verdict.require(f"{name}: the {BASE} variant on {backend}")
    parity = {backend: verdict.parity for backend, verdict in verdicts.items()}
    return replace(manifest, variants={BASE: replace(variant, parity=parity)})


def _with_fast_pixels(
    manifest: Manifest, job: ExportJob, config: ExportConfig, images: ImageBatches, progress: Progress
) -> Manifest:
    """The manifest with the record of the fast pixel mode, at the bounds that variants have to keep."""
    record = check_fast_pixels(job, images, config.variant_bounds, progress=progress)
    if not record["passed"]:
        warnings.warn(f"the fast pixel mode is left out: {'; '.join(record['broken'])}", LeftOutWarning, stacklevel=3)
    return replace(manifest, fast_pixels=record)


def _projection_facts(projection: Projection, graphs: dict[str, TowerFacts]) -> ProjectionFacts:
    """What the manifest says of a projection."""
    return ProjectionFacts(
        sha256=projection.digest,
        estimator=projection.estimator,
        strength=projection.strength,
        rank=projection.rank,
        image_fold=graphs["image"].fold,
        text_fold=graphs["text"].fold,
    )


def _producer(checkpoint: Checkpoint) -> dict[str, str]:
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
