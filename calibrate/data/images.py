"""Images to calibrate on, from a manifest (JSONL, CSV) or folders `environment/class/file`.

In folders, equal file names in two environments may mean one object, or two images that were numbered alike.
`house/pic_001.jpg` of two sets is two houses: both sets count from one. `noto/1f415.webp` and `twemoji/1f415.webp` are
one dog. A numbering can be recognised (digits alone, or a prefix that many files share and a counter); whether objects
or files were numbered cannot be told from one name. From many it sometimes can: numbers of objects, given once for all
classes, belong to one class each, lie scattered in it, and are the same in all environments. Numbers of files begin
anew in every class, or run on: then as many coincide with the number one place further on.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from invariclip.calibrate.data.records import read_records
from invariclip.errors import InputError
from invariclip.files import path_kind
from invariclip.preprocessing.find import find_images

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence

    Stems: TypeAlias = Mapping[str, set[str]]

PairsBy: TypeAlias = Literal["auto", "name", "class"]
"""What makes images of a folder one concept: see `read_images`."""
PAIRS_BY: tuple[PairsBy, ...] = get_args(PairsBy)

CHANCE = 1e-6
"""Numbers coincide by design where chance alone would do it less often than this."""
_SHIFTS = (-3, -2, -1, 1, 2, 3)
_COUNTED = 3
"""Numbers behind a prefix from which it is a counter's, unless the prefix is one of `_OF_FILES`."""
_OF_FILES = frozenset(
    [
        "", "c", "d", "dsc", "dscf", "dscn", "f", "file", "frame", "im", "image", "img", "p", "photo", "pic",
        "image", "s", "sample", "scan", "screenshot", "untitled", "x",
    ]
)  # fmt: skip
"""Prefixes, without separators, that are of a file and not of what it shows."""
_NUMBERED = re.compile(r"(.*?)(\d+)\)?")
_HEXADECIMAL = re.compile(r"(?=.*\d)(?=.*[a-f])[0-9a-f]{4,}(-[0-9a-f]+)*", re.IGNORECASE)
ALIASES: dict[str, tuple[str, ...]] = {
    "path": ("path", "file", "filename", "image"),
    "environment": ("environment", "style", "domain", "env"),
    "concept": ("concept", "id"),
    "name": ("name", "class", "label"),
    "split": ("split",),
}
"""The columns of a manifest and what else each may be called; the first that is there counts."""


@dataclass(frozen=True)
class FileNames:
    """What the names of a folder's files stand for.

    Attributes:
        by_name: Classes whose file names are objects.
        coincidental: Classes whose file names coincide like numbers of files.
        unsure: Classes of `by_name` whose names count, and all environments have the same ones.
    """

    by_name: frozenset[str]
    coincidental: frozenset[str] = frozenset()
    unsure: frozenset[str] = frozenset()


def judge(stems: Mapping[str, Stems]) -> FileNames:
    """What file names stand for, class by class.

    Names are objects only where most of a class's stand in several environments. Of those that look like a numbering:

    - Where all of them together coincide more often than numberings of files do (`by_design`), they are objects.
    - Where the prefix names the class (`cat-17`) and every environment has the same ones, they are taken for objects,
      and the class is `unsure`.
    - Otherwise they are numbers of files, `coincidental`.

    Args:
        stems: Class → file name without ending → environments that have it.
    """
    shared = {
        label: [stem for stem, environments in each.items() if len(environments) > 1] for label, each in stems.items()
    }
    named = {label for label, each in stems.items() if 2 * len(shared[label]) >= len(each)}
    every = [stem for label in named for stem in shared[label]]
    digits = sum(stem.isdigit() for stem in every)
    # Code points such as 2601 stand among others such as 1f415; they count nothing.
    hexadecimal = 0 < digits <= sum(_HEXADECIMAL.fullmatch(stem) is not None for stem in every)
    numbered = {label for label in named if 2 * len(_counters(shared[label], hexadecimal)) > len(shared[label])}
    if not numbered or by_design({label: stems[label] for label in numbered}):
        return FileNames(frozenset(named))
    unsure = {label for label in numbered if _complete(stems[label]) and _names_class(label, shared[label])}
    return FileNames(frozenset(named - numbered | unsure), frozenset(numbered - unsure), frozenset(unsure))


