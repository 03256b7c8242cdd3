"""Checkpoint and projection to a verified artifact: fold, trace, verify, and only then take the name."""

from __future__ import annotations

import platform
import warnings
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from invariclip.artifact.folder import describe_file, require_replaceable, write_manifest
from invariclip.artifact.learned_prompts import write_semantics
from invariclip.artifact.manifest import Manifest, ModelFacts, ProjectionFacts, Variant, space_id
from invariclip.artifact.projection import write_projection
from invariclip.backends import DEFAULT_BACKEND, require_backend
from invariclip.console import silent
from invariclip.errors import InputError, LeftOutWarning
from invariclip.export.graphs.front import add_front
from invariclip.export.graphs.head import attach_head
from invariclip.export.graphs.rewrites import NAMES
from invariclip.export.graphs.tower_graph import tower_graph
from invariclip.export.graphs.trace import OPSET, write_facts, write_graph
from invariclip.export.variants import BASE as FLOAT32
from invariclip.export.variants import Wish, require_wish, with_variants
from invariclip.export.verification import evidence, fast_pixels, figures, verify
from invariclip.files import new_directory, write_atomically
from invariclip.preprocessing.prompts import DEFAULT_TEMPLATES, check_prompts
from invariclip.version import __version__

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    import onnx_ir as ir

    from invariclip.artifact.learned_prompts import LearnedPrompts
    from invariclip.artifact.manifest import Front, TextLength
    from invariclip.artifact.projection import Projection
    from invariclip.console import Progress
    from invariclip.export.checkpoints.checkpoint import Checkpoint
    from invariclip.export.graphs.rewrites import Tower
    from invariclip.export.graphs.tower_graph import TowerFacts
    from invariclip.export.verification.evidence import ImageBatches
    from invariclip.export.verification.figures import Thresholds
    from invariclip.export.verification.verify import ExportJob

IMAGE_FILE, TEXT_FILE, LEARNED_TEXT_FILE = "image.onnx", "text.onnx", "text.cdc.onnx"
TOKENIZER_FILE, PROJECTION_FILE, SEMANTICS_FILE = "tokenizer.json", "projection.safetensors", "cdc.safetensors"


@dataclass(frozen=True)
class Build:
    """How the graphs are made.

    Attributes:
        rewrites: Names of the exact rewrites that are switched on, see `rewrites`.
        pixels_in_graph: Put a front before the image tower that takes uint8 images of any size: `resize` (ONNX's
            Resize, for ONNX Runtime) or `matmul` (two products, which TensorRT builds); None leaves that to the host.
        projection_as_input: Leave the projection as a matrix that may be exchanged at any run.
        fast_pixels: Hold the fast pixel mode against the exact one, so that it can be asked for at run time.
    """

    rewrites: tuple[str, ...] = NAMES
    pixels_in_graph: Literal["resize", "matmul"] | None = None
    projection_as_input: bool = False
    fast_pixels: bool = False


@dataclass(frozen=True)
class Written:
    """What `write_files` wrote: the manifest without variants, and what the variant has to say of its two graphs."""

    manifest: Manifest
    image: str
    text: str
    text_length: TextLength
    front: Front


