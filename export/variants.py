"""Further variants of an artifact: other precisions and fewer tokens, made from its float32 graphs, judged like them.

A variant is listed on the engines where it keeps the contract at the level asked for. An engine where it does not is
left out, and where it keeps it nowhere the variant is, its files with it; the manifest says by how much each missed.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from invariclip.artifact.folder import describe_file
from invariclip.artifact.parity import agreement_interval, items_needed
from invariclip.errors import ContractError, FewImagesWarning, InputError, LeftOutWarning
from invariclip.export.checkpoints.check_texts import spread
from invariclip.export.graph_files import write_image_graph
from invariclip.export.graphs.writing import write_facts
from invariclip.export.quantization.float16 import NORMS
from invariclip.export.quantization.variants import KINDS, VariantInputs, write_islands
from invariclip.export.verification.candidate import VerificationCandidate
from invariclip.export.verification.evidence import BUNDLED_LIMIT, ImageBatches, altered
from invariclip.export.verification.figures import searched
from invariclip.export.verification.verify import GraphTrials, check
from invariclip.preprocessing.find import find_images

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from invariclip.artifact.manifest import Manifest, Variant
    from invariclip.console import Progress
    from invariclip.export.config import ExportConfig
    from invariclip.export.quantization.variants import Method, VariantKind
    from invariclip.export.verification.candidate import CandidateVerdict, ExportJob
    from invariclip.export.verification.verify import ReferenceEvidence

BASE = "float32"
"""The variant that every artifact has, and the others are made from."""
CALIBRATION = 96
"""Bundled images that ranges and moments are taken from, each as it is and under one intervention."""
LOOKED_AT = 240
"""Images at most that a search asks the contract on: of far fewer, one alone decides whether 99.5 % is kept."""
THIN_FILE, HALF_TEXT_FILE = "image.tokens.onnx", "text.float16-islands.onnx"
_BATCH = 8
_SEED = 1
"""Of those interventions; the contract's own draws have another."""


def with_variants(
    manifest: Manifest,
    folder: Path,
    job: ExportJob,
    config: ExportConfig,
    reference: ReferenceEvidence,
    progress: Progress,
) -> Manifest:
    """Makes, judges and lists further variants in an artifact's folder that holds its float32 graphs.

    Args:
        manifest: The artifact's, with the variant `float32`.
        folder: Where its files are.
        job: What every variant must answer like.
        config: Which variants, on which engines, within which bounds.
        reference: What the contract looks at, and what the reference answers.
        progress: `console.bar` or `console.silent`.

    Returns:
        The manifest with what passed in `variants`, and the rest in `left_out`.
    """
    if not config.variants:
        return manifest
    base = manifest.variants[BASE]
    made, left = _made(base, folder, job, config, _inputs(job, config, reference, progress))
    files = {file.path for variant in made.values() for file in (variant.image, variant.text)}
    for file in files - {base.image.path, base.text.path}:
        write_facts(folder / file, manifest.facts(file))
    # the digests once more: the facts were added after the files were made
    made = {
        name: replace(one, image=describe_file(folder, one.image.path), text=describe_file(folder, one.text.path))
        for name, one in made.items()
    }
    for name, verdicts in _judged(made, folder, job, config, reference, progress).items():
        passed = {engine: verdict.parity for engine, verdict in verdicts.items() if not verdict.broken}
        missed = {engine: verdict.reason for engine, verdict in verdicts.items() if verdict.broken}
        if passed:
            made[name] = replace(made[name], parity=passed)
            left |= {f"{name} on {engine}": reason for engine, reason in missed.items()}
        else:
            left[name] = "; ".join(f"{engine}: {reason}" for engine, reason in missed.items())
    if set(made) - set(left):
        _warn_of_few(len(reference.images.readable), config.variant_bounds.min_top1)
    for name, why in left.items():
        warnings.warn(f"variant {name} is left out: {why}", LeftOutWarning, stacklevel=2)
    listed = {**manifest.variants, **{name: one for name, one in made.items() if name not in left}}
    _drop_unlisted(folder, listed)
    return replace(manifest, variants=listed, left_out=left)


def _warn_of_few(images: int, share: float) -> None:
    """What agrees on few images may agree on fewer of others."""
    if share < 1 and images < items_needed(share):
        low, _ = agreement_interval(1.0, images)
        warnings.warn(
            f"the contract saw {images} images: without a miss among them, a variant may still agree on no more than "
            f"{low:.1%} of others like them; {items_needed(share)} show {share:.1%} (--images takes your own)",
            FewImagesWarning,
            stacklevel=3,
        )


def _inputs(job: ExportJob, config: ExportConfig, reference: ReferenceEvidence, progress: Progress) -> VariantInputs:
    """What variants are calibrated and searched on; the engine is named for each."""
    spare, spec = spare_images(config, reference.images), job.checkpoint.pixels
    calibration = ImageBatches(spare if config.calibration_images else spread(spare, CALIBRATION), spec)
    bounds = searched(config.variant_bounds)
    trials = GraphTrials.look(job, ImageBatches(spread(spare, LOOKED_AT), spec), bounds, progress)
    return VariantInputs(partial(_batches, calibration), trials, "", config.threads, progress)


