"""What CDC learnt: context vectors of M templates, and how each template's logits become evidence; and its file.

Template 0 is the hand-written one. A learned template m is a few vectors in the text tower's token-embedding space that
stand before the class's name. In a row of token ids they are negative ids: `context_ids`. A text tower that carries the
vectors behind its vocabulary's rows (the artifact's `text.cdc.onnx`, and the encoder that CDC is trained on) looks an
id i < 0 up in row V - 1 - i of V vocabulary rows.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.artifact.manifest import LearnedPromptsFacts
from invariclip.console import silent
from invariclip.errors import SemanticsError
from invariclip.files import write_atomically
from invariclip.preprocessing.prompts import class_bank
from invariclip.records import Record

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from invariclip.console import Progress


@dataclass(frozen=True)
class LearnedPromptsFileFacts:
    """What a file of learned templates says beside its arrays; the fields of `LearnedPrompts`."""

    templates: tuple[str, ...]
    checkpoint_sha256: str
    projection_sha256: str | None
    abstain_above: float | None
    provenance: dict[str, Any]


LEARNED_PROMPTS_FILE = Record(
    "invariclip.learned_prompts", "learned templates", "`invariclip cdc`", 3, 1 << 28, SemanticsError,
    LearnedPromptsFileFacts,
)  # fmt: skip
MAX_LEARNED = 16
"""Learned templates beside the hand-written one."""
MAX_CONTEXT_TOKENS = 64
LEARNED_TEXT = "{}."
"""What stands behind a learned template's vectors: the class's name."""
_ARRAYS = ("context", "evidence_scale", "evidence_bias", "background")


@dataclass(frozen=True, eq=False)
class LearnedPrompts:
    """M learned templates beside the hand-written one, and how sure each is.

    Attributes:
        context: float32 [M, n, width], the learned templates' vectors.
        evidence_scale: float64 [M + 1], a of `evidence.log_evidence`; template 0 first.
        evidence_bias: float64 [M + 1], c.
        background: float64 [M + 1], r, the cosine of what an image of none of the classes is held against.
        templates: The hand-written prompts with one `{}`; template 0 is the mean of a class's embeddings in them.
        checkpoint_sha256: Of the checkpoint whose text tower the vectors belong to.
        projection_sha256: Digest of the projection in whose space they were trained, or None.
        abstain_above: The uncertainty above which to abstain, for the target risk asked for; None if none was.
        provenance: What it came from: options, images, seeds, scores, versions. JSON-ready.
    """

    context: NDArray[np.float32]
    evidence_scale: NDArray[np.float64]
    evidence_bias: NDArray[np.float64]
    background: NDArray[np.float64]
    templates: tuple[str, ...]
    checkpoint_sha256: str
    projection_sha256: str | None = None
    abstain_above: float | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuses what could not be served.

        Raises:
            SemanticsError: A shape is wrong, there are too many templates or vectors, or a value is out of range.
        """
        shape = self.context.shape
        if len(shape) != 3 or not 1 <= shape[0] <= MAX_LEARNED or not 1 <= shape[1] <= MAX_CONTEXT_TOKENS:
            raise SemanticsError(
                f"context has shape {list(shape)}; it must be [M, n, width] with M up to {MAX_LEARNED} and n up to "
                f"{MAX_CONTEXT_TOKENS}"
            )
        wanted = (shape[0] + 1,)
        if {self.evidence_scale.shape, self.evidence_bias.shape, self.background.shape} != {wanted}:
            raise SemanticsError(
                f"evidence_scale, evidence_bias and background need {wanted[0]} values, one a template"
            )
        numbers = (self.context, self.evidence_scale, self.evidence_bias, self.background)
        if not all(np.isfinite(array).all() for array in numbers) or not (self.evidence_scale > 0).all():
            raise SemanticsError("the learned templates hold values that are not finite, or no scale above 0")
        if not self.templates or not all(isinstance(one, str) and one.count("{}") == 1 for one in self.templates):
            raise SemanticsError(
                f"the hand-written prompts need one {{}} each for the class name, not {list(self.templates)!r:.80}"
            )
        if self.abstain_above is not None and not 0 <= self.abstain_above <= 1:
            raise SemanticsError(f"abstain_above {self.abstain_above} is not an uncertainty, from 0 to 1")

    @property
    def learned(self) -> int:
        """M, templates beside the hand-written one."""
        return int(self.context.shape[0])

    @property
    def context_tokens(self) -> int:
        """n, vectors before the class's name."""
        return int(self.context.shape[1])

    @property
    def digest(self) -> str:
        """sha256 over all that an answer depends on: shapes and values, little-endian, and the hand-written prompts."""
        head = json.dumps([list(self.context.shape), list(self.templates)])
        arrays = (self.context, self.evidence_scale, self.evidence_bias, self.background)
        parts = [np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes() for array in arrays]
        return hashlib.sha256(b"\n".join([head.encode(), *parts])).hexdigest()

    @property
    def facts(self) -> LearnedPromptsFacts:
        """What a manifest says of it."""
        numbers = (self.evidence_scale, self.evidence_bias, self.background)
        scale, bias, background = (tuple(map(float, values)) for values in numbers)
        return LearnedPromptsFacts(
            self.digest, self.learned, self.context_tokens, scale, bias, background, self.abstain_above
        )

    def require_owner(self, checkpoint_sha256: str, projection_sha256: str | None) -> None:
        """Refuses another checkpoint or another projection than those it was trained with.

        Raises:
            SemanticsError: It belongs to others.
        """
        if self.checkpoint_sha256 != checkpoint_sha256:
            raise SemanticsError(
                f"the learned templates belong to the checkpoint {self.checkpoint_sha256[:16]}, not to "
                f"{checkpoint_sha256[:16]}; train them with this one"
            )
        if self.projection_sha256 != projection_sha256:
            ours, theirs = (name[:16] if name else "none" for name in (self.projection_sha256, projection_sha256))
            raise SemanticsError(
                f"the learned templates were trained in the space of projection {ours}, not {theirs}; "
                "give that projection, or train them in this one's space"
            )


