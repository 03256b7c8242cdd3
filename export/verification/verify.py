"""The parity contract: an exported graph answers like its checkpoint, shown on real images, or it is not shipped.

Reference: the original PyTorch encoder in float32, unfolded; then A_inv and the L2 norm in float64. Candidate: the ONNX
files in one engine. Both see the same uint8 images and the same ids. The reference encodes every input once, however
many candidates (variants, engines, projections) are held against it, and only one tower of one candidate is open at a
time. `figures` says what is bounded, `answers` how it is measured. `GraphTrials` asks the contract of one image tower
again and again, while a search looks for a variant that keeps it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from math import inf
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from invariclip.artifact.fidelity import LEVELS
from invariclip.artifact.manifest import EMBEDDING
from invariclip.backends import open_backend
from invariclip.console import silent
from invariclip.errors import ContractError
from invariclip.export.checkpoints import check_texts
from invariclip.export.checkpoints.learned_contexts import contexts_of
from invariclip.export.graphs.front import BOUNDS
from invariclip.export.verification import answers, pixel_checks
from invariclip.export.verification.answers import measure, project
from invariclip.export.verification.candidate import CandidateVerdict, ExportJob, VerificationCandidate
from invariclip.export.verification.diagnose import causes_of, front_causes, pixel_causes
from invariclip.export.verification.figures import THRESHOLDS, Thresholds, failures
from invariclip.export.verification.pixel_checks import RawImages
from invariclip.preprocessing.pixels import pixels

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.backends import Backend
    from invariclip.console import Progress
    from invariclip.export.checkpoints.checkpoint import Checkpoint
    from invariclip.export.verification.answers import Comparison, ReferenceTarget
    from invariclip.export.verification.evidence import ImageBatches
    from invariclip.export.verification.figures import Thresholds, TowerFigures


BATCH = 16
"""Rows per run; the last batch is smaller."""
ALTERED = 64
"""Images that are also shown under an intervention."""
TOWERS = ("image", "text")


def check(
    candidates: Mapping[str, VerificationCandidate],
    images: ImageBatches,
    bounds: Thresholds | Mapping[str, Thresholds] | None = None,
    *,
    reference: ReferenceEvidence | None = None,
    progress: Progress = silent,
) -> dict[str, CandidateVerdict]:
    """Holds graphs of one checkpoint against it.

    Images are matched with the baked classes, or with a list of prompts; texts with those images. Both banks are
    the reference's own embeddings.

    Args:
        candidates: Graphs by name; all their jobs have the same checkpoint.
        images: What to look at.
        bounds: What they must keep, for all or by the candidates' names; None takes their levels' own.
        reference: From `look`, where the reference was run on these images already; None runs it.
        progress: `console.bar` or `console.silent`.

    Returns:
        A verdict for every candidate.

    Raises:
        InputError: No image can be read.
        ArtifactError: A graph cannot be loaded.
        ContractError: A graph cannot answer at all, or with vectors of another width.
        CheckpointError: The checkpoint itself answers with NaN or infinity.
    """
    reference = reference or look(next(iter(candidates.values())).job.checkpoint, images, progress)
    verdicts = {}
    for name, candidate in candidates.items():
        limits = bounds.get(name) if isinstance(bounds, Mapping) else bounds
        try:
            verdicts[name] = _judge(name, candidate, reference, limits or THRESHOLDS[candidate.level], progress)
        except ContractError as error:
            raise ContractError(f"{name}: {error}") from error
    return verdicts


@dataclass(frozen=True)
class ReferenceEvidence:
    """What all candidates are held against: inputs, the reference's answers, and the host's pixels."""

    checkpoint: Checkpoint
    images: ImageBatches
    raw: RawImages
    targets: dict[str, ReferenceTarget]
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
    levels = pixel_checks.pixel_levels(images.readable, checkpoint.pixels)
    causes = pixel_causes(images.readable, checkpoint.pixels) if levels else []
    prompts = checkpoint.encode_texts(check_texts.ids_of(check_texts.PROMPTS, checkpoint.tokenizer))
    targets = {"image": target, "text": replace(texts, batches=lambda: iter(parts))}
    raw = RawImages(images.readable, checkpoint.pixels)
    return ReferenceEvidence(checkpoint, images, raw, targets, prompts, levels, causes)


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
    name: str, candidate: VerificationCandidate, reference: ReferenceEvidence, bounds: Thresholds, progress: Progress
) -> CandidateVerdict:
    """Both towers of one candidate, one after the other."""
    job, checkpoint = candidate.job, reference.checkpoint
    sides: dict[str, Comparison] = {}
    engine: dict[str, Any] = {}
    front, trial = _Front(), {**THRESHOLDS, candidate.level: bounds}
    for tower in TOWERS:
        target = reference.targets[tower]
        # variants often share a text graph: what one engine answered with it stands for all of them
        key = (candidate.text, candidate.backend, candidate.text_compute, candidate.threads, candidate.opener, id(job))
        if tower == "text" and key in reference.texts:
            sides[tower] = reference.texts[key]
            continue
        backend = candidate.opened(tower)
        engine = engine or backend.describe()
        batches = progress(target.batches(), total=-(-len(target.raw) // BATCH), desc=f"{name}, {tower} tower")
        site = job.site if tower == "image" else None
        sides[tower] = answers.compare(backend, target, job.projection, batches, site)
        any_size = tower == "image" and pixel_checks.is_any_size(backend)
        if any_size:
            sides[tower].levels["front_cosine"] = _front_cosine(backend, job, reference)
        if tower == "text":
            reference.texts[key] = sides[tower]
        del backend  # the next tower is loaded only when this one's memory is free
        if any_size:
            front = _front(candidate, reference, bounds)
            sides[tower].levels["front_levels"] = front.levels
    sides["image"].levels["pixel_levels"] = reference.pixel_levels
    trial = {name: front.tighten(limits) for name, limits in trial.items()}
    bounds = trial[candidate.level]
    bank = job.bank if job.bank is not None else project(reference.prompts, job.projection)
    figures = {
        "image": measure(sides["image"], bank, job.head),
        "text": measure(sides["text"], sides["image"].reference),
    }
    failed = {tower: failures(tower, figures[tower], bounds) for tower in TOWERS}
    causes = list(reference.pixel_causes)
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
        "unreadable_images": len(reference.images.unreadable),
        "too_large_images": len(reference.raw.too_large) if front.is_there else 0,
        "level": candidate.level,
        "fidelity": kept,
        "thresholds": asdict(bounds),
        "causes": causes,
        "passed": not broken,
    }
    return CandidateVerdict(figures["image"], figures["text"], broken, parity, causes)


def _front_cosine(backend: Backend, job: ExportJob, reference: ReferenceEvidence) -> float:
    """Smallest cosine between decoded images through the graph's own resize and through the host's."""
    spec, worst = reference.checkpoint.pixels, 1.0
    for place, image in enumerate(reference.raw):
        if place == len(reference.front_raw):  # the first candidate that resizes; the next ones find it done
            reference.front_raw.append(reference.checkpoint.encode_images(pixels(image, spec)[None]))
        (got,) = backend.run({backend.input_names[0]: image[None]}, (EMBEDDING,))[EMBEDDING].astype(np.float64)
        cosine = float(
            project(reference.front_raw[place], job.projection, job.site)[0] @ got / max(np.linalg.norm(got), 1e-30)
        )
        worst = float(np.minimum(worst, cosine))
    return worst


@dataclass(frozen=True)
class _Front:
    """What was measured of a graph's own resize; the defaults are those of a graph without one.

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


