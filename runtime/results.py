"""What a model says of an image.

When to give no label: which uncertainty is meant, and above what of it an answer is "not sure".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from invariclip.artifact.manifest import LearnedPromptsFacts
from invariclip.errors import InputError
from invariclip.uncertainty import energy_uncertainty, fuse, opinions

CALIBRATED: Literal["calibrated"] = "calibrated"
"""Asks for the uncertainty that the artifact's templates were calibrated to abstain above."""
AbstainAbove: TypeAlias = float | Literal["calibrated"] | None
UncertaintyKind: TypeAlias = Literal["evidence", "energy"]
"""`evidence` of learned templates (see `uncertainty`), or the `energy` of the logits, which every artifact has."""
EVIDENCE: Literal["evidence"] = "evidence"
ENERGY: Literal["energy"] = "energy"
UNCERTAINTY_KINDS: tuple[UncertaintyKind, ...] = get_args(UncertaintyKind)
WITHOUT_EVIDENCE = (
    "the artifact has no learned templates, so its uncertainty is energy, not evidence; ask for energy, or train "
    "templates with `invariclip cdc` and export again with --cdc FILE"
)


def uncertainty_kind(learned: LearnedPromptsFacts | None, asked: str | None = None) -> UncertaintyKind:
    """Which uncertainty is meant: the one asked for, else evidence where there are learned templates, else energy.

    Args:
        learned: The artifact's learned templates.
        asked: One of `UNCERTAINTY_KINDS`, or None.

    Raises:
        InputError: There is no such kind, or the artifact has no learned templates to have evidence of.
    """
    if asked is None:
        return EVIDENCE if learned is not None else ENERGY
    if asked not in UNCERTAINTY_KINDS:
        raise InputError(f"no uncertainty is called {asked!r:.60}; available: {', '.join(UNCERTAINTY_KINDS)}")
    if asked == EVIDENCE and learned is None:
        raise InputError(WITHOUT_EVIDENCE)
    return EVIDENCE if asked == EVIDENCE else ENERGY


def threshold(
    learned: LearnedPromptsFacts | None, abstain_above: AbstainAbove, kind: UncertaintyKind | None = None
) -> float | None:
    """The uncertainty that is meant: the number itself, or what the templates were calibrated to for a target risk.

    Args:
        learned: The artifact's learned templates.
        abstain_above: From 0 to 1, or `CALIBRATED`; None never abstains.
        kind: Of which uncertainty; None takes `uncertainty_kind`'s choice.

    Raises:
        InputError: It is no uncertainty, the kind cannot be had, or `CALIBRATED` where nothing was calibrated.
    """
    kind = uncertainty_kind(learned, kind)
    if abstain_above is None:
        return None
    if abstain_above == CALIBRATED:
        if learned is None or kind == ENERGY:
            raise InputError(
                "only the evidence of learned templates is calibrated for a risk, energy is not; give a number from 0 "
                "to 1, or train templates with `invariclip cdc --target-risk R` and export again"
            )
        if learned.abstain_above is None:
            raise InputError(
                "the artifact's templates were not calibrated for a risk; give a number from 0 to 1, or train with "
                "`invariclip cdc --target-risk R` and export again"
            )
        return learned.abstain_above
    require_threshold(abstain_above)
    return float(abstain_above)


def require_threshold(abstain_above: object) -> None:
    """Refuses what is no uncertainty.

    Raises:
        InputError: It is not a number from 0 to 1.
    """
    number = isinstance(abstain_above, int | float) and not isinstance(abstain_above, bool)
    if not number or not 0 <= abstain_above <= 1:  # type: ignore[operator]
        raise InputError(
            f"the uncertainty to abstain above must be a number from 0 to 1 or {CALIBRATED!r}, not {abstain_above!r}"
        )