def context_ids(template: int, tokens: int) -> tuple[int, ...]:
    """The ids of a learned template's vectors, as they stand before a class's name.

    Args:
        template: From 1 to M; 0 is hand-written and has none.
        tokens: n, vectors a template.
    """
    first = (template - 1) * tokens
    return tuple(-1 - place for place in range(first, first + tokens))


def class_banks(
    embed: Callable[[list[str], tuple[int, ...]], NDArray[np.floating]],
    classes: Sequence[str],
    templates: Sequence[str],
    facts: LearnedPromptsFacts,
    *,
    progress: Progress = silent,
) -> NDArray[np.float64]:
    """Unit-length class embeddings of every template: the hand-written prompts' mean first, then each learned one's.

    Args:
        embed: Texts, and the ids before each, to unit-length embeddings [N, d], in a tower that reads the vectors.
        classes: K class names.
        templates: The hand-written prompts with one `{}` each.
        facts: Of the learned templates.
        progress: `console.bar` or `console.silent`.

    Returns:
        float64 [M + 1, K, d].

    Raises:
        InputError: What `prompts.check_prompts` refuses, prompts without a mean direction, or vectors that leave a text
            no room.
    """
    banks = [class_bank(lambda texts: embed(texts, ()), classes, templates, progress=progress)]
    for template in range(1, facts.learned + 1):
        before = context_ids(template, facts.context_tokens)
        banks.append(class_bank(partial(_behind, embed, before), classes, (LEARNED_TEXT,), progress=progress))
    return np.stack(banks)


def _behind(
    embed: Callable[[list[str], tuple[int, ...]], NDArray[np.floating]], before: tuple[int, ...], texts: list[str]
) -> NDArray[np.floating]:
    return embed(texts, before)


def write_semantics(path: str | os.PathLike[str], semantics: LearnedPrompts) -> None:
    """Writes `cdc.safetensors` atomically: the arrays, and the rest as metadata."""
    facts = {
        "templates": list(semantics.templates),
        "checkpoint_sha256": semantics.checkpoint_sha256,
        "projection_sha256": semantics.projection_sha256,
        "abstain_above": semantics.abstain_above,
        "provenance": semantics.provenance,
    }
    tensors: dict[str, NDArray[Any]] = {
        "context": np.ascontiguousarray(semantics.context, dtype=np.float32),
        "evidence_scale": np.ascontiguousarray(semantics.evidence_scale, dtype=np.float64),
        "evidence_bias": np.ascontiguousarray(semantics.evidence_bias, dtype=np.float64),
        "background": np.ascontiguousarray(semantics.background, dtype=np.float64),
    }
    write_atomically(Path(path), LEARNED_PROMPTS_FILE.to_bytes(tensors, facts))


def read_semantics(path: str | os.PathLike[str]) -> LearnedPrompts:
    """Reads what `write_semantics` wrote.

    Raises:
        SemanticsError: The file is missing, too large, damaged, or not of this schema.
    """
    tensors, facts = LEARNED_PROMPTS_FILE.read(path)
    try:
        arrays = [tensors[name] for name in _ARRAYS]
    except KeyError as error:
        LEARNED_PROMPTS_FILE.refuse(path, f"{error} is missing")
    if [str(array.dtype) for array in arrays] != ["float32", *["float64"] * 3] or len(tensors) != len(_ARRAYS):
        LEARNED_PROMPTS_FILE.refuse(path, "its arrays are of another type, or others")
    context, scale, bias, background = arrays
    return LearnedPrompts(
        context, scale, bias, background, facts.templates, facts.checkpoint_sha256, facts.projection_sha256,
        facts.abstain_above, facts.provenance,
    )  # fmt: skip