def _front(candidate: VerificationCandidate, reference: ReferenceEvidence, bounds: Thresholds) -> _Front:
    """Asks the graph's own resize, opened once and alone, in the candidate's engine."""
    spec = reference.checkpoint.pixels
    form, run = pixel_checks.open_front(candidate.image, backend=candidate.backend, threads=candidate.threads)
    front = _Front(pixel_checks.front_levels(run, reference.raw, spec), BOUNDS[form, spec.interpolation].max_levels)
    if front.levels <= front.tighten(bounds).max_front_levels:
        return front
    return replace(front, causes=tuple(front_causes(run, reference.raw, spec)))


@dataclass
class GraphTrials:
    """Reference answers, once; then any number of graphs.

    Attributes:
        job: What they must answer like.
        bounds: What they must keep.
        target: The images, and the reference's answers.
        bank: float64 [K, d], what best matches are sought in.
    """

    job: ExportJob
    bounds: Thresholds
    target: ReferenceTarget
    bank: NDArray[np.float64]

    @classmethod
    def look(cls, job: ExportJob, images: ImageBatches, bounds: Thresholds, progress: Progress) -> GraphTrials:
        """Runs the reference's image tower on every image.

        Raises:
            InputError: No image can be read.
            CheckpointError: The checkpoint itself answers with NaN or infinity.
        """
        target = look_at_images(job.checkpoint, images, progress)
        return cls(job, bounds, target, job.bank_or_prompts())

    def figures(self, image: Path, *, backend: str, threads: int | None = None) -> TowerFigures:
        """What a graph answers, measured.

        Raises:
            ArtifactError: The engine cannot load it.
            ContractError: It cannot answer.
        """
        opened = open_backend(backend, image, threads=threads)
        comparison = answers.compare(opened, self.target, self.job.projection, self.target.batches())
        return measure(comparison, self.bank, self.job.head)

    def cost(self, image: Path, *, backend: str, threads: int | None = None) -> float:
        """1 - the mean cosine to the reference on a few images: what a part of a search ranks by."""
        opened = open_backend(backend, image, threads=threads)
        few = self.target.first[: len(self.target.raw)]
        got = opened.run({opened.input_names[0]: few}, (EMBEDDING,))[EMBEDDING].astype(np.float64)
        wanted = answers.project(self.target.raw[: len(few)], self.job.projection)
        return float(1 - (got * wanted).sum(axis=1).mean())

    def broken(self, figures: TowerFigures) -> list[str]:
        """Every bound that figures break, in words."""
        return list(failures("image", figures, self.bounds).values())
