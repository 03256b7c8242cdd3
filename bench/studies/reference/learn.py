"""What joins the towers: a text's place among the trunk's features, by kernel regression, then as a small network.

Both towers stay locked (LiT, Zhai et al., CVPR 2022, locks the image tower alone). A name's target is the mean
direction of what shows it: drawings, with the mean of their own source taken away, so that a name learnt from drawings
does not say "drawing"; and rows of ImageNet's classifier. Kernel ridge regression carries the targets to other texts,
from `Sentences`: MiniLM's embeddings as open_clip's tower with the mean pooler makes them before its head. open_clip
has no kernel machine, so the two-layer head of that tower is then fitted to answer as the regression does.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from invariclip.bench.studies.reference.imagenet import PERSON
from invariclip.console import Progress, silent
from invariclip.export.reference.models import MINILM_FOLDER, MINILM_WIDTH

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.bench.studies.reference.imagenet import ImageClass
    from invariclip.bench.studies.reference.images import CaptionedImage


_BATCH = 256
_CONTEXT = 77


class Sentences:
    """The published encoder from its unpacked package."""

    def __init__(self, package: Path) -> None:
        """Opens it; nothing is fetched."""
        from tokenizers import Tokenizer
        from transformers import AutoModel

        folder = package / MINILM_FOLDER
        self._model: Any = AutoModel.from_pretrained(str(folder)).eval()
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(_CONTEXT)

    def __call__(self, texts: Sequence[str], progress: Progress = silent) -> torch.Tensor:
        """float32 [N, 384], not of unit length; texts of one length share a batch."""
        ids = [encoded.ids for encoded in self._tokenizer.encode_batch(list(texts))]
        order = np.argsort([len(each) for each in ids], kind="stable")
        out = torch.zeros(len(texts), MINILM_WIDTH)
        starts = range(0, len(order), _BATCH)
        with torch.inference_mode():
            for start in progress(starts, total=len(starts), desc="texts"):
                rows = order[start : start + _BATCH]
                longest = max(len(ids[row]) for row in rows)
                tokens = torch.tensor([ids[row] + [0] * (longest - len(ids[row])) for row in rows])
                mask = (tokens != 0).long()
                hidden = self._model(input_ids=tokens, attention_mask=mask).last_hidden_state
                out[torch.from_numpy(rows)] = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return out

    def in_templates(
        self, templates: Sequence[str], subjects: Sequence[str], progress: Progress = silent
    ) -> torch.Tensor:
        """float32 [T, N, 384]: every subject in every template."""
        texts = [template.format(subject) for template in templates for subject in subjects]
        return self(texts, progress).reshape(len(templates), len(subjects), MINILM_WIDTH)


TEMPLATES = (
    "{}",
    "a photo of a {}.",
    "a picture of a {}.",
    "a drawing of a {}.",
    "an image of {}",
    "a cartoon of a {}.",
    "a painting of a {}.",
)
TEMPLATE_SHARES = (0.25, 0.2, 0.25, 0.1, 0.1, 0.05, 0.05)
PLAIN = 3
"""The first templates name no style, and are what the regression looks at."""
_KEYWORDS = 6
_KINDS = 5


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """What a run depends on besides its data.

    Attributes:
        seed: Of everything random.
        row_weight: How much a classifier row weighs beside a drawing.
        keyword_weight: How much all keywords of a drawing weigh beside its name.
        row_length: Length of a classifier row among features.
        width: Of the kernel exp((cos - 1) / width²).
        ridge: Of the regression, for a text of mean weight.
        steps: Optimiser steps of the network.
        batch: Texts a step.
        rate: Peak learning rate, after a warm-up and before a cosine.
    """

    seed: int = 0
    row_weight: float = 3.0
    keyword_weight: float = 0.1
    row_length: float = 10.0
    width: float = 0.7
    ridge: float = 0.3
    steps: int = 3500
    batch: int = 1024
    rate: float = 4e-3


@dataclasses.dataclass(frozen=True)
class Targets:
    """What texts should be embedded as.

    Attributes:
        texts: M subjects, without a template.
        means: float64 [M, width], mean unit directions.
        weights: float64 [M], how much was seen of each.
        origin: float32 [width], what is taken from every image's features.
    """

    texts: tuple[str, ...]
    means: NDArray[np.float64]
    weights: NDArray[np.float64]
    origin: NDArray[np.float32]


def targets(
    shown: Sequence[CaptionedImage],
    features: NDArray[np.float32],
    classes: Sequence[ImageClass],
    directions: NDArray[np.float32],
    photographs: NDArray[np.float32],
    settings: TrainingSettings,
) -> Targets:
    """Mean directions of names, keywords, ImageNet's classes and what these are kinds of.

    Args:
        shown: N images; those of split `train` are learnt from.
        features: Theirs, [V, N, width].
        classes: ImageNet's classes.
        directions: Theirs, [1000, width], unit length.
        photographs: The mean feature of photographs, [width].
        settings: The run's settings.
    """
    gathered = _Gathered(features.shape[2])
    sources = np.array([image.source for image in shown])
    centres = {source: features[:, sources == source].mean(axis=(0, 1)) for source in dict.fromkeys(sources.tolist())}
    drawn = features.mean(axis=(0, 1))
    of_images = features.mean(axis=0)
    for place, image in enumerate(shown):
        if image.split != "train":
            continue
        direction = _unit(of_images[place] - centres[image.source])
        gathered.add(image.name, direction, 1.0)
        words = image.words[:_KEYWORDS]
        for word in words:
            gathered.add(word, direction, settings.keyword_weight / len(words))
    emoji_words = {word for p in shown if p.source != "clipart" and p.split == "train" for word in (p.name, *p.words)}
    for kind, direction in zip(classes, directions, strict=True):
        for name in kind.names:
            gathered.add(name, direction, settings.row_weight * 0.6 / len(kind.names))
        for rank, word in enumerate(usual_kinds(kind, emoji_words)):
            gathered.add(word, direction, settings.row_weight * 0.22 * math.exp(-rank))
        if kind.definition:
            gathered.add(kind.definition, direction, settings.row_weight * 0.05)
    return gathered.done(np.asarray((photographs + drawn) / 2, dtype=np.float32))


def usual_kinds(kind: ImageClass, known: set[str]) -> tuple[str, ...]:
    """What people call a class: single words that emoji are named by, the nearest first; people for what is worn.

    Example:
        >>> usual_kinds(ImageClass(("beagle",), ("hound", "dog", "canine", "animal"), "", False), {"dog", "animal"})
        ('dog', 'animal')
    """
    if kind.worn:
        return PERSON
    return tuple(word for word in kind.kinds if word in known and " " not in word)[:_KINDS]


class _Gathered:
    """Weighted sums by text."""

    def __init__(self, width: int) -> None:
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._weights: dict[str, float] = {}
        self._width = width

    def add(self, text: str, direction: NDArray[Any], weight: float) -> None:
        self._sums.setdefault(text, np.zeros(self._width))
        self._sums[text] += weight * direction
        self._weights[text] = self._weights.get(text, 0.0) + weight

    def done(self, origin: NDArray[np.float32]) -> Targets:
        texts = tuple(self._sums)
        weights = np.array([self._weights[text] for text in texts])
        means = np.stack([self._sums[text] for text in texts]) / weights[:, None]
        return Targets(texts, means, weights, origin)


class Regression:
    """Kernel ridge regression from a sentence embedding to a direction among the trunk's features."""

    def __init__(self, points: torch.Tensor, targets: Targets, settings: TrainingSettings) -> None:
        """Fits.

        Args:
            points: The texts' embeddings in the `PLAIN` templates, [PLAIN, M, 384].
            targets: What they should answer.
            settings: Width and ridge.
        """
        self._centre = torch.nn.functional.normalize(points.mean(dim=(0, 1)), dim=-1)
        # centred on unit vectors: what every text shares tells nothing
        self._points = torch.nn.functional.normalize(torch.stack([self._apart(each) for each in points]).sum(0), dim=-1)
        self._width = settings.width
        weights = torch.from_numpy(targets.weights / targets.weights.mean()).float()
        kernel = self._kernel(self._points) + settings.ridge * torch.diag(1 / weights)
        self._answers = torch.linalg.solve(kernel, torch.from_numpy(targets.means).float())

    def __call__(self, embeddings: torch.Tensor) -> torch.Tensor:
        """[N, 384] to [N, width]."""
        answers: torch.Tensor = self._kernel(self._apart(embeddings)) @ self._answers
        return answers

    def _apart(self, embeddings: torch.Tensor) -> torch.Tensor:
        unit = torch.nn.functional.normalize(embeddings, dim=-1)
        return torch.nn.functional.normalize(unit - self._centre, dim=-1)

    def _kernel(self, points: torch.Tensor) -> torch.Tensor:
        return torch.exp((points @ self._points.T - 1) / self._width**2)


