"""Trains the prompts' vectors with frozen encoders, a few classes a step; stops early and resumes.

Everything that a training depends on is kept in one safetensors file, so that it resumes to the same result.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from invariclip.calibrate.prompts import losses
from invariclip.calibrate.prompts.texts import LearnedTexts, starting_context
from invariclip.console import Progress, silent
from invariclip.errors import InputError
from invariclip.files import write_atomically
from invariclip.records import Record

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.artifact.projection import Projection
    from invariclip.calibrate.prompts.options import PromptOptions
    from invariclip.export.checkpoints.checkpoint import Checkpoint


@dataclass(frozen=True)
class TrainingFacts:
    """What a training's file says beside its tensors: its key, and the fields of `TrainingState`."""

    key: str
    step: int
    best_step: int
    best_loss: float | None
    stale: int
    curve: tuple[tuple[int, float], ...]


TRAINING_FILE = Record(
    "invariclip.cdc.training", "a training's state", "`invariclip cdc`", 1, 1 << 30, InputError, TrainingFacts
)
VALIDATION_CLASSES = 64
"""Classes that a look at the validation images takes at most; drawn once."""
_EVIDENCE_RATE = 0.05
"""Adam's, of the logarithm of a template's scale and of its bias."""


@dataclass
class TrainingState:
    """Where a training stands, between two steps.

    Attributes:
        step: Steps done.
        tensors: What is learned, by name: `context` [M, n, width], `log_scale` and `bias` [M + 1].
        best: The same at the best look so far.
        best_loss: Its validation loss.
        best_step: Its step.
        stale: Looks since then.
        curve: (step, validation loss) of every look.
    """

    step: int
    tensors: dict[str, torch.Tensor]
    best: dict[str, torch.Tensor]
    best_loss: float = float("inf")
    best_step: int = 0
    stale: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)


def write_state(path: Path, key: str, state: TrainingState, moments: dict[str, torch.Tensor]) -> None:
    """Writes a state and the optimiser's moments, atomically.

    Args:
        path: The file.
        key: Digest of all that the training depends on.
        state: Where it stands.
        moments: See `optimiser_moments`.
    """
    tensors = {
        **{f"now.{name}": value for name, value in state.tensors.items()},
        **{f"best.{name}": value for name, value in state.best.items()},
        **{f"adam.{name}": value for name, value in moments.items()},
    }
    facts = {
        "key": key, "step": state.step, "best_step": state.best_step,
        "best_loss": state.best_loss if math.isfinite(state.best_loss) else None,
        "stale": state.stale, "curve": state.curve,
    }  # fmt: skip
    arrays = {name: value.detach().contiguous().clone().numpy() for name, value in tensors.items()}
    write_atomically(path, TRAINING_FILE.to_bytes(arrays, facts))


def read_state(path: Path, key: str) -> tuple[TrainingState, dict[str, torch.Tensor]] | None:
    """What `write_state` wrote for the same key; None where there is nothing, or nothing that can be read."""
    if not path.is_file():
        return None
    try:
        arrays, facts = TRAINING_FILE.read(path)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    except (InputError, ValueError, TypeError):
        return None  # it is trained again
    if facts.key != key:
        return None
    parts = {part: _part(tensors, part) for part in ("now", "best", "adam")}
    best_loss = math.inf if facts.best_loss is None else facts.best_loss
    state = TrainingState(
        facts.step, parts["now"], parts["best"], best_loss, facts.best_step, facts.stale, list(facts.curve)
    )
    return state, parts["adam"]


