"""A build's signs of life: TensorRT's progress monitor, heard on its threads, shown on ours."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from invariclip.console import Progress

T = TypeVar("T")
_DONE = ""


class Steps:
    """What a build reports, as an iterable; and the way to stop it."""

    def __init__(self) -> None:
        self._said: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self.phases: list[str] = []

    def started(self, phase: str) -> None:
        """A phase has begun."""
        self.phases.append(phase)

    def stepped(self, phase: str) -> bool:
        """A step of a phase is done; False tells the builder to stop."""
        self._said.put(phase)
        return not self._stopped.is_set()

    def finish(self) -> None:
        """Nothing more will come."""
        self._said.put(_DONE)

    def stop(self) -> None:
        """The builder ends at its next step."""
        self._stopped.set()

    def __iter__(self) -> Iterator[str]:
        """Every finished step, until the end."""
        while (phase := self._said.get()) != _DONE:
            yield phase


def monitor(trt: Any, steps: Steps) -> Any:
    """A progress monitor of a library that reports to `steps`; it must live as long as the builder's config.

    Args:
        trt: The library's module.
        steps: Where it reports.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            del parent_phase, num_steps
            steps.started(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            del step
            return steps.stepped(phase_name)

        def phase_finish(self, phase_name: str) -> None:
            del phase_name

    return Monitor()


def watched(work: Callable[[], T], steps: Steps, progress: Progress, desc: str) -> T:
    """Does the work in a thread while its steps are shown; an interruption stops it at its next step.

    Args:
        work: Blocks, and reports to `steps` meanwhile.
        steps: What it reports.
        progress: `console.bar` or `console.silent`.
        desc: What the bar says.
    """
    answer: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            answer.append(work())
        except BaseException as error:
            failure.append(error)
        finally:
            steps.finish()

    thread = threading.Thread(target=run, name="tensorrt-build")
    thread.start()
    try:
        for _ in progress(steps, desc=desc):
            pass
    except BaseException:
        steps.stop()
        thread.join()
        raise
    thread.join()
    if failure:
        raise failure[0]
    return answer[0]