def by_design(stems: Mapping[str, Stems]) -> bool:
    """Whether every number is of one class, and they coincide far more often than with numbers a few places further on.

    Of every class the two fullest environments are compared. Places are counted among the numbers that any image of
    the folder has behind that prefix: a set that was thinned by number, everywhere alike, has no gaps then. A set that
    was thinned by class and number, everywhere alike, has; but there one number is of several classes.

    Args:
        stems: As for `judge`, of classes whose names are numberings.
    """
    pool: dict[str, set[int]] = defaultdict(set)
    for each in stems.values():
        own_numbers = {parts for stem in each if (parts := _split(stem)) is not None}
        if any(number in pool[prefix] for prefix, number in own_numbers):
            return False
        for prefix, number in own_numbers:
            pool[prefix].add(number)
    place = {prefix: {number: rank for rank, number in enumerate(sorted(all_))} for prefix, all_ in pool.items()}
    own, shifted = 0, Counter[int]()
    for each in stems.values():
        counts = Counter(environment for environments in each.values() for environment in environments)
        numbers = [
            {
                (parts[0], place[parts[0]][parts[1]])
                for stem, environments in each.items()
                if environment in environments and (parts := _split(stem)) is not None
            }
            for environment in sorted(counts, key=lambda name: (-counts[name], name))[:2]
        ]
        one, other = numbers if len(numbers) > 1 else (set(), set())
        own += len(one & other)
        for shift in _SHIFTS:
            shifted[shift] += len({(prefix, rank + shift) for prefix, rank in one} & other)
    return _tail(own, own + max(shifted.values(), default=0)) < CHANCE


def coinciding(stems: Mapping[str, Stems], labels: Iterable[str]) -> list[str]:
    """Every pair of equal names in two environments of some classes, in words."""
    return [
        f"{label}/{stem} in {one} and {other}"
        for label in sorted(labels)
        for stem, environments in sorted(stems[label].items())
        for one, other in combinations(sorted(environments), 2)
    ]


def _tail(own: int, count: int) -> float:
    """The chance that of so many fair coins `own` or more fall on one side."""
    return float(sum(math.comb(count, k) for k in range(own, count + 1)) / 2**count)


def _split(stem: str) -> tuple[str, int] | None:
    """Prefix and number of a name that ends in a number: `pic_001`, `IMG0042`, `00017`, `dog (3)`; not of `1f415`."""
    match = _NUMBERED.fullmatch(stem)
    if match is None or len(match[2]) > 18:  # no counter; and digits past that are a digest's
        return None
    prefix = match[1]
    if any(letter.isdigit() for letter in prefix) and prefix[-1].isalnum():
        return None
    return prefix, int(match[2])


def _counters(stems: Iterable[str], hexadecimal: bool) -> list[str]:
    """The names that look like a numbering."""
    by_prefix: dict[str, list[str]] = defaultdict(list)
    for stem in stems:
        parts = _split(stem)
        if parts is not None and not (hexadecimal and not parts[0]):
            by_prefix[parts[0]].append(stem)
    return [
        stem
        for prefix, each in by_prefix.items()
        if _plain(prefix) in _OF_FILES or len(each) >= _COUNTED
        for stem in each
    ]


def _complete(stems: Stems) -> bool:
    """Whether every environment that has the class has all of its names."""
    have = set().union(*stems.values())
    return all(environments == have for environments in stems.values())


def _names_class(label: str, stems: Iterable[str]) -> bool:
    prefixes = {_plain(parts[0]) for stem in stems if (parts := _split(stem)) is not None}
    return prefixes == {_plain(label)}


def _plain(text: str) -> str:
    return "".join(letter for letter in text.casefold() if letter.isalnum())


class SkippedImageWarning(UserWarning):
    """An image was left out; what is measured does not contain it."""


