"""The page of the transfer: fitted on drawings alone, scored on another set's images."""

from __future__ import annotations

from typing import Any

from invariclip.bench.studies.stylebench.evaluate_page import NAMES, above_auto, chosen, interval, table
from invariclip.bench.studies.stylebench.sources import HELD_OUT_STYLES
from invariclip.bench.studies.stylebench.world import ELSEWHERE_TEMPLATES


def render_transfer(result: dict[str, Any]) -> str:
    """The page; every figure in percent, means over seeds."""
    rows, domains = result["rows"], list(result["elsewhere"])
    change = rows["auto"]["difference"]
    held = [style for style in result["images"] if style not in HELD_OUT_STYLES]
    seeds = f"{result['seeds']} seeds" if result["seeds"] > 1 else "one seed"
    counts = ", ".join(f"{name} {count}" for name, count in result["elsewhere"].items())
    templates = " and ".join(f'"{template}"' for template in ELSEWHERE_TEMPLATES)
    body = [
        [
            NAMES.get(name, name),
            *(
                f"{scores[domain]['value']:.1f}"
                + ("" if name == "none" else f" ({scores['differences'][domain]['value']:+.1f})")
                for domain in domains
            ),
            interval(scores["mean"]),
            "" if name == "none" else interval(scores["difference"], signed=True),
            "" if scores["spread"] is None or name == "none" else f"± {scores['spread']:.1f}",
            chosen(scores["chosen"]),
        ]
        for name, scores in rows.items()
    ]
    parts = [
        "# Fitted on emoji, asked about PACS",
        f"A projection fitted and selected on pairs of emoji alone, zero-shot on PACS, mean over its domains: "
        f"{rows['none']['mean']['value']:.1f} % → {rows['auto']['mean']['value']:.1f} %, "
        f"**{interval(change, signed=True)} points**.",
        above_auto("Zero-shot on PACS", rows),
        *_worse(rows["auto"], domains),
        "## What was measured",
        f"- **Fitted and selected** on the training styles of [stylebench](stylebench.md) ({', '.join(held)}), for "
        "zero-shot, exactly as there: the rows are the very maps of its zero-shot table.\n"
        f"- **Scored** on PACS ({counts} images, every image that is at hand), among its {len(result['classes'])} "
        f"class names ({', '.join(result['classes'])}); the prompts are {templates}, their embeddings averaged. No "
        "image, name or domain of PACS enters a fit or a selection.\n"
        f"- **Encoder.** `{result['model']}` (sha256 `{result['checkpoint_sha256'][:16]}`), {result['width']} wide, "
        f"images in {result['precision']}; {seeds}.\n"
        "- **Brackets.** 95 % intervals by bootstrap over images within every domain and class, and over seeds; "
        "differences are paired. In parentheses: the difference of a domain. Other classes, domains and encoders are "
        "not covered.\n"
        "- **What was looked at while choosing.** Nothing of this table was chosen on PACS. But PACS with an earlier "
        "encoder was looked at when `calibrate`'s rule of selection was settled "
        "(`calibrate/projection/selection.py`), and figures "
        "of a quick ridge regression on it were in view when the reference was set out: people were taught to it "
        "because of them ([its card](../export/reference/reference/card.md)).",
        table(["", *domains, "mean", "to no projection", "seeds", "chosen"], body),
        "Made by `python -m invariclip.bench.studies.stylebench evaluate --pacs FOLDER`, with the table of stylebench.",
    ]
    return "\n\n".join(parts) + "\n"


def _worse(scores: dict[str, Any], domains: list[str]) -> list[str]:
    """Domains that what was chosen harms, surely."""
    changes = {domain: scores["differences"][domain] for domain in domains}
    harmed = [f"{domain} {interval(change, signed=True)}" for domain, change in changes.items() if change["high"] < 0]
    return [f"- **It is worse on** {', '.join(harmed)}."] if harmed else []
