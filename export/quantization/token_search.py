"""How few tokens a tower can do with: the cheapest schedule whose figures keep a contract's bounds.

Families of schedules with one parameter each are bisected, and the best is refined block by block. The engine is the
caller's: the search asks "figures for this schedule" and nothing else, at most as often as it may, and the same figures
lead to the same schedule. Whatever it returns was asked about and passed: that fewer tokens are never better, which
bisection assumes, only decides what is tried.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isnan
from typing import TYPE_CHECKING

from invariclip.errors import InputError
from invariclip.export.graphs.token_schedules import FAMILIES, written
from invariclip.export.verification.figures import failures

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from invariclip.export.graphs.token_schedules import MergeSchedules, Schedule, TowerShape
    from invariclip.export.verification.figures import Thresholds, TowerFigures


TRIALS = 14
"""Schedules that are asked about, unless the caller says otherwise: each is a trace and a run of the images."""
WORTH = 0.01
"""Share of the whole tower's cost that a trial has to promise over the best so far."""


@dataclass(frozen=True)
class Trial:
    """A schedule that was asked about.

    Attributes:
        schedule: Tokens left after each block but the last.
        flops: What an image costs, see `TowerShape.flops`.
        saving: Share of the whole tower's cost that it saves.
        figures: What was measured.
        broken: The bounds that it breaks, see `figures.failures`; empty where it passes.
    """

    schedule: Schedule
    flops: float
    saving: float
    figures: TowerFigures
    broken: dict[str, str]

    def __str__(self) -> str:
        """One line: tokens, saving, agreement, cosine, and what is broken by how much."""
        figures = self.figures
        return (
            f"{written(self.schedule)}: saves {self.saving:.1%}, top-1 {figures.top1_agreement:.2%}, cosine min "
            f"{figures.cosine_min:.5f} mean {figures.cosine_mean:.6f}: {'; '.join(self.broken.values()) or 'passes'}"
        )


@dataclass(frozen=True)
class SearchResult:
    """What a search came to.

    Attributes:
        best: The cheapest trial that passed; None where none did, or none could save anything.
        nearest: The failed trial that misses by least; None where all passed.
        trials: All, in the order in which they were asked.
        complete: Whether the search ended by itself; False where it ran out of trials.
    """

    best: Trial | None
    nearest: Trial | None
    trials: tuple[Trial, ...]
    complete: bool

    def lines(self) -> list[str]:
        """The search as a report."""
        best = "no schedule passes" if self.best is None else f"chosen: {self.best}"
        nearest = [] if self.nearest is None else [f"nearest miss: {self.nearest}"]
        end = [] if self.complete else [f"stopped after {len(self.trials)} trials; more may find a cheaper one"]
        return [best, *nearest, *end, *(f"{place}. {trial}" for place, trial in enumerate(self.trials, 1))]


def fewest_tokens(
    shape: TowerShape,
    ask: Callable[[Schedule], TowerFigures],
    bounds: Thresholds,
    *,
    trials: int = TRIALS,
    families: Sequence[MergeSchedules] = FAMILIES,
) -> SearchResult:
    """Searches for the cheapest schedule that keeps the bounds.

    The figures should come from other images than those that the chosen one is judged on afterwards: the best of many
    trials is partly luck.

    Args:
        shape: The tower.
        ask: A schedule → the figures of an image tower with it, by whatever engine and on whatever images.
        bounds: What must be kept.
        trials: How often `ask` is called at most, 1 or more.
        families: What is bisected, in this order.

    Raises:
        InputError: `trials` is below 1.
    """
    if trials < 1:
        raise InputError(f"a search needs 1 trial or more, not {trials}")
    search = _Search(shape, ask, bounds, trials)
    complete = all(search.bisect(family) for family in families) and search.refine()
    passed = [trial for trial in search.seen.values() if not trial.broken]
    failed = [trial for trial in search.seen.values() if trial.broken]
    return SearchResult(
        best=min(passed, key=lambda trial: (trial.flops, trial.schedule), default=None),
        nearest=max(failed, key=_nearness, default=None),
        trials=tuple(search.seen.values()),
        complete=complete,
    )


