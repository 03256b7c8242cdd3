"""A config as a model: read, a Hugging Face text tower resolved to local files, built by open_clip."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from invariclip.errors import CheckpointError
from invariclip.export.checkpoints.json_file import read_object
from invariclip.export.checkpoints.quiet import quiet
from invariclip.export.checkpoints.random_weights import Unfilled, fill
from invariclip.export.checkpoints.shorten import shorten
from invariclip.export.checkpoints.sources import CONFIG_FILE

if TYPE_CHECKING:
    from invariclip.export.checkpoints.sources import CheckpointSource

TOWER_FILE = "config.json"
"""What describes a Hugging Face text tower, in the model's folder or in one below it with the tower's name."""
_MAX_CONFIG = 16 * 2**20


def read_config(source: CheckpointSource) -> dict[str, Any]:
    """The model part of an open_clip config: embed_dim, vision_cfg, text_cfg.

    Raises:
        CheckpointError: The config file is missing or not one.
    """
    from open_clip import get_model_config

    name = source.name
    try:
        config = get_model_config(source.identifier)
    except FileNotFoundError as error:
        raise CheckpointError(f"{name}: the folder holds no {CONFIG_FILE}") from error
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise CheckpointError(f"{name}: its {CONFIG_FILE} is not readable as JSON ({error})") from error
    if not isinstance(config, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= set(config):
        raise CheckpointError(f"{name}: its {CONFIG_FILE} lacks embed_dim, vision_cfg or text_cfg")
    return config


def text_tower(config: dict[str, Any], source: CheckpointSource) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The `text_cfg` with a Hugging Face tower's name resolved to a local folder, and that tower's own config.

    Args:
        config: As `read_config` gave it.
        source: Where the model lies.

    Returns:
        The `text_cfg` to build from, and the content of the tower's `config.json`, or None for open_clip's own towers.

    Raises:
        CheckpointError: The tower's files are missing, ask for code of their own, or `transformers` is not installed.
    """
    text_cfg: dict[str, Any] = dict(config.get("text_cfg") or {})
    wanted = text_cfg.get("hf_model_name")
    if not wanted:
        return text_cfg, None
    name = source.name
    candidates = [] if source.folder is None else [source.folder / str(wanted), source.folder]
    found = next((folder for folder in candidates if (folder / TOWER_FILE).is_file()), None)
    if found is None:
        where = f"was not found in {source.folder}" if source.folder is not None else "is not part of open_clip"
        raise CheckpointError(
            f"{name}: its text tower is {wanted}, whose {TOWER_FILE} {where}; pass as --model a folder with "
            f"{CONFIG_FILE}, the weights, and {wanted}'s {TOWER_FILE} and tokenizer.json"
        )
    tower = read_object(found / TOWER_FILE, "a model's config", most=_MAX_CONFIG)
    from open_clip.hf_configs import arch_dict
    from open_clip.hf_model import transformers

    if transformers is None:
        raise CheckpointError(f'{name}: its text tower ({wanted}) needs transformers: pip install "invariclip[hf]"')
    if "auto_map" in tower:
        raise CheckpointError(f"{found / TOWER_FILE}: refused, auto_map asks to run code that comes with the model")
    if tower.get("model_type") not in arch_dict:
        raise CheckpointError(
            f"{found / TOWER_FILE}: model_type {tower.get('model_type')!r} is not known to open_clip; available: "
            f"{', '.join(arch_dict)}"
        )
    return {**text_cfg, "hf_model_name": str(found), "hf_model_pretrained": False}, tower


def build(source: CheckpointSource, text_cfg: dict[str, Any], *, seed: int | None, short: bool = False) -> Any:
    """The model as open_clip builds it; the caller's random state stays as it was.

    Args:
        source: What to build.
        text_cfg: As `text_tower` gave it.
        seed: Of its random weights; None leaves the matrices unwritten, for weights that come from a file.
        short: Keep the first and last block of every stack alone; what goes is never written, and costs nothing.

    Raises:
        CheckpointError: open_clip or timm cannot build what the config says.
    """
    from open_clip import create_model

    changed = {"text_cfg": text_cfg} if text_cfg.get("hf_model_name") else {}
    try:
        with quiet(), torch.random.fork_rng(devices=[]), Unfilled():  # type: ignore[no-untyped-call]
            torch.manual_seed(seed or 0)
            module = create_model(
                source.identifier,
                load_weights=False,
                pretrained_image=False,
                pretrained_text=False,
                device="cpu",
                **changed,
            )
    except Exception as error:  # a config is data: whatever it breaks in open_clip or timm is the config's fault
        raise CheckpointError(f"{source.name}: open_clip cannot build it ({type(error).__name__}: {error})") from error
    if short:
        shorten(module)
    if seed is not None:
        fill(module, seed)
    return module
