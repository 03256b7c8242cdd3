"""Convolutions as products: what each output position looks at, as a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray


@dataclass(frozen=True)
class ConvWindow:
    """What one output position of a two-dimensional convolution reads, over all channels.

    Attributes:
        kernel: Height and width.
        strides: Down and across.
        pads: Zeros above, left, below and right.
        dilations: Steps between the numbers read, down and across.
    """

    kernel: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilations: tuple[int, int]

    def __str__(self) -> str:
        """One name for each window."""
        parts = (self.kernel, self.strides, self.pads, self.dilations)
        return "/".join("x".join(map(str, part)) for part in parts)

    def rows(self, planes: NDArray[np.float32], most: int | None = None) -> NDArray[np.float32]:
        """[N, C, H, W] → [N · positions, C · kh · kw]: the convolution is these rows times `sites.matrix`.

        Args:
            planes: float32.
            most: Take about so many positions of each image, on a grid; None takes all.
        """
        top, left, bottom, right = self.pads
        padded = np.pad(planes, ((0, 0), (0, 0), (top, bottom), (left, right)))
        reach = [(size - 1) * step + 1 for size, step in zip(self.kernel, self.dilations, strict=True)]
        seen = sliding_window_view(padded, reach, axis=(2, 3))
        down, across = self.strides
        chosen = seen[:, :, ::down, ::across, :: self.dilations[0], :: self.dilations[1]]
        if most is not None:
            step = max(1, round((chosen.shape[2] * chosen.shape[3] / most) ** 0.5))
            chosen = chosen[:, :, ::step, ::step]
        by_place = chosen.transpose(0, 2, 3, 1, 4, 5)
        return np.asarray(by_place.reshape(-1, planes.shape[1] * self.kernel[0] * self.kernel[1]))


def window_of(conv: ir.Node) -> ConvWindow | None:
    """What a Conv reads; None of one that int8 leaves alone: by groups, not of two dimensions, or padding by itself."""
    attributes, weights = conv.attributes, conv.inputs[1]
    if weights is None or weights.const_value is None or attributes.get_int("group", 1) != 1:
        return None
    shape = weights.const_value.numpy().shape
    if len(shape) != 4 or attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None
    high, wide = shape[2:]
    down, across = attributes.get_ints("strides", [1, 1])
    top, left, bottom, right = attributes.get_ints("pads", [0, 0, 0, 0])
    tall, broad = attributes.get_ints("dilations", [1, 1])
    return ConvWindow((high, wide), (down, across), (top, left, bottom, right), (tall, broad))
