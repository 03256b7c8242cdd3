"""Any open_clip model as one `Checkpoint`: module, pixels, tokenizer, temperature, digest.

This is where calibration, export and verification get the original encoder from. Loading never runs what a file holds
(see `weights`), and never falls back to random weights unless it was asked to.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from invariclip.errors import CheckpointError
from invariclip.export import weights
from invariclip.export.preprocessing import preprocessing_of, warn_of_quick_gelu
from invariclip.export.tokenizer_json import tokenizer_of
from invariclip.export.torchvision_ops import declare_missing_ops
from invariclip.pixels import normalise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from invariclip.pixels import PixelSpec
    from invariclip.tokenizer import Tokenizer

REFERENCE = "reference"
CONFIG_FILE = "open_clip_config.json"
_HUB, _FOLDER = "hf-hub:", "local-dir:"
_CHUNK = 32
"""Pictures or texts per forward pass of the reference encoder."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An open_clip model in float32, in evaluation mode, with everything that its pictures and texts need.

    Attributes:
        name: `reference`, the architecture's name, the folder's name, or the hub id.
        module: The open_clip model. Never changed: it is the reference of every parity figure.
        pixels: How pictures become its input.
        tokenizer: How texts do.
        embed_dim: D, the width of both towers' embeddings.
        logit_scale: Temperature that multiplies cosines, already exponentiated.
        logit_bias: Added to logits (SigLIP), or None.
        sha256: Digest of the weights, see `weights.digest`.
        source: Where the weights came from, in words: a file's name, or the seed of random ones.
    """

    name: str
    module: torch.nn.Module
    pixels: PixelSpec
    tokenizer: Tokenizer
    embed_dim: int
    logit_scale: float
    logit_bias: float | None
    sha256: str
    source: str

    def encode_images(self, batch: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Raw image embeddings, as the encoder gives them: not projected, not of unit length.

        Args:
            batch: uint8 [N, H, W, 3], see `pixels.stack`.

        Returns:
            float32 [N, D].
        """
        encode: Callable[..., torch.Tensor] = self.module.encode_image  # type: ignore[assignment]
        return self._in_chunks(
            batch, lambda part: encode(torch.from_numpy(normalise(part, self.pixels)), normalize=False)
        )

    def encode_texts(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Raw text embeddings: not projected, not of unit length.

        Args:
            ids: int64 [N, L], see `tokenizer`.

        Returns:
            float32 [N, D].
        """
        encode: Callable[..., torch.Tensor] = self.module.encode_text  # type: ignore[assignment]
        return self._in_chunks(ids, lambda part: encode(torch.from_numpy(part), normalize=False))

    def embed_images(self, batch: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Image embeddings of unit length, float64 [N, D], from uint8 [N, H, W, 3]."""
        return _unit(self.encode_images(batch))

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Text embeddings of unit length, float64 [N, D], from texts."""
        return _unit(self.encode_texts(self.tokenizer(list(texts))))

    def _in_chunks(self, rows: NDArray[Any], encode: Callable[[NDArray[Any]], torch.Tensor]) -> NDArray[np.float32]:
        if len(rows) == 0:
            return np.empty((0, self.embed_dim), dtype=np.float32)
        with torch.inference_mode():
            parts = [
                encode(np.ascontiguousarray(rows[start : start + _CHUNK])).float().numpy()
                for start in range(0, len(rows), _CHUNK)
            ]
        return np.concatenate(parts)


def load_checkpoint(
    model: str,
    checkpoint: str | Path | None = None,
    *,
    threads: int | None = None,
    allow_random: bool = False,
    seed: int = 0,
) -> Checkpoint:
    """Loads an open_clip model and its weights.

    Args:
        model: `reference` (bundled), an open_clip architecture's name (`ViT-B-32`), a folder in open_clip's layout, or
            `hf-hub:owner/name`.
        checkpoint: File with the weights. Needed with an architecture's name; overrides the file that lies in a folder.
        threads: Torch's threads for this process; None leaves them.
        allow_random: Take random weights where there is no checkpoint. They are for looking at structure and speed.
        seed: Of the random weights.

    Raises:
        CheckpointError: The model is unknown, its weights are missing, damaged, unsafe or another model's, or it is
            of a kind that this version does not export.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    declare_missing_ops()
    name, identifier, file = _locate(model)
    file = Path(checkpoint) if checkpoint is not None else file
    if file is None and not allow_random:
        raise CheckpointError(
            f"{model}: no weights; pass --checkpoint FILE, or --random-weights SEED to look at structure"
        )
    config = _config(identifier, name)
    text_cfg = config.get("text_cfg") or {}
    tokenizer = tokenizer_of(text_cfg, name)
    tensors = None if file is None else weights.read_state_dict(file)
    module = _build(identifier, name, seed)
    if tensors is None:
        sha256, source = weights.digest(module.state_dict()), f"random weights, seed {seed}"
    else:
        sha256, source = weights.digest(tensors), str(file.name if file else "")
        if module.logit_bias is not None and "logit_bias" not in tensors:
            tensors["logit_bias"] = torch.zeros_like(torch.as_tensor(module.logit_bias))
        weights.fit(tensors, module, str(file), name)
        if identifier == name:
            warn_of_quick_gelu(name, config)
    module = module.float().eval().requires_grad_(False)
    bias = module.logit_bias
    return Checkpoint(
        name=name,
        module=module,
        pixels=preprocessing_of(module, name, published=identifier == name),
        tokenizer=tokenizer,
        embed_dim=int(config["embed_dim"]),
        logit_scale=math.exp(float(torch.as_tensor(module.logit_scale).reshape(()))),
        logit_bias=None if bias is None else float(torch.as_tensor(bias).reshape(())),
        sha256=sha256,
        source=source,
    )


def _locate(model: str) -> tuple[str, str, Path | None]:
    """The name to show, what open_clip calls it, and the file with its weights if one belongs to it.

    Raises:
        CheckpointError: No such architecture or folder, or the hub cannot be reached.
    """
    from open_clip import list_models

    if model == REFERENCE:
        from invariclip.export.reference import checkpoint_path, config_path

        return REFERENCE, f"{_FOLDER}{Path(config_path()).parent}", Path(checkpoint_path())
    if model.startswith(_HUB):
        folder, file = _download(model.removeprefix(_HUB))
        return model, f"{_FOLDER}{folder}", file
    if model in list_models():
        return model, model, None
    folder = Path(model.removeprefix(_FOLDER))
    if folder.is_dir():
        return folder.resolve().name, f"{_FOLDER}{folder}", _weights_in(folder)
    near = difflib.get_close_matches(model, [REFERENCE, *list_models()], n=4, cutoff=0.5)
    hint = f"nearest names: {', '.join(near)}" if near else "for example ViT-B-32, or `reference`"
    raise CheckpointError(f"{model}: neither an open_clip architecture nor a folder; {hint}")


def _weights_in(folder: Path) -> Path | None:
    """The folder's weights: safetensors before others, open_clip's own names first (as open_clip chooses)."""
    names = sorted(path for path in folder.iterdir() if path.suffix in weights.CHECKPOINT_SUFFIXES)
    own = [path for path in names if path.stem.startswith("open_clip")] or names
    return min(own, key=lambda path: weights.CHECKPOINT_SUFFIXES.index(path.suffix), default=None)


def _download(hub_id: str) -> tuple[Path, Path]:
    from open_clip.pretrained import download_pretrained_from_hf

    try:
        config = Path(download_pretrained_from_hf(hub_id, filename=CONFIG_FILE))
        return config.parent, Path(download_pretrained_from_hf(hub_id))
    except Exception as error:  # whatever the hub's client, the network and the cache raise
        reason = str(error).split("\n", 1)[0]
        raise CheckpointError(
            f"{_HUB}{hub_id}: cannot be fetched from the Hugging Face hub ({reason}); offline, name a local folder"
        ) from error


def _config(identifier: str, name: str) -> dict[str, Any]:
    """The model part of an open_clip config: embed_dim, vision_cfg, text_cfg.

    Raises:
        CheckpointError: The config file is missing or not one.
    """
    from open_clip import get_model_config

    try:
        config = get_model_config(identifier)
    except FileNotFoundError as error:
        raise CheckpointError(f"{name}: the folder holds no {CONFIG_FILE}") from error
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise CheckpointError(f"{name}: its {CONFIG_FILE} is not readable as JSON ({error})") from error
    if not isinstance(config, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= set(config):
        raise CheckpointError(f"{name}: its {CONFIG_FILE} lacks embed_dim, vision_cfg or text_cfg")
    return config


def _build(identifier: str, name: str, seed: int) -> Any:
    """The model as open_clip builds it, with seeded random weights; the caller's random state stays as it was.

    Raises:
        CheckpointError: open_clip or timm cannot build what the config says.
    """
    from open_clip import create_model

    try:
        with _quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return create_model(
                identifier, load_weights=False, pretrained_image=False, pretrained_text=False, device="cpu"
            )
    except Exception as error:  # a config is data: whatever it breaks in open_clip or timm is the config's fault
        raise CheckpointError(f"{name}: open_clip cannot build it ({type(error).__name__}: {error})") from error


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = rows.astype(np.float64)
    return np.asarray(wide / np.linalg.norm(wide, axis=1, keepdims=True))


@contextmanager
def _quiet() -> Iterator[None]:
    """open_clip tells the root logger that weights are random; here that is either meant or about to change."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
