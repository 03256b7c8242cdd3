"""The trunk's features of images as they are and of altered views, computed once and kept."""

from __future__ import annotations

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.ndimage
from PIL import Image, ImageEnhance, ImageFilter

from invariclip.console import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

SIDE = 260
BATCH = 32
VIEWS = 2
"""The image as it is, and an altered view: more were tried and gained nothing on validation."""
VERSION = "reference-views-1"
"""Changes when a view would come out differently."""
_MIDDLE, _SPREAD = 127.0, 128.0
_WHITE = 250


def alter(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """An altered view of a drawing on white: another background, turned, mirrored, moved, another size, other light.

    Args:
        image: A square RGB image.
        rng: Draws the alteration.

    Returns:
        An RGB image of SIDE x SIDE.
    """
    background = (255, 255, 255)
    if rng.random() < 0.5:
        image, background = _on_another_background(image, rng)
    image = image.rotate(float(rng.uniform(-20, 20)), Image.Resampling.BICUBIC, fillcolor=background)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return _in_other_light(_placed(image, background, rng), rng)


def _on_another_background(image: Image.Image, rng: np.random.Generator) -> tuple[Image.Image, tuple[int, int, int]]:
    pixels = np.asarray(image)
    side = image.width
    labels, _ = scipy.ndimage.label((pixels >= _WHITE).all(axis=2))
    edge = np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    drawn = ~np.isin(labels, edge[edge > 0])
    kind, one, other = rng.random(), rng.integers(0, 256, 3), rng.integers(0, 256, 3)
    if kind < 0.5:
        behind: NDArray[Any] = np.broadcast_to(one, pixels.shape)
    else:
        ramp = np.linspace(0, 1, side)[:, None, None]
        if rng.random() < 0.5:
            ramp = ramp.transpose(1, 0, 2)
        behind = one * (1 - ramp) + other * ramp + np.zeros(pixels.shape)
        if kind > 0.8:
            behind = np.clip(behind + _clouds(side, rng), 0, 255)
    soft = scipy.ndimage.gaussian_filter(drawn.astype(np.float32), 0.7)[..., None]
    mixed = (pixels * soft + behind.astype(np.uint8) * (1 - soft)).astype(np.uint8)
    return Image.fromarray(mixed), (int(one[0]), int(one[1]), int(one[2]))


def _clouds(side: int, rng: np.random.Generator) -> NDArray[np.float32]:
    coarse = rng.normal(0, 40, (8, 8, 3)).astype(np.float32)
    planes = [
        np.asarray(Image.fromarray(coarse[..., k]).resize((side, side), Image.Resampling.BICUBIC)) for k in range(3)
    ]
    return np.stack(planes, axis=2)


def _placed(image: Image.Image, background: tuple[int, int, int], rng: np.random.Generator) -> Image.Image:
    side = image.width
    # above 1 the image is shrunk: things in the world do not fill their frame as icons do
    area, aspect = float(rng.uniform(0.45, 1.7)), math.exp(float(rng.uniform(-0.22, 0.22)))
    width, height = side * math.sqrt(area * aspect), side * math.sqrt(area / aspect)
    left, top = (_drawn_offset(side, extent, rng) + side / 2 for extent in (width, height))
    canvas = Image.new("RGB", (2 * side, 2 * side), background)
    canvas.paste(image, (side // 2, side // 2))
    return canvas.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))


def _drawn_offset(side: int, extent: float, rng: np.random.Generator) -> float:
    low, high = sorted((0.0, side - extent))
    return float(rng.uniform(low, high))


def _in_other_light(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    draw = rng.random()
    if draw < 0.15:
        image = image.convert("L").convert("RGB")
    elif draw < 0.5:
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            image = enhance(image).enhance(float(rng.uniform(0.6, 1.4)))
    if rng.random() < 0.15:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.5, 2))))
    return image


