"""When to give no label: the uncertainty above which an answer is "not sure"."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from invariclip.errors import InputError

if TYPE_CHECKING:
    from invariclip.manifest import SemanticsFacts

CALIBRATED: Literal["calibrated"] = "calibrated"
"""Asks for the uncertainty that the artifact's templates were calibrated to abstain above."""
AbstainAbove: TypeAlias = "float | Literal['calibrated'] | None"
WITHOUT_UNCERTAINTY = (
    "the artifact has no learned templates, so its answers have no uncertainty; train some with `invariclip cdc` and "
    "export again with --cdc FILE"
)


def threshold(learned: SemanticsFacts | None, abstain_above: AbstainAbove) -> float | None:
    """The uncertainty that is meant: the number itself, or what the templates were calibrated to for a target risk.

    Args:
        learned: The artifact's learned templates.
        abstain_above: From 0 to 1, or `CALIBRATED`; None never abstains.

    Raises:
        InputError: It is no uncertainty, the artifact has no learned templates, or they were not calibrated.
    """
    if abstain_above is None:
        return None
    if learned is None:
        raise InputError(WITHOUT_UNCERTAINTY)
    if abstain_above == CALIBRATED:
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
