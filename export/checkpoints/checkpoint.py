"""Any open_clip model as one `Checkpoint`: module, pixels, tokenizer, temperature, digest.

This is where calibration, export and verification get the original encoder from. Loading never runs what a file holds
(see `weights`), and never falls back to random weights unless it was asked to. How a checkpoint wants its images is
read from its config, or from what was published with its architecture.
"""

from __future__ import annotations

import math
import operator
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from invariclip.console import Progress, silent
from invariclip.errors import ArtifactError, CheckpointError
from invariclip.export.checkpoints import hugging_face, weights
from invariclip.export.checkpoints.construct import build, read_config, text_tower
from invariclip.export.checkpoints.sources import (
    CONFIG_FILE,
    HUB,
    REFERENCE,
    download_tokenizer,
    locate,
    locate_tokenizer,
)
from invariclip.export.checkpoints.surgery import shared_copy, shorten
from invariclip.export.checkpoints.tokenizer import TOKENIZER_FILE, tokenizer_of
from invariclip.export.checkpoints.weights import CheckpointWarning
from invariclip.export.libraries import declare_missing_ops
from invariclip.preprocessing.pixels import PixelSpec, normalise

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.export.checkpoints.sources import CheckpointSource
    from invariclip.preprocessing.tokenizer import Tokenizer

_CHUNK = 32
"""Images or texts per forward pass of the reference encoder."""
SHORT = "first and last blocks only"
"""What a shortened checkpoint's `source` says."""
_MAX_LOGIT_SCALE = 80
_KEYS = ("mean", "std", "interpolation", "resize_mode")