class CoincidingNamesWarning(UserWarning):
    """File names coincide in two environments, and it cannot be told whether they mean one object."""


@dataclass(frozen=True)
class ImageRecord:
    """One image.

    Attributes:
        path: The file.
        concept: What it shows, as an identifier: two images of one concept in two environments are a pair.
        name: The class in words, for zero-shot prompts; the concept where the manifest names no class.
        environment: Style, domain or setting.
        split: The manifest's split, or None where it has no such column.
    """

    path: Path
    concept: str
    name: str
    environment: str
    split: str | None = None


def read_images(
    source: str | os.PathLike[str], *, allow_outside: bool = False, pairs_by: PairsBy = "auto"
) -> list[ImageRecord]:
    """Reads a manifest or a folder.

    A manifest is JSONL (one object a line) or CSV (with a header); `ALIASES` says what its columns may be called.
    `path` and `environment` are needed, and one of `concept` and `name`. Paths are relative to the manifest.

    A folder is `environment/class/file`. Where most of a class's file names stand in several environments and are not
    numbers of files (see `judge`), the name is the concept (the same object, seen twice); otherwise the class is.
    Names that look like a numbering are warned about, unless they coincide by design or `pairs_by` is given.

    Args:
        source: The manifest or the folder.
        allow_outside: Accept absolute paths and paths that leave the manifest's folder.
        pairs_by: What makes images of a folder one concept: the file name with the class, in every class; the class;
            or `auto`, as above. A manifest names its concepts itself.

    Returns:
        The images in the manifest's order, or sorted by path; files are not opened.

    Raises:
        InputError: Missing, empty, without a needed column, not parseable, with a path that leaves the folder, or
            `pairs_by` is unknown or given for a manifest.
    """
    if pairs_by not in PAIRS_BY:
        raise InputError(f"pairs cannot be made by {pairs_by!r}; available: {', '.join(PAIRS_BY)}")
    where = Path(source)
    what = path_kind(where)
    if what == "folder":
        return _read_folder(where, pairs_by)
    if what != "file":
        raise InputError(f"{where}: no such file or folder; give a manifest (.jsonl, .csv) or a folder")
    if pairs_by != "auto":
        raise InputError(
            f"{where}: pairs by {pairs_by} are for folders environment/class/file; a manifest says in its column "
            "concept what belongs together"
        )
    rows = list(read_records(where))
    if not rows:
        raise InputError(f"{where}: the manifest lists no image")
    columns = _columns(where, rows[0][1])
    return [_image(where, number, row, columns, allow_outside) for number, row in rows]


def keep(
    images: Iterable[ImageRecord], *, environments: Sequence[str] | None = None, splits: Sequence[str] | None = None
) -> list[ImageRecord]:
    """The images of some environments and splits; None keeps all.

    Raises:
        InputError: An environment or split that no image has, or nothing is left.
    """
    kept = list(images)
    for what, values in (("environment", environments), ("split", splits)):
        if values is None:
            continue
        have = sorted({getattr(image, what) for image in kept} - {None})
        unknown = [value for value in values if value not in have]
        if unknown:
            available = ", ".join(have) or f"none, the images carry no {what}"
            raise InputError(f"no image has {what} {unknown[0]!r}; available: {available}")
        kept = [image for image in kept if getattr(image, what) in values]
    if not kept:
        raise InputError("no image is left after the filters; widen --environments or --split")
    return kept


def summarise(images: Sequence[ImageRecord]) -> dict[str, Any]:
    """What there is to pair: counts per environment, and the concepts that stand in one environment only.

    Returns:
        JSON-ready: `images`, `concepts`, `environments` (name → count), `unpaired_concepts` (count).
    """
    places: dict[str, set[str]] = defaultdict(set)
    for image in images:
        places[image.concept].add(image.environment)
    return {
        "images": len(images),
        "concepts": len(places),
        "environments": dict(sorted(Counter(image.environment for image in images).items())),
        "unpaired_concepts": sum(len(environments) < 2 for environments in places.values()),
    }


