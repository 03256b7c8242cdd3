"""The page of a calibration: one HTML file that needs no other, with every plot's figures in a table below it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.calibrate.data.stream.tally import ProblemCounts
from invariclip.calibrate.projection.evaluate import Bootstrap
from invariclip.calibrate.projection.folds import CHANGED
from invariclip.calibrate.projection.selection import Selection
from invariclip.calibrate.report.evidence import ReportEvidence, chosen_candidate
from invariclip.calibrate.report.examples import changed_pairs, correct, natural_rows, turned
from invariclip.calibrate.report.rendering import write_html
from invariclip.calibrate.report.plots import Bar, bar_plot, curve_plot, curves, spectrum_plot
from invariclip.calibrate.report.retrieval import NEAREST, Retrieval, RetrievedRanks
from invariclip.calibrate.report.verdict import conclude, signed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from invariclip.calibrate.fit import Calibration, FitOptions
    from invariclip.calibrate.report.measures import Change

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


def write_page(path: Path, result: Calibration, options: FitOptions, evidence: ReportEvidence) -> None:
    """Renders the page and writes it atomically.

    Args:
        path: The .html file.
        result: What `calibrate` returned.
        options: What it was asked for.
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
        skipped=skipped_by_reason(facts["skipped"], evidence.given),
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


def skipped_by_reason(skipped: Sequence[str], paths: frozenset[str]) -> list[tuple[str, int, str]]:
    """What was skipped, the most frequent reason first: the reason, how many, and one of the files.

    Args:
        skipped: Lines `path: reason`.
        paths: All files that were given: a path may hold a colon of its own.
    """
    reasons: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for line in skipped:
        parts = line.split(": ")
        ends = (count for count in range(1, len(parts)) if ": ".join(parts[:count]) in paths)
        count = next(ends, 0)
        path, reason = ": ".join(parts[:count]), ": ".join(parts[count:])
        reasons[reason] += 1
        examples.setdefault(reason, Path(path).name)
    return [(reason, count, examples[reason]) for reason, count in reasons.most_common()]


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
    shown = np.unique(np.linspace(0, len(values) - 1, min(SPECTRUM_ROWS, len(values))).round().astype(int))
    return {
        "plot": spectrum_plot(values, f"Spectrum of {name}", result.projection.rank),
        "rows": [(int(place) + 1, float(values[place])) for place in shown],
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
                "rows": _found(evidence, retrieval, answers),
                "turned": turned(evidence, retrieval, texts=texts),
            }
            for title, answers, texts in sections
            if answers is not None
        ],
    }


def _found(evidence: ReportEvidence, retrieval: Retrieval, answers: RetrievedRanks) -> list[dict[str, Any]]:
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