__all__ = ["REFERENCE", "Checkpoint", "CheckpointWarning", "load_checkpoint"]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An open_clip model in float32, in evaluation mode, with everything that its images and texts need.

    Attributes:
        name: `reference`, the architecture's name, the folder's name, or the hub id.
        module: The open_clip model. Never changed: it is the reference of every parity figure.
        pixels: How images become its input.
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
    tokenizer: str | Path | None = None,
    threads: int | None = None,
    allow_random: bool = False,
    seed: int = 0,
    short: bool = False,
    progress: Progress = silent,
) -> Checkpoint:
    """Loads an open_clip model and its weights.

    Args:
        model: `reference` (bundled), an open_clip architecture's name (`ViT-B-32`), a folder in open_clip's layout or
            in transformers' (CLIPModel, SiglipModel), or `hf-hub:owner/name`.
        checkpoint: File with the weights. Needed with an architecture's name, where it may also be one of open_clip's
            tags; overrides the file that lies in a folder.
        tokenizer: A `tokenizer.json`, its folder or `hf-hub:owner/name`, for models with another vocabulary than
            open_clip's own; overrides the file that lies in the model's folder.
        threads: Torch's threads for this process; None leaves them.
        allow_random: Take random weights where there is no checkpoint. They are for looking at structure and speed.
        seed: Of the random weights.
        progress: Progress display of what is fetched for a reference model.
        short: Leave out the middle of every stack of blocks (see `shorten`); with random weights only.

    Raises:
        CheckpointError: The model is unknown, its weights or its tokenizer are missing, damaged, unsafe or another
            model's, or it is of a kind that this version does not export.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    declare_missing_ops()
    source = locate(model, checkpoint, progress=progress)
    name, file = source.name, source.file
    if file is None and not allow_random:
        raise CheckpointError(
            f"{model}: no weights; pass --checkpoint FILE, or --random-weights SEED to look at structure"
        )
    if file is not None and short:
        raise CheckpointError(
            f"{model}: only random weights can be shortened before they are drawn; {file} has its own"
        )
    theirs = _in_transformers_layout(source)
    config = read_config(source, theirs)
    if source.tag:
        require_activation(name, config, source.tag)
    text_cfg, tower = text_tower(config, source)
    reads = _tokenizer(config["text_cfg"] or {}, source, tokenizer, tower)
    notes: list[str] = []
    tensors = None if file is None else weights.read_state_dict(file, notes)
    sizes = None if tensors is None else [tensor.numel() for tensor in tensors.values()]
    module = build(source, text_cfg, seed=seed if tensors is None else None, sizes=sizes, short=short, theirs=theirs)
    if tensors is None:
        sha256, words = (
            weights.digest(module.state_dict()),
            f"random weights, seed {seed}{f', {SHORT}' if short else ''}",
        )
    else:
        sha256, words = weights.digest(tensors), ", ".join([str(file.name if file else ""), *notes])
        _fit(tensors, module, str(file), name)
        if source.folder is None and not source.tag:
            warn_of_quick_gelu(name, config)
    module = module.float().eval().requires_grad_(False)
    bias = module.logit_bias
    return Checkpoint(
        name=name,
        module=module,
        pixels=preprocessing_of(module, name, source.tag or (published(name) if source.folder is None else {})),
        tokenizer=reads,
        embed_dim=int(config["embed_dim"]),
        logit_scale=_temperature(float(torch.as_tensor(module.logit_scale).reshape(())), name),
        logit_bias=None if bias is None else float(torch.as_tensor(bias).reshape(())),
        sha256=sha256,
        source=words,
    )


def _in_transformers_layout(source: CheckpointSource) -> hugging_face.Config | None:
    """The config of a folder in transformers' layout; open_clip's own counts where both are there."""
    if source.folder is None or (source.folder / CONFIG_FILE).is_file():
        return None
    return hugging_face.read(source.folder)


def _fit(tensors: dict[str, torch.Tensor], module: Any, where: str, name: str) -> None:
    """`weights.fit`, with 0 for a bias of the logits that the file does not hold, and a warning."""
    if module.logit_bias is not None and "logit_bias" not in tensors:
        warnings.warn(
            f"{name}: {where} holds no logit_bias; 0 is taken, as open_clip does, and probabilities mean nothing",
            CheckpointWarning,
            stacklevel=3,
        )
        tensors["logit_bias"] = torch.zeros_like(torch.as_tensor(module.logit_bias))
    weights.fit(tensors, module, where, name)


def _temperature(logit_scale: float, name: str) -> float:
    """What multiplies cosines, exponentiated.

    Raises:
        CheckpointError: It is no number that float32 can hold.
    """
    if not abs(logit_scale) < _MAX_LOGIT_SCALE:
        raise CheckpointError(f"{name}: its logit_scale is {logit_scale:g}; exponentiated it is no usable temperature")
    return math.exp(logit_scale)


def _tokenizer(
    text_cfg: dict[str, Any], source: CheckpointSource, given: str | Path | None, tower: dict[str, Any] | None
) -> Tokenizer:
    """The tokenizer that was given, else the model's own; a model from the hub may take its tokenizer from there."""
    path = None if given is None else locate_tokenizer(given)
    wanted = text_cfg.get("hf_tokenizer_name")
    own = None if source.folder is None else source.folder / TOKENIZER_FILE
    if path is None and wanted and source.name.startswith(HUB) and not (own is not None and own.is_file()):
        path = download_tokenizer(str(wanted))
    return tokenizer_of(text_cfg, source.name, given=path, folder=source.folder, tower=tower)


