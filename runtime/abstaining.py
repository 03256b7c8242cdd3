"""When to give no label: which uncertainty is meant, and above what of it an answer is "not sure"."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

from invariclip.errors import InputError
from invariclip.manifest import SemanticsFacts

CALIBRATED: Literal["calibrated"] = "calibrated"
"""Asks for the uncertainty that the artifact's templates were calibrated to abstain above."""
AbstainAbove: TypeAlias = float | Literal["calibrated"] | None
UncertaintyKind: TypeAlias = Literal["evidence", "energy"]
"""`evidence` of learned templates (see `evidence`), or the `energy` of the logits, which every artifact has."""
EVIDENCE: Literal["evidence"] = "evidence"
ENERGY: Literal["energy"] = "energy"
UNCERTAINTY_KINDS: tuple[UncertaintyKind, ...] = get_args(UncertaintyKind)
WITHOUT_EVIDENCE = (
    "the artifact has no learned templates, so its uncertainty is energy, not evidence; ask for energy, or train "
    "templates with `invariclip cdc` and export again with --cdc FILE"
)


def uncertainty_kind(learned: SemanticsFacts | None, asked: str | None = None) -> UncertaintyKind:
    """Which uncertainty is meant: the one asked for, else evidence where there are learned templates, else energy.

    Args:
        learned: The artifact's learned templates.
        asked: One of `UNCERTAINTY_KINDS`, or None.

    Raises:
        InputError: There is no such kind, or the artifact has no learned templates to have evidence of.
    """
    if asked is None:
        return EVIDENCE if learned is not None else ENERGY
    if asked not in UNCERTAINTY_KINDS:
        raise InputError(f"no uncertainty is called {asked!r:.60}; available: {', '.join(UNCERTAINTY_KINDS)}")
    if asked == EVIDENCE and learned is None:
        raise InputError(WITHOUT_EVIDENCE)
    return EVIDENCE if asked == EVIDENCE else ENERGY


def threshold(
    learned: SemanticsFacts | None, abstain_above: AbstainAbove, kind: UncertaintyKind | None = None
) -> float | None:
    """The uncertainty that is meant: the number itself, or what the templates were calibrated to for a target risk.

    Args:
        learned: The artifact's learned templates.
        abstain_above: From 0 to 1, or `CALIBRATED`; None never abstains.
        kind: Of which uncertainty; None takes `uncertainty_kind`'s choice.

    Raises:
        InputError: It is no uncertainty, the kind cannot be had, or `CALIBRATED` where nothing was calibrated.
    """
    kind = uncertainty_kind(learned, kind)
    if abstain_above is None:
        return None
    if abstain_above == CALIBRATED:
        if learned is None or kind == ENERGY:
            raise InputError(
                "only the evidence of learned templates is calibrated for a risk, energy is not; give a number from 0 "
                "to 1, or train templates with `invariclip cdc --target-risk R` and export again"
            )
        if learned.abstain_above is None:
            raise InputError(
                "the artifact's templates were not calibrated for a risk; give a number from 0 to 1, or train with "
                "`invariclip cdc --target-risk R` and export again"
            )
        return learned.abstain_above
    require_threshold(abstain_above)
    return float(abstain_above)


def require_threshold(abstain_above: object) -> None:
    """Refuses what is no uncertainty.

    Raises:
        InputError: It is not a number from 0 to 1.
    """
    number = isinstance(abstain_above, int | float) and not isinstance(abstain_above, bool)
    if not number or not 0 <= abstain_above <= 1:  # type: ignore[operator]
        raise InputError(
            f"the uncertainty to abstain above must be a number from 0 to 1 or {CALIBRATED!r}, not {abstain_above!r}"
        )
