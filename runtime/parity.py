"""The parity figures that a manifest carries, as people read them: a row per figure, a column per tower."""

from __future__ import annotations

from typing import Any

from invariclip.console import table

PARITY_HEADER = ["figure", "image", "text", "bound"]
_FIGURES = (
    # key, heading, format, bound
    ("items", "items", "d", ""),
    ("max_abs_diff", "max |Δ|", ".2e", "max_abs_diff"),
    ("cosine_min", "cosine min", ".8f", "min_cosine"),
    ("cosine_mean", "cosine mean", ".8f", ""),
    ("top1_agreement", "top-1 agreement", ".2%", "min_top1"),
    ("top1_of", "best match sought among", "d", ""),
    ("top1_ties", "ties of best match", "d", ""),
    ("probability_diff", "probability max |Δ|", ".2e", "max_probability_diff"),
    ("batch_diff", "alone or in a batch, max |Δ|", ".2e", "max_batch_diff"),
    ("rerun_diff", "run to run, max |Δ|", ".2e", "max_rerun_diff"),
    ("non_finite", "NaN or infinite", "d", ""),
)


def parity_rows(parity: dict[str, Any]) -> list[list[str]]:
    """The rows under `PARITY_HEADER` of one variant's `parity`; a figure that no tower has is left out."""
    rows = []
    for key, heading, form, bound in _FIGURES:
        cells = [_cell(parity[tower].get(key), form) for tower in ("image", "text")]
        if any(cell != "–" for cell in cells):
            rows.append([heading, *cells, f"{parity['thresholds'][bound]:g}" if bound else ""])
    return rows


def parity_table(parity: dict[str, Any]) -> str:
    """The same as aligned text."""
    return table(PARITY_HEADER, parity_rows(parity))


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
