"""How a checkpoint wants its images, read from its config or from what was published with its architecture."""

from __future__ import annotations

import json
import warnings
from typing import Any

from invariclip.errors import ArtifactError, CheckpointError
from invariclip.preprocessing.pixels import PixelSpec

_KEYS = ("mean", "std", "interpolation", "resize_mode")


class CheckpointWarning(UserWarning):
    """A checkpoint may want something else than what was taken."""


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

    tags_by_settings: dict[str, list[str]] = {}
    for tag in list_pretrained_tags_by_model(name):
        settings = {
            key: value for key, value in get_pretrained_cfg(name, tag).items() if key in _KEYS and value is not None
        }
        tags_by_settings.setdefault(json.dumps(settings, sort_keys=True), []).append(tag)
    if len(tags_by_settings) == 1:
        settings = json.loads(next(iter(tags_by_settings)))
        return dict(settings)
    if tags_by_settings:
        tags = min(tags_by_settings.values(), key=len)
        warnings.warn(
            f"{name}: some published checkpoints ({', '.join(tags)}) want other preprocessing than OpenAI's, which is "
            "taken here; for one of them pass its tag as --checkpoint, or its folder as --model",
            CheckpointWarning,
            stacklevel=3,
        )
    return {}


def _twin(name: str, quick: bool) -> str:
    return name.removesuffix("-quickgelu") if quick else f"{name}-quickgelu"
