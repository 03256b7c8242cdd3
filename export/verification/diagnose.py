"""Why a graph or its pixels failed: each known fault is made on purpose, and named only if it gives the same answers.

Nothing is guessed. A fault of a tower is confirmed where the faulty reference agrees with the candidate (cosine above
`AGREES` on every row) and is at least ten times nearer to it than the true reference is; a fault of pixels where it
gives every image within a level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from invariclip.export.checkpoints.surgery import shared_copy
from invariclip.export.libraries import declare_missing_ops
from invariclip.export.verification.answers import project
from invariclip.export.verification.figures import max_diff
from invariclip.export.verification.pixel_checks import levels, shown, transform
from invariclip.preprocessing.pixels import normalise, pixels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.artifact.projection import Projection
    from invariclip.export.checkpoints.checkpoint import Checkpoint
    from invariclip.export.verification.answers import Comparison
    from invariclip.export.verification.pixel_checks import RunFront
    from invariclip.preprocessing.pixels import PixelSpec

AGREES = 0.9999
NEARER = 0.1
_HALF_MAX = float(torch.finfo(torch.float16).max)
_STATISTICS = {
    "OpenAI's": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "ImageNet's": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "0.5": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "no": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
_CLOSE = 1.0
"""Levels within which two images are the same; honest float rounding stays below it."""


@dataclass
class Fault:
    """One way to be wrong.

    Attributes:
        kind: Of faults of one kind only the nearest is named.
        words: What to call it; said after the encoder ran, so it may tell what was seen.
        encode: Raw embeddings [n, D] of a batch with this fault; None where the model has no place for it.
    """

    kind: str
    words: Callable[[], str]
    encode: Callable[[NDArray[Any]], NDArray[np.float32] | None]


def causes_of(checkpoint: Checkpoint, projection: Projection | None, tower: str, comparison: Comparison) -> list[str]:
    """Faults that explain a tower's answers on the batch that is furthest off; empty where none does.

    Args:
        checkpoint: The original model; it stays unchanged.
        projection: A_inv, or None.
        tower: `image` or `text`.
        comparison: What came out.
    """
    if comparison.worst is None:
        return []
    _, batch, got, start = comparison.worst
    honest = comparison.reference[start : start + len(batch)]
    nearest: dict[str, tuple[float, str]] = {}
    for fault in _faults(checkpoint, tower):
        raw = fault.encode(batch)
        if raw is None:
            continue
        off = _explains(project(raw, projection), honest, got.astype(np.float64))
        # of faults that are nearly the same (two forms of GELU) the one that is nearest
        if off is not None and off < nearest.get(fault.kind, (np.inf, ""))[0]:
            nearest[fault.kind] = off, f"{tower}: {fault.words()}"
    if projection is not None and got.shape[1] == checkpoint.embed_dim:
        encode = checkpoint.encode_images if tower == "image" else checkpoint.encode_texts
        off = _explains(project(encode(batch), None), honest, got.astype(np.float64))
        if off is not None:
            nearest["projection"] = off, f"{tower}: the projection is not in the graph"
    return [words for _, words in nearest.values()]


def _explains(faulty: NDArray[np.float64], honest: NDArray[np.float64], got: NDArray[np.float64]) -> float | None:
    """How far the faulty reference is from these answers; None where it does not give them, or the true one does."""
    finite = np.isfinite(got).all(axis=1)
    if faulty.shape != got.shape or not np.array_equal(finite, np.isfinite(faulty).all(axis=1)):
        return None
    if not finite.any():
        return 0.0
    finite_everywhere = bool(finite.all())
    faulty, honest, got = faulty[finite], honest[finite], got[finite]
    cosines = (faulty * got).sum(axis=1) / np.maximum(np.linalg.norm(got, axis=1), 1e-30)
    off = float(np.abs(faulty - got).max())
    nearer = not finite_everywhere or off <= NEARER * np.abs(honest - got).max()
    return off if cosines.min() > AGREES and nearer else None


def _faults(checkpoint: Checkpoint, tower: str) -> Iterator[Fault]:
    if tower == "image":
        yield Fault(
            "channels",
            lambda: "red and blue are swapped",
            lambda batch: checkpoint.encode_images(np.ascontiguousarray(batch[..., ::-1])),
        )
        for name, (mean, std) in _STATISTICS.items():
            other = replace(checkpoint, pixels=replace(checkpoint.pixels, image_mean=mean, image_std=std))
            said = f"images are normalised with {name} mean and standard deviation, not the checkpoint's"
            yield Fault("statistics", partial(str, said), other.encode_images)
    else:
        yield Fault("mask", lambda: "the causal mask is missing", _with(checkpoint, tower, _unmask))
    for name, activation in _activations().items():
        said = f"it computes {name} where the checkpoint has another activation"
        yield Fault("activation", partial(str, said), _with(checkpoint, tower, partial(_activate, activation)))
    halves: list[HalfLayerNorm] = []
    yield Fault("overflow", lambda: _overflow(halves), _overflowing(checkpoint, tower, halves))


def _overflow(halves: list[HalfLayerNorm]) -> str:
    reach = max(half.reach for half in halves)
    return f"a LayerNorm overflows in float16: its input is {reach:.3g} off its mean, squares end at {_HALF_MAX:.0f}"


def _overflowing(
    checkpoint: Checkpoint, tower: str, halves: list[HalfLayerNorm]
) -> Callable[[NDArray[Any]], NDArray[np.float32] | None]:
    """An encoder with half-precision LayerNorms; None where no square leaves the range."""
    encode = _with(checkpoint, tower, lambda root: _halve(root, halves))

    def checked(batch: NDArray[Any]) -> NDArray[np.float32] | None:
        raw = encode(batch)
        return raw if any(half.reach**2 > _HALF_MAX for half in halves) else None

    return checked


def _with(
    checkpoint: Checkpoint, tower: str, change: Callable[[nn.Module], bool]
) -> Callable[[NDArray[Any]], NDArray[np.float32] | None]:
    """An encoder of a changed copy; None where nothing could be changed. The copy shares all weights."""

    def encode(batch: NDArray[Any]) -> NDArray[np.float32] | None:
        twin = shared_copy(checkpoint.module)
        if not change(twin):
            return None
        other = replace(checkpoint, module=twin)
        return other.encode_images(batch) if tower == "image" else other.encode_texts(batch)

    return encode


def _unmask(root: nn.Module) -> bool:
    changed = False
    for part in root.modules():
        mask = part._buffers.get("attn_mask")
        if mask is not None:
            part._buffers["attn_mask"] = torch.zeros_like(mask)
            changed = True
    return changed


def _activations() -> dict[str, nn.Module]:
    declare_missing_ops()
    from open_clip.transformer import QuickGELU

    return {"GELU": nn.GELU(), "GELU's tanh form": nn.GELU("tanh"), "QuickGELU": QuickGELU()}


def _activate(activation: nn.Module, root: nn.Module) -> bool:
    changed = False
    for part in list(root.modules()):
        for name, child in part._modules.items():
            if child is not None and "GELU" in type(child).__name__:
                part._modules[name] = activation
                changed = True
    return changed


class HalfLayerNorm(nn.Module):
    """LayerNorm as a graph computes it that was cast to float16 without care: the squares overflow."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        """Takes the weights of a true one."""
        super().__init__()
        self.norm = norm
        self.reach = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Everything in float16, the result in x's own type."""
        axes = tuple(range(-len(self.norm.normalized_shape), 0))
        half = x.half()
        centred = half - half.mean(axes, keepdim=True)
        self.reach = max(self.reach, float(torch.nan_to_num(centred.float(), nan=torch.inf).abs().max()))
        answer = centred / (centred * centred).mean(axes, keepdim=True).add(self.norm.eps).sqrt()
        if self.norm.weight is not None:
            answer = answer * self.norm.weight.half()
        if self.norm.bias is not None:
            answer = answer + self.norm.bias.half()
        return answer.to(x.dtype)


