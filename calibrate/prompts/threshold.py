"""The uncertainty above which to abstain, so that a target risk is kept with a given confidence.

With probability `confidence` over the held-back images, P(wrong | u ≤ threshold) ≤ target for images from the same
distribution. A threshold is accepted if the Clopper-Pearson upper bound of the risk of what it accepts is within the
target. Thresholds come from other images than those that test them, so each test is exact; they are tested in a fixed
order from strict to lenient, and the walk ends at the first that fails, so that many tests cost no more than one
(fixed-sequence testing, Bauer 1991; for risks: Angelopoulos et al., Learn then Test, 2021). The strictest thresholds
accept too few images to prove anything, and a chance error among few would end the walk: so there are several walks
with different starts, which share the allowed error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from numpy.typing import NDArray

GRID = 50
"""Thresholds that are tried."""
STARTS = 3
"""Walks: from two and six times the fewest images that could prove anything, and from half of all."""


@dataclass(frozen=True)
class Threshold:
    """What was found.

    Attributes:
        value: The uncertainty above which to abstain, or None: no threshold was proved to keep the target.
        target: Share of wrong answers that is allowed.
        confidence: With what probability it is kept.
        accepted: Held images at or below the threshold.
        wrong: Those of them that are answered wrong.
        bound: Upper bound of the risk of what is accepted, at the walk's own confidence.
        held: Images that were held back.
    """

    value: float | None
    target: float
    confidence: float
    accepted: int
    wrong: int
    bound: float
    held: int

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "abstain_above": self.value,
            "target_risk": self.target,
            "confidence": self.confidence,
            "accepted": self.accepted,
            "wrong": self.wrong,
            "bound": self.bound,
            "held": self.held,
        }

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> Threshold:
        """What `to_json` gave."""
        return cls(
            facts["abstain_above"], facts["target_risk"], facts["confidence"], facts["accepted"], facts["wrong"],
            facts["bound"], facts["held"],
        )  # fmt: skip

    def sentence(self) -> str:
        """In words."""
        promise = f"wrong answers ≤ {self.target:.1%} with {self.confidence:.0%} confidence"
        if self.value is None:
            return (
                f"no threshold was proved to keep {promise} on {self.held} held-back images; hold more back, or ask "
                "for a higher risk"
            )
        return (
            f"abstain above {self.value:.4g}: {promise}, on images like those held back; answers "
            f"{self.accepted} of {self.held}, {self.wrong} wrong"
        )


def choose_threshold(
    uncertainty: NDArray[np.floating[Any]],
    wrong: NDArray[np.bool_],
    grid: NDArray[np.floating[Any]],
    *,
    target: float,
    confidence: float,
) -> Threshold:
    """The largest threshold that is proved to keep the target.

    Args:
        uncertainty: u of the held-back images, [N].
        wrong: Which of them are answered wrong, bool [N].
        grid: u of other images, from which thresholds are taken; they may have been learned from.
        target: Share of wrong answers allowed among those given, between 0 and 1.
        confidence: With what probability that is kept, between 0 and 1.

    Raises:
        InputError: Nothing is held back, there is no grid, or a value is not between 0 and 1.
        MissingExtraError: scipy is not installed.
    """
    if not len(uncertainty) or not len(grid):
        raise InputError("a threshold needs images that are held back and others to take thresholds from")
    if not (0 < target < 1 and 0 < confidence < 1):
        raise InputError(f"target risk {target} and confidence {confidence} must lie between 0 and 1")
    thresholds = np.unique(np.quantile(grid, np.linspace(0, 1, GRID), method="inverted_cdf"))
    error = (1 - confidence) / STARTS
    # None wrong among so few proves it; where walks start must not depend on the held images, only on how many
    fewest = np.log(error) / np.log1p(-target)
    expected = len(uncertainty) * (grid[None, :] <= thresholds[:, None]).mean(axis=1)
    starts = np.searchsorted(expected, [2 * fewest, 6 * fewest, len(uncertainty) / 2])
    best: int | None = None
    for start in np.unique(starts):
        for place in range(start, len(thresholds)):
            accepted = uncertainty <= thresholds[place]
            if upper_bound(int(wrong[accepted].sum()), int(accepted.sum()), error) > target:
                break
            best = place if best is None else max(best, place)
    if best is None:
        return Threshold(None, target, confidence, 0, 0, 1.0, len(uncertainty))
    accepted = uncertainty <= thresholds[best]
    count, errors = int(accepted.sum()), int(wrong[accepted].sum())
    bound = upper_bound(errors, count, error)
    return Threshold(float(thresholds[best]), target, confidence, count, errors, bound, len(uncertainty))


def upper_bound(wrong: int, count: int, error: float) -> float:
    """Clopper and Pearson's upper bound of a probability: it is below the truth with probability `error` at most.

    Args:
        wrong: How often it happened.
        count: Of how many.
        error: The allowed error.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    if wrong >= count:
        return 1.0
    try:
        from scipy.stats import beta
    except ImportError:
        raise MissingExtraError('a threshold needs scipy: pip install "invariclip[calibrate]"') from None
    return float(beta.ppf(1 - error, wrong + 1, count - wrong))
