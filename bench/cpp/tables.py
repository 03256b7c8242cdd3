"""The tables of the C++ runtime's text side, from Python's own: `python -m invariclip.bench.cpp.tables`.

What `str.lower`, `str.split`, `unicodedata.normalize`, `html.unescape` and ftfy know of characters, so that C++ cleans
a text as Python does.
"""

from __future__ import annotations

import html.entities
import re
import sys
import unicodedata
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import ftfy
from ftfy import badness, chardata

from invariclip.bench.cpp.build import SOURCE
from invariclip.console import note
from invariclip.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

OUT = "src/text_tables.cpp"
EVERY = tuple(code for code in range(sys.maxunicode + 1) if not 0xD800 <= code <= 0xDFFF)
_WIDTH = 116


def tables() -> str:
    """The C++ file."""
    cased = [code for code in EVERY if f"{chr(code)}Σ".lower()[-1] == "ς"]
    skipped = [code for code in EVERY if f"a{chr(code)}Σ".lower()[-1] == "ς" and code not in set(cased)]
    parts = [
        f"// Written by `python -m invariclip.bench.cpp.tables` of Unicode {unicodedata.unidata_version} and ftfy "
        f"{ftfy.__version__}.",
        "// clang-format off",
        '#include "text_tables.hpp"',
        "",
        "namespace invariclip::tables {",
        "",
        _array("Range", "spaces", _ranges(code for code in EVERY if chr(code).isspace())),
        _array("Range", "digits", _ranges(_category(r"\d"))),
        _array("Range", "cased", _ranges(cased)),
        _array("Range", "ignorable", _ranges(skipped)),
        _array("Lower", "lower", _lower()),
        _array("Class", "combining", _combining()),
        _array("Decomposition", "decompositions", _decompositions()),
        _array("Text", "widths", _texts(chardata.WIDTH_MAP)),
        _array("Text", "ligatures", _texts(chardata.LIGATURES)),
        _array("Range", "removed", _ranges(chardata.CONTROL_CHARS)),
        *_bad(),
        _array("Entity", "entities", _entities(html.entities.html5.items())),
        _array("Entity", "shouted_entities", _entities(_shouted())),
        _array("Pair", "replaced_references", _references()),
        _array("Range", "dropped_references", _ranges(html._invalid_codepoints)),  # type: ignore[attr-defined]
        "}  // namespace invariclip::tables",
    ]
    return "\n".join(parts) + "\n"


def _ranges(codes: Iterable[int]) -> list[tuple[int, int]]:
    ranges: list[list[int]] = []
    for code in sorted(codes):
        if ranges and ranges[-1][1] + 1 == code:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return [(first, last) for first, last in ranges]


def _lower() -> list[tuple[int, int, int, int]]:
    """(first, last, step, difference) of runs; U+0130, the only one that becomes two, is not in it."""
    changed = [(code, ord(chr(code).lower()) - code) for code in EVERY if len(chr(code).lower()) == 1]
    longer = [code for code in EVERY if len(chr(code).lower()) != 1]
    if longer != [0x130]:
        raise ValueError(f"characters that become several small ones: {longer}; C++ knows U+0130 alone")
    runs: list[list[int]] = []
    for code, difference in changed:
        if not difference:
            continue
        last = runs[-1] if runs else [0, -9, 0, 0]
        step = code - last[1]
        if last[3] == difference and step in (1, 2) and last[2] in (0, step):
            last[1], last[2] = code, step
        else:
            runs.append([code, code, 0, difference])
    return [(first, end, step or 1, difference) for first, end, step, difference in runs]


def _combining() -> list[tuple[int, int, int]]:
    made: list[list[int]] = []
    for code in EVERY:
        kind = unicodedata.combining(chr(code))
        if kind and made and made[-1][1:] == [code - 1, kind]:
            made[-1][1] = code
        elif kind:
            made.append([code, code, kind])
    return [(first, last, kind) for first, last, kind in made]


def _decompositions() -> list[tuple[int, int, int, int]]:
    """(code, first, second or 0, whether the two become it again), of canonical ones but Hangul's."""
    made = []
    for code in EVERY:
        found = unicodedata.decomposition(chr(code))
        if found and not found.startswith("<"):
            first, second = ([int(part, 16) for part in found.split()] + [0])[:2]
            again = second != 0 and unicodedata.normalize("NFC", chr(code)) == chr(code)
            made.append((code, first, second, int(again)))
    return made