def optimiser_moments(optimiser: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Adam's state by place and name."""
    held: dict[int, dict[str, torch.Tensor]] = optimiser.state_dict()["state"]
    return {f"{place}.{name}": torch.as_tensor(value) for place, own in held.items() for name, value in own.items()}


def restore_moments(optimiser: torch.optim.Optimizer, moments: dict[str, torch.Tensor]) -> None:
    """Puts back what `optimiser_moments` gave."""
    held: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in moments.items():
        place, name = key.split(".", 1)
        held.setdefault(int(place), {})[name] = value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": held})


def _part(tensors: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")}


@dataclass(frozen=True, eq=False)
class Task:
    """What is learned from.

    Attributes:
        names: K classes.
        hand_written: float64 [K, d], template 0's class embeddings.
        views: float64 [M, R, d], training images under each template's augmentation.
        labels: int64 [R].
        validation: float64 [V, d], images that are not learned from: as they are, and under every augmentation.
        validation_labels: int64 [V].
    """

    names: tuple[str, ...]
    hand_written: NDArray[np.float64]
    views: NDArray[np.float64]
    labels: NDArray[np.int64]
    validation: NDArray[np.float64]
    validation_labels: NDArray[np.int64]

    @property
    def digest(self) -> str:
        """sha256 over all of it."""
        parts = [json.dumps(self.names).encode()]
        arrays = (self.hand_written, self.views, self.labels, self.validation, self.validation_labels)
        parts += [np.ascontiguousarray(array).tobytes() for array in arrays]
        return hashlib.sha256(b"\n".join(parts)).hexdigest()


@dataclass(frozen=True, eq=False)
class Trained:
    """What was learned.

    Attributes:
        context: float32 [M, n, width].
        steps: Steps done.
        best_step: The one that is kept.
        curve: (step, validation loss) of every look.
    """

    context: NDArray[np.float32]
    steps: int
    best_step: int
    curve: tuple[tuple[int, float], ...]


def train(
    checkpoint: Checkpoint,
    task: Task,
    options: PromptOptions,
    projection: Projection | None = None,
    *,
    work: Path | None = None,
    progress: Progress = silent,
) -> Trained:
    """Learns the vectors.

    Args:
        checkpoint: The encoder; it stays as it is.
        task: What to learn from.
        options: How.
        projection: A_inv, or None.
        work: Folder that keeps where the training stands after every look; a training of the same task, options and
            model goes on from there, to the same result.
        progress: Progress display.
    """
    start, spread = starting_context(checkpoint, options)
    learner = _Learner(checkpoint, task, options, projection, start, spread)
    inputs = [
        "training-3",
        checkpoint.sha256,
        projection.digest if projection else None,
        options.to_json(),
        task.digest,
    ]
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
    file = work / f"cdc-{key[:16]}.safetensors" if work else None
    state = learner.begin(file, key)
    for _ in progress(range(state.step, options.steps), total=options.steps - state.step, desc="learning templates"):
        if state.stale >= options.patience:
            break
        learner.step(state.step)
        state.step += 1
        if state.step % options.check_every == 0 or state.step == options.steps:
            learner.look(state)
            if file:
                write_state(file, key, state, optimiser_moments(learner.optimiser))
    return Trained(state.best["context"].numpy(), state.step, state.best_step, tuple(state.curve))


class _Learner:
    """What is learned, and one step of it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        task: Task,
        options: PromptOptions,
        projection: Projection | None,
        start: NDArray[np.float32],
        spread: float,
    ) -> None:
        self.options = options
        self.context = torch.nn.Parameter(torch.from_numpy(start))
        self.texts = LearnedTexts(checkpoint, self.context, projection)
        self.ids = self.texts.ids(task.names)
        self.tau = checkpoint.logit_scale
        self.views, self.hand_written, self.validation = (
            torch.from_numpy(array).float() for array in (task.views, task.hand_written, task.validation)
        )
        self.labels, self.validation_labels = task.labels, task.validation_labels
        # Every template starts with the chance of being wrong for its uncertainty
        self.log_scale = torch.nn.Parameter(torch.zeros(options.learned + 1))
        self.bias = torch.nn.Parameter(torch.zeros(options.learned + 1))
        self.optimiser = torch.optim.Adam(
            [
                {"params": [self.context], "lr": options.rate * spread},
                {"params": [self.log_scale, self.bias], "lr": _EVIDENCE_RATE},
            ]
        )
        self.seen = np.unique(task.labels)
        checked = np.unique(task.validation_labels)
        if len(checked) > VALIDATION_CLASSES:
            checked = np.sort(np.random.default_rng([options.seed, 31]).permutation(checked)[:VALIDATION_CLASSES])
        self.checked = checked

    def begin(self, file: Path | None, key: str) -> TrainingState:
        """The start, or where the file says that it stands."""
        saved = read_state(file, key) if file else None
        if saved is None:
            state = TrainingState(0, {}, {})
            self.look(state)
            return state
        state, moments = saved
        with torch.no_grad():
            for name, parameter in self._parameters().items():
                parameter.copy_(state.tensors[name])
        restore_moments(self.optimiser, moments)
        return state

    def step(self, number: int) -> None:
        """One step; what it draws depends on the seed and its number alone."""
        rng = np.random.default_rng([self.options.seed, 37, number])
        classes = self.seen
        if len(classes) > self.options.classes:
            classes = np.sort(rng.choice(classes, self.options.classes, replace=False))
        rows = np.flatnonzero(np.isin(self.labels, classes))
        if len(rows) > self.options.images:
            rows = rng.choice(rows, self.options.images, replace=False)
        texts = self.texts.embed(self.ids[:, classes])
        labels = torch.from_numpy(np.searchsorted(classes, self.labels[rows]))
        loss = self._loss(self.views[:, rows], labels, texts, self.hand_written[classes], number)
        self.optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()

    def look(self, state: TrainingState) -> None:
        """Scores the validation images and keeps what is best."""
        with torch.no_grad():
            loss = self._validation_loss()
        state.tensors = {name: value.detach().clone() for name, value in self._parameters().items()}
        state.curve = [*state.curve, (state.step, loss)]
        if loss < state.best_loss:
            state.best, state.best_loss, state.best_step, state.stale = state.tensors, loss, state.step, 0
        else:
            state.stale += 1

    def _parameters(self) -> dict[str, torch.nn.Parameter]:
        return {"context": self.context, "log_scale": self.log_scale, "bias": self.bias}

    def _opinions(self, logits: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Each template's log e, template 0 first."""
        scale = self.log_scale.exp()
        return [losses.log_evidence(own, scale[m], self.bias[m]) for m, own in enumerate(logits)]

    def _loss(
        self, views: torch.Tensor, labels: torch.Tensor, texts: torch.Tensor, hand_written: torch.Tensor, number: int
    ) -> torch.Tensor:
        on, options = self.options.losses, self.options
        learned = [self.tau * view @ own.T for view, own in zip(views, texts, strict=True)]
        beside = [self.tau * view @ hand_written.T for view in views]
        # Template 0 has no augmentation of its own: it judges what template 1 sees
        opinions = self._opinions([beside[0], *learned])
        everyone = [*opinions, losses.fused_log_evidence(opinions)]
        loss = torch.zeros(())
        if "evidential" in on:
            loss = loss + torch.stack([losses.evidential_loss(one, labels).mean() for one in everyone]).mean()
        if "misleading" in on and options.misleading:
            share = min(1.0, 2 * number / options.steps)
            parts = torch.stack([losses.misleading_loss(one, labels).mean() for one in everyone])
            loss = loss + options.misleading * share * parts.mean()
        if "softmax" in on:
            loss = loss + torch.stack([torch.nn.functional.cross_entropy(one, labels) for one in learned]).mean()
        if "diversity" in on:
            loss = loss + options.diversity * losses.diversity_loss(texts)
        if "consistency" in on:
            tied = [losses.consistency_loss(a, b).mean() for a, b in zip(learned, beside, strict=True)]
            loss = loss + options.consistency * torch.stack(tied).mean()
        return loss

    def _validation_loss(self) -> float:
        rows = np.flatnonzero(np.isin(self.validation_labels, self.checked))
        labels = torch.from_numpy(np.searchsorted(self.checked, self.validation_labels[rows]))
        vectors = self.validation[rows]
        banks = [self.hand_written[self.checked], *torch.from_numpy(self.texts.bank(self.ids[:, self.checked])).float()]
        logits = [self.tau * vectors @ bank.T for bank in banks]
        if "evidential" in self.options.losses:
            fused = losses.fused_log_evidence(self._opinions(logits))
            return float(losses.evidential_loss(fused, labels).mean())
        return float(np.mean([float(torch.nn.functional.cross_entropy(one, labels)) for one in logits[1:]]))