def _halve(root: nn.Module, halves: list[HalfLayerNorm]) -> bool:
    halves.clear()
    for part in list(root.modules()):
        for name, child in part._modules.items():
            if isinstance(child, nn.LayerNorm) and "2d" not in type(child).__name__:
                part._modules[name] = HalfLayerNorm(child)
                halves.append(part._modules[name])  # type: ignore[arg-type]
    return bool(halves)


def pixel_causes(paths: Sequence[Path], spec: PixelSpec) -> list[str]:
    """Faults that explain why the runtime's pixels differ from open_clip's transform.

    Args:
        paths: Readable images.
        spec: How the tower wants them.
    """
    theirs = transform(spec)
    triples = (
        (np.asarray(image), levels(normalise(pixels(image, spec)[None], spec), spec)[0], levels(theirs(image), spec))
        for image in shown(paths, spec)
        if image.mode == "RGB"  # faults are made for images that need no conversion
    )
    return [f"pixels: {words}" for words in _explained(triples, spec)]


def front_causes(run: RunFront, images: Iterable[NDArray[np.uint8]], spec: PixelSpec) -> list[str]:
    """Faults that explain why a graph's own resize differs from the runtime's pixels.

    Args:
        run: See `pixel_checks.open_front`.
        images: uint8 [h, w, 3] each, of any size.
        spec: How the tower wants images.
    """
    triples = ((image, run(image), pixels(image, spec)) for image in images)
    return [f"resize in the graph: {words}" for words in _explained(triples, spec)]


