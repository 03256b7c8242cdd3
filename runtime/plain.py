"""YAML and JSON files that people write: plain types alone, and nothing in them that reads as something else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from invariclip.errors import InputError, MissingExtraError
from invariclip.records import parse_json, read_bounded

if TYPE_CHECKING:
    from pathlib import Path

LARGEST = 1 << 16
"""Bytes that a file may have."""
DEEPEST = 8
"""Levels of a YAML file; its parser is slow on deeper ones."""
_SHOWN = 64
"""Characters of a name in a message."""


def read_plain(path: Path, what: str) -> Any:
    """The file's content, of plain types alone.

    Args:
        path: JSON if it ends in `.json`, YAML otherwise.
        what: What it holds, in the plural, for messages.

    Raises:
        InputError: Missing, too large, not text, not parseable, or with a name twice in one mapping.
    """
    raw = read_bounded(path, f"a list of {what}", LARGEST)
    try:
        text = raw.decode("utf-8-sig")
        return parse_json(text, str(path)) if path.suffix.lower() == ".json" else _from_yaml(text, what)
    except (ValueError, RecursionError) as error:
        # a parser's own message goes over several lines
        raise InputError(f"{path}: not readable: {' '.join(str(error).split())[:200]}") from error


def _from_yaml(text: str, what: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise MissingExtraError(
            f'{what} in YAML need the package pyyaml: pip install "invariclip[calibrate]"; JSON needs none'
        ) from error
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            # aliases could blow a small file up, and have no use here
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("YAML aliases (*name) are not taken; write the values out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError(f"more than {DEEPEST} levels deep")
        waiting = [yaml.compose(text, Loader=yaml.SafeLoader)]
        while waiting:
            node = waiting.pop()
            if isinstance(node, yaml.MappingNode):
                _refuse_repeats([key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
                waiting += [value for _, value in node.value]
            elif isinstance(node, yaml.SequenceNode):
                waiting += node.value
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _refuse_repeats(names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{name[:_SHOWN]!r} stands twice in one mapping; the second would replace the first")
        seen.add(name)
