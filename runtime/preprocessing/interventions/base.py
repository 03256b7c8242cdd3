"""What every intervention is: parameters within limits, and one change of an image.

An intervention acts on the image as the tower sees it, after resize and crop: the two members of a pair then differ
in nothing but the intervention (whatever mode the file was stored in), and a blur of three pixels means the same for
every file.
"""

from __future__ import annotations

from dataclasses import field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from PIL import Image

from invariclip.errors import InputError

if TYPE_CHECKING:
    import numpy as np

Range = tuple[float, float]
"""What a parameter is drawn from, evenly: lowest and highest; both the same fixes it."""


def parameter(default: Any, lowest: float, highest: float) -> Any:
    """A dataclass field with limits: a number, or a `Range` where the default is one.

    Args:
        default: int, float, or a pair of them; a value must be of the same kind.
        lowest: The least that makes sense.
        highest: The most.
    """
    return field(default=default, metadata={"limits": (lowest, highest)})


class Intervention:
    """One way to change an image; subclasses are frozen dataclasses whose fields come from `parameter`.

    Attributes:
        name: What the command line, files and provenance call it.
        needs_donor: Whether a second image is needed.
    """

    name: ClassVar[str]
    needs_donor: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, limits, default in described(type(self)):
            object.__setattr__(self, name, _checked(f"{self.name}: {name}", getattr(self, name), limits, default))

    def __call__(self, image: Image.Image, rng: np.random.Generator, donor: Image.Image | None = None) -> Image.Image:
        """A changed copy of an image.

        Args:
            image: Any mode; RGB as the tower sees it.
            rng: All that is random comes from it.
            donor: The second image, resized to the first; without meaning where none is needed.

        Returns:
            RGB of the same size.

        Raises:
            InputError: A donor is needed and there is none.
            NotApplicableError: This image has not what the intervention changes.
        """
        del donor
        return self.change(image.convert("RGB"), rng)

    def change(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """What subclasses do: RGB to RGB of the same size, the argument untouched."""
        raise NotImplementedError

    def parameters(self) -> dict[str, Any]:
        """Parameters by name, JSON-ready."""
        values = {name: getattr(self, name) for name, _, _ in described(type(self))}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


class DonorIntervention(Intervention):
    """An intervention that takes something from a second image."""

    needs_donor = True

    def __call__(self, image: Image.Image, rng: np.random.Generator, donor: Image.Image | None = None) -> Image.Image:
        """As `Intervention.__call__`, with a donor."""
        if donor is None:
            raise InputError(f"{self.name} needs a second image; give it one, or leave the intervention out")
        fitted = donor.convert("RGB")
        if fitted.size != image.size:
            fitted = fitted.resize(image.size, Image.Resampling.BICUBIC)
        return self.change_with(image.convert("RGB"), fitted, rng)

    def change_with(self, image: Image.Image, donor: Image.Image, rng: np.random.Generator) -> Image.Image:
        """What subclasses do: RGB and a donor of the same size to RGB of that size."""
        raise NotImplementedError


def described(kind: type[Intervention]) -> list[tuple[str, tuple[float, float], Any]]:
    """A kind's parameters: name, limits, default."""
    return [(each.name, each.metadata["limits"], each.default) for each in fields(kind)]  # type: ignore[arg-type]


def _checked(what: str, value: Any, limits: tuple[float, float], default: Any) -> Any:
    """A value of the default's kind and within the limits; one number stands for a range without width.

    Raises:
        InputError: It is neither.
    """
    if not isinstance(default, tuple):
        return _number(what, value, limits, whole=isinstance(default, int))
    pair = value if isinstance(value, (list, tuple)) else [value, value]
    if len(pair) != 2:
        raise InputError(f"{what} is a number or [lowest, highest], not {len(pair)} values")
    low, high = (_number(what, each, limits, whole=all(isinstance(part, int) for part in default)) for each in pair)
    if low > high:
        raise InputError(f"{what}: the lowest, {low:g}, is above the highest, {high:g}")
    return low, high


def _number(what: str, value: Any, limits: tuple[float, float], *, whole: bool) -> float:
    needed = f"{what} must be a {'whole ' if whole else ''}number from {limits[0]:g} to {limits[1]:g}"
    right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not (right and limits[0] <= value <= limits[1]):
        # it comes from a file and may be anything, of any length
        given = repr(value)[:40] if isinstance(value, (str, float, int)) else f"a {type(value).__name__}"
        raise InputError(f"{needed}, not {given}")
    return value if whole else float(value)
