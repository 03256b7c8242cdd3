"""Interventions as they are asked for: on the command line by name, or in a YAML or JSON file with strengths.

A file holds a list or a mapping (docs/interventions.md):

    - all                       # a group
    - fog                       # a kind with its defaults
    - rotation: {degrees: [5, 15]}

    light-fog: {kind: fog, density: 0.5}
    heavy-fog: {kind: fog, density: [2, 4]}
    greyscale:
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from invariclip.errors import InputError
from invariclip.plain import read_plain
from invariclip.preprocessing.interventions.base import described
from invariclip.preprocessing.interventions.catalogue import CATALOGUE, GROUPS, InterventionRequest, resolve, unknown

SUFFIXES = (".yaml", ".yml", ".json")
LONGEST = 64
"""Characters of a label."""


def parse_kinds(text: str) -> tuple[InterventionRequest, ...]:
    """Interventions as the command line gives them: `none`, names and groups with commas, or a file.

    Raises:
        InputError: A name is not known, or the file cannot be used.
        MissingExtraError: The file is YAML and PyYAML is not installed.
    """
    if text.strip().lower().endswith(SUFFIXES):
        return read_kinds(Path(text.strip()))
    names = [name.strip() for name in text.split(",") if name.strip()]
    if names in ([], ["none"]):
        return ()
    return tuple(dict.fromkeys(kind for name in names for kind in _named(name)))


def read_kinds(path: Path) -> tuple[InterventionRequest, ...]:
    """Interventions of a file.

    Raises:
        InputError: It cannot be read, or an entry, a name or a value cannot be used; the line names the file.
        MissingExtraError: It is YAML and PyYAML is not installed.
    """
    return kinds_of(read_plain(path, "interventions"), str(path))


def kinds_of(content: Any, where: str) -> tuple[InterventionRequest, ...]:
    """Interventions of a file's content: a list or a mapping.

    Args:
        content: Of plain types.
        where: What to call it in messages.

    Raises:
        InputError: An entry, a name or a value cannot be used.
    """
    if content in (None, [], {}):
        raise InputError(f"{where}: lists no intervention; --interventions none does without")
    if not isinstance(content, list | dict):
        raise InputError(f"{where}: holds neither a list nor a mapping of interventions")
    entries = content if isinstance(content, list) else [{label: given} for label, given in content.items()]
    chosen: dict[str, InterventionRequest] = {}
    for number, entry in enumerate(entries, 1):
        try:
            found = _entry(entry)
        except InputError as error:
            raise InputError(f"{where}: entry {number}: {error}") from error
        for kind in found:
            if kind.label in chosen:
                raise InputError(
                    f"{where}: entry {number}: {kind.label!r} stands there twice; give one another label, as in "
                    f"{{my-{kind.label}: {{kind: {kind.change.name}}}}}"
                )
            chosen[kind.label] = kind
    return tuple(chosen.values())


def _named(name: str) -> tuple[InterventionRequest, ...]:
    """A group, or a kind with its defaults."""
    if name not in GROUPS and name not in CATALOGUE:
        raise unknown("intervention", name, ["all", "none", *list(GROUPS)[1:], *CATALOGUE])
    return tuple(resolve(each) for each in GROUPS.get(name, (name,)))


def _entry(entry: Any) -> tuple[InterventionRequest, ...]:
    """A name, or one label with what is said of it."""
    if isinstance(entry, str):
        return _named(entry)
    if not isinstance(entry, dict) or len(entry) != 1:
        raise InputError("must be a name, or one label and its parameters: {fog: {density: [1, 2]}}")
    ((label, given),) = entry.items()
    if not isinstance(label, str) or not 0 < len(label) <= LONGEST or not label.isprintable():
        raise InputError(
            f"a label must be 1 to {LONGEST} printable characters; quote what YAML takes for something else"
        )
    if given is None and label in GROUPS:
        return _named(label)
    if not isinstance(given, dict | None):
        raise InputError(f"{label}: parameters must be a mapping, such as {{density: [1, 2]}}")
    return (_build(label, given or {}),)


def _build(label: str, given: dict[Any, Any]) -> InterventionRequest:
    kind = given.get("kind", label)
    if not isinstance(kind, str) or kind not in CATALOGUE:
        said = " (a label that is no kind needs `kind: NAME`)" if "kind" not in given else ""
        raise InputError(f"{unknown('intervention', str(kind)[:LONGEST], CATALOGUE)}{said}")
    known = [name for name, _, _ in described(CATALOGUE[kind])]
    values = {name: value for name, value in given.items() if name != "kind"}
    for name in values:
        if name not in known:
            raise unknown(f"parameter of {kind}", str(name)[:LONGEST], known)
    return InterventionRequest(label, CATALOGUE[kind](**values))
