"""The frozen trunk's features of every training picture, plain and slightly altered, computed once and kept."""

from __future__ import annotations

import copy
import hashlib
import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from invariclip.console import Progress, silent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.bench.stylebench.manifest import Picture

CROP = 224
BATCH = 32
AUGMENTATION = "crop-turn-flip-1"
"""Changes when altered views would come out differently."""


def alter(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A slightly altered view: turned, mirrored, cropped or shrunk, on white. Colours stay, for they are the style.

    Args:
        picture: An RGB picture.
        rng: Draws the alteration.

    Returns:
        An RGB picture of CROP x CROP.
    """
    side = picture.width
    angle = float(rng.uniform(-20, 20))
    turned = picture.rotate(angle, Image.Resampling.BICUBIC, fillcolor=(255, 255, 255))
    if rng.random() < 0.5:
        turned = turned.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # above 1 the picture is shrunk: things in the world do not fill their frame as icons do
    area, aspect = float(rng.uniform(0.45, 1.5)), math.exp(float(rng.uniform(-0.22, 0.22)))
    width, height = side * math.sqrt(area * aspect), side * math.sqrt(area / aspect)
    left = _place(side, width, rng)
    top = _place(side, height, rng)
    canvas = Image.new("RGB", (2 * side, 2 * side), (255, 255, 255))
    canvas.paste(turned, (side // 2, side // 2))
    box = (left + side / 2, top + side / 2, left + width + side / 2, top + height + side / 2)
    return canvas.resize((CROP, CROP), Image.Resampling.BICUBIC, box=box)


def _place(side: int, extent: float, rng: np.random.Generator) -> float:
    low, high = sorted((0.0, side - extent))
    return float(rng.uniform(low, high))


def view_seed(picture: Picture, view: int, seed: int) -> int:
    """A seed of its own for each view of each picture, whatever order they are computed in."""
    digest = hashlib.sha256(f"{seed}:{picture.sha256}:{view}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def compute_features(
    trunk: torch.nn.Module,
    preprocess: Callable[[Image.Image], torch.Tensor],
    root: Path,
    pictures: Sequence[Picture],
    view: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> NDArray[np.float32]:
    """Features of one view of each picture, [N, width]; view 0 is the picture as it is."""

    def pixels(picture: Picture) -> torch.Tensor:
        with Image.open(root / picture.file) as opened:
            image = opened.convert("RGB")
        if view:
            image = alter(image, np.random.default_rng(view_seed(picture, view, seed)))
        return preprocess(image)

    found = []
    with ThreadPoolExecutor(max_workers=2) as pool, torch.no_grad():
        for start in range(0, len(pictures), BATCH):
            batch = torch.stack(list(pool.map(pixels, pictures[start : start + BATCH])))
            batch = batch.to(dtype).contiguous(memory_format=torch.channels_last)
            found.append(trunk(batch).float().numpy())
    return np.concatenate(found).astype(np.float32)


def cached_features(
    trunk: torch.nn.Module,
    preprocess: Callable[[Image.Image], torch.Tensor],
    root: Path,
    pictures: Sequence[Picture],
    views: Sequence[int],
    seed: int,
    cache: Path,
    progress: Progress = silent,
) -> NDArray[np.float32]:
    """Features of several views, [V, N, width]; a view that was computed before is read back.

    Args:
        trunk: Frozen, in evaluation mode.
        preprocess: The checkpoint's own transform.
        root: Folder of the pictures.
        pictures: Which pictures.
        views: 0 for the picture as it is, others for altered ones.
        seed: Seed of the alterations.
        cache: Folder of the kept features.
        progress: Progress display.
    """
    cache.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(f"{AUGMENTATION} {seed} {_state_digest(trunk)}".encode())
    for picture in pictures:
        key.update(picture.sha256.encode())
    stem = key.hexdigest()[:16]
    stacked = []
    for view in progress(views, total=len(views), desc="views"):
        path = cache / f"{stem}-{view:02d}.npy"
        if not path.is_file():
            # an altered view may lose some digits: bfloat16 is three times as fast on CPUs that know it
            dtype = torch.bfloat16 if view else torch.float32
            fast = fused(trunk, dtype)
            beside = path.with_suffix(".part.npy")
            np.save(beside, compute_features(fast, preprocess, root, pictures, view, seed, dtype))
            beside.replace(path)
        stacked.append(np.load(path))
    return np.stack(stacked)


def fused(trunk: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The same trunk with its operations fused for the CPU: three times as fast, equal to rounding."""
    example = torch.zeros(BATCH, 3, CROP, CROP, dtype=dtype).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trunk = copy.deepcopy(trunk).to(dtype)
        trunk = trunk.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        traced = torch.jit.trace(trunk, example, check_trace=False)  # type: ignore[no-untyped-call]
        found: torch.nn.Module = torch.jit.optimize_for_inference(torch.jit.freeze(traced))
    return found


def _state_digest(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()
