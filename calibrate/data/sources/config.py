"""Sources from a YAML or JSON file: a list of entries, each with a kind and its keys (docs/sources.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from invariclip.calibrate.data.names import PAIRS_BY
from invariclip.calibrate.data.changes import Changes
from invariclip.calibrate.data.sources.entry import SourceEntry, unknown
from invariclip.calibrate.data.sources.images import ImageSource
from invariclip.calibrate.data.sources.pairs_file import PairsFile, Points
from invariclip.calibrate.data.sources.texts import TemplatePairs, TextPairs
from invariclip.calibrate.data.sources.webdataset import WebDataset
from invariclip.errors import InputError
from invariclip.plain import read_plain
from invariclip.preprocessing.prompts import read_templates

if TYPE_CHECKING:
    import os

    from invariclip.calibrate.data.names import PairsBy
    from invariclip.calibrate.data.stream.blocks import PairSource

COMMON = ("kind", "name", "weight")
POINTS = ("both", "first", "none")


@dataclass(frozen=True)
class SourceKind:
    """One kind of source.

    Attributes:
        keys: What an entry may hold beside `COMMON`.
        build: Makes the source, given its entry, name and weight.
    """

    keys: tuple[str, ...]
    build: Callable[[SourceEntry, str, float], PairSource]


def sources_of(given: str | os.PathLike[str] | Mapping[str, Any]) -> list[PairSource]:
    """The sources that a file lists.

    Args:
        given: A YAML or JSON file, or its content: `{"sources": [{"kind": …, …}, …]}`. Relative paths are relative to
            the file, or to the current folder.

    Raises:
        InputError: It cannot be read, lists nothing, or names a kind, key or value that is not known.
        MissingExtraError: It is YAML and PyYAML is not installed.
    """
    if isinstance(given, Mapping):
        where, content, folder = "sources", cast("Any", given), Path()
    else:
        path = Path(given)
        where, content, folder = str(path), read_plain(path, "sources"), path.parent
    if not isinstance(content, Mapping) or list(content) != ["sources"]:
        raise InputError(f"{where}: must be a mapping with the one key `sources`, see docs/sources.md")
    entries = content["sources"]
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{where}: lists no source; available kinds: {', '.join(KINDS)}")
    found: dict[str, PairSource] = {}
    for number, values in enumerate(entries, 1):
        source = _source(f"{where}: source {number}", values, folder)
        if source.name in found:
            raise InputError(f"{where}: source {number}: another one is called {source.name!r}; give it a `name`")
        found[source.name] = source
    return list(found.values())


def _source(where: str, values: Any, folder: Path) -> PairSource:
    if not isinstance(values, Mapping):
        raise InputError(f"{where}: must be a mapping with a `kind`; available: {', '.join(KINDS)}")
    entry = SourceEntry(where, values, folder)
    kind = entry.text("kind")
    if kind not in KINDS:
        raise unknown(f"{where}: no kind of source", kind, tuple(KINDS))
    entry.refuse_unknown((*COMMON, *KINDS[kind].keys))
    return KINDS[kind].build(entry, entry.text("name", kind), entry.number("weight", 1.0))


def _images(entry: SourceEntry, name: str, weight: float) -> PairSource:
    return ImageSource(
        name,
        entry.path("path"),
        weight,
        environments=entry.texts("environments"),
        splits=entry.texts("splits"),
        natural=entry.flag("natural", True),
        changes=_changes(entry),
        points=entry.flag("points", True),
        seed=entry.whole("seed", 0),
        allow_outside=entry.flag("allow_outside", False),
        pairs_by=cast("PairsBy", entry.choice("pairs_by", "auto", PAIRS_BY)),
    )


def _domainbed(entry: SourceEntry, name: str, weight: float) -> PairSource:
    # Two images of a class show two objects, so natural pairs have to be asked for (see calibrate.layouts).
    return ImageSource(
        name,
        entry.path("path"),
        weight,
        environments=entry.texts("environments"),
        natural=entry.flag("natural", False),
        changes=_changes(entry, "all"),
        points=entry.flag("points", True),
        seed=entry.whole("seed", 0),
        layout=entry.text("set"),
    )


def _pairs(entry: SourceEntry, name: str, weight: float) -> PairSource:
    return PairsFile(
        name, entry.path("path"), weight, points=_points(entry), allow_outside=entry.flag("allow_outside", False)
    )


def _webdataset(entry: SourceEntry, name: str, weight: float) -> PairSource:
    return WebDataset(
        name,
        entry.paths("path"),
        weight,
        natural=entry.flag("natural", True),
        changes=_changes(entry),
        points=entry.flag("points", True),
    )


def _texts(entry: SourceEntry, name: str, weight: float) -> PairSource:
    if "path" in entry.values:
        if set(entry.values) & {"classes", "templates", "classes_file", "templates_file"}:
            raise InputError(f"{entry.where}: give `path`, or classes and templates, not both")
        return TextPairs(name, entry.path("path"), weight)
    classes = _one_of(entry, "classes", "classes_file")
    templates = _one_of(entry, "templates", "templates_file")
    try:
        return TemplatePairs(name, classes, templates, weight)
    except InputError as error:
        raise InputError(f"{entry.where}: {error}") from error


def _embeddings(entry: SourceEntry, name: str, weight: float) -> PairSource:
    from invariclip.calibrate.data.sources.embeddings import EmbeddingSource

    paths = {key: entry.path(key) for key in ("first", "second", "path") if key in entry.values}
    source: PairSource = EmbeddingSource(name=name, weight=weight, points=_points(entry), **paths)
    return source


def _changes(entry: SourceEntry, default: str = "none") -> Changes:
    kinds = entry.kinds("interventions", default)
    try:
        return Changes(kinds, entry.whole("draws", 2), entry.whole("seed", 0))
    except InputError as error:
        raise InputError(f"{entry.where}: {error}") from error


def _points(entry: SourceEntry) -> Points:
    return cast("Points", entry.choice("points", "both", POINTS))


def _one_of(entry: SourceEntry, key: str, file: str) -> tuple[str, ...]:
    """Texts from a key, or from the lines of the file that another key names."""
    if (key in entry.values) == (file in entry.values):
        raise InputError(f"{entry.where}: give `path`, or {key!r} or {file!r}, one of the two")
    listed = entry.texts(key)
    return listed if listed is not None else _lines(Path(entry.path(file)), key)


def _lines(path: Path, key: str) -> tuple[str, ...]:
    if key == "templates":
        return read_templates(path)
    try:
        with path.open(encoding="utf-8-sig") as stream:
            return tuple(line.strip() for line in stream if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error})") from error


_CHANGED = ("interventions", "draws", "seed")
KINDS: dict[str, SourceKind] = {
    "images": SourceKind(
        ("path", "environments", "splits", "natural", "points", "allow_outside", "pairs_by", *_CHANGED),
        _images,
    ),
    "pairs": SourceKind(("path", "points", "allow_outside"), _pairs),
    "webdataset": SourceKind(("path", "natural", "points", *_CHANGED), _webdataset),
    "texts": SourceKind(("path", "classes", "classes_file", "templates", "templates_file"), _texts),
    "embeddings": SourceKind(("first", "second", "path", "points"), _embeddings),
    "domainbed": SourceKind(("set", "path", "environments", "natural", "points", *_CHANGED), _domainbed),
}
"""The kinds by name."""
