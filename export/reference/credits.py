"""Who made the bundled images and the parts of the reference models, and under which licences they may be used."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from invariclip.export.reference.models import LEARNT_FILE, RECIPES

_HERE = Path(__file__).resolve().parent
LICENSES = _HERE / "LICENSES.md"
"""In the repository and the sdist; a wheel holds neither images nor weights, and not this page."""
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)|[`*<>]")


@dataclass(frozen=True)
class Credit:
    """Something that others made, or that was learnt from it.

    Attributes:
        what: What it is.
        licence: As it is stated; an SPDX identifier where there is one.
        authors: Whom to credit.
        source: Where it is from.
        fetched: It is fetched when it is first used, and not here.
    """

    what: str
    licence: str
    authors: str
    source: str
    fetched: bool = False


def credits_of_parts() -> list[Credit]:
    """Of the bundled images and learnt weights where they are installed, and of all that is fetched on demand."""
    parts = _images(LICENSES.read_text(encoding="utf-8")) if LICENSES.is_file() else []
    for recipe in RECIPES.values():
        if (recipe.folder / LEARNT_FILE).is_file():
            what = f"what was learnt of --model {recipe.name}"
            parts.append(Credit(what, "Apache-2.0", "invariclip", f"export/reference/{recipe.folder.name}"))
    packages = {package.name: package for recipe in RECIPES.values() for package in (recipe.image, recipe.text)}
    for package in packages.values():
        users = ", ".join(recipe.name for recipe in RECIPES.values() if package in (recipe.image, recipe.text))
        source = f"{package.client}: {package.name} {package.version}"
        parts.append(Credit(f"{package.taken} (--model {users})", package.licence, package.author, source, True))
    return parts


def _images(page: str) -> list[Credit]:
    """The rows of the page's table of images, if they are here: folder, licence, authors, source, taken from."""
    section = page.partition("\n## Images")[2].partition("\n## ")[0]
    rows = [line.strip().strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    parts = []
    for folder, licence, authors, source, taken in (map(_plain, row) for row in rows[2:]):
        if all((_HERE / "images" / name.strip().strip("/")).is_dir() for name in folder.split(",")):
            parts.append(Credit(f"images of {folder}", licence, authors, f"{source}, {taken}"))
    return parts


def _plain(cell: str) -> str:
    """A cell without its Markdown."""
    return _LINK.sub(lambda found: found[1] or "", cell).strip()
