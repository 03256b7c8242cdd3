"""The reviewed list of real photographs: which file shows which concept."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources


@cache
def reviewed_photographs() -> dict[str, str]:
    """Hexcode by file, relative to the stamps' folder; one file a concept, looked at one by one."""
    text = resources.files(__package__).joinpath("photographs.json").read_text(encoding="utf-8")
    return {file: hexcode for hexcode, file in json.loads(text)["photographs"].items()}
