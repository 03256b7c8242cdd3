"""The parity contract: an exported graph answers like its checkpoint, shown on real images, or it is not shipped.

Reference: the original PyTorch encoder in float32, unfolded; then A_inv and the L2 norm in float64. Candidate: the ONNX
files in one engine. Both see the same uint8 images and the same ids. The reference encodes every input once, however
many candidates (variants, engines, projections) are held against it, and only one tower of one candidate is open at a
time. `figures` says what is bounded, `comparison` how it is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from math import inf
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from invariclip.artifact.fidelity import LEVELS
from invariclip.artifact.learned_prompts import class_banks
from invariclip.artifact.manifest import EMBEDDING
from invariclip.console import silent
from invariclip.errors import ContractError
from invariclip.export.checkpoints import check_texts
from invariclip.export.checkpoints.contexts import contexts_of, with_semantics
from invariclip.export.graphs.front import BOUNDS
from invariclip.export.verification import answers, images_check
from invariclip.export.verification.answers import project
from invariclip.export.verification.candidate import CandidateVerdict, ExportJob, VerificationCandidate
from invariclip.export.verification.comparison import measure
from invariclip.export.verification.diagnose import causes_of
from invariclip.export.verification.diagnose_pixels import front_causes, pixel_causes
from invariclip.export.verification.figures import THRESHOLDS, Thresholds, failures
from invariclip.export.verification.images_check import RawImages
from invariclip.preprocessing.pixels import pixels
from invariclip.preprocessing.prompts import class_bank

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from invariclip.artifact.learned_prompts import LearnedPrompts
    from invariclip.artifact.projection import Projection
    from invariclip.backends import Backend
    from invariclip.console import Progress
    from invariclip.export.checkpoints.checkpoint import Checkpoint
    from invariclip.export.verification.answers import ReferenceTarget
    from invariclip.export.verification.comparison import Comparison
    from invariclip.export.verification.evidence import ImageBatches

BATCH = 16
"""Rows per run; the last batch is smaller."""
ALTERED = 64
"""Images that are also shown under an intervention."""
TOWERS = ("image", "text")

__all__ = [
    "CandidateVerdict",
    "ExportJob",
    "ReferenceEvidence",
    "VerificationCandidate",
    "check",
    "look",
    "prepare",
    "project",
]


def prepare(
    checkpoint: Checkpoint,
    projection: Projection | None,
    classes: tuple[str, ...],
    templates: tuple[str, ...],
    semantics: LearnedPrompts | None = None,
) -> ExportJob:
    """A job whose class embeddings come from the reference: PyTorch in float32, projection and mean in float64.

    Args:
        checkpoint: The original model.
        projection: A_inv, or None.
        classes: Names to bake in.
        templates: Their hand-written prompts.
        semantics: Learned templates; the job's checkpoint then reads their vectors as well.

    Raises:
        InputError: Bad classes or templates.
        SemanticsError: The learned templates belong to another checkpoint or projection, or do not fit its text tower.
    """
    if semantics is not None:
        semantics.require_owner(checkpoint.sha256, None if projection is None else projection.digest)
        checkpoint = replace(checkpoint, module=with_semantics(checkpoint.module, semantics))

    def embed(texts: list[str], before: tuple[int, ...] = ()) -> NDArray[np.float64]:
        return project(checkpoint.encode_texts(checkpoint.tokenizer(texts, prefix=before)), projection)

    learned = None if semantics is None else semantics.facts
    if not classes:
        return ExportJob(checkpoint, projection, classes, templates, None, learned)
    if learned is None:
        return ExportJob(checkpoint, projection, classes, templates, class_bank(embed, classes, templates))
    banks = class_banks(embed, classes, templates, learned)
    return ExportJob(checkpoint, projection, classes, templates, banks[0], learned, banks)


def check(
    candidates: Mapping[str, VerificationCandidate],
    images: ImageBatches,
    bounds: Thresholds | Mapping[str, Thresholds] | None = None,
    *,
    seen: ReferenceEvidence | None = None,
    progress: Progress = silent,
) -> dict[str, CandidateVerdict]:
    """Holds graphs of one checkpoint against it.

    Images are matched with the baked classes, or with a list of prompts; texts with those images. Both banks are
    the reference's own embeddings.

    Args:
        candidates: Graphs by name; all their jobs have the same checkpoint.
        images: What to look at.
        bounds: What they must keep, for all or by the candidates' names; None takes their levels' own.
        seen: From `look`, where the reference was run on these images already; None runs it.
        progress: `console.bar` or `console.silent`.

    Returns:
        A verdict for every candidate.

    Raises:
        InputError: No image can be read.
        ArtifactError: A graph cannot be loaded.
        ContractError: A graph cannot answer at all, or with vectors of another width.
        CheckpointError: The checkpoint itself answers with NaN or infinity.
    """
    seen = seen or look(next(iter(candidates.values())).job.checkpoint, images, progress)
    verdicts = {}
    for name, candidate in candidates.items():
        limits = bounds.get(name) if isinstance(bounds, Mapping) else bounds
        try:
            verdicts[name] = _judge(name, candidate, seen, limits or THRESHOLDS[candidate.level], progress)
        except ContractError as error:
            raise ContractError(f"{name}: {error}") from error
    return verdicts


@dataclass(frozen=True)
class ReferenceEvidence:
    """What all candidates are held against: inputs, the reference's answers, and the host's pixels."""

    checkpoint: Checkpoint
    images: ImageBatches
    raw: RawImages
    shown: dict[str, ReferenceTarget]
    prompts: NDArray[np.float32]
    pixel_levels: float
    pixel_causes: list[str]
    front_raw: list[NDArray[np.float32]] = field(default_factory=list)
    texts: dict[tuple[Any, ...], Comparison] = field(default_factory=dict)


def look(checkpoint: Checkpoint, images: ImageBatches, progress: Progress) -> ReferenceEvidence:
    """Runs the reference on everything once.

    Raises:
        InputError: No image can be read.
        CheckpointError: The checkpoint itself answers with NaN or infinity.
    """
    target = look_at_images(checkpoint, images, progress)
    ids = check_texts.ids_of(check_texts.TEXTS, checkpoint.tokenizer)
    learned = contexts_of(checkpoint.module)
    if learned is not None:
        ids = np.concatenate([ids, check_texts.ids_behind(learned, checkpoint.tokenizer)])
    parts = [ids[start : start + BATCH] for start in range(0, len(ids), BATCH)]
    texts = answers.show(
        lambda: progress(parts, total=len(parts), desc="reference, text tower"),
        checkpoint.encode_texts,
        spec=checkpoint.tokenizer.spec,
    )
    levels = images_check.pixel_levels(images.readable, checkpoint.pixels)
    causes = pixel_causes(images.readable, checkpoint.pixels) if levels else []
    prompts = checkpoint.encode_texts(check_texts.ids_of(check_texts.PROMPTS, checkpoint.tokenizer))
    shown = {"image": target, "text": replace(texts, batches=lambda: iter(parts))}
    raw = RawImages(images.readable, checkpoint.pixels)
    return ReferenceEvidence(checkpoint, images, raw, shown, prompts, levels, causes)


def look_at_images(checkpoint: Checkpoint, images: ImageBatches, progress: Progress) -> ReferenceTarget:
    """The reference's image tower alone; the images are shown to candidates without a second progress bar.

    Raises:
        InputError: No image can be read.
        CheckpointError: The checkpoint itself answers with NaN or infinity.
    """
    steps = -(-len(images.paths) // BATCH)
    target = answers.show(
        lambda: progress(images.batches(BATCH), total=steps, desc="reference, image tower"),
        checkpoint.encode_images,
        alter=set(check_texts.spread(range(len(images.paths)), ALTERED)),
    )
    return replace(target, batches=lambda: images.batches(BATCH))


def _judge(
    name: str, candidate: VerificationCandidate, seen: ReferenceEvidence, bounds: Thresholds, progress: Progress
) -> CandidateVerdict:
    """Both towers of one candidate, one after the other."""
    job, checkpoint = candidate.job, seen.checkpoint
    sides: dict[str, Comparison] = {}
    engine: dict[str, Any] = {}
    front, trial = _Front(), {**THRESHOLDS, candidate.level: bounds}
    for tower in TOWERS:
        shown = seen.shown[tower]
        # variants often share a text graph: what one engine answered with it stands for all of them
        key = (candidate.text, candidate.backend, candidate.text_compute, candidate.threads, candidate.opener, id(job))
        if tower == "text" and key in seen.texts:
            sides[tower] = seen.texts[key]
            continue
        backend = candidate.opened(tower)
        engine = engine or backend.describe()
        batches = progress(shown.batches(), total=-(-len(shown.raw) // BATCH), desc=f"{name}, {tower} tower")
        site = job.site if tower == "image" else None
        sides[tower] = answers.compare(backend, shown, job.projection, batches, site)
        any_size = tower == "image" and images_check.is_any_size(backend)
        if any_size:
            sides[tower].levels["front_cosine"] = _front_cosine(backend, job, seen)
        if tower == "text":
            seen.texts[key] = sides[tower]
        del backend  # the next tower is loaded only when this one's memory is free
        if any_size:
            front = _front(candidate, seen, bounds)
            sides[tower].levels["front_levels"] = front.levels
    sides["image"].levels["pixel_levels"] = seen.pixel_levels
    trial = {name: front.tighten(limits) for name, limits in trial.items()}
    bounds = trial[candidate.level]
    bank = job.bank if job.bank is not None else project(seen.prompts, job.projection)
    figures = {
        "image": measure(sides["image"], bank, job.head),
        "text": measure(sides["text"], sides["image"].reference),
    }
    failed = {tower: failures(tower, figures[tower], bounds) for tower in TOWERS}
    causes = list(seen.pixel_causes)
    for tower in TOWERS:
        if set(failed[tower]) - {"pixel_levels", "front_levels", "front_cosine"}:
            causes += causes_of(checkpoint, job.projection, tower, sides[tower])
    causes += front.causes
    broken = [line for lines in failed.values() for line in lines.values()]
    kept = [name for name in LEVELS if not any(failures(tower, figures[tower], trial[name]) for tower in TOWERS)]
    parity = {
        "reference": f"torch {torch.__version__} float32, projection and norm in float64",
        "engine": engine,
        **{tower: {**figures[tower].to_json(), "failed": list(failed[tower])} for tower in TOWERS},
        "unreadable_images": len(seen.images.unreadable),
        "too_large_images": len(seen.raw.too_large) if front.is_there else 0,
        "level": candidate.level,
        "fidelity": kept,
        "thresholds": asdict(bounds),
        "causes": causes,
        "passed": not broken,
    }
    return CandidateVerdict(figures["image"], figures["text"], broken, parity, causes)


def _front_cosine(backend: Backend, job: ExportJob, seen: ReferenceEvidence) -> float:
    """Smallest cosine between decoded images through the graph's own resize and through the host's."""
    spec, worst = seen.checkpoint.pixels, 1.0
    for place, image in enumerate(seen.raw):
        if place == len(seen.front_raw):  # the first candidate that resizes; the next ones find it done
            seen.front_raw.append(seen.checkpoint.encode_images(pixels(image, spec)[None]))
        (got,) = backend.run({backend.input_names[0]: image[None]}, (EMBEDDING,))[EMBEDDING].astype(np.float64)
        cosine = float(
            project(seen.front_raw[place], job.projection, job.site)[0] @ got / max(np.linalg.norm(got), 1e-30)
        )
        worst = float(np.minimum(worst, cosine))
    return worst


@dataclass(frozen=True)
class _Front:
    """What was seen of a graph's own resize; the defaults are those of a graph without one.

    Attributes:
        levels: Largest difference from the host's pixels.
        most: What its form keeps on any image, see `front.BOUNDS`.
        causes: What is wrong, where it is further off.
    """

    levels: float = 0.0
    most: float = inf
    causes: tuple[str, ...] = ()

    @property
    def is_there(self) -> bool:
        return self.most < inf

    def tighten(self, bounds: Thresholds) -> Thresholds:
        """The bounds, held to what the form keeps as well."""
        return replace(bounds, max_front_levels=min(bounds.max_front_levels, self.most))


def _front(candidate: VerificationCandidate, seen: ReferenceEvidence, bounds: Thresholds) -> _Front:
    """Asks the graph's own resize, opened once and alone, in the candidate's engine."""
    spec = seen.checkpoint.pixels
    form, run = images_check.open_front(candidate.image, backend=candidate.backend, threads=candidate.threads)
    front = _Front(images_check.front_levels(run, seen.raw, spec), BOUNDS[form, spec.interpolation].max_levels)
    if front.levels <= front.tighten(bounds).max_front_levels:
        return front
    return replace(front, causes=tuple(front_causes(run, seen.raw, spec)))
