"""What is held against a checkpoint, what it must answer like, and what came out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from invariclip.artifact.fidelity import require_level
from invariclip.artifact.learned_prompts import class_banks
from invariclip.backends import DEFAULT_BACKEND, open_backend, require_backend
from invariclip.errors import ContractError
from invariclip.export.checkpoints.check_texts import PROMPTS, ids_of
from invariclip.export.checkpoints.learned_contexts import with_semantics
from invariclip.export.verification.answers import project
from invariclip.export.verification.class_head import ClassHead
from invariclip.preprocessing.prompts import class_bank

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from invariclip.artifact.fidelity import Fidelity
    from invariclip.artifact.learned_prompts import LearnedPrompts
    from invariclip.artifact.manifest import Compute, LearnedPromptsFacts
    from invariclip.artifact.projection import Projection
    from invariclip.backends import Backend
    from invariclip.export.checkpoints.checkpoint import Checkpoint
    from invariclip.export.verification.figures import TowerFigures
    from invariclip.sites.site import Site


@dataclass(frozen=True)
class ExportJob:
    """What one artifact is made from, and so what it must answer like.

    Attributes:
        checkpoint: The original model.
        projection: A_inv, or None.
        classes: Names that are baked in.
        templates: Prompt templates of the classes.
        bank: float64 [K, d] unit class embeddings of the reference, or None without classes.
        learned: Facts of the learned templates, or None. The checkpoint's text tower reads their vectors then.
        banks: float64 [M + 1, K, d], class embeddings by template, where there are both; `bank` is the first.
        site: The place whose shift images' embeddings lose, or None.
    """

    checkpoint: Checkpoint
    projection: Projection | None
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    bank: NDArray[np.float64] | None
    learned: LearnedPromptsFacts | None = None
    banks: NDArray[np.float64] | None = None
    site: Site | None = None

    @property
    def head(self) -> ClassHead | None:
        """What the classes must be answered like."""
        bank = self.bank if self.learned is None else self.banks
        if bank is None:
            return None
        return ClassHead(bank, self.checkpoint.logit_scale, self.checkpoint.logit_bias, self.learned)

    def bank_or_prompts(self) -> NDArray[np.float64]:
        """float64 [K, d], what best matches are sought in: the classes, or a list of prompts without them."""
        if self.bank is not None:
            return self.bank
        ids = ids_of(PROMPTS, self.checkpoint.tokenizer)
        return project(self.checkpoint.encode_texts(ids), self.projection)


def prepare(
    checkpoint: Checkpoint,
    projection: Projection | None,
    classes: tuple[str, ...],
    templates: tuple[str, ...],
    learned_prompts: LearnedPrompts | None = None,
) -> ExportJob:
    """A job whose class embeddings come from the reference: PyTorch in float32, projection and mean in float64.

    Args:
        checkpoint: The original model.
        projection: A_inv, or None.
        classes: Names to bake in.
        templates: Their hand-written prompts.
        learned_prompts: Learned templates; the job's checkpoint then reads their vectors as well.

    Raises:
        InputError: Bad classes or templates.
        SemanticsError: The learned templates belong to another checkpoint or projection, or do not fit its text tower.
    """
    if learned_prompts is not None:
        learned_prompts.require_owner(checkpoint.sha256, None if projection is None else projection.digest)
        checkpoint = replace(checkpoint, module=with_semantics(checkpoint.module, learned_prompts))

    def embed(texts: list[str], before: tuple[int, ...] = ()) -> NDArray[np.float64]:
        return project(checkpoint.encode_texts(checkpoint.tokenizer(texts, prefix=before)), projection)

    learned = None if learned_prompts is None else learned_prompts.facts
    if not classes:
        return ExportJob(checkpoint, projection, classes, templates, None, learned)
    if learned is None:
        return ExportJob(checkpoint, projection, classes, templates, class_bank(embed, classes, templates))
    banks = class_banks(embed, classes, templates, learned)
    return ExportJob(checkpoint, projection, classes, templates, banks[0], learned, banks)


@dataclass(frozen=True)
class VerificationCandidate:
    """Two graphs, the engine that answers with them, and the projection that they claim to hold.

    Attributes:
        image: The image graph.
        text: The text graph.
        job: What they must answer like.
        backend: The engine, see `backends.BACKENDS`.
        level: The fidelity that they must reach, which says their bounds.
        compute: What the engine may compute the image graph in; see `manifest.Variant`.
        text_compute: The same of the text graph.
        threads: The engine's; None takes what this process may use.
        opener: Loads a graph, given engine, path and threads.
    """

    image: Path
    text: Path
    job: ExportJob
    backend: str = DEFAULT_BACKEND
    level: Fidelity = "exact"
    compute: Compute = "float32"
    text_compute: Compute = "float32"
    threads: int | None = None
    opener: Callable[..., Backend] = open_backend

    @classmethod
    def open(
        cls,
        image: Path,
        text: Path,
        job: ExportJob,
        *,
        backend: str = DEFAULT_BACKEND,
        level: Fidelity = "exact",
        compute: Compute = "float32",
        text_compute: Compute = "float32",
        threads: int | None = None,
    ) -> VerificationCandidate:
        """Names two ONNX files. Each is loaded when its turn comes and let go after it.

        Raises:
            InputError: There is no such engine or level.
            MissingExtraError: The engine is not installed.
        """
        require_backend(backend)
        return cls(image, text, job, backend, require_level(level), compute, text_compute, threads)

    def opened(self, tower: str) -> Backend:
        """Loads one tower, `image` or `text`; it is let go with the last reference to it.

        Raises:
            ArtifactError: The engine cannot load it.
        """
        path, compute = (self.image, self.compute) if tower == "image" else (self.text, self.text_compute)
        return self.opener(self.backend, path, threads=self.threads, compute=compute)


@dataclass(frozen=True)
class CandidateVerdict:
    """What came out for one candidate.

    Attributes:
        image: Figures of the image tower.
        text: Figures of the text tower.
        broken: Every bound that is broken, in words; empty if it passed.
        parity: All of it as the manifest stores it, see `parity`.
        causes: What is wrong, where recomputing the reference with that fault gave the candidate's answers.
    """

    image: TowerFigures
    text: TowerFigures
    broken: list[str]
    parity: dict[str, Any]
    causes: list[str] = field(default_factory=list)

    @property
    def reason(self) -> str:
        """All that is broken, and the causes that were found, in one line."""
        known = f"; cause: {'; '.join(self.causes)}" if self.causes else ""
        return f"{'; '.join(self.broken)}{known}"

    def require(self, what: str) -> None:
        """Fails if any bound is broken.

        Raises:
            ContractError: Naming each figure that failed, and by how much.
        """
        if self.broken:
            raise ContractError(f"{what} does not answer like its checkpoint: {self.reason}")
