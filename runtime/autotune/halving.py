"""Successive halving: all candidates get few rounds, the better half more, in turns that are paired with the default.

Every candidate lives in a process of its own. In a round each has one short turn, beginning with another one each
round, and so has the safe default: a ratio compares turns of the same round, because machines drift. Where memory does
not hold all processes at once they run in heats, which the default's part in each of them makes comparable.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from invariclip.autotune.checks import IMAGES, disagreement
from invariclip.autotune.verdict import MeasuredCandidate, Timed, survivors
from invariclip.autotune.worker import TuneWorker
from invariclip.errors import ContractError, UntrueVariantWarning
from invariclip.measure.worker import WorkerError, rotated

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.autotune.candidates import TuneCandidate
    from invariclip.console import Progress
    from invariclip.profile import Objective

LONGEST_TURN, SHORTEST_TURN = 0.2, 0.02
"""Seconds that a turn should last; one batch is timed anyway."""
PAUSE = 0.03
"""Seconds before a turn; shorter than the benches', because a search has a minute for everything."""


@dataclass(frozen=True)
class Stage:
    """One stage of the search.

    Attributes:
        rounds: Turns that every entry gets if there is time.
        least: Turns that it gets anyway. The range of six rounds holds their median 97 times in 100, that of three 75.
        batches: Batch sizes that every candidate left is timed at; None keeps to the entries that are left.
        share: Of the time, in parts.
    """

    rounds: int
    least: int
    batches: tuple[int, ...] | None
    share: float


def stages_for(objective: Objective, batches: tuple[int, ...]) -> tuple[Stage, ...]:
    """The stages; throughput first compares engines at one batch size and then the better ones at all.

    Args:
        objective: What is sought.
        batches: Batch sizes, ascending; one for latency.
    """
    if objective == "latency":
        return Stage(3, 3, batches, 2), Stage(5, 3, None, 3), Stage(11, 6, None, 5)
    return Stage(3, 3, (middle(batches),), 2), Stage(3, 3, batches, 4), Stage(9, 6, None, 4)