def export_artifact(
    checkpoint: Checkpoint,
    out: str | os.PathLike[str],
    *,
    projection: Projection | None = None,
    classes: Sequence[str] = (),
    templates: Sequence[str] | None = None,
    semantics: LearnedPrompts | None = None,
    images: Sequence[str | Path] | None = None,
    thresholds: Thresholds = figures.EXACT,
    how: Build | None = None,
    backends: Sequence[str] = (DEFAULT_BACKEND,),
    wish: Wish | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> Manifest:
    """Writes a verified artifact, or nothing.

    Args:
        checkpoint: The original model; it stays unchanged.
        out: The artifact's folder, by convention `name.icm`. An artifact that stands there is replaced.
        projection: A_inv to fold in, or None.
        classes: Class names to bake into the image graph.
        templates: Prompt templates of the classes; None takes those that the learned templates were trained beside, or
            the default.
        semantics: Learned templates: the classes are answered by all of them, with an uncertainty, and the text graph
            reads their vectors.
        images: Files and folders to verify on; None takes the bundled ones.
        thresholds: Bounds of the contract.
        how: How the graphs are made; None takes every rewrite, images prepared by the host, the projection folded.
        backends: Engines that have to keep the contract, see `backends.BACKENDS`.
        wish: Further variants beside float32, see `variants`; one that fails is left out with a warning.
        threads: The engines' threads; None takes what this process may use.
        progress: `console.bar` or `console.silent`.

    Returns:
        The manifest that was written.

    Raises:
        ProjectionError: The projection is of another width.
        SemanticsError: The learned templates belong to another checkpoint or projection.
        ContractError: The graph cannot be exported, or does not answer like the checkpoint.
        InputError: Bad classes or templates, no readable image, or a folder that cannot be written.
    """
    target = Path(out)
    require_replaceable(target)
    if projection is not None:
        projection.require_width(checkpoint.embed_dim, checkpoint.name)
    for name in backends:
        require_backend(name)
    checked = evidence.images_of(images, checkpoint.pixels)
    checked.require_readable()
    build, wanted = how or Build(), wish or Wish()
    prompts = _prompts(templates, semantics)
    if classes:
        check_prompts(classes, prompts)
    if semantics is not None and build.projection_as_input:
        raise InputError(
            "learned templates were trained in the space of one projection, so it cannot stay exchangeable; leave "
            "--cdc or --projection-as-input-initializer out"
        )
    job = verify.prepare(checkpoint, projection, tuple(classes), prompts, semantics)
    require_wish(wanted, build.pixels_in_graph)
    with new_directory(target) as folder:
        written = write_files(job, folder, build, progress, semantics)
        towers = folder / written.image, folder / written.text
        candidates = {
            name: verify.VerificationCandidate.open(*towers, job, backend=name, threads=threads) for name in backends
        }
        seen = verify.look(job.checkpoint, checked, progress)
        verdicts = verify.check(candidates, checked, thresholds, seen=seen, progress=progress)
        for name, verdict in verdicts.items():
            verdict.require(f"{target.name}: the {FLOAT32} variant on {name}")
        files = describe_file(folder, written.image), describe_file(folder, written.text)
        parity = {name: verdict.parity for name, verdict in verdicts.items()}
        variant = Variant(FLOAT32, *files, parity, written.text_length, written.front)
        manifest = with_variants(
            replace(written.manifest, variants={FLOAT32: variant}), folder, job, wanted, seen, backends=backends,
            threads=threads, progress=progress, trace=partial(_write_thinned, job, build),
        )  # fmt: skip
        if build.fast_pixels:
            manifest = replace(manifest, fast_pixels=_fast_pixels(job, checked, wanted, progress))
        write_manifest(folder, manifest)
    return manifest


def _prompts(templates: Sequence[str] | None, semantics: LearnedPrompts | None) -> tuple[str, ...]:
    """The hand-written prompts.

    Raises:
        InputError: Others are given than the learned templates were trained beside.
    """
    if semantics is None:
        return tuple(templates or DEFAULT_TEMPLATES)
    if templates is not None and tuple(templates) != semantics.templates:
        raise InputError(
            f"the learned templates were trained beside the prompts {' | '.join(semantics.templates)}; leave other "
            "templates out, or train with them"
        )
    return semantics.templates


def _fast_pixels(job: ExportJob, images: ImageBatches, wish: Wish, progress: Progress) -> dict[str, Any]:
    """The record of the fast pixel mode, at the bounds of the level that variants have to keep."""
    record = fast_pixels.prove(job, images, wish.bounds or figures.THRESHOLDS[wish.level], progress=progress)
    if not record["passed"]:
        warnings.warn(f"the fast pixel mode is left out: {'; '.join(record['broken'])}", LeftOutWarning, stacklevel=3)
    return record


def _write_thinned(job: ExportJob, how: Build, tokens: Sequence[int], path: Path) -> None:
    """Writes the image graph again with so many tokens after each block."""
    graph = tower_graph(
        job.checkpoint, "image", job.projection, rewrites=how.rewrites, projection_as_input=how.projection_as_input,
        tokens=tokens,
    )  # fmt: skip
    _attach(graph.model, job)
    write_graph(graph.model, path)


def _attach(model: ir.Model, job: ExportJob) -> None:
    head, checkpoint = job.head, job.checkpoint
    attach_head(model, head.bank if head else None, checkpoint.logit_scale, checkpoint.logit_bias, job.learned)


def write_files(
    job: ExportJob, folder: Path, how: Build, progress: Progress, semantics: LearnedPrompts | None = None
) -> Written:
    """Writes every file but the manifest; its manifest lists no variant yet."""
    checkpoint, projection = job.checkpoint, job.projection
    write_atomically(folder / TOKENIZER_FILE, checkpoint.tokenizer.model_json)
    if projection is not None:
        write_projection(folder / PROJECTION_FILE, projection)
    if semantics is not None:
        write_semantics(folder / SEMANTICS_FILE, semantics)
    graphs: dict[str, TowerFacts] = {}
    # One tower at a time: of a large model two graphs beside the checkpoint would not fit
    pending: dict[Tower, str] = {"image": IMAGE_FILE, "text": LEARNED_TEXT_FILE if semantics else TEXT_FILE}
    for tower, file in progress(list(pending.items()), total=len(pending), desc="trace"):
        graph = tower_graph(
            checkpoint, tower, projection, rewrites=how.rewrites, projection_as_input=how.projection_as_input
        )
        if tower == "image":
            _attach(graph.model, job)
            if how.pixels_in_graph is not None:
                add_front(graph.model, checkpoint.pixels, how.pixels_in_graph)
        write_graph(graph.model, folder / file)
        graphs[tower] = graph.facts
        del graph
    manifest = Manifest(
        model=ModelFacts(
            checkpoint.name, checkpoint.sha256, checkpoint.embed_dim, checkpoint.logit_scale, checkpoint.logit_bias
        ),
        pixels=checkpoint.pixels,
        text=checkpoint.tokenizer.spec,
        tokenizer=describe_file(folder, TOKENIZER_FILE),
        projection=facts_of(projection, graphs) if projection else None,
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
        producer=producer(checkpoint),
        cdc=job.learned,
        cdc_file=describe_file(folder, SEMANTICS_FILE) if semantics else None,
    )
    for file in pending.values():
        write_facts(folder / file, manifest.facts(file))
    return Written(
        manifest,
        **pending,
        text_length="dynamic" if graphs["text"].applied("text-cut") else "fixed",
        front=how.pixels_in_graph or "host",
    )


def facts_of(projection: Projection, graphs: Mapping[str, TowerFacts]) -> ProjectionFacts:
    """What the manifest says of a projection."""
    return ProjectionFacts(
        sha256=projection.digest,
        estimator=projection.estimator,
        strength=projection.strength,
        rank=projection.rank,
        image_fold=graphs["image"].fold,
        text_fold=graphs["text"].fold,
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