def _explained(triples: Iterable[tuple[NDArray[np.uint8], NDArray[Any], NDArray[Any]]], spec: PixelSpec) -> list[str]:
    """The faults that give what was got of every image, where at least one differs from what was wanted.

    One image after the other, because large ones do not fit into memory together.
    """
    differs, left = False, _FAULTS
    for image, got, wanted in triples:
        differs = differs or not max_diff(got, wanted) <= _CLOSE  # so that a NaN differs
        left = {words: fault for words, fault in left.items() if _same(got, fault(image, wanted, spec))}
        if not left:
            break
    return list(left) if differs else []


def _same(got: NDArray[Any], made: NDArray[Any] | None) -> bool:
    return made is not None and got.shape == made.shape and max_diff(np.clip(np.round(got), 0, 255), made) <= _CLOSE


def _swapped(image: NDArray[np.uint8], wanted: NDArray[Any], spec: PixelSpec) -> NDArray[Any]:
    del image, spec
    return wanted[..., ::-1]


def _floored(image: NDArray[np.uint8], wanted: NDArray[Any], spec: PixelSpec) -> NDArray[Any] | None:
    del wanted
    return _fit(image, spec, offset=math.floor)


def _floats_first(image: NDArray[np.uint8], wanted: NDArray[Any], spec: PixelSpec) -> NDArray[Any] | None:
    del wanted
    return _fit(image, spec, in_floats=True)


def _floats_and_floored(image: NDArray[np.uint8], wanted: NDArray[Any], spec: PixelSpec) -> NDArray[Any] | None:
    del wanted
    return _fit(image, spec, in_floats=True, offset=math.floor)


def _nearest(image: NDArray[np.uint8], wanted: NDArray[Any], spec: PixelSpec) -> NDArray[Any] | None:
    del wanted
    return _fit(image, spec, filter_=Image.Resampling.NEAREST)


def _other_filter(image: NDArray[np.uint8], wanted: NDArray[Any], spec: PixelSpec) -> NDArray[Any] | None:
    del wanted
    other = Image.Resampling.BILINEAR if spec.interpolation == "bicubic" else Image.Resampling.BICUBIC
    return _fit(image, spec, filter_=other)


_FAULTS: dict[str, Callable[[NDArray[np.uint8], NDArray[Any], PixelSpec], NDArray[Any] | None]] = {
    "red and blue are swapped": _swapped,
    "the crop's offset is cut off, not rounded": _floored,
    "it is resized in floats, not in bytes": _floats_first,
    "it is resized in floats, not in bytes, and the crop's offset is cut off, not rounded": _floats_and_floored,
    "it is resized by the other of bicubic and bilinear": _other_filter,
    "it is resized by nearest neighbour": _nearest,
}


def _fit(
    image: NDArray[np.uint8],
    spec: PixelSpec,
    *,
    in_floats: bool = False,
    offset: Callable[[float], int] = round,
    filter_: Image.Resampling | None = None,
) -> NDArray[Any] | None:
    """Resize and centre crop of an RGB image to a square tower, written apart from the runtime's, with faults.

    Args:
        image: uint8 [h, w, 3].
        spec: How the tower wants it.
        in_floats: Neither round nor clip between the two passes, only at the end.
        offset: Makes a whole number of the crop's offset.
        filter_: Another filter than the spec's.

    Returns:
        [H, W, 3] in levels; None for a spec that this cannot do.
    """
    height, width = spec.image_size
    if spec.resize_mode == "longest" or (spec.resize_mode == "shortest" and height != width):
        return None
    size = (width, height)
    if spec.resize_mode == "shortest":
        tall, wide = image.shape[:2]
        scaled = int(height * max(tall, wide) / min(tall, wide))
        size = (height, scaled) if wide <= tall else (scaled, height)
    taken = Image.Resampling.BICUBIC if spec.interpolation == "bicubic" else Image.Resampling.BILINEAR
    filter_ = taken if filter_ is None else filter_
    if in_floats:
        channels = [Image.fromarray(channel.astype(np.float32)) for channel in image.transpose(2, 0, 1)]
        whole = np.stack([np.asarray(channel.resize(size, filter_)) for channel in channels], axis=-1)
        whole = np.clip(np.round(whole), 0, 255)
    else:
        whole = np.asarray(Image.fromarray(image).resize(size, filter_))
    top, left = offset((whole.shape[0] - height) / 2), offset((whole.shape[1] - width) / 2)
    return whole[top : top + height, left : left + width]
