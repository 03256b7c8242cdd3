"""The list of sources in a YAML or JSON file: each entry has a kind and that kind's keys (docs/sources.md)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from invariclip.calibrate.data.images import PAIRS_BY
from invariclip.calibrate.data.sources.images import ImageSource
from invariclip.calibrate.data.sources.listed_pairs import PairsFile, Points, TemplatePairs, TextPairs
from invariclip.calibrate.data.sources.webdataset import WebDataset
from invariclip.calibrate.data.versions import Changes
from invariclip.errors import InputError
from invariclip.plain import read_plain
from invariclip.preprocessing.interventions import kinds_of, parse_kinds
from invariclip.preprocessing.prompts import read_lines, read_templates

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from invariclip.calibrate.data.images import PairsBy
    from invariclip.calibrate.data.stream.blocks import PairSource
    from invariclip.preprocessing.interventions import InterventionRequest

COMMON = ("kind", "name", "weight")
POINTS = ("both", "first", "none")
_CHANGED = ("interventions", "draws", "seed")


@dataclass(frozen=True)
class SourceEntry:
    """The keys of one source.

    Attributes:
        where: What to call it in messages.
        values: As they were read.
        folder: What relative paths are relative to.
    """

    where: str
    values: Mapping[str, Any]
    folder: Path

    def refuse_unknown(self, known: Sequence[str]) -> None:
        """Makes sure that no key is there that nothing reads.

        Raises:
            InputError: One is; the nearest of the known ones is named.
        """
        for key in self.values:
            if key not in known:
                raise unknown(f"{self.where}: no key", str(key), known)

    def text(self, key: str, default: str | None = None) -> str:
        """A text that is not empty.

        Raises:
            InputError: It is something else, or missing without a default.
        """
        value = self.values.get(key, default)
        if not isinstance(value, str) or not value:
            raise self._wrong(key, "a text", value)
        return value

    def path(self, key: str) -> str:
        """A path; a relative one is relative to the list's folder.

        Raises:
            InputError: It is missing or no text.
        """
        return self._placed(self.text(key))

    def paths(self, key: str) -> tuple[str, ...]:
        """One path or several.

        Raises:
            InputError: They are missing or no texts.
        """
        texts = self.texts(key)
        if texts is None:
            raise self._wrong(key, "a path or a list of paths", None)
        return tuple(self._placed(each) for each in texts)

    def texts(self, key: str) -> tuple[str, ...] | None:
        """One text or a list of them; None where the key is missing.

        Raises:
            InputError: They are something else.
        """
        value = self.values.get(key)
        if value is None:
            return None
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not items or not all(isinstance(item, str) and item for item in items):
            raise self._wrong(key, "a text or a list of texts", value)
        return tuple(items)

    def flag(self, key: str, default: bool) -> bool:
        """True or false.

        Raises:
            InputError: It is something else.
        """
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false", value)
        return value

    def whole(self, key: str, default: int) -> int:
        """A whole number of zero or more.

        Raises:
            InputError: It is something else.
        """
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self._wrong(key, "a whole number of zero or more", value)
        return value

    def number(self, key: str, default: float) -> float:
        """A number above zero.

        Raises:
            InputError: It is something else.
        """
        value = self.values.get(key, default)
        known = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not known or not 0 < value <= sys.float_info.max:  # a NaN fails too
            raise self._wrong(key, "a number above zero", value)
        return float(value)

    def choice(self, key: str, default: str, known: Sequence[str]) -> str:
        """One of some words.

        Raises:
            InputError: It is something else.
        """
        value = self.values.get(key, default)
        if value not in known:
            raise self._wrong(key, f"one of {', '.join(known)}", value)
        return str(value)

    def kinds(self, key: str, default: str = "none") -> tuple[InterventionRequest, ...]:
        """Interventions: names and groups with commas, a file of them, or a list as such a file holds.

        Raises:
            InputError: They are something else, or not known.
        """
        value = self.values.get(key, default)
        if isinstance(value, (list, dict)):
            return kinds_of(value, f"{self.where}: {key}")
        if not isinstance(value, str):
            raise self._wrong(key, "names of interventions, a file, or a list (docs/interventions.md)", value)
        try:
            return parse_kinds(self._placed(value) if value.strip().endswith((".yaml", ".yml", ".json")) else value)
        except InputError as error:
            raise InputError(f"{self.where}: {error}") from error

    def _placed(self, path: str) -> str:
        return str(self.folder / path)

    def _wrong(self, key: str, expected: str, value: Any) -> InputError:
        actual = "it is missing" if value is None else f"not {value!r:.60}"
        return InputError(f"{self.where}: {key!r} must be {expected}, {actual}")


def unknown(what: str, word: str, known: Sequence[str]) -> InputError:
    """The error for a word that is not known: the nearest that is, and all there are."""
    near = get_close_matches(word[:64], known, 1, cutoff=0.5)
    hint = f"; nearest: {near[0]}" if near else ""
    return InputError(f"{what} is called {word[:64]!r}{hint}; available: {', '.join(known)}")


@dataclass(frozen=True)
class SourceKind:
    """One kind of source.

    Attributes:
        keys: What an entry may hold beside `COMMON`.
        build: Makes the source, given its entry, name and weight.
    """

    keys: tuple[str, ...]
    build: Callable[[SourceEntry, str, float], PairSource]


def sources_of(config: str | os.PathLike[str] | Mapping[str, Any]) -> list[PairSource]:
    """The sources that a file lists.

    Args:
        config: A YAML or JSON file, or its content: `{"sources": [{"kind": …, …}, …]}`. Relative paths are relative to
            the file, or to the current folder.

    Raises:
        InputError: It cannot be read, lists nothing, or names a kind, key or value that is not known.
        MissingExtraError: It is YAML and PyYAML is not installed.
    """
    if isinstance(config, Mapping):
        where, content, folder = "sources", cast("Any", config), Path()
    else:
        path = Path(config)
        where, content, folder = str(path), read_plain(path, "sources"), path.parent
    if not isinstance(content, Mapping) or list(content) != ["sources"]:
        raise InputError(f"{where}: must be a mapping with the one key `sources`, see docs/sources.md")
    entries = content["sources"]
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{where}: lists no source; available kinds: {', '.join(KINDS)}")
    sources: dict[str, PairSource] = {}
    for number, values in enumerate(entries, 1):
        source = _source(f"{where}: source {number}", values, folder)
        if source.name in sources:
            raise InputError(f"{where}: source {number}: another one is called {source.name!r}; give it a `name`")
        sources[source.name] = source
    return list(sources.values())


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
    # Two images of a class show two objects, so natural pairs have to be asked for (see `data.domainbed`).
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
    texts = entry.texts(key)
    if texts is not None:
        return texts
    path = entry.path(file)
    return read_templates(path) if key == "templates" else read_lines(path, key)


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
