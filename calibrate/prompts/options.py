"""What CDC learns, and how: one frozen record that goes into the file's provenance."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from invariclip.artifact.learned_prompts import MAX_CONTEXT_TOKENS, MAX_LEARNED
from invariclip.errors import InputError
from invariclip.preprocessing.interventions import CATALOGUE, InterventionRequest, resolve
from invariclip.preprocessing.prompts import DEFAULT_TEMPLATES, check_prompts

if TYPE_CHECKING:
    from collections.abc import Sequence

Augmentation: TypeAlias = InterventionRequest | None
"""An intervention, or None: the image as it is."""

LOSSES = ("evidential", "misleading", "diversity", "consistency", "softmax")
"""Terms of the loss, see `losses`."""
DEFAULT_LOSSES = ("evidential", "misleading", "diversity", "consistency")
PLAIN = "none"
"""The augmentation that leaves an image as it is, as it is typed."""
_GENTLE_FIRST = (
    *("crop", "colour-jitter", "greyscale", "gaussian-blur", "perspective", "posterize", "rotation", "equalize"),
    *("jpeg", "fog", "flip", "gaussian-noise", "solarize", "shot-noise", "background-texture", "invert"),
)
DEFAULT_AUGMENTATIONS = tuple(name for name in _GENTLE_FIRST if name in CATALOGUE)
"""Of template 1, 2, ...: none needs a second image, and neighbours change different things."""
MAX_SHOTS = 16


@dataclass(frozen=True)
class PromptOptions:
    """What to learn.

    Attributes:
        learned: M, learned templates beside the hand-written one.
        context_tokens: n, vectors a template.
        templates: The hand-written prompts with one `{}`: template 0.
        augmentations: What template 1, 2, ... sees of an image in training; M of them. Empty takes the first M of
            `DEFAULT_AUGMENTATIONS`.
        shots: Training images of a class; None takes all but those that are held back.
        losses: Terms that are on, of `LOSSES`.
        misleading: Weight of the misleading evidence's divergence, reached over the first half of the steps.
        diversity: Weight of the diversity term.
        consistency: Weight of the consistency term.
        steps: Steps at most.
        images: Images a step.
        classes: Classes a step: where there are more, they are drawn.
        rate: Adam's, of the vectors in units of the vocabulary's spread.
        noise: What tells templates apart at the start, in the same units.
        check_every: Steps between two looks at the validation images.
        patience: Looks without a gain after which training ends.
        validation: Share of a class's images that training does not see: to stop early and to fit the evidence.
        held: Share that is held back for the threshold alone.
        target_risk: Share of wrong answers allowed among those that are given, or None for no threshold.
        confidence: With what probability that is kept.
        augmentation_seed: Of what augmentations draw; apart from `seed`, so that embeddings serve several seeds.
        seed: Of everything else that is drawn.
    """

    learned: int = 4
    context_tokens: int = 4
    templates: tuple[str, ...] = DEFAULT_TEMPLATES
    augmentations: tuple[Augmentation, ...] = ()
    shots: int | None = None
    losses: tuple[str, ...] = DEFAULT_LOSSES
    misleading: float = 0.1
    diversity: float = 0.1
    consistency: float = 1.0
    steps: int = 100
    images: int = 96
    classes: int = 32
    rate: float = 0.05
    noise: float = 0.2
    check_every: int = 10
    patience: int = 3
    validation: float = 0.2
    held: float = 0.2
    target_risk: float | None = None
    confidence: float = 0.95
    augmentation_seed: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses what cannot be learned.

        Raises:
            InputError: A value is out of range, or augmentations are not one a template.
        """
        _require_from_to("learned templates", self.learned, 1, MAX_LEARNED)
        _require_from_to("vectors a template", self.context_tokens, 1, MAX_CONTEXT_TOKENS)
        if self.shots is not None:
            _require_from_to("shots", self.shots, 1, MAX_SHOTS)
        for name in ("steps", "images", "check_every", "patience"):
            _require_from_to(name, getattr(self, name), 1, 1_000_000)
        _require_from_to("classes a step", self.classes, 2, 100_000)
        check_prompts(("class",), self.templates)
        for name in ("misleading", "diversity", "consistency", "noise"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} must be zero or more, not {getattr(self, name)}")
        if not 0 < self.rate < float("inf"):
            raise InputError(f"the rate must be above zero, not {self.rate}")
        if not (0 < self.validation < 1 and 0 <= self.held < 1 and self.validation + self.held < 1):
            raise InputError(
                f"shares of {self.validation} for validation and {self.held} for the threshold leave nothing to learn "
                "from, or are no shares"
            )
        self._check_risk()
        self._check_losses()
        if self.augmentations and len(self.augmentations) != self.learned:
            raise InputError(f"{len(self.augmentations)} augmentations for {self.learned} learned templates; give each")
        if not self.augmentations and self.learned > len(DEFAULT_AUGMENTATIONS):
            raise InputError(f"name the augmentations of more than {len(DEFAULT_AUGMENTATIONS)} learned templates")

    def _check_risk(self) -> None:
        if self.target_risk is not None and not 0 < self.target_risk < 1:
            raise InputError(f"the target risk is a share of wrong answers between 0 and 1, not {self.target_risk}")
        if not 0 < self.confidence < 1:
            raise InputError(f"the confidence is between 0 and 1, not {self.confidence}")
        if self.target_risk is not None and self.held == 0:
            raise InputError("a threshold for a target risk needs images that are held back; held is 0")

    def _check_losses(self) -> None:
        unknown = [name for name in self.losses if name not in LOSSES]
        if unknown:
            raise InputError(f"no loss is called {unknown[0]!r}; available: {', '.join(LOSSES)}")
        if not {"evidential", "softmax"} & set(self.losses):
            raise InputError("one of the losses evidential and softmax must be on: nothing else says what is right")

    @property
    def views(self) -> tuple[Augmentation, ...]:
        """Template m's augmentation at place m - 1."""
        return self.augmentations or tuple(resolve(name) for name in DEFAULT_AUGMENTATIONS[: self.learned])

    def to_json(self) -> dict[str, Any]:
        """All of them, every augmentation with its parameters."""
        plain = {each.name: getattr(self, each.name) for each in fields(self)}
        named = [PLAIN if kind is None else kind.to_json() for kind in self.views]
        return {**plain, "templates": list(self.templates), "losses": list(self.losses), "augmentations": named}

    def without(self, losses: Sequence[str]) -> PromptOptions:
        """The same with some terms of the loss off.

        Raises:
            InputError: A term is not on.
        """
        absent = [name for name in losses if name not in self.losses]
        if absent:
            raise InputError(f"the loss {absent[0]!r} is not on; on are: {', '.join(self.losses)}")
        return replace(self, losses=tuple(name for name in self.losses if name not in losses))


def _require_from_to(what: str, value: int, lowest: int, highest: int) -> None:
    if not lowest <= value <= highest:
        raise InputError(f"{what}: {value} is not from {lowest} to {highest}")
