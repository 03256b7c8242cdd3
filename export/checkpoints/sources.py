"""Where a model comes from: bundled, an architecture's name, a folder or the hub; and the file of its weights."""

from __future__ import annotations

import difflib
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from invariclip.console import Progress, silent
from invariclip.errors import CheckpointError
from invariclip.export.checkpoints import weights
from invariclip.export.libraries import declare_missing_ops
from invariclip.export.reference.models import RECIPES, assembled

REFERENCE = "reference"
CONFIG_FILE = "open_clip_config.json"
HUB, FOLDER = "hf-hub:", "local-dir:"
_STEMS = ("open_clip", "model", "pytorch_model")
_TRANSFORMERS_FILES = (
    "config.json", "*processor_config.json", "tokenizer*.json", "special_tokens_map.json", "*.safetensors",
    "*.safetensors.index.json",
)  # fmt: skip
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class CheckpointSource:
    """A model before it is loaded.

    Attributes:
        name: `reference`, the architecture's name, the folder's name, or the hub id.
        identifier: What open_clip calls it: an architecture's name, or `local-dir:` and a folder.
        folder: Where its files lie, or None for an architecture.
        file: Its weights, or None.
        tag: What was published with the weights, where they were named by open_clip's tag; else empty.
    """

    name: str
    identifier: str
    folder: Path | None = None
    file: Path | None = None
    tag: dict[str, Any] = field(default_factory=dict)


def locate(model: str, checkpoint: str | Path | None = None, *, progress: Progress = silent) -> CheckpointSource:
    """Finds a model's files.

    Args:
        model: A reference model (`RECIPES`), an open_clip architecture, a folder in its layout or in transformers', or
            `hf-hub:owner/name`.
        checkpoint: File with the weights instead of the model's own; with an architecture's name also one of
            open_clip's tags (`laion2b_s34b_b79k`), whose file is downloaded.
        progress: Progress display of what is fetched for a reference model.

    Raises:
        CheckpointError: No such architecture or folder, or the hub cannot be reached.
        InputError: A part of a reference model cannot be fetched.
    """
    from open_clip import list_models

    own = None if checkpoint is None else Path(checkpoint)
    if model in RECIPES:
        folder = assembled(model, progress=progress)
        return CheckpointSource(model, f"{FOLDER}{folder}", folder, own or _weights_in(folder))
    if model.startswith(HUB):
        folder, file = _download_model(model.removeprefix(HUB))
        return CheckpointSource(model, f"{FOLDER}{folder}", folder, own or file)
    if model in list_models():
        known = None if own is None or own.exists() else _published(model, str(own))
        return known or CheckpointSource(model, model, None, own)
    folder = Path(model.removeprefix(FOLDER))
    if folder.is_dir():
        return CheckpointSource(folder.resolve().name, f"{FOLDER}{folder}", folder, own or _weights_in(folder))
    near = difflib.get_close_matches(model, [*RECIPES, *list_models()], n=4, cutoff=0.5)
    hint = f"nearest names: {', '.join(near)}" if near else "for example ViT-B-32, or `reference`"
    raise CheckpointError(f"{model}: neither an open_clip architecture nor a folder; {hint}")


def comes_along(name: str) -> bool:
    """Whether a model's name means the same everywhere and nothing is fetched for it: a reference, or an architecture.

    A file may be followed to such a name; any other has to come from the user.
    """
    declare_missing_ops()
    from open_clip import list_models

    return name in RECIPES or name in list_models()


def locate_tokenizer(name: str | Path) -> Path:
    """A `tokenizer.json` or its folder; `hf-hub:owner/name` is downloaded, with the settings beside it.

    Raises:
        CheckpointError: There is no such file or folder, or the hub cannot be reached.
    """
    if str(name).startswith(HUB):
        return download_tokenizer(str(name).removeprefix(HUB))
    path = Path(name)
    if not path.exists():
        raise CheckpointError(f"{path}: no such tokenizer; give a folder with {_TOKENIZER_FILES[0]}, or that file")
    return path


