"""Images resampled within every environment and class, where classes are so few that they are no sample."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from invariclip.calibrate.projection.bootstrap import RESAMPLES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from invariclip.calibrate.projection.bootstrap import Scores


class Resampler(Protocol):
    """`Bootstrap`, or `Stratified`."""

    @property
    def codes(self) -> NDArray[np.int64]:
        """The environments' codes, in the order of the columns."""

    def samples(self, correct: Scores) -> NDArray[np.float64]:
        """Percent right, [1 + resamples, environments + 1], as `Bootstrap.samples` has it."""


class Stratified:
    """Accuracies per environment and their mean, images resampled within every environment and class."""

    def __init__(
        self, classes: NDArray[np.int64], environments: NDArray[np.int64], *, resamples: int = RESAMPLES, seed: int = 0
    ) -> None:
        """Draws the resamples.

        Args:
            classes: int64 [N].
            environments: int64 [N].
            resamples: How many.
            seed: Of the draws.
        """
        self.codes, self._environment = np.unique(environments, return_inverse=True)
        self._sizes = np.bincount(self._environment)
        cells = np.unique(np.stack([self._environment, classes]), axis=1, return_inverse=True)[1]
        rng = np.random.default_rng(seed)
        self._cells = []
        for cell in range(cells.max() + 1):
            members = np.flatnonzero(cells == cell)
            draws = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=resamples)
            weights = np.concatenate([np.ones((1, len(members)), np.int16), draws.astype(np.int16)])
            self._cells.append((members, int(self._environment[members[0]]), weights))
        self._resamples = resamples

    def samples(self, correct: Scores) -> NDArray[np.float64]:
        """Percent right, [1 + resamples, environments + 1]: row 0 as observed, the last column the environments' mean.

        Args:
            correct: bool [N], or shares of right answers from 0 to 1.
        """
        right = np.zeros((1 + self._resamples, len(self.codes)))
        for members, environment, weights in self._cells:
            right[:, environment] += weights @ correct[members].astype(np.float64)
        share = 100 * right / self._sizes
        return np.concatenate([share, share.mean(axis=1, keepdims=True)], axis=1)
