"""An image's way to the tower, checked: the runtime's pixels, a resize that is in the graph, and the fast pixel mode.

Host pixels are held against open_clip's own transform. Images are shown whole and cut, because square ones (all the
bundled ones are) need no crop, and an offset that is cut off instead of rounded shows only where it ends in a half.

The fast mode is about large JPEGs, which few images of a check are (the bundled ones are 256x256 WebP). So every image
becomes JPEGs of chosen sizes: repeated in mirror image at its own resolution, and not enlarged, because an enlarged
image has no fine detail and hides what the decoder leaves out.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx_ir as ir
from PIL import Image

from invariclip.backends import open_backend
from invariclip.console import silent
from invariclip.errors import InputError
from invariclip.export.checkpoints.check_texts import spread
from invariclip.export.graphs.front import form_of, front_alone
from invariclip.export.libraries import declare_missing_ops
from invariclip.export.verification.answers import agreement, project
from invariclip.export.verification.figures import max_diff
from invariclip.files import scratch_directory
from invariclip.preprocessing.pixels import normalise, open_image, pixels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.backends import Backend
    from invariclip.export.graphs.front import FrontForm
    from invariclip.preprocessing.pixels import PixelSpec

    RunFront: TypeAlias = Callable[[NDArray[np.uint8]], NDArray[Any]]
    """An image uint8 [h, w, 3] of any size to what a graph's own resize makes of it: [H, W, 3] in levels of 255."""

    from invariclip.console import Progress
    from invariclip.export.verification.candidate import ExportJob
    from invariclip.export.verification.evidence import ImageBatches
    from invariclip.export.verification.figures import Thresholds

