"""The five DomainBed sets by name: their folders, and what is missing from a copy.

Folder names are those that DomainBed's download leaves (Gulrajani and Lopez-Paz, arXiv 2007.01434; its
`domainbed/datasets.py` and `scripts/download.py`): `ROOT/<set>/<environment>/<class>/<file>`.

The class is the concept: nothing says that two files show one object, and equal file names in two environments are an
accident of numbering. Two images that share only their class also differ in pose, in the animal and in how many there
are, and a projection fitted on such pairs would remove all of that; `bench/studies/domains` measures what they do.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invariclip.calibrate.data.images import read_images
from invariclip.errors import InputError
from invariclip.files import path_kind

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from invariclip.calibrate.data.images import ImageRecord

_OFFICE_HOME = """
    Alarm_Clock Backpack Batteries Bed Bike Bottle Bucket Calculator Calendar Candles Chair Clipboards Computer Couch
    Curtains Desk_Lamp Drill Eraser Exit_Sign Fan File_Cabinet Flipflops Flowers Folder Fork Glasses Hammer Helmet
    Kettle Keyboard Knives Lamp_Shade Laptop Marker Monitor Mop Mouse Mug Notebook Oven Pan Paper_Clip Pen Pencil
    Postit_Notes Printer Push_Pin Radio Refrigerator Ruler Scissors Screwdriver Shelf Sink Sneakers Soda Speaker Spoon
    Table Telephone ToothBrush Toys Trash_Can TV Webcam
"""
_WORDS = {"Flipflops": "flip-flops", "Postit_Notes": "post-it notes", "ToothBrush": "toothbrush", "TV": "TV"}
"""Class folders whose words are not their name in lower case with spaces."""


@dataclass(frozen=True)
class Layout:
    """A set's folders.

    Attributes:
        name: What the set is called.
        folder: The folder that DomainBed keeps it in.
        environments: Folders of its environments, sorted.
        class_count: How many classes every environment has.
        classes: Their folders, sorted; empty where only the count is checked.
        spellings: Other names under which an environment's folder is met, by its name here.
    """

    name: str
    folder: str
    environments: tuple[str, ...]
    class_count: int
    classes: tuple[str, ...] = ()
    spellings: dict[str, str] = field(default_factory=dict)


def _layout(name: str, folder: str, environments: str, classes: str, **more: Any) -> Layout:
    names = tuple(sorted(classes.split()))
    return Layout(name, folder, tuple(environments.split("/")), len(names), names, **more)


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        _layout("PACS", "PACS", "art_painting/cartoon/photo/sketch", "dog elephant giraffe guitar horse house person"),
        _layout("VLCS", "VLCS", "Caltech101/LabelMe/SUN09/VOC2007", "bird car chair dog person"),
        _layout(
            "OfficeHome",
            "office_home",
            "Art/Clipart/Product/Real World",
            _OFFICE_HOME,
            spellings={"RealWorld": "Real World", "Real_World": "Real World"},
        ),
        _layout(
            "TerraIncognita",
            "terra_incognita",
            "location_100/location_38/location_43/location_46",
            "bird bobcat cat coyote dog empty opossum rabbit raccoon squirrel",
        ),
        Layout("DomainNet", "domain_net", ("clipart", "infograph", "painting", "quickdraw", "real", "sketch"), 345),
    )
}


def find_layout(name: str) -> Layout:
    """A layout by its name, in any case and with or without separators (`office_home`, `officehome`).

    Raises:
        InputError: The name is not known.
    """
    plain = _plain(name)
    for layout in LAYOUTS.values():
        if plain in (_plain(layout.name), _plain(layout.folder)):
            return layout
    raise InputError(f"no set is called {name!r}; available: {', '.join(LAYOUTS)}, or a folder environment/class/file")


def read_layout(layout: Layout, data: str | os.PathLike[str]) -> list[ImageRecord]:
    """The images of a set, after a check that nothing of it is missing.

    Args:
        layout: Which set.
        data: The set's own folder, in whatever name, or the folder that holds it under DomainBed's name.

    Returns:
        Images whose concept is their class, named in words, sorted by environment and path.

    Raises:
        InputError: An environment or a class is missing, or there is one too many; the message names them.
    """
    root = _root(layout, Path(data))
    # Copies differ in the case of a few class folders (`Toothbrush`); one class must not become two.
    spelt = {name.casefold(): name for name in layout.classes}
    images = []
    for image in read_images(root, pairs_by="class"):
        folder = image.path.relative_to(root).parts[1]
        concept = spelt.get(folder.casefold(), folder)
        environment = layout.spellings.get(image.environment, image.environment)
        images.append(replace(image, concept=concept, name=words(concept), environment=environment))
    _check(layout, root, images)
    return images


def words(folder: str) -> str:
    """A class folder's name in words: `Alarm_Clock` → `alarm clock`."""
    return _WORDS.get(folder, folder.replace("_", " ").lower())


def _root(layout: Layout, data: Path) -> Path:
    if path_kind(data) != "folder":
        raise InputError(f"{data}: no such folder; give the folder of {layout.name} or the one that holds it")
    known = {*layout.environments, *layout.spellings}
    for root in (data, data / layout.folder, data / layout.name, data / layout.name.lower()):
        if root.is_dir() and any((root / environment).is_dir() for environment in known):
            return root
    have = ", ".join(sorted(path.name for path in data.iterdir() if path.is_dir())) or "no folder"
    raise InputError(
        f"{data}: not {layout.name}, whose environments are {', '.join(layout.environments)}, "
        f"nor a folder with {layout.folder}/ in it; it has: {have}"
    )


def _check(layout: Layout, root: Path, images: Sequence[ImageRecord]) -> None:
    classes: dict[str, set[str]] = {environment: set() for environment in layout.environments}
    for image in images:
        classes.setdefault(image.environment, set()).add(image.concept)
    _same(f"{root}: environments of {layout.name}", set(layout.environments), {e for e, c in classes.items() if c})
    # Where a layout lists no classes, those of most environments are what the others are held against.
    expected = set(layout.classes)
    if not expected:
        counts = Counter(name for present in classes.values() for name in present)
        expected = {name for name, count in counts.items() if 2 * count > len(classes)}
        if len(expected) != layout.class_count:
            raise InputError(f"{root}: {layout.name} has {layout.class_count} classes, here are {len(expected)}")
    for environment, present in classes.items():
        _same(f"{root / environment}: classes of {layout.name}", expected, present)


def _same(what: str, expected: set[str], present: set[str]) -> None:
    missing, extra = sorted(expected - present), sorted(present - expected)
    if missing or extra:
        parts = [f"missing or empty {', '.join(missing)}"] if missing else []
        parts += [f"unknown {', '.join(extra)}"] if extra else []
        raise InputError(f"{what}: {'; '.join(parts)}; available: {', '.join(sorted(present)) or 'none'}")


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
