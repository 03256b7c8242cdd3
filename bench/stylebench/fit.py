"""Trains the head and the text tower on cached trunk features with CLIP's loss."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from invariclip.bench.stylebench.captions import caption, vocabulary
from invariclip.bench.stylebench.reference import encode_texts
from invariclip.console import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.bench.stylebench.manifest import Picture

SAVE_EVERY = 100


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a training run depends on besides its data.

    Attributes:
        seed: Seed of everything random.
        steps: Optimiser steps.
        batch: Concepts a step; each gives one picture and one caption.
        views: Altered views of each picture, beside the plain one.
        rate: Peak learning rate, after a warm-up and before a cosine.
        decay: Weight decay of matrices other than the token table.
        head_rate: The image head's share of the learning rate: it starts from something good, the text tower does not.
    """

    seed: int = 7
    steps: int = 600
    batch: int = 256
    views: int = 2
    rate: float = 1e-3
    decay: float = 0.1
    head_rate: float = 0.01


def fit(
    model: Any,
    tokenize: Callable[[list[str]], torch.Tensor],
    features: NDArray[np.float32],
    pictures: Sequence[Picture],
    settings: Settings,
    state_file: Path | None = None,
    progress: Progress = silent,
) -> list[dict[str, float]]:
    """Trains `model.visual.head` and the text tower; the trunk stays as it is.

    A step draws distinct concepts, so that no picture is told apart from another caption of its own concept.

    Args:
        model: An `open_clip.CLIP` whose trunk made the features.
        tokenize: Texts to token ids [N, context].
        features: Trunk features [V, N, width].
        pictures: The N pictures; all are learnt from.
        settings: The run's settings.
        state_file: Where the run's state is kept; an interrupted run goes on from it.
        progress: Progress display.

    Returns:
        The log: step, loss, logit scale, seconds of training so far.
    """
    model.train()
    model.visual.trunk.requires_grad_(False).eval()
    words = Words(model, tokenize, pictures)
    optimiser = _optimiser(model, words, settings)
    log: list[dict[str, float]] = []
    first = _restore(state_file, model, words, optimiser, log)
    by_concept: dict[str, list[int]] = {}
    for index, picture in enumerate(pictures):
        by_concept.setdefault(picture.concept, []).append(index)
    choices = list(by_concept.values())
    started, spent = time.perf_counter(), log[-1]["seconds"] if log else 0
    for step in progress(range(first, settings.steps), total=settings.steps - first, desc="training"):
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * _schedule(step, settings.steps)
        loss = _step(model, words, features, pictures, choices, settings, step)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], 1.0)
        optimiser.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        done = step + 1
        if done % 100 == 0 or done == settings.steps:
            log.append(
                {
                    "step": done,
                    "loss": round(float(loss.detach()), 4),
                    "scale": _scale(model),
                    "seconds": round(spent + time.perf_counter() - started),
                }
            )
        if state_file is not None and (done % SAVE_EVERY == 0 or done == settings.steps):
            _save(state_file, model, words, optimiser, log, done)
    words.put_back(model)
    model.eval()
    return log