_MAX_PIXELS = 50_000_000
"""Larger images are not shown to a graph that resizes: float32 copies of them would not be bounded."""
JPEG_SIZES = ((640, 480), (1800, 1350), (4000, 3000))
"""Width and height. At the first a decoder can leave out nothing for 224 pixels; at the second it leaves the least that
it may, just `FAST_MARGIN` times what is needed; the third is what a telephone takes."""
QUALITY = 90
_MAX_SIDE = 8192
_BATCH = 16
SHOWN = 24
"""Images that are looked at: whole and cut, and as JPEGs of each of `JPEG_SIZES`."""


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
        count = 0
        for place, image in enumerate(shown(self.paths, self.spec)):
            if image.width * image.height <= _MAX_PIXELS:
                count += 1
                yield np.asarray(image.convert("RGB"))
            else:
                self._leave_out(spread(self.paths, SHOWN)[place // 2], f"{image.width}x{image.height}")
        if not count:
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
    with scratch_directory() as folder:
        part = folder / "front.onnx"
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


@dataclass(frozen=True)
class FastFigures:
    """How far the fast mode is from the exact one.

    Attributes:
        items: JPEGs looked at.
        max_levels: Largest difference of a byte, in levels of 255.
        mean_levels: Mean difference of a byte.
        cosine_min: Smallest cosine between the embeddings of both.
        cosine_mean: Mean cosine.
        top1_agreement: Share of JPEGs whose best match in the bank is the same; None without a bank.
    """

    items: int
    max_levels: float
    mean_levels: float
    cosine_min: float
    cosine_mean: float
    top1_agreement: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The figures as a parity record stores them."""
        return asdict(self)


def as_jpeg(image: Image.Image, size: tuple[int, int], quality: int = QUALITY) -> bytes:
    """An image as a JPEG of another size: cut where it is larger, repeated in mirror image where it is smaller.

    Args:
        image: Any mode.
        size: Width and height, at most 8192 each.
        quality: Pillow's, from 1 to 95; colour is stored at half resolution, as cameras do.

    Raises:
        InputError: `size` is out of range.
    """
    if not all(1 <= side <= _MAX_SIDE for side in size):
        raise InputError(f"a JPEG of {size[0]}x{size[1]} is not made; sides go from 1 to {_MAX_SIDE}")
    rgb = np.asarray(image.convert("RGB"))[: size[1], : size[0]]
    room = ((0, size[1] - rgb.shape[0]), (0, size[0] - rgb.shape[1]), (0, 0))
    stream = io.BytesIO()
    Image.fromarray(np.pad(rgb, room, mode="symmetric")).save(stream, "JPEG", quality=quality, subsampling="4:2:0")
    return stream.getvalue()


def check_fast_pixels(
    job: ExportJob, images: ImageBatches, bounds: Thresholds, *, progress: Progress = silent
) -> dict[str, Any]:
    """Holds the fast mode against the exact one at a level's bounds, as the checkpoint itself sees both.

    Which engine answers does not matter: what the mode changes is the pixels, and every variant was held against the
    checkpoint already.

    Args:
        job: The checkpoint, its projection, and the classes, whose place prompts take where there are none.
        images: What to make JPEGs of.
        bounds: `min_cosine` and `min_top1` are asked.
        progress: `console.bar` or `console.silent`.

    Returns:
        The record that `Manifest.fast_pixels` keeps: figures, bounds, what they `broken`, and `passed`.

    Raises:
        InputError: No image can be read.
    """
    chosen = spread(images.readable, SHOWN)
    pairs = fast_pairs(progress(chosen, total=len(chosen), desc="fast pixels"), job.checkpoint.pixels)

    def encode(batch: NDArray[np.uint8]) -> NDArray[np.float64]:
        parts = [job.checkpoint.encode_images(batch[start : start + _BATCH]) for start in range(0, len(batch), _BATCH)]
        return project(np.concatenate(parts), job.projection, job.site)

    figures = fast_figures(pairs, encode, job.bank_or_prompts())
    broken = []
    if not figures.cosine_min >= bounds.min_cosine:
        broken.append(f"cosine to the exact mode {figures.cosine_min:.6f}, below {bounds.min_cosine:g}")
    if figures.top1_agreement is not None and not figures.top1_agreement >= bounds.min_top1:
        broken.append(f"the same best match on {figures.top1_agreement:.2%}, below {bounds.min_top1:.2%}")
    return {
        **figures.to_json(),
        "sizes": [list(size) for size in JPEG_SIZES],
        "min_cosine": bounds.min_cosine,
        "min_top1": bounds.min_top1,
        "broken": broken,
        "passed": not broken,
    }


def fast_pairs(
    paths: Iterable[Path], spec: PixelSpec, sizes: Sequence[tuple[int, int]] = JPEG_SIZES
) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Some of the images as JPEGs of each size, through the exact mode and through the fast one.

    Args:
        paths: Readable images.
        spec: How the tower wants them.
        sizes: Width and height of the JPEGs.

    Returns:
        Pairs of uint8 [H, W, 3].

    Raises:
        InputError: An image cannot be read.
    """
    for path in paths:
        image = open_image(path)
        for size in sizes:
            data = as_jpeg(image, size)
            yield pixels(data, spec), pixels(data, spec, "fast")


def fast_levels(pairs: Iterable[tuple[NDArray[np.uint8], NDArray[np.uint8]]]) -> tuple[float, float]:
    """Largest and mean difference of what `fast_pairs` gives, in levels of 255; 0 where there are none."""
    worst, total, count = 0, 0, 0
    for exact, fast in pairs:
        off = np.abs(exact.astype(np.int16) - fast)
        worst, total, count = max(worst, int(off.max())), total + int(off.sum()), count + off.size
    return float(worst), total / max(count, 1)


def fast_figures(
    pairs: Iterable[tuple[NDArray[np.uint8], NDArray[np.uint8]]],
    encode: Callable[[NDArray[np.uint8]], NDArray[Any]],
    bank: NDArray[Any] | None = None,
) -> FastFigures:
    """What a tower makes of the fast mode.

    Args:
        pairs: What `fast_pairs` gives; they are held in memory, 300 KB each at 224x224.
        encode: uint8 [n, H, W, 3] to embeddings [n, d] of any length above 0: the checkpoint's, or a graph's.
        bank: [K, d], of unit length: where an image's best match is sought.

    Raises:
        InputError: There is no pair.
    """
    images = list(pairs)
    if not images:
        raise InputError("the fast pixel mode was shown no image; give at least one")
    sides = [np.asarray(encode(np.stack(side)), dtype=np.float64) for side in zip(*images, strict=True)]
    exact, fast = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in sides)
    cosines = (exact * fast).sum(axis=1)
    same = None if bank is None else agreement(exact @ bank.T, fast @ bank.T, 1)[0]
    return FastFigures(len(images), *fast_levels(images), float(cosines.min()), float(cosines.mean()), same)