def read_rgb(path: Path) -> Image.Image:
    """An image in RGB, transparency laid on white."""
    with Image.open(path) as opened:
        if opened.mode == "RGB":
            return opened.copy()
        colour = opened.convert("RGBA")
    white = Image.new("RGBA", colour.size, "white")
    white.alpha_composite(colour)
    return white.convert("RGB")


def to_input(image: Image.Image) -> NDArray[np.float32]:
    """The trunk's input, [3, SIDE, SIDE]: the shorter side resized to SIDE, the centre kept."""
    width, height = image.size
    if (width, height) != (SIDE, SIDE):
        scale = SIDE / min(width, height)
        size = max(SIDE, round(width * scale)), max(SIDE, round(height * scale))
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = round((size[0] - SIDE) / 2), round((size[1] - SIDE) / 2)
        image = image.crop((left, top, left + SIDE, top + SIDE))
    return np.asarray(((np.asarray(image, dtype=np.float32) - _MIDDLE) / _SPREAD).transpose(2, 0, 1))


class BFloat16Trunk:
    """The frozen trunk in bfloat16, where the processor multiplies in it; float32 elsewhere."""

    def __init__(self, module: torch.nn.Module, threads: int) -> None:
        """Compiles the trunk, a timm model without its classifier, for batches of BATCH."""
        import openvino
        import torch

        model = openvino.convert_model(module.eval(), example_input=torch.zeros(1, 3, SIDE, SIDE))
        model.reshape([BATCH, 3, SIDE, SIDE])
        hints = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": threads}
        self._run = openvino.Core().compile_model(model, "CPU", hints)

    def __call__(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 [N, 3, SIDE, SIDE], N at most BATCH, to float32 [N, width]."""
        padded = np.zeros((BATCH, *batch.shape[1:]), dtype=np.float32)
        padded[: len(batch)] = batch
        return np.array(self._run(padded)[0][: len(batch)], dtype=np.float32)


def features(
    make_trunk: Callable[[], BFloat16Trunk],
    paths: Sequence[Path],
    digests: Sequence[str],
    views: int,
    cache: Path,
    progress: Progress = silent,
) -> NDArray[np.float32]:
    """Features [V, N, width] of N images; what was computed before is read back, so that a stopped run resumes.

    Args:
        make_trunk: Compiles the trunk; called only where something has to be computed.
        paths: The images.
        digests: Theirs, which seed the alterations and name the kept features.
        views: V: view 0 is the image as it is, others are altered.
        cache: Folder of the kept features, one file a view.
        progress: Progress display.
    """
    cache.mkdir(parents=True, exist_ok=True)
    stem = hashlib.sha256("\n".join([VERSION, *digests]).encode()).hexdigest()[:16]
    trunk: BFloat16Trunk | None = None
    stacked = []
    for view in range(views):
        path = cache / f"{stem}-{view}.npy"
        if not path.is_file():
            trunk = trunk or make_trunk()
            beside = path.with_suffix(".part.npy")
            np.save(beside, _one_view(trunk, paths, digests, view, progress))
            beside.replace(path)
        stacked.append(np.load(path, allow_pickle=False))
    return np.stack(stacked)


def _one_view(
    trunk: BFloat16Trunk, paths: Sequence[Path], digests: Sequence[str], view: int, progress: Progress
) -> NDArray[np.float32]:
    def read(place: int) -> NDArray[np.float32]:
        image = read_rgb(paths[place])
        if view:
            seed = hashlib.sha256(f"{VERSION}:{digests[place]}:{view}".encode()).digest()
            image = alter(image, np.random.default_rng(int.from_bytes(seed[:8], "big")))
        return to_input(image)

    rows = []
    starts = range(0, len(paths), BATCH)
    with ThreadPoolExecutor(max_workers=2) as pool:
        for start in progress(starts, total=len(starts), desc=f"view {view}"):
            batch = list(pool.map(read, range(start, min(start + BATCH, len(paths)))))
            rows.append(trunk(np.stack(batch)))
    return np.concatenate(rows)
