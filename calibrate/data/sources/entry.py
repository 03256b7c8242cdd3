"""One entry of a list of sources: keys with values of known types, and one line where they are not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from invariclip.errors import InputError
from invariclip.preprocessing.interventions import kinds_of, parse_kinds

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from invariclip.preprocessing.interventions import InterventionRequest


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
        given = self.texts(key)
        if given is None:
            raise self._wrong(key, "a path or a list of paths", None)
        return tuple(self._placed(each) for each in given)

    def texts(self, key: str) -> tuple[str, ...] | None:
        """One text or a list of them; None where the key is missing.

        Raises:
            InputError: They are something else.
        """
        value = self.values.get(key)
        if value is None:
            return None
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or not listed or not all(isinstance(item, str) and item for item in listed):
            raise self._wrong(key, "a text or a list of texts", value)
        return tuple(listed)

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
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not (value > 0 and math.isfinite(value)):
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

    def _placed(self, given: str) -> str:
        return str(self.folder / given)

    def _wrong(self, key: str, wanted: str, value: Any) -> InputError:
        given = "it is missing" if value is None else f"not {value!r:.60}"
        return InputError(f"{self.where}: {key!r} must be {wanted}, {given}")


def unknown(what: str, given: str, known: Sequence[str]) -> InputError:
    """The error for a word that is not known: the nearest that is, and all there are."""
    near = get_close_matches(given[:64], known, 1, cutoff=0.5)
    hint = f"; nearest: {near[0]}" if near else ""
    return InputError(f"{what} is called {given[:64]!r}{hint}; available: {', '.join(known)}")