def _columns(where: Path, row: dict[str, Any]) -> dict[str, str]:
    """Which column of the manifest stands for each of `ALIASES`."""
    columns = {}
    for column, aliases in ALIASES.items():
        match = next((alias for alias in aliases if alias in row), None)
        if match is not None:
            columns[column] = match
    missing = [column for column in ("path", "environment") if column not in columns]
    if "concept" not in columns and "name" not in columns:
        missing.append("concept")
    if missing:
        names = " or ".join(ALIASES[missing[0]] + (ALIASES["name"] if missing[0] == "concept" else ()))
        have = ", ".join(str(key) for key in row)
        raise InputError(f"{where}: no column for the {missing[0]} (named {names}); it has: {have}")
    return columns


def _image(where: Path, number: int, row: dict[str, Any], columns: dict[str, str], allow_outside: bool) -> ImageRecord:
    cells = {}
    for column, name in columns.items():
        value = row.get(name)
        if column != "split" and (not isinstance(value, (str, int)) or value == ""):
            raise InputError(f"{where}: line {number} has no {name!r}")
        cells[column] = "" if value is None else str(value)
    concept = cells.get("concept", cells.get("name", ""))
    return ImageRecord(
        path=inside_folder(where, number, cells["path"], allow_outside),
        concept=concept,
        name=cells.get("name", concept),
        environment=cells["environment"],
        split=cells.get("split") or None,
    )


def inside_folder(where: Path, number: int, name: str, allow_outside: bool) -> Path:
    """The file that a manifest names; a manifest from elsewhere must not make us read arbitrary files.

    Raises:
        InputError: It lies outside the manifest's folder, and that is not allowed.
    """
    path = where.parent / name
    if allow_outside:
        return path
    try:
        inside = not Path(name).is_absolute() and path.resolve().is_relative_to(where.parent.resolve())
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in the name, or links that go round
        raise InputError(f"{where}: line {number} names {name!r}, which no file can be called ({error})") from error
    if not inside:
        raise InputError(f"{where}: line {number} names {name!r}, outside its folder (--allow-outside permits it)")
    return path


def _read_folder(root: Path, pairs_by: PairsBy) -> list[ImageRecord]:
    files = sorted(find_images([root]))
    deep = {path: parts for path in files if len(parts := path.relative_to(root).parts) >= 3}
    if not deep:
        raise InputError(f"{root}: images must lie in environment/class/file, {files[0].relative_to(root)} does not")
    if len(deep) < len(files):
        stray = next(path for path in files if path not in deep)
        warnings.warn(
            f"{root}: {len(files) - len(deep)} images outside environment/class/ are left out, such as {stray}",
            SkippedImageWarning,
            stacklevel=3,
        )
    stems: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for path, parts in deep.items():
        stems[parts[1]][path.stem].add(parts[0])
    if pairs_by == "auto":
        names = judge(stems)
        _warn_of(root, stems, names)
    else:
        names = FileNames(frozenset(stems) if pairs_by == "name" else frozenset())
    return [
        ImageRecord(
            path=path,
            concept=f"{parts[1]}/{path.stem}" if parts[1] in names.by_name else parts[1],
            name=parts[1].replace("_", " "),
            environment=parts[0],
        )
        for path, parts in deep.items()
    ]


def _warn_of(root: Path, stems: dict[str, dict[str, set[str]]], names: FileNames) -> None:
    """Says where equal names were taken for nothing, or for objects, on what may be an accident."""
    cases = {
        "look like numbers of files: they are not taken for one object, and their classes are paired by class": (
            names.coincidental
        ),
        "count, but every environment has the same ones: they are taken for one object": names.unsure,
    }
    for what, labels in cases.items():
        if labels:
            pairs = coinciding(stems, labels)
            warnings.warn(
                f"{root}: {len(pairs):,} pairs of equal file names in {len(labels)} of {len(stems)} classes, such as "
                f"{pairs[0]}, {what}; say --pairs-by name if equal names mean one object, --pairs-by class if not",
                CoincidingNamesWarning,
                stacklevel=4,
            )