@cache
def _category(pattern: str) -> frozenset[int]:
    compiled = re.compile(pattern)
    return frozenset(code for code in EVERY if compiled.match(chr(code)))


def _members(op: str, value: Any) -> frozenset[int]:
    if op == "LITERAL":
        return frozenset({value})
    if op == "ANY":
        return frozenset(EVERY) - {0x0A}
    if op == "RANGE":
        return frozenset(range(value[0], value[1] + 1))
    if op == "CATEGORY":
        return _category({"CATEGORY_SPACE": r"\s", "CATEGORY_WORD": r"\w"}[str(value)])
    if op != "IN":
        raise ValueError(f"ftfy's expression has {op}, which C++ has no form of")
    parts = [(str(kind), inner) for kind, inner in value]
    found = frozenset[int]().union(*(_members(kind, inner) for kind, inner in parts if kind != "NEGATE"))
    return frozenset(EVERY) - found if parts[0][0] == "NEGATE" else found


def _bad() -> list[str]:
    """The expression by which ftfy knows text that was decoded wrongly: alternatives of sets, one a character."""
    expression = badness.BADNESS_RE
    ((_, (_, branches)),) = re._parser.parse(expression.pattern, expression.flags)  # type: ignore[attr-defined]
    sets: dict[frozenset[int], int] = {}
    sequences: list[tuple[int, ...]] = []
    for branch in branches:
        made: list[tuple[int, ...]] = [()]
        for op, value in branch:
            if str(op) == "AT":
                made = [(*one, -1) for one in made]  # only at the begin
            elif str(op) == "MAX_REPEAT":
                low, high, inner = value
                if (low, high, len(inner)) != (0, 1, 1):
                    raise ValueError(f"ftfy's expression repeats {value}, which C++ has no form of")
                number = sets.setdefault(_members(str(inner[0][0]), inner[0][1]), len(sets))
                made = [*made, *((*one, number) for one in made)]
            else:
                number = sets.setdefault(_members(str(op), value), len(sets))
                made = [(*one, number) for one in made]
        sequences += made
    ranges: list[tuple[int, int]] = []
    places = [0]
    for members in sets:
        ranges += _ranges(members)
        places.append(len(ranges))
    longest = max(map(len, sequences))
    padded = [(*one, *[-2] * (longest - len(one))) for one in sequences]
    return [
        _array("Range", "bad_ranges", ranges),
        _array("Range", "bad_sets", list(pairwise(places))),
        f"static_assert(bad_length == {longest});\n",
        _array("Sequence", "bad_sequences", padded, nested=True),
    ]


def _texts(given: Mapping[int, str]) -> list[tuple[int, str]]:
    return [(code, _quoted(text)) for code, text in sorted(given.items())]


def _shouted() -> list[tuple[str, str]]:
    """Entities in capitals that ftfy knows and HTML does not."""
    known = {f"&{name}" for name in html.entities.html5}
    return [(name[1:], text) for name, text in chardata.HTML_ENTITIES.items() if name not in known]


def _entities(named: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(f'"{name}"', _quoted(text)) for name, text in sorted(named)]


def _references() -> list[tuple[int, int]]:
    return [(code, ord(text)) for code, text in sorted(html._invalid_charrefs.items())]  # type: ignore[attr-defined]


def _quoted(text: str) -> str:
    return '"' + "".join(f"\\{byte:03o}" for byte in text.encode()) + '"'


def _array(kind: str, name: str, rows: Sequence[Sequence[object]], *, nested: bool = False) -> str:
    """A table and its size; the rows fill lines."""
    lines, line = [], "   "
    opening, closing = ("{{{", "}}}") if nested else ("{", "}")
    for row in rows:
        cell = f" {opening}{', '.join(map(str, row))}{closing},"
        if len(line) + len(cell) > _WIDTH:
            lines.append(line)
            line = "   "
        line += cell
    lines.append(line)
    table = "\n".join(lines)
    rows_of = f"namespace {{\nconstexpr {kind} {name}_rows[] = {{\n{table}\n}};\n}}"
    return f"{rows_of}\nconst Table<{kind}> {name}{{{name}_rows}};\n"


def write(place: Path = SOURCE / OUT, made: Callable[[], str] = tables) -> None:
    """Writes the file."""
    write_atomically(place, made())
    note(f"{place}: written")


if __name__ == "__main__":
    write()
