"""Which pairs and which retrievals the page shows: drawn by content and seed, never by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.calibrate.report.thumbnails import Thumbnail, data_uri

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from invariclip.calibrate.report.evidence import ReportEvidence
    from invariclip.calibrate.report.retrieval import Retrieval

CHANGED_PAIRS = 24
OF_A_KIND = 2
NATURAL_CONCEPTS = 6
NATURAL_ENVIRONMENTS = 6
RETRIEVALS, TEXTS = 4, 6
"""By the nearest image and by the nearest class text: of those that became right, and of those that became wrong."""


def changed_pairs(evidence: ReportEvidence) -> list[dict[str, Any]]:
    """Images beside their changed versions: of every kind the first ones drawn, if there is room."""
    table = evidence.table
    kinds = [int(kind) for kind in np.unique(table.kinds[~table.unchanged])]
    each = min(OF_A_KIND, max(1, CHANGED_PAIRS // max(1, len(kinds))))
    found = []
    for kind in kinds:
        rows = np.flatnonzero(table.kinds == kind)
        names = [evidence.images[row].environment for row in rows]
        for row in rows[_in_turns(evidence.ranks[rows], names)][:each].tolist():
            origin = int(table.origins[row])
            gap = 1 - float(table.vectors[row] @ table.vectors[origin])
            pair = {"kind": table.kind_names[kind], "gap": gap}
            found.append(pair | {"first": _thumbnail(evidence, origin), "second": _thumbnail(evidence, row)})
    return found[:CHANGED_PAIRS]


def natural_rows(evidence: ReportEvidence) -> list[dict[str, Any]]:
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
        images = [_thumbnail(evidence, row) for row in chosen]
        concept_name = table.concept_names[concept]
        name = images[0].name
        found.append({"name": name, "concept": "" if concept_name == name else concept_name, "images": images})
        if len(found) == NATURAL_CONCEPTS:
            break
    return found


@dataclass(frozen=True)
class Turned:
    """Queries whose answer turned right, or turned wrong.

    Attributes:
        title: Which of the two.
        count: How many there are.
        cards: The first ones drawn: `query` (a thumbnail) and `sides`, each a word and its answers, of which each is
            a thumbnail or None, a name, and whether it is of the query's class.
    """

    title: str
    count: int
    cards: list[dict[str, Any]]


def turned(evidence: ReportEvidence, retrieval: Retrieval, *, texts: bool) -> list[Turned]:
    """Queries that became right, and those that became wrong; none where there is no projection.

    Args:
        evidence: What they are drawn from.
        retrieval: Its retrieval.
        texts: Go by the nearest class text; by the nearest image otherwise.
    """
    answers = retrieval.texts if texts else retrieval.images
    if answers is None or answers.after is None:
        return []
    old, new = correct(evidence, retrieval, answers.before), correct(evidence, retrieval, answers.after)
    found = []
    for title, changed in (("became right", ~old & new), ("became wrong", old & ~new)):
        places = np.flatnonzero(changed)
        names = [retrieval.groups[place] for place in places]
        drawn = _in_turns(evidence.ranks[retrieval.queries[places]], names)[: TEXTS if texts else RETRIEVALS]
        sides = (("without", answers.before), ("with", answers.after))
        cards = [
            {
                "query": _thumbnail(evidence, int(retrieval.queries[place])),
                "sides": [(word, _found(evidence, retrieval, place, side[place], texts)) for word, side in sides],
            }
            for place in places[drawn]
        ]
        found.append(Turned(title, len(places), cards))
    return found


def correct(evidence: ReportEvidence, retrieval: Retrieval, nearest: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether what is nearest is of the query's class, bool [Q].

    Args:
        evidence: Knows the classes.
        retrieval: The queries.
        nearest: int64 [Q, T], one side of the retrieval's answers.
    """
    labels = evidence.table.labels
    texts = retrieval.texts is not None and (nearest is retrieval.texts.before or nearest is retrieval.texts.after)
    return np.asarray((nearest[:, 0] if texts else labels[nearest[:, 0]]) == labels[retrieval.queries])


def _found(
    evidence: ReportEvidence, retrieval: Retrieval, place: int, codes: NDArray[np.int64], texts: bool
) -> list[tuple[Thumbnail | None, str, bool]]:
    table = evidence.table
    own = table.labels[retrieval.queries[place]]
    if texts:
        return [(None, table.label_names[code], bool(code == own)) for code in codes.tolist()]
    images = [_thumbnail(evidence, row) for row in codes.tolist()]
    return [(item, item.name, bool(table.labels[row] == own)) for item, row in zip(images, codes, strict=True)]


def _in_turns(ranks: NDArray[np.int64], groups: Sequence[str]) -> list[int]:
    """Places in the order in which they are drawn, the groups taking turns."""
    turns: dict[str, int] = {}
    keyed = []
    for place in np.argsort(ranks).tolist():
        turns[groups[place]] = turns.get(groups[place], -1) + 1
        keyed.append((turns[groups[place]], int(ranks[place]), place))
    return [place for _, _, place in sorted(keyed)]


def _thumbnail(evidence: ReportEvidence, row: int) -> Thumbnail:
    image, kind = evidence.images[row], int(evidence.table.kinds[row])
    changed = "" if kind < 0 else f", {evidence.table.kind_names[kind]}"
    return Thumbnail(data_uri(evidence.shown(row)), image.name, image.environment + changed)
