"""The concepts: what they are called, which styles draw them, and which of them an encoder may learn from."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from invariclip.bench.studies.stylebench.artwork import hexcode_of
from invariclip.bench.studies.stylebench.sources import STYLES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Split = Literal["train", "calibrate", "test"]

GROUPS = ("Animals & Nature", "Food & Drink", "Objects", "Travel & Places", "Activities")
"""Things that can be seen; faces, people, symbols and flags are left out."""

COMMON_STYLES = (
    "noto",
    "twemoji",
    "fluent-flat",
    "fluent-3d",
    "fluent-high-contrast",
    "openmoji",
    "openmoji-black",
)
"""A concept counts only if all of these draw it, so that every style is asked the same question."""

SPLIT_SEED = "stylebench-1"
_CLOCK_FACE = re.compile(r"o.clock$|-thirty$")


@dataclass(frozen=True)
class Concept:
    """One thing that is drawn in several styles.

    Attributes:
        hexcode: Its code points, as `hexcode_of` writes them.
        name: The English CLDR name.
        group: One of `GROUPS`.
        keywords: Other English words for it, without the name itself.
        split: What an encoder or a projection may learn from it.
    """

    hexcode: str
    name: str
    group: str
    keywords: tuple[str, ...]
    split: Split


def split_of(hexcode: str) -> Split:
    """Splits concepts 80/10/10 by a seeded hash, so that a concept's place never depends on which others exist.

    "train": an encoder learns from it. "calibrate": no encoder does, a projection may. "test": nothing is fitted on it.
    """
    digest = hashlib.sha256(f"{SPLIT_SEED}:{hexcode}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return "train" if share < 0.8 else "calibrate" if share < 0.9 else "test"


def image_split(style: str, concept: Split) -> Split:
    """The split of one image: "test" in a held-out style, whatever its concept; else the concept's."""
    return "test" if STYLES[style].held_out else concept


def read_concepts(packages: Mapping[str, Path]) -> dict[str, Concept]:
    """All concepts of `GROUPS` by hexcode, clock faces left out, whether or not every style draws them.

    Args:
        packages: Unpacked folder by package key.
    """
    table: dict[str, dict[str, Any]] = json.loads(
        (packages["names"] / "data-by-emoji.json").read_text(encoding="utf-8")
    )
    words: dict[str, list[str]] = json.loads(
        (packages["keywords"] / "dist" / "emoji-en-US.json").read_text(encoding="utf-8")
    )
    concepts: dict[str, Concept] = {}
    for emoji, entry in table.items():
        # twenty-four faces of a clock differ by the hands alone
        if entry["group"] not in GROUPS or _CLOCK_FACE.search(entry["name"]):
            continue
        code = hexcode_of("-".join(f"{ord(character):04x}" for character in emoji))
        name = entry["name"]
        concepts[code] = Concept(code, name, entry["group"], clean_words(words.get(emoji, []), name), split_of(code))
    return concepts


def clean_words(words: list[str], name: str) -> tuple[str, ...]:
    """Keywords as a caption would say them: no underscores, emoticons or repetition of the name."""
    plain = dict.fromkeys(word.replace("_", " ").strip().lower() for word in words)
    return tuple(w for w in plain if w != name.lower() and re.fullmatch(r"[a-z][a-z0-9 '-]+", w))


def common_concepts(concepts: Mapping[str, Concept], drawn: Mapping[str, Mapping[str, object]]) -> dict[str, Concept]:
    """The concepts that every one of `COMMON_STYLES` draws.

    Args:
        concepts: By hexcode.
        drawn: For each style, something by hexcode.
    """
    return {code: c for code, c in concepts.items() if all(code in drawn[style] for style in COMMON_STYLES)}
