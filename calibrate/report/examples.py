"""Which pairs and which retrievals the page shows: drawn by content and seed, never by hand; as small pictures."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from invariclip.calibrate.report.retrieval import right

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from invariclip.calibrate.report.evidence import Evidence

THUMBNAIL = 112
"""Pixels of the longer side."""
MAX_BYTES = 4000
"""Of one small picture. A page has at most 154 of them (48 in pairs that were changed, 36 natural ones, 70 around
retrievals): below 1 MB, base64 included."""
CHANGED_PAIRS = 24
OF_A_KIND = 2
NATURAL_CONCEPTS = 6
NATURAL_ENVIRONMENTS = 6
RETRIEVALS = 5
"""Of each sort: those that became right and those that became wrong."""


@dataclass(frozen=True)
class Thumbnail:
    """A picture of the page: `src` is a data URI, `alt` says what it shows."""

    src: str
    alt: str
    name: str
    environment: str


def data_uri(pixels: NDArray[np.uint8]) -> str:
    """uint8 [H, W, 3] as a WebP of at most `MAX_BYTES` bytes."""
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    content = b""
    for quality in (80, 60, 40, 20, 5):
        stream = io.BytesIO()
        image.save(stream, "WEBP", quality=quality, method=6)
        content = stream.getvalue()
        if len(content) <= MAX_BYTES:
            break
    return f"data:image/webp;base64,{base64.b64encode(content).decode()}"


def changed_pairs(evidence: Evidence) -> list[dict[str, Any]]:
    """Pictures beside their changed versions: of every kind the first ones drawn, if there is room."""
    table = evidence.table
    kinds = [int(kind) for kind in np.unique(table.kinds[~table.unchanged])]
    each = min(OF_A_KIND, max(1, CHANGED_PAIRS // max(1, len(kinds))))
    found = []
    for kind in kinds:
        rows = np.flatnonzero(table.kinds == kind)
        for row in _spread(evidence, rows)[:each]:
            origin = int(table.origins[row])
            gap = 1 - float(table.vectors[row] @ table.vectors[origin])
            pair = {"kind": table.kind_names[kind], "gap": gap}
            found.append(pair | {"first": _thumbnail(evidence, origin), "second": _thumbnail(evidence, row)})
    return found[:CHANGED_PAIRS]


def natural_rows(evidence: Evidence) -> list[dict[str, Any]]:
    """Concepts in their environments: the first ones drawn of those that stand in two or more."""
    table, found = evidence.table, []
    rows = np.flatnonzero(table.unchanged)
    seen: dict[int, dict[int, int]] = {}
    for row in rows[np.argsort(evidence.ranks[rows])]:
        seen.setdefault(int(table.concepts[row]), {}).setdefault(int(table.environments[row]), int(row))
    for concept, members in seen.items():
        if len(members) < 2:
            continue
        chosen = [members[environment] for environment in sorted(members)][:NATURAL_ENVIRONMENTS]
        pictures = [_thumbnail(evidence, row) for row in chosen]
        found.append({"name": table.concept_names[concept], "pictures": pictures})
        if len(found) == NATURAL_CONCEPTS:
            break
    return found


def changed_retrievals(evidence: Evidence) -> list[tuple[str, int, list[dict[str, Any]]]]:
    """Queries whose nearest picture became right, and those whose became wrong: title, how many, the first drawn."""
    retrieval, table = evidence.retrieval, evidence.table
    if retrieval.after is None:
        return []
    old = right(table, retrieval.queries, retrieval.before)
    new = right(table, retrieval.queries, retrieval.after)
    found = []
    for title, changed in (("became right", ~old & new), ("became wrong", old & ~new)):
        places = {int(retrieval.queries[place]): place for place in np.flatnonzero(changed)}
        shown = _spread(evidence, np.fromiter(places, dtype=np.int64, count=len(places)))[:RETRIEVALS]
        cards = []
        for row in shown:
            sides = (
                ("without", retrieval.before[places[row]]),
                ("with", retrieval.after[places[row]]),
            )
            cards.append(
                {
                    "query": _thumbnail(evidence, row),
                    "sides": [(side, [_answer(evidence, row, int(other)) for other in rows]) for side, rows in sides],
                }
            )
        found.append((title, len(places), cards))
    return found


def _answer(evidence: Evidence, query: int, row: int) -> tuple[Thumbnail, bool]:
    labels = evidence.table.labels
    return _thumbnail(evidence, row), bool(labels[query] == labels[row])


def _spread(evidence: Evidence, rows: NDArray[np.int64]) -> list[int]:
    """Rows in the order in which they are drawn, the environments taking turns."""
    turns: dict[int, int] = {}
    keyed = []
    for row in rows[np.argsort(evidence.ranks[rows])]:
        environment = int(evidence.table.environments[row])
        turns[environment] = turns.get(environment, -1) + 1
        keyed.append((turns[environment], int(evidence.ranks[row]), int(row)))
    return [row for _, _, row in sorted(keyed)]


def _thumbnail(evidence: Evidence, row: int) -> Thumbnail:
    picture, kind = evidence.pictures[row], int(evidence.table.kinds[row])
    changed = "" if kind < 0 else f", {evidence.table.kind_names[kind]}"
    return Thumbnail(
        src=data_uri(evidence.shown(row)),
        alt=f"{picture.name}, {picture.environment}{changed}",
        name=picture.name,
        environment=picture.environment,
    )
