"""Further variants of an artifact: other precisions and fewer tokens, made from its float32 graphs, judged like them.

A variant is listed on the engines where it keeps the contract at the level asked for. An engine where it does not is
left out, and where it keeps it nowhere the variant is, its files with it; the manifest says by how much each missed.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from invariclip.artifact.folder import describe_file
from invariclip.errors import ContractError, InputError, LeftOutWarning
from invariclip.export.checkpoints import check_texts
from invariclip.export.checkpoints.check_texts import spread
from invariclip.export.graphs.trace import write_facts
from invariclip.export.quantization.fewer import fewer_tokens
from invariclip.export.quantization.islands import NORMS
from invariclip.export.quantization.trials import GraphTrials
from invariclip.export.quantization.variants import KINDS, VariantInputs, require_kinds, write_islands
from invariclip.export.verification import evidence, verify
from invariclip.export.verification.candidate import VerificationCandidate
from invariclip.export.verification.evidence import ImageBatches
from invariclip.export.verification.figures import THRESHOLDS, searched
from invariclip.preprocessing.find import find_images

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from invariclip.artifact.fidelity import Fidelity
    from invariclip.artifact.manifest import Manifest, Variant
    from invariclip.console import Progress
    from invariclip.export.quantization.token_search import Found
    from invariclip.export.quantization.variants import Method, VariantKind
    from invariclip.export.verification.candidate import CandidateVerdict, ExportJob
    from invariclip.export.verification.figures import Thresholds
    from invariclip.export.verification.verify import ReferenceEvidence

BASE = "float32"
"""The variant that every artifact has, and the others are made from."""
CALIBRATION = 96
"""Bundled images that ranges and moments are taken from, each as it is and under one intervention."""
LOOKED_AT = 240
"""Images at most that a search asks the contract on: of far fewer, one alone decides whether 99.5 % is kept."""
_BATCH = 8
_SEED = 1
"""Of those interventions; the contract's own draws have another."""


@dataclass(frozen=True)
class Wish:
    """What further variants an artifact should have.

    Attributes:
        names: See `precision.variants.KINDS`.
        level: The fidelity that they have to reach.
        bounds: That level's bounds; None takes the level's own.
        calibration: Images to calibrate on; None takes bundled ones that the contract does not look at.
    """

    names: tuple[str, ...] = ()
    level: Fidelity = "fast"
    bounds: Thresholds | None = None
    calibration: tuple[str | Path, ...] | None = None


def require_wish(wish: Wish, pixels_in_graph: str | None) -> None:
    """Makes sure that every variant can be made, before minutes of work.

    Raises:
        InputError: One is not known, or the image graph would resize images itself.
    """
    require_kinds(wish.names)
    if wish.names and pixels_in_graph is not None:
        raise InputError("variants take images prepared by the host: leave --pixels-in-graph or --variant out")


def with_variants(
    manifest: Manifest,
    folder: Path,
    job: ExportJob,
    wish: Wish,
    seen: ReferenceEvidence,
    *,
    backends: Sequence[str],
    threads: int | None,
    progress: Progress,
    trace: Callable[[Sequence[int], Path], None],
) -> Manifest:
    """Makes, judges and lists further variants in an artifact's folder that holds its float32 graphs.

    Args:
        manifest: The artifact's, with the variant `float32`.
        folder: Where its files are.
        job: What every variant must answer like.
        wish: Which ones.
        seen: What the contract looks at, and what the reference answers.
        backends: Engines to judge on; a variant needs one of them.
        threads: The engines'.
        progress: `console.bar` or `console.silent`.
        trace: Writes the image graph again with so many tokens after each block.

    Returns:
        The manifest with what passed in `variants`, and the rest in `left_out`.
    """
    if not wish.names:
        return manifest
    base = manifest.variants[BASE]
    bounds = wish.bounds or THRESHOLDS[wish.level]
    spare = spare_images(wish, seen.images)
    calibration = ImageBatches(spare if wish.calibration else spread(spare, CALIBRATION), job.checkpoint.pixels)
    trials = GraphTrials.look(
        job, ImageBatches(spread(spare, LOOKED_AT), job.checkpoint.pixels), searched(bounds), progress
    )
    workshop = VariantInputs(partial(_batches, calibration), trials, "", threads, progress)
    made, left = _made(manifest, folder, wish, backends, workshop, partial(fewer_tokens, folder=folder, trace=trace))
    files = {file.path for variant in made.values() for file in (variant.image, variant.text)}
    for file in files - {base.image.path, base.text.path}:
        write_facts(folder / file, manifest.facts(file))
    # the digests once more: the facts were added after the files were made
    made = {
        name: replace(one, image=describe_file(folder, one.image.path), text=describe_file(folder, one.text.path))
        for name, one in made.items()
    }
    verdicts = _judged(folder, job, wish, bounds, seen, made, backends, threads, progress)
    for name, variant in made.items():
        passed = {engine: verdict.parity for engine, verdict in verdicts[name].items() if not verdict.broken}
        missed = {engine: verdict.reason for engine, verdict in verdicts[name].items() if verdict.broken}
        if passed:
            made[name] = replace(variant, parity=passed)
            left |= {f"{name} on {engine}": reason for engine, reason in missed.items()}
        else:
            left[name] = "; ".join(f"{engine}: {reason}" for engine, reason in missed.items())
    for name, why in left.items():
        warnings.warn(f"variant {name} is left out: {why}", LeftOutWarning, stacklevel=2)
    listed = {**manifest.variants, **{name: one for name, one in made.items() if name not in left}}
    _drop_unlisted(folder, listed)
    return replace(manifest, variants=listed, left_out=left)