def download_tokenizer(hub_id: str) -> Path:
    """Fetches a tokenizer's files from the hub, or from its cache; returns their folder.

    Raises:
        CheckpointError: The hub cannot be reached, or has no such tokenizer.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    file = _fetch(hub_id, lambda: hf_hub_download(hub_id, _TOKENIZER_FILES[0]))
    for name in _TOKENIZER_FILES[1:]:
        try:
            hf_hub_download(hub_id, name)
        except EntryNotFoundError:  # optional, and the hub says that there is none
            continue
        except Exception as error:  # whatever the hub's client, the network and the cache raise
            raise _unreachable(hub_id, error) from error
    return file.parent


def _weights_in(folder: Path) -> Path | None:
    """The folder's weights: safetensors before others, open_clip's own names first (as open_clip chooses).

    Then transformers' names: its trainer leaves `training_args.bin` and `optimizer.pt` beside the weights.
    """
    names = sorted(path for path in folder.iterdir() if path.suffix in weights.CHECKPOINT_SUFFIXES)
    own = next((found for stem in _STEMS if (found := [path for path in names if path.stem.startswith(stem)])), names)
    file = min(own, key=lambda path: weights.CHECKPOINT_SUFFIXES.index(path.suffix), default=None)
    indices = [path for suffix in weights.INDEX_SUFFIXES for path in sorted(folder.glob(f"*{suffix}"))]
    if not indices or (file is not None and "-of-" not in file.stem):
        return file
    return next((path for path in indices if path.name.startswith("open_clip")), indices[0])


def _published(name: str, tag: str) -> CheckpointSource | None:
    """The weights that open_clip knows by a tag, downloaded; None for what looks like a file.

    Raises:
        CheckpointError: No such tag, or it cannot be fetched.
    """
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model

    settings = get_pretrained_cfg(name, tag)
    if not settings:
        if Path(tag).suffix or len(Path(tag).parts) > 1:
            return None
        tags = ", ".join(list_pretrained_tags_by_model(name)) or "none"
        raise CheckpointError(f"{tag}: neither a file nor one of the tags of {name}; available: {tags}")
    try:
        return CheckpointSource(name, name, None, Path(download_pretrained(settings)), dict(settings))
    except Exception as error:  # whatever the hub's client, the network and the cache raise
        reason = str(error).split("\n", 1)[0]
        raise CheckpointError(
            f"{name}: the weights {tag} cannot be fetched ({reason}); offline, name a file with --checkpoint"
        ) from error


def _download_model(hub_id: str) -> tuple[Path, Path | None]:
    """A model's folder and weights, from the hub or its cache; in transformers' layout where it has no other."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    from open_clip.pretrained import download_pretrained_from_hf

    try:
        config = _fetch(hub_id, lambda: download_pretrained_from_hf(hub_id, filename=CONFIG_FILE))
    except CheckpointError as error:
        cause = error.__cause__
        # open_clip raises its own error while it handles the hub's
        reason = cause.__context__ if isinstance(cause, FileNotFoundError) else cause
        if not isinstance(reason, EntryNotFoundError) or isinstance(reason, LocalEntryNotFoundError):
            raise
        folder = _fetch(hub_id, lambda: snapshot_download(hub_id, allow_patterns=list(_TRANSFORMERS_FILES)))
        return folder, _weights_in(folder)
    return config.parent, _fetch(hub_id, lambda: download_pretrained_from_hf(hub_id))


def _fetch(hub_id: str, download: Any) -> Path:
    # its client logs each attempt; what it comes to is said once, below
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return Path(download())
    except Exception as error:  # whatever the hub's client, the network and the cache raise
        raise _unreachable(hub_id, error) from error
    finally:
        logger.setLevel(level)


def _unreachable(hub_id: str, error: Exception) -> CheckpointError:
    reason = str(error).split("\n", 1)[0]
    return CheckpointError(
        f"{HUB}{hub_id}: cannot be fetched from the Hugging Face hub ({reason}); offline, name a local folder"
    )
