"""The reference model: an open_clip model whose image tower starts from ImageNet, small enough to be committed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from invariclip.export.torchvision_ops import declare_missing_ops

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from PIL import Image

CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 256,
        "vision_cfg": {
            "timm_model_name": "resnet18",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": 224,
        },
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 3},
    },
    "preprocess_cfg": {
        "size": [224, 224],
        "mode": "RGB",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
    },
}
"""What open_clip reads from `open_clip_config.json`. The ONNX trunk was trained with ImageNet's mean and deviation."""
