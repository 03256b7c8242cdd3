"""What the form of the model was chosen by: photographs and cartoons of a package that nothing is learnt from.

GCompris, KDE's learning games, holds photographs of animals and things and cartoons that are named by their files. They
are read to choose by and to set the temperature, and are not passed on.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

RESOURCES = Path("usr/share/gcompris-qt/rcc")
_ANIMALS = ("erase", "explore_world_animals", "explore_farm_animals")
_THINGS = "categorization"
_THING_FOLDERS = ("/tools/", "/others/", "/fishes/", "windmill", "solar", "dam")
_CARTOONS = "lang"
_NOT_SHOWN_ALONE = frozenset(
    {
        *("animal", "back", "black", "blue", "brown", "bug", "color", "dad", "brother", "child", "eight", "eleven"),
        *("five", "four", "friend", "gray", "green", "one", "pink", "red", "seven", "six", "sixteen", "skin", "son"),
        *("ten", "three", "twelve", "two", "white", "yellow", "zero", "nine", "mauve", "orange-color", "neck", "knee"),
        *("leg", "mother", "sister", "reptile", "head", "hair", "grandmother", "man", "woman", "girl", "boy", "flies"),
    }
)
"""Colours, numbers, and parts and people that an arrow points at among others."""
_SPELT = {
    "dragon": "komodo dragon",
    "chamaeleon": "chameleon",
    "camels": "camel",
    "meerkats": "meerkat",
    "swans": "swan",
    "spoonbills": "spoonbill",
    "long nosed monkey": "proboscis monkey",
    "erasers": "eraser",
    "spoons": "spoon",
    "buffetset": "buffet",
    "weighing machine": "weighing scale",
    "nail cutter": "nail clipper",
    "plier": "pliers",
    "solar": "solar panel",
    "blackslate": "blackboard",
    "screw driver": "screwdriver",
    "bulb": "light bulb",
    "gosling": "duckling",
}
_IMAGES = (".webp", ".jpg", ".jpeg")
_MAX_ENTRY = 64 * 2**20


@dataclass(frozen=True)
class ValidationImage:
    """One image and what its file calls it; `kind` is `photograph` or `cartoon`."""

    path: Path
    name: str
    kind: str


def read_validation(package: Path, out: Path) -> list[ValidationImage]:
    """Unpacks the images that are named and shown alone.

    Args:
        package: The unpacked package.
        out: Where the images go.
    """
    found = []
    for archive in (*_ANIMALS, _THINGS, _CARTOONS):
        for inside, data in read_resources(package / RESOURCES / f"{archive}.rcc"):
            name = name_of(inside)
            if not inside.endswith(_IMAGES) or (archive == _CARTOONS and name in _NOT_SHOWN_ALONE):
                continue
            if archive == _THINGS and not any(part in inside for part in _THING_FOLDERS):
                continue
            path = out / archive / inside.replace("/", "__")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            found.append(ValidationImage(path, name, "cartoon" if archive == _CARTOONS else "photograph"))
    return sorted(found, key=lambda named: str(named.path))


def name_of(inside: str) -> str:
    """What a file is called by people.

    Example:
        >>> name_of("images/tools/screwDriver2.webp")
        'screwdriver'
    """
    stem = re.sub(r"\d+$", "", inside.rsplit("/", 1)[-1].rsplit(".", 1)[0])
    plain = re.sub(r"([a-z])([A-Z])", r"\1 \2", stem).replace("_", " ").lower()
    return _SPELT.get(plain, plain)


def read_resources(path: Path) -> Iterator[tuple[str, bytes]]:
    """The files of a Qt resource archive (rcc), with their paths inside.

    Raises:
        InputError: It cannot be read, or is damaged.
    """
    try:
        data = path.read_bytes()
        if data[:4] != b"qres":
            raise InputError(f"{path.name} is no Qt resource archive")
        version, tree, blobs, names = struct.unpack(">4I", data[4:20])
        yield from _walk(data, tree, blobs, names, 22 if version >= 2 else 14)
    except (OSError, struct.error, UnicodeDecodeError, zlib.error) as error:
        raise InputError(f"{path.name} cannot be read ({error}): fetch the package again") from error


def _walk(data: bytes, tree: int, blobs: int, names: int, node: int) -> Iterator[tuple[str, bytes]]:
    waiting = [(0, "")]
    seen = set()
    while waiting:
        number, prefix = waiting.pop()
        if number in seen:
            raise InputError("a Qt resource archive refers to itself")
        seen.add(number)
        place = tree + number * node
        name_at, flags = struct.unpack(">IH", data[place : place + 6])
        length = struct.unpack(">H", data[names + name_at : names + name_at + 2])[0]
        start = names + name_at + 6
        name = prefix + (data[start : start + 2 * length].decode("utf-16-be") if number else "")
        if flags & 2:
            count, first = struct.unpack(">II", data[place + 6 : place + 14])
            if count > len(data) // node:
                raise InputError("a Qt resource archive says that it holds more files than it has room for")
            waiting += [(first + k, f"{name}/" if name else "") for k in range(count)]
            continue
        at = blobs + struct.unpack(">I", data[place + 10 : place + 14])[0]
        size = struct.unpack(">I", data[at : at + 4])[0]
        content = data[at + 4 : at + 4 + size]
        yield name, zlib.decompressobj().decompress(content[4:], _MAX_ENTRY) if flags & 1 else content


def macro_accuracy(answers: Sequence[int] | NDArray[np.int64], labels: Sequence[int] | NDArray[np.int64]) -> float:
    """Percent right, every class counting the same.

    Example:
        >>> macro_accuracy([0, 0, 1], [0, 0, 2])
        50.0
    """
    truth = np.asarray(labels)
    right = np.asarray(answers) == truth
    return 100 * float(np.mean([right[truth == label].mean() for label in np.unique(truth)]))