def spare_images(config: ExportConfig, judged: ImageBatches) -> list[Path]:
    """What to calibrate and search on: the images named for it, or bundled ones that the contract does not look at.

    As many bundled ones as the contract looks at, at most: ranges and second moments hold every image's activations.

    Raises:
        InputError: A path does not exist or a folder is empty.
    """
    if config.calibration_images:
        return find_images(list(config.calibration_images))
    from invariclip.export.reference import images_path

    bundled = find_images([images_path()])
    apart = [path for path in bundled if path not in set(judged.paths)]
    return spread(apart or bundled, BUNDLED_LIMIT)


def _batches(images: ImageBatches) -> Iterator[NDArray[np.uint8]]:
    """Calibration images as they are and under an intervention each, so that ranges hold for both."""
    for batch in images.batches(_BATCH):
        yield batch
        yield altered(batch, _SEED)


def _made(
    base: Variant, folder: Path, job: ExportJob, config: ExportConfig, inputs: VariantInputs
) -> tuple[dict[str, Variant], dict[str, str]]:
    """Every variant whose graph could be made, not yet judged; and why the others could not."""
    made: dict[str, Variant] = {}
    left: dict[str, str] = {}
    # graphs by what was done to them: several variants may share one
    graphs: dict[tuple[Method, bool], tuple[Path, dict[str, Any]]] = {("none", False): (folder / base.image.path, {})}

    def trace(tokens: Sequence[int], path: Path) -> None:
        write_image_graph(job, config, path, tokens=tokens)

    for name in config.variants:
        kind = KINDS[name]
        engine = _engine(kind, config.backends)
        if engine is None:
            left[name] = f"none of {', '.join(config.backends)} computes in {kind.compute}; add --backend openvino"
            continue
        here = replace(inputs, backend=engine)
        try:
            if kind.fewer_tokens and ("none", True) not in graphs:
                graphs["none", True] = folder / THIN_FILE, {"tokens": here.thin(folder / THIN_FILE, trace)}
            key = kind.method, kind.fewer_tokens
            if key not in graphs:
                source, report = graphs["none", kind.fewer_tokens]
                target = folder / f"image.{name.removesuffix('-bfloat16')}.onnx"
                graphs[key] = target, {**report, **here.make(kind.method, source, target)}
        except (ContractError, InputError) as error:
            left[name] = str(error)
            continue
        image, report = graphs[key]
        made[name] = replace(
            base, precision=kind.precision, compute=kind.compute, image=describe_file(folder, image.name),
            text=describe_file(folder, _text_of(kind, folder, base)), made=report, parity={},
        )  # fmt: skip
    return made, left


def _engine(kind: VariantKind, backends: Sequence[str]) -> str | None:
    """The engine that a search asks: OpenVINO first, which is the faster one in int8."""
    able = [name for name in backends if kind.compute == "float32" or name == "openvino"]
    return "openvino" if "openvino" in able else next(iter(able), None)


def _text_of(kind: VariantKind, folder: Path, base: Variant) -> str:
    """The text graph's file: the float32 one, or one in float16 that variants share."""
    if not kind.text_islands:
        return base.text.path
    target = folder / HALF_TEXT_FILE
    if not target.is_file():
        write_islands(folder / base.text.path, target, NORMS)
    return target.name


def _judged(
    made: Mapping[str, Variant],
    folder: Path,
    job: ExportJob,
    config: ExportConfig,
    reference: ReferenceEvidence,
    progress: Progress,
) -> dict[str, dict[str, CandidateVerdict]]:
    """Every variant on every engine that can compute it, by name and engine."""
    candidates, places = {}, {}
    for name, variant in made.items():
        for engine in config.backends:
            if variant.compute != "float32" and engine != "openvino":
                continue
            key = f"{name} on {engine}"
            places[key] = name, engine
            candidates[key] = VerificationCandidate.open(
                folder / variant.image.path, folder / variant.text.path, job, backend=engine, level=config.fidelity,
                compute=variant.compute, text_compute=variant.text_compute, threads=config.threads,
            )  # fmt: skip
    verdicts: dict[str, dict[str, CandidateVerdict]] = {name: {} for name in made}
    if candidates:
        for key, verdict in check(
            candidates, reference.images, config.variant_bounds, reference=reference, progress=progress
        ).items():
            name, engine = places[key]
            verdicts[name][engine] = verdict
    return verdicts


def _drop_unlisted(folder: Path, listed: Mapping[str, Variant]) -> None:
    """Takes away graphs that no variant names."""
    kept = {file.path for variant in listed.values() for file in (variant.image, variant.text)}
    for path in folder.glob("*.onnx"):
        if path.name not in kept:
            path.unlink()
            path.with_name(f"{path.name}.data").unlink(missing_ok=True)
