"""Image interventions: the same picture, changed in ways that leave its class alone.

The seven kinds are CLIP-ICM's (Song et al., ICML 2025, arXiv 2405.15289, interventional data). Its published code takes
their ranges from the command line and states no default; the defaults here are the ones that torchvision's own
examples of the same seven use, with contrast and saturation jittered as widely as brightness.

They act on the picture as the tower sees it, after resize and crop: the two members of a pair then differ in nothing
but the intervention (whatever mode the file was stored in), and a blur of three pixels means the same for every file.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence


class Intervention(Protocol):
    """One way to change a picture; its random choices come from the generator alone."""

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """A changed copy of an RGB picture, of the same size and mode."""


@dataclass(frozen=True)
class ColourJitter:
    """Brightness, contrast and saturation by factors around 1, hue by a turn of the colour circle.

    Attributes:
        brightness: The factor is drawn from [1 - brightness, 1 + brightness].
        contrast: Likewise.
        saturation: Likewise.
        hue: The turn is drawn from [-hue, hue], in whole circles.
    """

    brightness: float = 0.5
    contrast: float = 0.5
    saturation: float = 0.5
    hue: float = 0.3

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Applies the four in random order, since they do not commute."""
        steps = (
            (ImageEnhance.Brightness, self.brightness),
            (ImageEnhance.Contrast, self.contrast),
            (ImageEnhance.Color, self.saturation),
            (None, self.hue),
        )
        for index in rng.permutation(len(steps)):
            enhance, reach = steps[index]
            if enhance is None:
                image = _turn_hue(image, rng.uniform(-reach, reach))
            else:
                image = enhance(image).enhance(rng.uniform(max(0.0, 1 - reach), 1 + reach))
        return image


@dataclass(frozen=True)
class Greyscale:
    """Luma alone (ITU-R 601), in all three channels."""

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Has nothing to draw."""
        del rng
        return ImageOps.grayscale(image).convert("RGB")


@dataclass(frozen=True)
class GaussianBlur:
    """Blur whose standard deviation, in pixels, is drawn from [lowest, highest]."""

    lowest: float = 0.1
    highest: float = 5.0

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Blurs by Pillow's extended box blur, which is within a few levels of a true Gaussian."""
        return image.filter(ImageFilter.GaussianBlur(rng.uniform(self.lowest, self.highest)))


@dataclass(frozen=True)
class Invert:
    """The photographic negative."""

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Has nothing to draw."""
        del rng
        return ImageOps.invert(image)


@dataclass(frozen=True)
class Posterize:
    """Keeps only the highest `bits` of every channel."""

    bits: int = 2

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Has nothing to draw."""
        del rng
        return ImageOps.posterize(image, self.bits)


@dataclass(frozen=True)
class Solarize:
    """Inverts the levels at and above `threshold` (0 to 255)."""

    threshold: int = 192

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Has nothing to draw."""
        del rng
        return ImageOps.solarize(image, self.threshold)


@dataclass(frozen=True)
class Equalize:
    """Flattens the histogram of every channel."""

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Has nothing to draw."""
        del rng
        return ImageOps.equalize(image)


INTERVENTIONS: dict[str, Intervention] = {
    "colour-jitter": ColourJitter(),
    "greyscale": Greyscale(),
    "gaussian-blur": GaussianBlur(),
    "invert": Invert(),
    "posterize": Posterize(),
    "solarize": Solarize(),
    "equalize": Equalize(),
}
"""The paper's seven, by the names that the command line and provenance use."""


def parse_kinds(text: str) -> tuple[str, ...]:
    """Names of interventions as the command line gives them: `all`, `none`, or a list with commas.

    Raises:
        InputError: A name is not known.
    """
    if text == "all":
        return tuple(INTERVENTIONS)
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names in ([], ["none"]):
        return ()
    unknown = [name for name in names if name not in INTERVENTIONS]
    if unknown:
        raise InputError(f"no intervention is called {unknown[0]!r}; available: all, none, {', '.join(INTERVENTIONS)}")
    return tuple(dict.fromkeys(names))


def choose_kinds(kinds: Sequence[str], key: str, seed: int, draws: int = 1) -> tuple[str, ...]:
    """The kinds that one picture gets: `draws` of `kinds` without repetition, at random (the paper draws one).

    Args:
        kinds: Names to draw from.
        key: What the picture is, such as the digest of its file: the draw depends on `key` and `seed` and nothing
            else, so that neither the order of the pictures nor parallel work changes it.
        seed: The run's seed.
        draws: How many; all of them if there are fewer.
    """
    order = _generator("choose", key, seed).permutation(len(kinds))
    return tuple(kinds[index] for index in order[:draws])


def intervene(image: Image.Image, kind: str, key: str, seed: int) -> Image.Image:
    """One picture under one intervention, reproducibly (see `choose_kinds` for `key` and `seed`).

    Args:
        image: RGB, as the tower sees it.
        kind: A name in `INTERVENTIONS`.
        key: What the picture is.
        seed: The run's seed.

    Returns:
        RGB of the same size.

    Raises:
        InputError: The kind is not known.
    """
    if kind not in INTERVENTIONS:
        raise InputError(f"no intervention is called {kind!r}; available: {', '.join(INTERVENTIONS)}")
    return INTERVENTIONS[kind](image.convert("RGB"), _generator(kind, key, seed))


def _generator(*parts: str | int) -> np.random.Generator:
    """A generator of its own for every combination of parts."""
    digest = hashlib.sha256("\n".join(map(str, parts)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def _turn_hue(image: Image.Image, turn: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    # Hue is stored in 256 steps and wraps, as angles do.
    turned = Image.fromarray((np.asarray(hue).astype(np.int16) + round(turn * 256)).astype(np.uint8))
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")
