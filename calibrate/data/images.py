"""Images to calibrate on: a manifest (JSONL or CSV) or folders `environment/class/file`."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invariclip.calibrate.data.names import PAIRS_BY, FileNames, PairsBy, coinciding, judge
from invariclip.calibrate.data.records import read_records
from invariclip.errors import InputError
from invariclip.preprocessing.pixels import IMAGE_SUFFIXES

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Sequence

ALIASES: dict[str, tuple[str, ...]] = {
    "path": ("path", "file", "filename", "image"),
    "environment": ("environment", "style", "domain", "env"),
    "concept": ("concept", "id"),
    "name": ("name", "class", "label"),
    "split": ("split",),
}
"""The columns of a manifest and what else each may be called; the first that is there counts."""


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
    numbers of files (see `names.judge`), the name is the concept (the same object, seen twice); otherwise the class is.
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
    if where.is_dir():
        return _read_folder(where, pairs_by)
    if not where.is_file():
        raise InputError(f"{where}: no such file or folder; give a manifest (.jsonl, .csv) or a folder")
    if pairs_by != "auto":
        raise InputError(
            f"{where}: pairs by {pairs_by} are for folders environment/class/file; a manifest says in its column "
            "concept what belongs together"
        )
    rows = list(read_records(where))
    if not rows:
        raise InputError(f"{where}: the manifest lists no image")
    found = _columns(where, rows[0][1])
    return [_image(where, number, row, found, allow_outside) for number, row in rows]


def keep(
    images: Iterable[ImageRecord], *, environments: Sequence[str] | None = None, splits: Sequence[str] | None = None
) -> list[ImageRecord]:
    """The images of some environments and splits; None keeps all.

    Raises:
        InputError: An environment or split that no image has, or nothing is left.
    """
    kept = list(images)
    for what, wanted in (("environment", environments), ("split", splits)):
        if wanted is None:
            continue
        have = sorted({getattr(image, what) for image in kept} - {None})
        unknown = [value for value in wanted if value not in have]
        if unknown:
            available = ", ".join(have) or f"none, the images carry no {what}"
            raise InputError(f"no image has {what} {unknown[0]!r}; available: {available}")
        kept = [image for image in kept if getattr(image, what) in wanted]
    if not kept:
        raise InputError("no image is left after the filters; widen --environments or --split")
    return kept


def summarise(images: Sequence[ImageRecord]) -> dict[str, Any]:
    """What there is to pair: counts per environment, and the concepts that stand in one environment only.

    Returns:
        JSON-ready: `images`, `concepts`, `environments` (name → count), `unpaired_concepts` (count).
    """
    seen: dict[str, set[str]] = defaultdict(set)
    for image in images:
        seen[image.concept].add(image.environment)
    return {
        "images": len(images),
        "concepts": len(seen),
        "environments": dict(sorted(Counter(image.environment for image in images).items())),
        "unpaired_concepts": sum(len(environments) < 2 for environments in seen.values()),
    }


def _columns(where: Path, row: dict[str, Any]) -> dict[str, str]:
    """Which column of the manifest stands for each of `ALIASES`."""
    found = {}
    for column, aliases in ALIASES.items():
        match = next((alias for alias in aliases if alias in row), None)
        if match is not None:
            found[column] = match
    missing = [column for column in ("path", "environment") if column not in found]
    if "concept" not in found and "name" not in found:
        missing.append("concept")
    if missing:
        names = " or ".join(ALIASES[missing[0]] + (ALIASES["name"] if missing[0] == "concept" else ()))
        have = ", ".join(str(key) for key in row)
        raise InputError(f"{where}: no column for the {missing[0]} (named {names}); it has: {have}")
    return found


def _image(where: Path, number: int, row: dict[str, Any], found: dict[str, str], allow_outside: bool) -> ImageRecord:
    cells = {}
    for column, name in found.items():
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


def inside_folder(where: Path, number: int, given: str, allow_outside: bool) -> Path:
    """The file that a manifest names; a manifest from elsewhere must not make us read arbitrary files.

    Raises:
        InputError: It lies outside the manifest's folder, and that is not allowed.
    """
    path = where.parent / given
    if allow_outside:
        return path
    try:
        inside = not Path(given).is_absolute() and path.resolve().is_relative_to(where.parent.resolve())
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in the name, or links that go round
        raise InputError(f"{where}: line {number} names {given!r}, which no file can be called ({error})") from error
    if not inside:
        raise InputError(f"{where}: line {number} names {given!r}, outside its folder (--allow-outside permits it)")
    return path


def _read_folder(root: Path, pairs_by: PairsBy) -> list[ImageRecord]:
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not files:
        raise InputError(f"{root}: no image in this folder; known endings: {' '.join(IMAGE_SUFFIXES)}")
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
    seen: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for path, parts in deep.items():
        seen[parts[1]][path.stem].add(parts[0])
    if pairs_by == "auto":
        names = judge(seen)
        _warn_of(root, seen, names)
    else:
        names = FileNames(frozenset(seen) if pairs_by == "name" else frozenset())
    return [
        ImageRecord(
            path=path,
            concept=f"{parts[1]}/{path.stem}" if parts[1] in names.by_name else parts[1],
            name=parts[1].replace("_", " "),
            environment=parts[0],
        )
        for path, parts in deep.items()
    ]


def _warn_of(root: Path, seen: dict[str, dict[str, set[str]]], names: FileNames) -> None:
    """Says where equal names were taken for nothing, or for objects, on what may be an accident."""
    told = {
        "look like numbers of files: they are not taken for one object, and their classes are paired by class": (
            names.coincidental
        ),
        "count, but every environment has the same ones: they are taken for one object": names.unsure,
    }
    for what, labels in told.items():
        if labels:
            pairs = coinciding(seen, labels)
            warnings.warn(
                f"{root}: {len(pairs):,} pairs of equal file names in {len(labels)} of {len(seen)} classes, such as "
                f"{pairs[0]}, {what}; say --pairs-by name if equal names mean one object, --pairs-by class if not",
                CoincidingNamesWarning,
                stacklevel=4,
            )