class RankedClass(NamedTuple):
    """A class with its probability, from 0 to 1."""

    label: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What an image was taken for.

    Attributes:
        label: The most probable class; None where the model abstains.
        probability: The most probable class's probability, from 0 to 1 (softmax over all classes; per class for sigmoid
            models; belief, and doubt shared as the hand-written template has it, for learned templates).
        ranking: The `top_k` classes with their probabilities, best first.
        uncertainty: From 0, sure, to 1, nothing for any class; None where none was given.
        uncertainty_kind: What it is: `evidence` of learned templates, or `energy`, which is no probability (see
            `energy`); None where there is none.
        abstained: Whether the uncertainty was above what the caller allowed.
    """

    label: str | None
    probability: float
    ranking: tuple[RankedClass, ...]
    uncertainty: float | None = None
    uncertainty_kind: UncertaintyKind | None = None
    abstained: bool = False

    def to_json(self) -> dict[str, Any]:
        """What `predict --json` and the server say of an image."""
        return {
            "label": self.label, "probability": self.probability,
            "ranking": [one._asdict() for one in self.ranking],
            "uncertainty": self.uncertainty, "uncertainty_kind": self.uncertainty_kind, "abstained": self.abstained,
        }  # fmt: skip


class Answers(NamedTuple):
    """What `Model.answer` gives: a row an image.

    Attributes:
        embeddings: float32 [N, d], of unit length.
        probabilities: float32 [N, K].
        uncertainties: float32 [N] by kind: `evidence` of an artifact with learned templates, `energy` of every one.
        logits: float32 [N, K], τ · cos (+ b), of the hand-written template.
    """

    embeddings: NDArray[np.float32]
    probabilities: NDArray[np.float32]
    uncertainties: Mapping[UncertaintyKind, NDArray[np.float32]]
    logits: NDArray[np.float32]

    @property
    def uncertainty(self) -> NDArray[np.float32]:
        """The artifact's own, float32 [N]: evidence where it has learned templates, else energy."""
        return self.uncertainties[EVIDENCE if EVIDENCE in self.uncertainties else ENERGY]


@dataclass(frozen=True, eq=False)
class Answer:
    """One image's answer from a stream.

    Attributes:
        place: Where the image stands in the stream, from 0; unreadable ones are counted.
        image: It itself, as it was given.
        embedding: float32 [d], of unit length.
        probabilities: float32 [K], in the order of `classes`; None where there are no classes.
        classes: The K class names.
        uncertainties: From 0 to 1, by kind, as of `Answers`; empty where there are no classes.
        logits: float32 [K], as of `Answers`; None where there are no classes.
    """

    place: int
    image: Any
    embedding: NDArray[np.float32]
    probabilities: NDArray[np.float32] | None
    classes: tuple[str, ...]
    uncertainties: Mapping[UncertaintyKind, float] = field(default_factory=dict)
    logits: NDArray[np.float32] | None = None

    @property
    def uncertainty(self) -> float | None:
        """The artifact's own: evidence where it has learned templates, else energy; None where there are no classes."""
        return self.uncertainties.get(EVIDENCE, self.uncertainties.get(ENERGY))

    def prediction(
        self, top_k: int = 5, *, abstain_above: float | None = None, uncertainty: UncertaintyKind | None = None
    ) -> Prediction:
        """The best classes.

        Args:
            top_k: How many.
            abstain_above: The uncertainty above which no label is given, see `threshold`.
            uncertainty: Which one to tell and to abstain by; None takes the artifact's own.

        Raises:
            InputError: There are no classes, a number is out of range, or there is no such uncertainty.
        """
        if self.probabilities is None:
            raise InputError("the artifact has no classes; give some with with_classes([...])")
        return ranked(
            self.probabilities, self.classes, top_k, self.uncertainties, kind=uncertainty,
            abstain_above=abstain_above, logits=self.logits,
        )  # fmt: skip


