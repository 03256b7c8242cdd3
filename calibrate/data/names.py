"""Whether equal file names in two environments mean one object, or two images that were counted alike.

`house/pic_001.jpg` of two sets is two houses: both sets count from one. `noto/1f415.webp` and `twemoji/1f415.webp` are
one dog. A name can be told for a numbering (digits alone, or a prefix that many files share and a counter); whether a
numbering is of objects or of files cannot be told from a name. From many it sometimes can: numbers of objects that were
given once for all classes belong to one class each and lie scattered in it, and all environments have the same ones.
Numbers of files begin anew in every class, or run on: then as many coincide with the number one place further on.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    Stems: TypeAlias = Mapping[str, set[str]]

PairsBy: TypeAlias = Literal["auto", "name", "class"]
"""What makes images of a folder one concept: see `images.read_images`."""
PAIRS_BY: tuple[PairsBy, ...] = get_args(PairsBy)

CHANCE = 1e-6
"""Numbers coincide by design where chance alone would do it less often than this."""
_SHIFTS = (-3, -2, -1, 1, 2, 3)
_COUNTED = 3
"""Numbers behind a prefix from which on it is a counter's, unless the prefix is one of `_OF_FILES`."""
_OF_FILES = frozenset(
    [
        "", "c", "d", "dsc", "dscf", "dscn", "f", "file", "frame", "im", "image", "img", "p", "photo", "pic",
        "image", "s", "sample", "scan", "screenshot", "untitled", "x",
    ]
)  # fmt: skip
"""Prefixes, without separators, that are of a file and not of what it shows."""
_NUMBERED = re.compile(r"(.*?)(\d+)\)?")
_HEXADECIMAL = re.compile(r"(?=.*\d)(?=.*[a-f])[0-9a-f]{4,}(-[0-9a-f]+)*", re.IGNORECASE)


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
        own_numbers = {found for stem in each if (found := _split(stem)) is not None}
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
                (found[0], place[found[0]][found[1]])
                for stem, environments in each.items()
                if environment in environments and (found := _split(stem)) is not None
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
    found = _NUMBERED.fullmatch(stem)
    if found is None or len(found[2]) > 18:  # no counter; and digits past that are a digest's
        return None
    prefix = found[1]
    if any(letter.isdigit() for letter in prefix) and prefix[-1].isalnum():
        return None
    return prefix, int(found[2])


def _counters(stems: Iterable[str], hexadecimal: bool) -> list[str]:
    """The names that look like a numbering."""
    by_prefix: dict[str, list[str]] = defaultdict(list)
    for stem in stems:
        found = _split(stem)
        if found is not None and not (hexadecimal and not found[0]):
            by_prefix[found[0]].append(stem)
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
    prefixes = {_plain(found[0]) for stem in stems if (found := _split(stem)) is not None}
    return prefixes == {_plain(label)}


def _plain(text: str) -> str:
    return "".join(letter for letter in text.casefold() if letter.isalnum())