def shortened(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint whose transformers and stages keep their first and last block; it shares the original's weights.

    Args:
        checkpoint: Left as it was.

    Returns:
        A runnable checkpoint with a digest of its own; its `source` says that it is shortened.
    """
    module = shared_copy(checkpoint.module)
    shorten(module)
    return replace(
        checkpoint,
        module=module,
        sha256=weights.digest(module.state_dict()),
        source=f"{checkpoint.source}, {SHORT}",
    )


def preprocessing_of(module: Any, name: str, settings: dict[str, Any]) -> PixelSpec:
    """How images become the input, from the config's preprocessing.

    Args:
        module: The open_clip model.
        name: What to call it in an error.
        settings: What counts instead of the config's, see `published`.

    Raises:
        CheckpointError: The config asks for something the runtime cannot do.
    """
    plain = {**module.visual.preprocess_cfg, **{key: value for key, value in settings.items() if key in _KEYS}}
    size = plain["size"]
    try:
        return PixelSpec(
            image_size=(size, size) if isinstance(size, int) else (size[0], size[1]),
            image_mean=tuple(map(float, plain["mean"])),  # type: ignore[arg-type]
            image_std=tuple(map(float, plain["std"])),  # type: ignore[arg-type]
            interpolation=plain["interpolation"],
            resize_mode=plain["resize_mode"],
            fill_color=operator.index(plain["fill_color"]),
        )
    except (ArtifactError, KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{name}: its preprocessing is not supported ({error})") from error


def warn_of_quick_gelu(name: str, config: dict[str, Any]) -> None:
    """Warns where some of an architecture's published checkpoints have the other activation than its config.

    Weights do not tell GELU from QuickGELU: the wrong one loads, answers, and is worse without a sound.
    """
    from open_clip import get_pretrained_cfg, list_models, list_pretrained_tags_by_model

    quick = bool(config.get("quick_gelu"))
    tags = list_pretrained_tags_by_model(name)
    other = [tag for tag in tags if bool(get_pretrained_cfg(name, tag).get("quick_gelu")) != quick]
    twin = _twin(name, quick)
    if other and twin in list_models():
        kinds = ("GELU", "QuickGELU") if quick else ("QuickGELU", "GELU")
        warnings.warn(
            f"{name} computes {kinds[1]}, but its published checkpoints {', '.join(other)} were trained with "
            f"{kinds[0]}; for one of them pass --model {twin}",
            CheckpointWarning,
            stacklevel=3,
        )


def require_activation(name: str, config: dict[str, Any], settings: dict[str, Any]) -> None:
    """Refuses published weights that were trained with another activation than the architecture computes.

    Args:
        name: The architecture.
        config: Its config.
        settings: What was published with the weights.

    Raises:
        CheckpointError: They were; the message names the architecture to ask for.
    """
    from open_clip import list_models

    quick, trained = bool(config.get("quick_gelu")), bool(settings.get("quick_gelu"))
    twin = _twin(name, quick)
    # without a twin, the architecture's own config is all that was published
    if quick != trained and twin != name and twin in list_models():
        kinds = ("QuickGELU", "GELU") if quick else ("GELU", "QuickGELU")
        raise CheckpointError(
            f"{name} computes {kinds[0]}, but these weights were trained with {kinds[1]}; pass --model {twin}"
        )


def published(name: str) -> dict[str, Any]:
    """Preprocessing that all published checkpoints of an architecture share; a warning, and nothing, if they differ.

    An architecture's name says nothing about it, and open_clip then takes OpenAI's mean and filter. For some families
    (MobileCLIP, PE-Core) that is wrong for every published checkpoint.
    """
    from open_clip import get_pretrained_cfg, list_pretrained_tags_by_model
    from open_clip.transform import PreprocessCfg

    usual = {key: getattr(PreprocessCfg(), key) for key in _KEYS}
    settings = {
        tag: {key: get_pretrained_cfg(name, tag).get(key) or usual[key] for key in _KEYS}
        for tag in list_pretrained_tags_by_model(name)
    }
    kinds = {tuple(map(str, one.values())): one for one in settings.values()}
    if len(kinds) == 1:
        return next(iter(kinds.values()))
    other = [tag for tag, one in settings.items() if tuple(map(str, one.values())) != tuple(map(str, usual.values()))]
    if other:
        warnings.warn(
            f"{name}: some published checkpoints ({', '.join(other)}) want other preprocessing than OpenAI's, which is "
            "taken here; for one of them pass its tag as --checkpoint, or its folder as --model",
            CheckpointWarning,
            stacklevel=3,
        )
    return {}


def _twin(name: str, quick: bool) -> str:
    return name.removesuffix("-quickgelu") if quick else f"{name}-quickgelu"
