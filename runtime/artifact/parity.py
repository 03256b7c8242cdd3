"""The parity figures that a manifest carries, as people read them: a row per figure, a column per tower.

A variant's `parity` is {backend: record}. A record is flat: `reference` (what was compared with), `engine` (what ran),
`image` and `text` (figure to number, null where there is none or it was NaN; `failed` names those that broke a bound),
`unreadable_images`, `too_large_images` (not shown to a graph's own resize), `level` (the fidelity that was asked
for), `fidelity` (the levels whose bounds it keeps), `thresholds` (of the level asked for), `causes` (what was found to
be wrong, in words) and `passed`.
"""

from __future__ import annotations

import math
from typing import Any

from invariclip.console import table
from invariclip.errors import ArtifactError

PARITY_HEADER = ["figure", "image", "text", "bound"]
_FIGURES = (
    # key, heading, format, bound, its direction
    ("items", "items", "d", "", ""),
    ("max_abs_diff", "max |Δ|", ".2e", "max_abs_diff", "≤"),
    ("batch_1", "max |Δ|, batches of 1", ".2e", "max_abs_diff", "≤"),
    ("batch_2", "max |Δ|, batches of 2", ".2e", "max_abs_diff", "≤"),
    ("batch_5", "max |Δ|, batches of 5", ".2e", "max_abs_diff", "≤"),
    ("batch_17", "max |Δ|, batches of 17", ".2e", "max_abs_diff", "≤"),
    ("cosine_min", "cosine min", ".8f", "min_cosine", "≥"),
    ("cosine_mean", "cosine mean", ".8f", "", ""),
    ("top1_agreement", "top-1 agreement", ".2%", "min_top1", "≥"),
    ("top5_agreement", "top-5 agreement", ".2%", "min_top5", "≥"),
    ("top1_of", "best matches sought among", "d", "", ""),
    ("top1_ties", "ties of best match", "d", "", ""),
    ("top5_ties", "ties of five best", "d", "", ""),
    ("probability_diff", "probability max |Δ|", ".2e", "max_probability_diff", "≤"),
    ("uncertainty_diff", "uncertainty max |Δ|", ".2e", "max_uncertainty_diff", "≤"),
    ("order_gap", "ranking of all classes, cosine out of order", ".1e", "max_order_gap", "≤"),
    ("gap_reference", "invariance gap of the reference", ".5f", "", ""),
    ("gap", "invariance gap", ".5f", "", ""),
    ("gap_increase", "invariance gap's increase", ".1e", "max_invariance_gap", "≤"),
    ("batch_diff", "alone or in a batch, max |Δ|", ".2e", "max_batch_diff", "≤"),
    ("rerun_diff", "run to run, max |Δ|", ".2e", "max_rerun_diff", "≤"),
    ("non_finite", "NaN or infinite", "d", "", ""),
    ("pixel_levels", "pixels, levels from open_clip's", ".3g", "max_pixel_levels", "≤"),
    ("front_levels", "resize in the graph, levels from the host's", ".3g", "max_front_levels", "≤"),
    ("front_cosine", "resize in the graph, cosine min", ".6f", "min_front_cosine", "≥"),
)
AGREEMENT = "top1_agreement"
Z = 1.959963984540054
"""The normal distribution's 97.5 % point: intervals hold 95 %."""
FAILED = "✗"
"""Stands behind a figure that broke its bound."""


def parity_rows(record: dict[str, Any]) -> list[list[str]]:
    """The rows under `PARITY_HEADER` of one backend's record; a figure that no tower has is left out."""
    rows = []
    for key, heading, form, bound, direction in _FIGURES:
        cells = [_cell(record[tower], key, form) for tower in ("image", "text")]
        if any(cell != "–" for cell in cells):
            rows.append([heading, *cells, f"{direction} {record['thresholds'][bound]:g}" if bound else ""])
        if key == AGREEMENT and record["thresholds"][bound] < 1:  # exact answers are bounded by their numbers
            intervals = [_interval(record[tower]) for tower in ("image", "text")]
            rows.append(["  on others like these, 95 %", *intervals, ""])
    return rows


def agreement_interval(agreement: float, items: int) -> tuple[float, float]:
    """Where the share lies on all inputs of a kind, if it is `agreement` on `items` drawn from them: 95 %.

    Wilson's score interval (Journal of the American Statistical Association 22, 1927, p. 209).
    """
    middle = agreement + Z * Z / (2 * items)
    half = Z * math.sqrt(agreement * (1 - agreement) / items + Z * Z / (4 * items * items))
    scale = 1 + Z * Z / items
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def items_needed(share: float) -> int:
    """How many inputs, without a miss among them, show that a share below 1 is reached on others like them."""
    return math.ceil(Z * Z * share / (1 - share))


def parity_table(record: dict[str, Any]) -> str:
    """The same as aligned text.

    Raises:
        ArtifactError: The record lacks figures or bounds, or has other types: the manifest keeps it as it is.
    """
    try:
        return table(PARITY_HEADER, parity_rows(record))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"a parity record cannot be read ({type(error).__name__}: {error}); export the artifact again"
        ) from error


def _interval(figures: dict[str, Any]) -> str:
    agreement, items = figures.get(AGREEMENT), figures.get("items")
    if agreement is None or not items:
        return "–"
    return "{:.1%} to {:.1%}".format(*agreement_interval(agreement, items))


def _cell(figures: dict[str, Any], key: str, form: str) -> str:
    value, failed = figures.get(key), key in figures.get("failed", ())
    if value is None:
        return f"NaN {FAILED}" if failed else "–"
    return format(value, form) + (f" {FAILED}" if failed else "")