class Words(torch.nn.Module):
    """The rows of the token table that captions use, trained apart.

    A few thousand of the 49,408 tokens occur; gradients and optimiser moments of the whole table would cost more than
    the text tower itself.
    """

    def __init__(self, model: Any, tokenize: Callable[[list[str]], torch.Tensor], pictures: Sequence[Picture]) -> None:
        super().__init__()
        self._tokenize = tokenize
        self._known: dict[str, torch.Tensor] = {}
        self.used = torch.unique(tokenize(vocabulary(pictures)))
        table = model.token_embedding.weight.detach()
        self.rows = torch.nn.Parameter(table[self.used].clone())
        model.token_embedding.requires_grad_(False)

    def forward(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids [N, L] and their rows [N, L, width], L as long as the longest text."""
        for text in texts:
            if text not in self._known:
                self._known[text] = self._tokenize([text])[0]
        tokens = torch.stack([self._known[text] for text in texts])
        tokens = tokens[:, : int(tokens.argmax(dim=1).max()) + 1].contiguous()
        return tokens, torch.nn.functional.embedding(torch.searchsorted(self.used, tokens), self.rows)

    def put_back(self, model: Any) -> None:
        """Writes the trained rows into the model's table."""
        with torch.no_grad():
            model.token_embedding.weight[self.used] = self.rows
        model.token_embedding.requires_grad_(True)


def start_head(model: Any, features: NDArray[np.float32]) -> None:
    """Starts the image head as a whitening of the trunk's features, so that training has little left to spoil.

    The trunk's features lie in a narrow cone and a few directions carry most of their length. With one of four training
    styles left out in turn, prototypes from the others were right on 3 to 6 % more of its pictures of learnt concepts
    after whitening, on 1 to 12 % more of kept-back concepts; a head trained from a random start was worse than none.

    Args:
        model: An `open_clip.CLIP` with a linear head without bias.
        features: Plain features of the pictures learnt from, [N, width].
    """
    weight = model.visual.head.proj.weight
    _, lengths, directions = np.linalg.svd(features, full_matrices=False)
    whitening = directions[: len(weight)] / lengths[: len(weight), None]
    # the size of a random start, which the learning rate is made for
    whitening *= features.shape[1] ** -0.5 / whitening.std()
    with torch.no_grad():
        weight.copy_(torch.from_numpy(whitening))


def _step(
    model: Any,
    words: Words,
    features: NDArray[np.float32],
    pictures: Sequence[Picture],
    choices: list[list[int]],
    settings: Settings,
    step: int,
) -> torch.Tensor:
    # a generator of its own for every step: a resumed run draws what an unbroken one would have
    rng = np.random.default_rng([settings.seed, step])
    torch.manual_seed(settings.seed * 1_000_003 + step)
    picked = rng.choice(len(choices), size=min(settings.batch, len(choices)), replace=False)
    rows = np.array([choices[k][rng.integers(len(choices[k]))] for k in picked])
    views = rng.integers(len(features), size=len(rows))
    images = torch.nn.functional.normalize(model.visual.head(torch.from_numpy(features[views, rows])), dim=-1)
    texts = encode_texts(model, *words([caption(pictures[row], rng) for row in rows]))
    logits = model.logit_scale.exp() * images @ texts.T
    target = torch.arange(len(rows))
    cross = torch.nn.functional.cross_entropy
    return (cross(logits, target) + cross(logits.T, target)) / 2


def _optimiser(model: Any, words: Words, settings: Settings) -> torch.optim.AdamW:
    decayed: list[torch.nn.Parameter] = []
    head = list(model.visual.head.parameters())
    free: list[torch.nn.Parameter] = [words.rows]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.startswith("visual."):
            # a position that no caption reaches has no gradient: decay would only erase it
            plain = parameter.ndim < 2 or "embedding" in name
            (free if plain else decayed).append(parameter)
    rate = settings.rate
    groups = [
        {"params": decayed, "peak": rate, "weight_decay": settings.decay},
        {"params": free, "peak": rate, "weight_decay": 0.0},
        {"params": head, "peak": rate * settings.head_rate, "weight_decay": settings.decay},
    ]
    return torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.98), eps=1e-6, fused=True)


def _schedule(step: int, steps: int) -> float:
    warm = max(1, min(100, steps // 10))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _scale(model: Any) -> float:
    return round(float(model.logit_scale.detach().exp()), 3)


def _save(
    path: Path, model: Any, words: Words, optimiser: torch.optim.AdamW, log: list[dict[str, float]], done: int
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    state = {"model": model.state_dict(), "words": words.state_dict(), "optimiser": optimiser.state_dict()}
    torch.save({**state, "log": log, "done": done}, beside)
    beside.replace(path)


def _restore(
    path: Path | None, model: Any, words: Words, optimiser: torch.optim.AdamW, log: list[dict[str, float]]
) -> int:
    if path is None or not path.is_file():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    words.load_state_dict(state["words"])
    optimiser.load_state_dict(state["optimiser"])
    log.extend(state["log"])
    return int(state["done"])
