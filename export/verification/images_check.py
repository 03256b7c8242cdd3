"""An image's way to the tower, checked at both ends: the runtime's pixels, and a resize that is in the graph.

Host pixels are held against open_clip's own transform. Images are shown whole and cut, because square ones (all the
bundled ones are) need no crop, and an offset that is cut off instead of rounded shows only where it ends in a half.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx_ir as ir

from invariclip.backends import open_backend
from invariclip.errors import InputError
from invariclip.export.checkpoints.check_texts import spread
from invariclip.export.graphs.front import form_of, front_alone
from invariclip.export.torchvision_ops import declare_missing_ops
from invariclip.export.verification.figures import max_diff
from invariclip.preprocessing.pixels import normalise, open_image, pixels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray
    from PIL import Image

    from invariclip.backends import Backend
    from invariclip.export.graphs.front import FrontForm
    from invariclip.preprocessing.pixels import PixelSpec

    RunFront: TypeAlias = Callable[[NDArray[np.uint8]], NDArray[Any]]
    """An image uint8 [h, w, 3] of any size to what a graph's own resize makes of it: [H, W, 3] in levels of 255."""

SHOWN = 24
"""Images that are shown whole and cut."""
_MAX_PIXELS = 50_000_000
"""Larger images are not shown to a graph that resizes: float32 copies of them would not be bounded."""


def cut(image: Image.Image, side: int, *, upright: bool) -> Image.Image:
    """The top left part of an image whose centre crop to a square has an offset that ends in a half, and is odd.

    Args:
        image: Any mode; it is kept.
        side: Side of the tower's square input, in pixels.
        upright: Cut to a portrait, else to a landscape.

    Returns:
        A smaller image; the same one where it is too small to be cut so.
    """
    long = image.height if upright else image.width
    other = image.width if upright else image.height
    for short in range(min(other, int(long * 0.7)), 0, -1):
        # an excess of 3, 7, 11, … halves to 1.5, 3.5, …: rounded half to even it goes up, cut off it goes down
        if (int(side * long / short) - side) % 4 == 3:
            return image.crop((0, 0, short, long) if upright else (0, 0, long, short))
    return image


def shown(paths: Sequence[Path], spec: PixelSpec) -> Iterator[Image.Image]:
    """Some of the images, decoded, each whole and cut.

    Args:
        paths: Readable images.
        spec: How the tower wants them.
    """
    for index, path in enumerate(spread(paths, SHOWN)):
        image = open_image(path)
        yield image
        yield cut(image, max(spec.image_size), upright=index % 2 == 0)


def transform(spec: PixelSpec) -> Callable[[Image.Image], NDArray[np.float32]]:
    """open_clip's own evaluation transform: an image to normalised float32 [3, H, W]."""
    declare_missing_ops()
    from open_clip.transform import image_transform

    apply = image_transform(
        spec.image_size,
        is_train=False,
        mean=spec.image_mean,
        std=spec.image_std,
        resize_mode=spec.resize_mode,
        interpolation=spec.interpolation,
        fill_color=spec.fill_color,
    )
    return lambda image: np.asarray(apply(image).numpy())


def levels(tensor: NDArray[np.float32], spec: PixelSpec) -> NDArray[np.float64]:
    """Normalised [..., 3, H, W] back to levels from 0 to 255, float64 [..., H, W, 3]."""
    mean = np.asarray(spec.image_mean, dtype=np.float64)[:, None, None]
    std = np.asarray(spec.image_std, dtype=np.float64)[:, None, None]
    return np.asarray(np.moveaxis((tensor.astype(np.float64) * std + mean) * 255, -3, -1))


def pixel_levels(paths: Sequence[Path], spec: PixelSpec) -> float:
    """Largest difference between what serving feeds a tower and open_clip's transform, in levels; 0 where equal.

    Args:
        paths: Readable images.
        spec: How the tower wants them.
    """
    theirs, worst = transform(spec), 0.0
    for image in shown(paths, spec):
        ours, wanted = normalise(pixels(image, spec)[None], spec)[0], theirs(image)
        if not np.array_equal(ours, wanted):
            worst = float(np.maximum(worst, max_diff(levels(ours, spec), levels(wanted, spec))))
    return worst


def is_any_size(backend: Backend) -> bool:
    """Whether a graph takes images of any size, and so resizes them itself."""
    shape = backend.input_shapes[backend.input_names[0]]
    return len(shape) == 4 and shape[1] is None and shape[2] is None


class TooLargeImageWarning(UserWarning):
    """An image that was named for the check is too large to be shown to a graph that resizes."""


@dataclass
class RawImages:
    """Images of any size, as a caller without our preprocessor decodes them; every pass gives the same.

    One that is too large is warned of and counted, never left out in silence.

    Attributes:
        paths: Readable images; `SHOWN` of them are shown, whole and cut.
        spec: How the tower wants them.
        too_large: Those of which the whole, or the cut too, was left out, with the reason.
    """

    paths: Sequence[Path]
    spec: PixelSpec
    too_large: dict[Path, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        """Gives uint8 [h, w, 3], one after the other.

        Raises:
            InputError: All of them are too large.
        """
        given = 0
        for place, image in enumerate(shown(self.paths, self.spec)):
            if image.width * image.height <= _MAX_PIXELS:
                given += 1
                yield np.asarray(image.convert("RGB"))
            else:
                self._leave_out(spread(self.paths, SHOWN)[place // 2], f"{image.width}x{image.height}")
        if not given:
            raise InputError(
                f"none of the {len(self.paths)} images is small enough for the check of a graph that resizes; "
                f"give one of up to {_MAX_PIXELS:,} pixels"
            )

    def _leave_out(self, path: Path, size: str) -> None:
        if path not in self.too_large:
            self.too_large[path] = f"{path}: {size} is above {_MAX_PIXELS:,} pixels"
            warnings.warn(
                f"not shown to the graph's own resize: {self.too_large[path]}", TooLargeImageWarning, stacklevel=3
            )


def open_front(model: Path, *, backend: str, threads: int | None) -> tuple[FrontForm, RunFront]:
    """Opens a graph's own resize alone, so that no weights are loaded.

    Args:
        model: An image graph with a front (see `front`).
        backend: The engine.
        threads: Its threads.

    Returns:
        The front's form, and what runs it; the engine is let go with the latter.

    Raises:
        ArtifactError: The front cannot be told from the rest of the graph, or the engine cannot load it.
    """
    alone = front_alone(ir.load(model))
    with TemporaryDirectory() as name:
        part = Path(name) / "front.onnx"
        ir.save(alone, part)
        engine = open_backend(backend, part, threads=threads)

    def run(image: NDArray[np.uint8]) -> NDArray[Any]:
        (fitted,) = engine.run({engine.input_names[0]: image[None]}).values()
        return np.asarray(fitted[0])

    return form_of(alone), run


def front_levels(run: RunFront, images: Iterable[NDArray[np.uint8]], spec: PixelSpec) -> float:
    """Largest difference between what a front gives and the runtime's pixels, in levels.

    Args:
        run: See `open_front`.
        images: uint8 [h, w, 3] each, of any size.
        spec: How the tower wants them.
    """
    # numpy's maximum, because Python's loses a NaN that is not the first
    return float(np.max([0.0, *(max_diff(run(image), pixels(image, spec)) for image in images)]))
