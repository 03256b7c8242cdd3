"""What the runtime hands on to the other rooms, which may not be installed: they are named as strings."""

from __future__ import annotations

import importlib
from typing import Any

from invariclip.errors import MissingExtraError

FURTHER: dict[str, tuple[str, str]] = {
    # what a command of the runtime hands on to another room: (module:attribute, extra)
    "adapt -o NAME.icm": ("invariclip.export.site:bake_site", "export"),
    "licenses": ("invariclip.export.reference.credits:credits_of_parts", ""),
    "embed SHARD.tar": ("invariclip.calibrate.data.sources.webdataset:shard_images", ""),
    "embed --engine ray": ("invariclip.calibrate.data.stream.collection:embed_images", "ray"),
}


def other_room(what: str) -> Any:
    """What a command of the runtime hands on to another room, by its key in `FURTHER`.

    Raises:
        MissingExtraError: Its optional dependencies are not installed.
    """
    return imported(what, *FURTHER[what])


def imported(what: str, target: str, extra: str) -> Any:
    """Something of a module that is imported now.

    Args:
        what: The command that needs it, for the message.
        target: module:attribute.
        extra: What to install for it; "" for nothing.

    Raises:
        MissingExtraError: Its optional dependencies are not installed.
    """
    module, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if not extra or (error.name or "").startswith("invariclip"):
            raise
        raise MissingExtraError(f'`invariclip {what}` needs {error.name}: pip install "invariclip[{extra}]"') from error
