"""How closely a variant answers like its checkpoint: three levels, judged at export, chosen from at run time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

Fidelity = Literal["exact", "near", "fast"]
"""`exact`: rounding of float32 alone (cosine ≥ 0.999999, the same best matches). `near`: cosine ≥ 0.9999 on every
image. `fast`: the same best match on at least 99.5 % of them. The bounds are in `export.contract.figures`."""
LEVELS: tuple[Fidelity, ...] = get_args(Fidelity)
"""Closest first."""


def require_level(level: str) -> Fidelity:
    """The level of this name.

    Raises:
        InputError: There is none.
    """
    for known in LEVELS:
        if level == known:
            return known
    raise InputError(f"no fidelity is called {level!r}; available: {', '.join(LEVELS)}")


def reaches(record: Mapping[str, Any], level: Fidelity) -> bool:
    """Whether what was measured of a variant on one engine keeps a level's bounds.

    Args:
        record: One backend's entry of `Variant.parity`; a level passes only if its own bounds were tried and kept, so
            a record that says nothing of a level does not reach it.
        level: What is asked for.
    """
    kept = record.get("fidelity")
    return record.get("passed") is True and isinstance(kept, list) and level in kept


def reached(record: Mapping[str, Any]) -> Fidelity | None:
    """The closest level that a record reaches, or None."""
    return next((level for level in LEVELS if reaches(record, level)), None)
