"""How a checkpoint wants its pictures, read from its config or from what was published with its architecture."""

from __future__ import annotations

import json
import warnings
from typing import Any

from invariclip.errors import ArtifactError, CheckpointError
from invariclip.pixels import PixelSpec


class CheckpointWarning(UserWarning):
    """A checkpoint may want something else than what was taken."""


def preprocessing_of(module: Any, name: str, *, published: bool) -> PixelSpec:
    """How pictures become the input, from the config's preprocessing.

    An architecture's name says nothing about it, and open_clip then takes OpenAI's mean and filter. For some families
    (MobileCLIP, PE-Core) that is wrong for every published checkpoint, so what all of those agree on comes first.

    Raises:
        CheckpointError: The config asks for something the runtime cannot do.
    """
    plain = dict(module.visual.preprocess_cfg)
    if published:
        plain.update(_published(name))
    size = plain["size"]
    try:
        return PixelSpec(
            image_size=(size, size) if isinstance(size, int) else (int(size[0]), int(size[1])),
            image_mean=tuple(map(float, plain["mean"])),  # type: ignore[arg-type]
            image_std=tuple(map(float, plain["std"])),  # type: ignore[arg-type]
            interpolation=plain["interpolation"],
            resize_mode=plain["resize_mode"],
            fill_color=int(plain["fill_color"]),
        )
    except (ArtifactError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{name}: its preprocessing is not supported ({error})") from error


def warn_of_quick_gelu(name: str, config: dict[str, Any]) -> None:
    """Warns where some of an architecture's published checkpoints have the other activation than its config.

    Weights do not tell GELU from QuickGELU: the wrong one loads, answers, and is worse without a sound.
    """
    from open_clip import get_pretrained_cfg, list_models, list_pretrained_tags_by_model

    quick = bool(config.get("quick_gelu"))
    tags = list_pretrained_tags_by_model(name)
    other = [tag for tag in tags if bool(get_pretrained_cfg(name, tag).get("quick_gelu")) != quick]
    twin = name.removesuffix("-quickgelu") if quick else f"{name}-quickgelu"
    if other and twin in list_models():
        kinds = ("GELU", "QuickGELU") if quick else ("QuickGELU", "GELU")
        warnings.warn(
            f"{name} computes {kinds[1]}, but its published checkpoints {', '.join(other)} were trained with "
            f"{kinds[0]}; for one of them pass --model {twin}",
            CheckpointWarning,
            stacklevel=3,
        )


def _published(name: str) -> dict[str, Any]:
    """Preprocessing that all published checkpoints of an architecture share; a warning if they differ."""
    from open_clip import get_pretrained_cfg, list_pretrained_tags_by_model

    keys = ("mean", "std", "interpolation", "resize_mode")
    found: dict[str, list[str]] = {}
    for tag in list_pretrained_tags_by_model(name):
        settings = {
            key: value for key, value in get_pretrained_cfg(name, tag).items() if key in keys and value is not None
        }
        found.setdefault(json.dumps(settings, sort_keys=True), []).append(tag)
    if len(found) == 1:
        settings = json.loads(next(iter(found)))
        return dict(settings)
    if found:
        tags = min(found.values(), key=len)
        warnings.warn(
            f"{name}: some published checkpoints ({', '.join(tags)}) want other preprocessing than OpenAI's, which is "
            "taken here; for one of them pass its folder with open_clip_config.json as --model",
            CheckpointWarning,
            stacklevel=4,
        )
    return {}
