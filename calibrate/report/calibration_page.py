"""The page of a calibration: one self-contained HTML file, with a table of figures below every plot.

Example pairs and retrievals are drawn by content and seed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.calibrate.data.problems import ProblemCounts
from invariclip.calibrate.projection.bootstrap import Bootstrap
from invariclip.calibrate.projection.folds import CHANGED
from invariclip.calibrate.projection.selection import Selection
from invariclip.calibrate.report.evidence import ReportEvidence, chosen_candidate
from invariclip.calibrate.report.plots import Bar, bar_plot, curve_plot, curves, spectrum_plot
from invariclip.calibrate.report.rendering import Thumbnail, data_uri, skipped_by_reason, write_html
from invariclip.calibrate.report.retrieval import NEAREST, Retrieval, RetrievedRanks
from invariclip.calibrate.report.verdict import conclude, signed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from invariclip.calibrate.fit import Calibration, FitOptions
    from invariclip.calibrate.report.evidence import Change, ReportEvidence
    from invariclip.calibrate.report.retrieval import Retrieval

CHANGED_PAIRS = 24
OF_A_KIND = 2
NATURAL_CONCEPTS = 6
NATURAL_ENVIRONMENTS = 6
RETRIEVALS, TEXTS = 4, 6
"""By the nearest image and by the nearest class text: of those that became right, and of those that became wrong."""
TEMPLATE = Path(__file__).with_name("calibration_page.html")
SPECTRUM_ROWS = 25
KNOWN_FACTS = (
    "problems",
    "images",
    "concepts",
    "environments",
    "unpaired_concepts",
    "skipped",
    "declined",
    "images_sha256",
    "natural_pairs",
    "interventional_pairs",
    "caption_pairs",
    "kept_variation",
    "kept_movement",
)
"""What the page says in words; other facts are shown as they are."""


def changed_pairs(evidence: ReportEvidence) -> list[dict[str, Any]]:
    """Images beside their changed versions: of every kind the first ones drawn, if there is room."""
    table = evidence.table
    kinds = [int(kind) for kind in np.unique(table.kinds[~table.unchanged])]
    each = min(OF_A_KIND, max(1, CHANGED_PAIRS // max(1, len(kinds))))
    cards = []
    for kind in kinds:
        rows = np.flatnonzero(table.kinds == kind)
        names = [evidence.origins.images[row].environment for row in rows]
        for row in rows[_in_turns(evidence.ranks[rows], names)][:each].tolist():
            origin = int(table.origins[row])
            gap = 1 - float(table.vectors[row] @ table.vectors[origin])
            pair = {"kind": table.kind_names[kind], "gap": gap}
            cards.append(pair | {"first": _thumbnail(evidence, origin), "second": _thumbnail(evidence, row)})
    return cards[:CHANGED_PAIRS]


def natural_rows(evidence: ReportEvidence) -> list[dict[str, Any]]:
    """Concepts in their environments: the first ones drawn of those that stand in two or more."""
    table, cards = evidence.table, []
    rows = np.flatnonzero(table.unchanged)
    by_concept: dict[int, dict[int, int]] = {}
    for row in rows[np.argsort(evidence.ranks[rows])]:
        by_concept.setdefault(int(table.concepts[row]), {}).setdefault(int(table.environments[row]), int(row))
    for concept, members in by_concept.items():
        if len(members) < 2:
            continue
        chosen = [members[environment] for environment in sorted(members)][:NATURAL_ENVIRONMENTS]
        images = [_thumbnail(evidence, row) for row in chosen]
        concept_name = table.concept_names[concept]
        name = images[0].name
        cards.append({"name": name, "concept": "" if concept_name == name else concept_name, "images": images})
        if len(cards) == NATURAL_CONCEPTS:
            break
    return cards


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
    groups = []
    for title, changed in (("became right", ~old & new), ("became wrong", old & ~new)):
        places = np.flatnonzero(changed)
        names = [retrieval.groups[place] for place in places]
        drawn = _in_turns(evidence.ranks[retrieval.queries[places]], names)[: TEXTS if texts else RETRIEVALS]
        sides = (("without", answers.before), ("with", answers.after))
        cards = [
            {
                "query": _thumbnail(evidence, int(retrieval.queries[place])),
                "sides": [(word, _retrieved(evidence, retrieval, place, side[place], texts)) for word, side in sides],
            }
            for place in places[drawn]
        ]
        groups.append(Turned(title, len(places), cards))
    return groups


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


def _retrieved(
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
    image, kind = evidence.origins.images[row], int(evidence.table.kinds[row])
    changed = "" if kind < 0 else f", {evidence.table.kind_names[kind]}"
    return Thumbnail(data_uri(evidence.encoder_input(row)), image.name, image.environment + changed)


def write_page(path: Path, result: Calibration, options: FitOptions, evidence: ReportEvidence) -> None:
    """Renders the page and writes it atomically.

    Args:
        path: The .html file.
        result: What `calibrate` returned.
        options: Its options.
        evidence: From `evidence.gather`.

    Raises:
        InputError: The file cannot be written, or an image cannot be read any more.
    """
    if result.selection is not None:
        # Rounded as in the projection's file: the page of a finished run is then the same as that of the run itself.
        result = replace(result, selection=Selection.from_json(result.selection.to_json()))
    candidate, facts = chosen_candidate(options, result), result.facts
    write_html(
        path,
        TEMPLATE,
        projection=result.projection,
        selection=result.selection,
        facts=facts,
        chosen=candidate,
        projected=candidate.estimator != "identity",
        conclusion=conclude(result, options),
        environments=_environments(result),
        curves=[curve_plot(curve, candidate) for curve in curves(result.selection)] if result.selection else [],
        spectrum=_spectrum(result, str(candidate)),
        changed=changed_pairs(evidence),
        natural=natural_rows(evidence),
        retrieval=_retrieval(evidence),
        concepts_left_out=evidence.concepts_left_out,
        gaps=_gaps(evidence),
        leakage=_leakage(evidence),
        skipped=skipped_by_reason(facts["skipped"], evidence.paths),
        problems=ProblemCounts.from_json(facts["problems"]).lines(),
        options=json.dumps(options.to_json(), indent=2, ensure_ascii=False),
        other_facts={
            name: json.dumps(facts[name], indent=2, ensure_ascii=False, sort_keys=True)
            for name in sorted(facts)
            if name not in KNOWN_FACTS
        },
        signed=signed,
        nearest=NEAREST,
    )


def _environments(result: Calibration) -> dict[str, Any] | None:
    """Right answers for everything that was left out, before and after."""
    if result.selection is None:
        return None
    scored = result.selection.result()
    projected = scored.candidate.estimator != "identity"
    bars = [
        Bar(name, before, scored.accuracy[name] if projected else None)
        for name, before in result.selection.baseline().accuracy.items()
    ]
    return {
        "bars": bars,
        "changed": any(bar.name.endswith(CHANGED) for bar in bars),
        "plot": bar_plot("Right answers where it was left out", bars, unit="% right"),
    }


def _spectrum(result: Calibration, name: str) -> dict[str, Any] | None:
    values = result.projection.eigenvalues
    if not len(values):
        return None
    places = np.unique(np.linspace(0, len(values) - 1, min(SPECTRUM_ROWS, len(values))).round().astype(int))
    return {
        "plot": spectrum_plot(values, f"Spectrum of {name}", result.projection.rank),
        "rows": [(int(place) + 1, float(values[place])) for place in places],
    }


def _retrieval(evidence: ReportEvidence) -> dict[str, Any] | None:
    """The nearest images and class texts: how often right, and examples that turned."""
    retrieval = evidence.retrieval
    if retrieval is None:
        return None
    sections = [("Nearest image", retrieval.images, False), ("Nearest class text", retrieval.texts, True)]
    return {
        "left_out": retrieval.left_out,
        "sections": [
            {
                "title": title,
                "rows": _retrieval_rows(evidence, retrieval, answers),
                "turned": turned(evidence, retrieval, texts=texts),
            }
            for title, answers, texts in sections
            if answers is not None
        ],
    }


def _retrieval_rows(evidence: ReportEvidence, retrieval: Retrieval, answers: RetrievedRanks) -> list[dict[str, Any]]:
    """Per group of queries and over all of them: how often the nearest is of the query's class."""
    before = correct(evidence, retrieval, answers.before)
    after = before if answers.after is None else correct(evidence, retrieval, answers.after)
    names, groups = np.unique(np.asarray(retrieval.groups), return_inverse=True)
    bootstrap = Bootstrap(evidence.table.concepts[retrieval.queries], groups, seed=evidence.seed)
    masks = [groups == code for code in range(len(names))] + [np.ones(len(groups), dtype=np.bool_)]
    return [
        {
            "name": name,
            "queries": int(mask.sum()),
            "before": old,
            "after": new,
            "fixed": int((mask & ~before & after).sum()),
            "broken": int((mask & before & ~after).sum()),
        }
        for name, mask, old, new in zip(
            [*names.tolist(), "mean"], masks, bootstrap.intervals(before), bootstrap.intervals(after), strict=True
        )
    ]


def _gaps(evidence: ReportEvidence) -> dict[str, Any] | None:
    if evidence.gaps is None:
        return None
    bars = _bars(evidence.gaps.kinds)
    plot = bar_plot("Distance of a pair's two members", bars, unit="% of the distance of images of two classes")
    return {"kinds": evidence.gaps.kinds, "apart": evidence.gaps.apart, "plot": plot}


def _leakage(evidence: ReportEvidence) -> dict[str, Any] | None:
    if not evidence.leakage:
        return None
    chance = 100 / len(np.unique(evidence.table.environments[evidence.table.unchanged]))
    plot = bar_plot(
        "Environment told from an embedding", _bars(evidence.leakage), unit="% right", reference=(chance, "chance")
    )
    return {"rows": evidence.leakage, "chance": chance, "plot": plot}


def _bars(changes: Sequence[Change]) -> list[Bar]:
    return [Bar(change.name, change.before, change.after) for change in changes]