def text_head(width_in: int, width_out: int) -> torch.nn.Sequential:
    """The head that open_clip's Hugging Face tower builds for `hf_proj_type: mlp`."""
    hidden = (width_in + width_out) // 2
    return torch.nn.Sequential(
        torch.nn.Linear(width_in, hidden, bias=False),
        torch.nn.GELU(),
        torch.nn.Linear(hidden, width_out, bias=False),
    )


def distil(
    teacher: Callable[[torch.Tensor], torch.Tensor],
    embeddings: torch.Tensor,
    weights: NDArray[np.float64],
    settings: TrainingSettings,
    progress: Progress = silent,
) -> tuple[torch.nn.Sequential, list[dict[str, float]]]:
    """Fits the head to the regression's directions, in every template.

    Args:
        teacher: The regression.
        embeddings: The texts in `TEMPLATES`, [T, M, 384].
        weights: [M], how much was seen of each: their root says how often a text is drawn.
        settings: The run's settings.
        progress: Progress display.

    Returns:
        The head, and the log: step, and the mean of 1 - cos.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        head = text_head(embeddings.shape[2], teacher(embeddings[0, :1]).shape[1])
    goals = torch.stack([torch.nn.functional.normalize(teacher(each), dim=-1) for each in embeddings])
    root = torch.from_numpy(np.sqrt(weights)).float()
    shares, templates = root / root.mean() + 0.02, torch.tensor(TEMPLATE_SHARES)
    optimiser = torch.optim.AdamW(head.parameters(), lr=settings.rate, weight_decay=0.0)
    log = []
    for step in progress(range(settings.steps), total=settings.steps, desc="text head"):
        for group in optimiser.param_groups:
            group["lr"] = settings.rate * _schedule(step, settings.steps)
        template = int(torch.multinomial(templates, 1, generator=generator))
        rows = torch.multinomial(shares, settings.batch, replacement=True, generator=generator)
        answers = torch.nn.functional.normalize(head(embeddings[template, rows]), dim=-1)
        loss = (1 - (answers * goals[template, rows]).sum(dim=1)).mean()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        if (step + 1) % 500 == 0 or step + 1 == settings.steps:
            log.append({"step": step + 1, "loss": round(float(loss.detach()), 4)})
    head.requires_grad_(False)
    return head, log


def _schedule(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _unit(row: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(row / np.linalg.norm(row))