def _nearness(trial: Trial) -> tuple[float, ...]:
    """Fewer broken bounds, then the agreement, then the cosine; NaN is furthest."""
    values = (trial.figures.top1_agreement, trial.figures.cosine_min)
    return (-len(trial.broken), *(-1.0 if isnan(value) else value for value in values))


@dataclass
class _Search:
    """One search under way; methods return whether trials were left."""

    shape: TowerShape
    ask: Callable[[Schedule], TowerFigures]
    bounds: Thresholds
    trials: int
    seen: dict[Schedule, Trial] = field(default_factory=dict)
    best: Trial | None = None

    def passes(self, schedule: Schedule) -> bool | None:
        """Whether a schedule passes; None where no trial is left to find out."""
        known = self.seen.get(schedule)
        if known is None:
            if len(self.seen) >= self.trials:
                return None
            figures = self.ask(schedule)
            known = Trial(
                schedule,
                self.shape.flops(schedule),
                self.shape.saving(schedule),
                figures,
                failures("image", figures, self.bounds),
            )
            self.seen[schedule] = known
        if not known.broken and (self.best is None or known.flops < self.best.flops):
            self.best = known
        return not known.broken

    def worth(self, schedule: Schedule) -> bool:
        """Whether a schedule promises enough over the best so far, or over merging nothing."""
        least = WORTH if self.best is None else self.best.saving + WORTH
        return self.shape.saving(schedule) >= least

    def bisect(self, family: MergeSchedules) -> bool:
        """The cheapest of a family, if it beats the best so far."""
        members = sorted(family.members(self.shape), key=lambda schedule: (-self.shape.flops(schedule), schedule))
        members = [schedule for schedule in members if self.worth(schedule)]
        if not members:
            return True
        verdict: bool | None = None
        # with nothing found yet the middle tells most; with something found, whether the family has a chance at all
        if self.best is None:
            middle = len(members) // 2
            verdict = self.passes(members[middle])
            members = members[middle + 1 :] if verdict else members[:middle]
        if not verdict and members:
            # the dearest that is still worth it: where it fails, so do the cheaper ones
            verdict, members = self.passes(members[0]), members[1:]
            if not verdict:
                return verdict is not None
        members = [schedule for schedule in members if self.worth(schedule)]
        while verdict is not None and members:
            middle = len(members) // 2
            verdict = self.passes(members[middle])
            members = members[middle + 1 :] if verdict else members[:middle]
            members = [schedule for schedule in members if self.worth(schedule)]
        return verdict is not None

    def refine(self) -> bool:
        """Fewer tokens at one merge after the other, in ever smaller steps."""
        step = 2 ** (self.shape.tokens // 8).bit_length() // 2  # a power of two, so that even numbers stay even
        while step > 1 and self.best is not None:
            before = self.best
            for schedule in self._smaller(before.schedule, step):
                verdict = self.passes(schedule) if self.worth(schedule) else False
                if verdict is None:
                    return False
                if verdict:
                    break
            if self.best is before:
                step //= 2
        return True

    def _smaller(self, schedule: Schedule, step: int) -> Iterator[Schedule]:
        """The schedule with `step` tokens fewer after one of its merges, the one that saves most first."""
        schedules = set()
        previous = (self.shape.tokens, *schedule)
        for place, after in enumerate(schedule):
            if previous[place] == after:
                continue
            cut = [min(tokens, after - step) if at >= place else tokens for at, tokens in enumerate(schedule)]
            changed = self._allowed(cut)
            if changed is not None:
                schedules.add(changed)
            # the same tokens as before, a block earlier
            if place:
                earlier = self._allowed([*schedule[: place - 1], after, *schedule[place:]])
                if earlier is not None:
                    schedules.add(earlier)
        yield from sorted(schedules, key=lambda changed: (self.shape.flops(changed), changed))

    def _allowed(self, schedule: list[int]) -> Schedule | None:
        try:
            return self.shape.require(schedule)
        except InputError:
            return None