def _judged(
    folder: Path, job: ExportJob, wish: Wish, bounds: Thresholds, seen: ReferenceEvidence, made: Mapping[str, Variant],
    backends: Sequence[str], threads: int | None, progress: Progress,
) -> dict[str, dict[str, CandidateVerdict]]:  # fmt: skip
    """Every variant on every engine that can compute it, by name and engine."""
    candidates, places = {}, {}
    for name, variant in made.items():
        for engine in backends:
            if variant.compute != "float32" and engine != "openvino":
                continue
            key = f"{name} on {engine}"
            places[key] = name, engine
            candidates[key] = VerificationCandidate.open(
                folder / variant.image.path, folder / variant.text.path, job, backend=engine, level=wish.level,
                compute=variant.compute, text_compute=variant.text_compute, threads=threads,
            )  # fmt: skip
    found: dict[str, dict[str, CandidateVerdict]] = {name: {} for name in made}
    verdicts = verify.check(candidates, seen.images, bounds, seen=seen, progress=progress) if candidates else {}
    for key, verdict in verdicts.items():
        name, engine = places[key]
        found[name][engine] = verdict
    return found


def _drop_unlisted(folder: Path, listed: Mapping[str, Variant]) -> None:
    """Takes away graphs that no variant names."""
    kept = {file.path for variant in listed.values() for file in (variant.image, variant.text)}
    for path in folder.glob("*.onnx"):
        if path.name not in kept:
            path.unlink()
            path.with_name(f"{path.name}.data").unlink(missing_ok=True)


def _made(
    manifest: Manifest, folder: Path, wish: Wish, backends: Sequence[str], workshop: VariantInputs,
    thin: Callable[..., tuple[Path, Found]],
) -> tuple[dict[str, Variant], dict[str, str]]:  # fmt: skip
    """Every variant whose graph could be made, not yet judged; and why the others could not."""
    made: dict[str, Variant] = {}
    left: dict[str, str] = {}
    base = manifest.variants[BASE]
    # graphs by what was done to them: several variants may share one
    graphs: dict[tuple[Method, bool], tuple[Path, dict[str, Any]]] = {("none", False): (folder / base.image.path, {})}
    for name in wish.names:
        kind = KINDS[name]
        engine = _engine(kind, backends)
        if engine is None:
            left[name] = f"none of {', '.join(backends)} computes in {kind.compute}; add --backend openvino"
            continue
        here = replace(workshop, backend=engine)
        try:
            if kind.fewer_tokens and ("none", True) not in graphs:
                path, found = thin(here)
                graphs["none", True] = path, {"tokens": found.lines()}
            key = kind.method, kind.fewer_tokens
            if key not in graphs:
                source, report = graphs["none", kind.fewer_tokens]
                target = folder / f"image.{name.removesuffix('-bfloat16')}.onnx"
                graphs[key] = target, {**report, **here.make(kind.method, source, target)}
        except (ContractError, InputError) as error:
            left[name] = str(error)
            continue
        image, report = graphs[key]
        text = _text_of(kind, folder, base)
        made[name] = replace(
            base, precision=kind.precision, compute=kind.compute, image=describe_file(folder, image.name),
            text=describe_file(folder, text), made=report, parity={},
        )  # fmt: skip
    return made, left


def _text_of(kind: VariantKind, folder: Path, base: Variant) -> str:
    """The text graph's file: the float32 one, or one in float16 that variants share."""
    if not kind.text_islands:
        return base.text.path
    target = folder / "text.float16-islands.onnx"
    if not target.is_file():
        write_islands(folder / base.text.path, target, NORMS)
    return target.name


def _engine(kind: VariantKind, backends: Sequence[str]) -> str | None:
    """The engine that a search asks: OpenVINO first, which is the faster one in int8."""
    able = [name for name in backends if kind.compute == "float32" or name == "openvino"]
    return "openvino" if "openvino" in able else next(iter(able), None)


def spare_images(wish: Wish, judged: ImageBatches) -> list[Path]:
    """What to calibrate and search on: the wish's own images, or bundled ones that the contract does not look at.

    As many bundled ones as the contract looks at, at most: ranges and second moments hold every image's activations.

    Raises:
        InputError: A path does not exist or a folder is empty.
    """
    if wish.calibration:
        return find_images(list(wish.calibration))
    from invariclip.export.reference import images_path

    bundled = find_images([images_path()])
    apart = [path for path in bundled if path not in set(judged.paths)]
    return check_texts.spread(apart or bundled, evidence.BUNDLED_LIMIT)


def _batches(images: ImageBatches) -> Iterator[NDArray[np.uint8]]:
    """Calibration images as they are and under an intervention each, so that ranges hold for both."""
    for batch in images.batches(_BATCH):
        yield batch
        yield evidence.altered(batch, _SEED)