def middle(batches: tuple[int, ...]) -> int:
    """The batch size that the default is timed at."""
    return batches[(len(batches) - 1) // 2]


@dataclass
class Search:
    """A search as it goes; what was measured stays in it when it is interrupted. Use it as a context.

    Attributes:
        folder: The artifact's.
        yardstick: The safe default, which every ratio is against.
        yard_batch: The batch size that it is timed at.
        seats: How many processes may live at once, at least 2.
        progress: `console.bar` or `console.silent`.
        timed: The latest turns of every entry.
        turn: Seconds that a turn should last.
        left_out: `candidate` and `why` of those that were refused or stopped.
    """

    folder: Path
    yardstick: TuneCandidate
    yard_batch: int
    seats: int
    progress: Progress
    timed: dict[MeasuredCandidate, Timed] = field(default_factory=dict)
    turn: float = LONGEST_TURN
    left_out: list[dict[str, str]] = field(default_factory=list)
    _open: dict[TuneCandidate, TuneWorker] = field(default_factory=dict)
    _wanted: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    def __enter__(self) -> Search:
        """Opens the safe default and asks it for the answers that others must give.

        Raises:
            ContractError: It cannot be opened, or answers NaN on this machine.
        """
        name = self.yardstick.name
        try:
            process = self._open[self.yardstick] = TuneWorker(self.folder, self.yardstick)
            answers = process.images(IMAGES)
            if not np.isfinite(answers).all():
                raise ContractError(f"{self.folder}: the safe default, {name}, answers NaN on this machine")
        except WorkerError as error:
            self.__exit__()
            raise ContractError(f"{self.folder}: the safe default, {name}, fails here: {error.reason}") from error
        except BaseException:  # Ctrl-C too must leave no process behind
            self.__exit__()
            raise
        self._wanted["images"] = answers
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._open.values():
            process.close()
        self._open.clear()

    def run(self, candidates: Sequence[TuneCandidate], stages: Sequence[Stage], seconds: float) -> list[Timed]:
        """Times the candidates, stage by stage.

        Args:
            candidates: At least one.
            stages: At least one.
            seconds: How long all of it should take; a stage that has begun gets its first rounds anyway.

        Returns:
            The finalists, timed in the same rounds.

        Raises:
            ContractError: The safe default stopped.
        """
        end = time.monotonic() + seconds
        self.turn = min(LONGEST_TURN, max(SHORTEST_TURN, seconds / 300))
        left = [MeasuredCandidate(candidate, self.yard_batch) for candidate in candidates]
        timed: list[Timed] = []
        for number, stage in enumerate(stages, start=1):
            if stage.batches is not None:
                among = list(dict.fromkeys(entry.candidate for entry in left))
                left = [MeasuredCandidate(candidate, batch) for candidate in among for batch in stage.batches]
            part = stage.share / sum(later.share for later in stages[number - 1 :])
            until = time.monotonic() + max(0.0, end - time.monotonic()) * part
            timed = []
            for heat in self._heats(left):
                timed += self._heat(heat, stage, number, until)
            if number < len(stages):
                left = self._go_on(timed)
        return timed

    def recheck(self, entry: MeasuredCandidate) -> str:
        """What is wrong with a finalist's answers in its own batch size, alone, and to texts; empty if nothing."""
        try:
            process, default = self._open[entry.candidate], self._open[self.yardstick]
            for batch in sorted({1, entry.batch}):
                problem = disagreement(process.images(batch), self._wanted["images"], entry.candidate.claimed)
                if problem:
                    return f"in batches of {batch}: {problem}"
            if "texts" not in self._wanted:
                self._wanted["texts"] = default.texts()
            problem = disagreement(process.texts(), self._wanted["texts"], entry.candidate.claimed)
        except WorkerError as error:
            return error.reason
        return problem and f"texts: {problem}"

    def refuse(self, candidate: TuneCandidate, why: str) -> None:
        """Leaves a candidate out that does not answer as its record says, and warns of it."""
        self._leave_out(candidate, f"does not answer here as its record says: {why}")
        warnings.warn(f"{candidate.name}: {self.left_out[-1]['why']}", UntrueVariantWarning, stacklevel=2)

    def _leave_out(self, candidate: TuneCandidate, why: str) -> None:
        self.left_out.append({"candidate": candidate.name, "why": why})
        for entry in [entry for entry in self.timed if entry.candidate == candidate]:
            del self.timed[entry]
        process = self._open.pop(candidate, None)
        if process is not None:
            process.close()

    def _go_on(self, timed: Sequence[Timed]) -> list[MeasuredCandidate]:
        """The entries of the next stage, which is one heat: as many candidates as have a seat.

        The default is timed in any case, so where it may be picked it stays to the end.
        """
        default = [one.entry for one in timed if one.entry == MeasuredCandidate(self.yardstick, self.yard_batch)]
        others = [one for one in timed if one.entry not in default]
        return [one.entry for one in survivors(others, self.seats - 1)] + default

    def _heats(self, entries: Sequence[MeasuredCandidate]) -> list[list[MeasuredCandidate]]:
        """Entries by as many candidates as have a seat beside the default."""
        among = list(dict.fromkeys(entry.candidate for entry in entries))
        others = [candidate for candidate in among if candidate != self.yardstick]
        size = max(1, self.seats - 1)
        groups = [others[start : start + size] for start in range(0, len(others), size)] or [[]]
        if self.yardstick in among:
            groups[0] = [self.yardstick, *groups[0]]
        return [[entry for entry in entries if entry.candidate in group] for group in groups]

    def _seat(self, candidates: Sequence[TuneCandidate]) -> None:
        """Ends processes that are not needed, opens those that are, and refuses those that answer wrongly."""
        for candidate in [held for held in self._open if held not in candidates and held != self.yardstick]:
            self._open.pop(candidate).close()
        missing = [candidate for candidate in candidates if candidate not in self._open]
        for candidate in self.progress(missing, total=len(missing), desc="open candidates"):
            try:
                process = self._open[candidate] = TuneWorker(self.folder, candidate)
                problem = disagreement(process.images(IMAGES), self._wanted["images"], candidate.claimed)
            except WorkerError as error:
                self._leave_out(candidate, error.reason)
                continue
            if problem:
                self.refuse(candidate, problem)

    def _heat(self, entries: Sequence[MeasuredCandidate], stage: Stage, number: int, until: float) -> list[Timed]:
        """Turns of these entries and of the default; those that stop are left out."""
        self._seat(list(dict.fromkeys(entry.candidate for entry in entries)))
        yard = MeasuredCandidate(self.yardstick, self.yard_batch)
        runs = [yard, *(entry for entry in entries if entry != yard and entry.candidate in self._open)]
        repetitions: dict[MeasuredCandidate, int] = {}
        turns: dict[MeasuredCandidate, list[float]] = {entry: [] for entry in runs}
        self._each(runs, lambda entry: repetitions.__setitem__(entry, self._warm_up(entry)))
        wanted = [entry for entry in entries if entry in turns]
        for round_ in self.progress(
            range(stage.rounds), total=stage.rounds, desc=f"stage {number}, {len(runs)} in turn"
        ):
            alive = [entry for entry in runs if entry.candidate in self._open]
            self._each(rotated(alive, round_), lambda entry: turns[entry].append(self._turn(entry, repetitions[entry])))
            for entry in wanted:
                if entry.candidate in self._open:
                    self.timed[entry] = _timed(entry, turns[entry], yard, turns[yard], number)
            if round_ + 1 >= stage.least and time.monotonic() > until:
                break
        return [self.timed[entry] for entry in wanted if entry.candidate in self._open]

    def _each(self, entries: Sequence[MeasuredCandidate], do: Callable[[MeasuredCandidate], None]) -> None:
        """Does something with every entry whose process lives.

        Raises:
            ContractError: The safe default stopped.
        """
        for entry in entries:
            if entry.candidate not in self._open:
                continue
            try:
                do(entry)
            except WorkerError as error:
                if entry.candidate == self.yardstick:
                    raise ContractError(
                        f"{self.folder}: the safe default, {entry.name}, stopped: {error.reason}"
                    ) from error
                self._leave_out(entry.candidate, error.reason)

    def _warm_up(self, entry: MeasuredCandidate) -> int:
        """A batch or two unmeasured; then as many repetitions as fill a turn."""
        process = self._open[entry.candidate]
        once = min(process.turn(2 if entry.batch <= IMAGES else 1, batch=entry.batch).times)
        return max(1, min(200, round(self.turn / max(once, 1e-6))))

    def _turn(self, entry: MeasuredCandidate, repetitions: int) -> float:
        """The median time of a batch, seconds, after the last candidate's threads went to sleep."""
        time.sleep(PAUSE)
        return float(np.median(self._open[entry.candidate].turn(repetitions, batch=entry.batch).times))


def _timed(
    entry: MeasuredCandidate, own: list[float], yard: MeasuredCandidate, default: list[float], stage: int
) -> Timed:
    seconds = np.asarray(own)
    speed = entry.batch / seconds
    return Timed(entry, seconds, speed * np.asarray(default[: len(own)]) / yard.batch, stage)
