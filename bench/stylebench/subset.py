"""The small part of the picture set that is committed: what the demo and the tests use without any download.

Concepts were chosen by hand from the list of names, for being plain words spread over the groups, before any model had
answered on them. Half of them the reference encoder learns; a quarter is for projections, a quarter for tests.
"""

from __future__ import annotations

import dataclasses
import shutil
from typing import TYPE_CHECKING

from PIL import Image

from invariclip.bench.stylebench.build import MANIFEST
from invariclip.bench.stylebench.manifest import Picture, read_manifest, write_manifest
from invariclip.console import Progress, silent
from invariclip.errors import InputError
from invariclip.files import sha256_file

if TYPE_CHECKING:
    from pathlib import Path

NAMES: dict[str, tuple[str, ...]] = {
    "train": (
        *("lion", "dog", "horse", "penguin", "owl", "frog", "butterfly", "whale", "crab", "sunflower", "mushroom"),
        *("grapes", "banana", "pineapple", "carrot", "hamburger", "doughnut", "trophy", "balloon", "basketball"),
        *("bicycle", "bus", "airplane", "rocket", "castle", "volcano"),
        *("trumpet", "key", "scissors", "bell", "crown", "glasses"),
    ),
    "calibrate": (
        *("koala", "turkey", "ram", "dove", "honey pot", "skis", "umbrella", "mountain", "thermometer"),
        *("guitar", "violin", "saxophone", "laptop", "candle", "hammer", "envelope"),
    ),
    "test": (
        *("elephant", "snake", "octopus", "scorpion", "bat", "rose", "cactus", "strawberry", "potato", "pizza"),
        *("lollipop", "soccer ball", "locomotive", "camera", "television", "backpack"),
    ),
}
"""Names by concept split."""

STYLES = (
    "noto",
    "twemoji",
    "fluent-flat",
    "fluent-3d",
    "emojione",
    "openmoji",
    "openmoji-black",
    "fluent-high-contrast",
)
"""Every style but the photographs, whose licence (GPL-2.0) does not suit a bundled file."""

LOSSY = {"fluent-3d": 90}
"""WebP quality of the style whose shading would take most of the space if it were kept without loss."""

MANIFEST_FILE = "pictures.jsonl"


def write_subset(data: Path, out: Path, progress: Progress = silent) -> list[Picture]:
    """Copies the committed subset out of a built set.

    Args:
        data: Folder of the built picture set.
        out: Folder to write `pictures/<style>/<hexcode>.webp` and `pictures.jsonl` into.
        progress: Progress display.

    Returns:
        The subset's manifest.

    Raises:
        InputError: A concept is missing or lies in another split than `NAMES` says.
    """
    wanted = {name: split for split, names in NAMES.items() for name in names}
    chosen = [p for p in read_manifest(data / MANIFEST) if p.name in wanted and p.style in STYLES]
    if len(chosen) != len(wanted) * len(STYLES):
        raise InputError(f"{data / MANIFEST} holds {len(chosen)} of {len(wanted) * len(STYLES)} pictures of the subset")
    moved = sorted({p.name for p in chosen if p.concept_split != wanted[p.name]})
    if moved:
        raise InputError(f"the subset lists {', '.join(moved)} under another split than the picture set")
    pictures = [_copy(data, out, picture) for picture in progress(chosen, total=len(chosen), desc="subset")]
    write_manifest(out / MANIFEST_FILE, pictures)
    return pictures


def _copy(data: Path, out: Path, picture: Picture) -> Picture:
    target = out / picture.file
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(target.name + ".part")
    if picture.style in LOSSY:
        with Image.open(data / picture.file) as opened:
            opened.save(beside, format="WEBP", quality=LOSSY[picture.style], method=6)
    else:
        shutil.copyfile(data / picture.file, beside)
    beside.replace(target)
    return dataclasses.replace(picture, sha256=sha256_file(target))