def ranked(
    probabilities: NDArray[np.float32],
    classes: Sequence[str],
    top_k: int,
    uncertainties: Mapping[UncertaintyKind, float] | None = None,
    *,
    kind: UncertaintyKind | None = None,
    abstain_above: float | None = None,
    logits: NDArray[np.float32] | None = None,
) -> Prediction:
    """The best classes of one image; of those equally probable, the larger logit comes first, then the first.

    Args:
        probabilities: float32 [K].
        classes: K names.
        top_k: How many.
        uncertainties: From 0 to 1, by kind.
        kind: Which of them counts; None takes evidence where it is there, else energy.
        abstain_above: The uncertainty above which no label is given; None always gives one.
        logits: float32 [K], which tell apart what float32 probabilities round to 0 or 1; None for none.

    Raises:
        InputError: A number is out of range, or there is no such uncertainty.
    """
    given = uncertainties or {}
    if kind is None:
        kind = next((name for name in (EVIDENCE, ENERGY) if name in given), None)
    elif kind not in given:
        raise InputError(WITHOUT_EVIDENCE if kind == EVIDENCE else f"these answers have no {kind}")
    uncertainty = None if kind is None else given[kind]
    if top_k < 1:
        raise InputError(f"top_k must be at least 1, not {top_k}")
    if abstain_above is not None:
        require_threshold(abstain_above)
        if uncertainty is None:
            raise InputError("these answers have no uncertainty to abstain by; leave the threshold out")
    order = np.argsort(-probabilities, kind="stable") if logits is None else np.lexsort((-logits, -probabilities))
    ranking = tuple(RankedClass(classes[place], float(probabilities[place])) for place in order[:top_k])
    # `not u <= bound`: an uncertainty that is NaN is no reason to be sure
    abstained = abstain_above is not None and not uncertainty <= abstain_above  # type: ignore[operator]
    return Prediction(None if abstained else ranking[0][0], ranking[0][1], ranking, uncertainty, kind, abstained)


def host_answers(
    embeddings: NDArray[np.float32],
    bank: NDArray[Any],
    logit_scale: float,
    logit_bias: float | None,
    learned: LearnedPromptsFacts | None,
) -> Answers:
    """What embeddings say of class embeddings, outside a graph.

    Args:
        embeddings: float32 [N, d], of unit length.
        bank: float32 [K, d], the classes', of unit length; with learned templates float64 [M + 1, K, d].
        logit_scale: τ.
        logit_bias: b of a sigmoid model, or None.
        learned: How a template's logits become evidence, or None.
    """
    plain = bank if learned is None else bank[0]
    logits = np.asarray(np.float32(logit_scale) * (embeddings @ plain.T), dtype=np.float32)
    biased = logits if logit_bias is None else logits + np.float32(logit_bias)
    unsure: dict[UncertaintyKind, NDArray[np.float32]] = {
        ENERGY: energy_uncertainty(biased, logit_scale, sigmoid=logit_bias is not None)
    }
    if learned is None:
        return Answers(embeddings, class_probabilities(logits, logit_bias), unsure, biased)
    probabilities, doubt = fused_probabilities(embeddings, bank, logit_scale, learned)
    return Answers(embeddings, probabilities, {EVIDENCE: doubt, **unsure}, biased)


def fused_probabilities(
    embeddings: NDArray[np.float32], banks: NDArray[np.float64], logit_scale: float, facts: LearnedPromptsFacts
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Probabilities [N, K] and uncertainty [N] of all templates together, see `uncertainty`; computed in float64.

    Args:
        embeddings: float32 [N, d], of unit length.
        banks: float64 [M + 1, K, d], the classes' by template, of unit length.
        logit_scale: τ.
        facts: How a template's logits become evidence.
    """
    templates, classes, width = banks.shape
    cosines = embeddings.astype(np.float64) @ banks.reshape(-1, width).T
    numbers = map(np.array, (facts.evidence_scale, facts.evidence_bias, facts.background))
    fused = fuse(*opinions(cosines.reshape(-1, templates, classes), logit_scale, *numbers))
    return fused.probabilities.astype(np.float32), fused.uncertainty.astype(np.float32)


def class_probabilities(logits: NDArray[np.float32], logit_bias: float | None) -> NDArray[np.float32]:
    """p(c|x) = softmax_c(τ · cos), CLIP-ICM's predictor; with a bias SigLIP's, sigmoid(τ · cos + b).

    Args:
        logits: float32 [N, K], τ · cos.
        logit_bias: b, or None.

    Returns:
        float32 [N, K].
    """
    if logit_bias is not None:
        # The sigmoid in a form that neither overflows nor rounds weak classes to equal ones: e^-|x| is exact where it
        # is small, so classes keep their order down to logits of -103
        biased = logits + np.float32(logit_bias)
        small = np.exp(-np.abs(biased))
        return np.asarray(np.where(biased < 0, small, np.float32(1)) / (1 + small), dtype=np.float32)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), dtype=np.float32)
