"""A candidate in a process of its own: engines in one process would slow each other, and a crash takes only itself."""

from __future__ import annotations

import json
import queue
import statistics
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.errors import InvariclipError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.autotune.candidates import TuneCandidate

LONGEST_ANSWER = 300.0
"""Seconds after which a process counts as stuck."""
PAUSE = 0.03
"""Seconds before a turn, in which the last candidate's threads go to sleep."""


class CandidateStoppedError(InvariclipError):
    """A candidate's process could not open it, or stopped; the message is the reason."""


class Process:
    """A running candidate; use it as a context, which ends it.

    Attributes:
        candidate: What it runs.
        facts: What the engine says of itself.
    """

    def __init__(self, folder: Path, candidate: TuneCandidate) -> None:
        """Starts it and waits until the artifact is open.

        Raises:
            StoppedError: It cannot be opened here.
        """
        self.candidate = candidate
        named = {"folder": str(folder), "variant": candidate.variant, "backend": candidate.backend}
        asked = json.dumps({**named, "threads": candidate.threads})
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "invariclip.autotune.worker",
                asked,
            ],  # -P: nothing is imported from where we are
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C is for the search, which then ends this
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.facts = self._answer()
        except BaseException:
            self.close()
            raise

    def seconds(self, batch: int, repetitions: int) -> list[float]:
        """Times of so many batches.

        Raises:
            StoppedError: The process stopped or could not answer.
        """
        return [float(value) for value in self._ask(do="time", batch=batch, repetitions=repetitions)["seconds"]]

    def turn(self, batch: int, repetitions: int) -> float:
        """The median time of a batch in one turn, seconds, after the last candidate's threads went to sleep.

        Raises:
            StoppedError: See `seconds`.
        """
        time.sleep(PAUSE)
        return statistics.median(self.seconds(batch, repetitions))

    def images(self, batch: int) -> NDArray[np.float32]:
        """Embeddings [IMAGES, d] of `checks.check_images`, in batches of that many.

        Raises:
            StoppedError: See `seconds`.
        """
        return np.asarray(self._ask(do="images", batch=batch)["embeddings"], dtype=np.float32)

    def texts(self) -> NDArray[np.float32]:
        """Embeddings [len(TEXTS), d] of `checks.TEXTS`.

        Raises:
            StoppedError: See `seconds`.
        """
        return np.asarray(self._ask(do="texts")["embeddings"], dtype=np.float32)

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):  # what was left in the buffer has no reader any more
                self._process.stdin.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> None:
        """Hands lines on, then an empty one: a pipe has no read with a time limit on every system."""
        if self._process.stdout is not None:
            with self._process.stdout as stream:
                for line in stream:
                    self._lines.put(line)
        self._lines.put("")

    def _ask(self, **question: Any) -> dict[str, Any]:
        stdin = self._process.stdin
        if stdin is None:
            raise CandidateStoppedError("its process has no pipe")
        with suppress(BrokenPipeError):  # what it said last, if anything, is still to be read
            stdin.write(json.dumps(question) + "\n")
            stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=LONGEST_ANSWER)
        except queue.Empty:
            raise CandidateStoppedError(f"its process gave no answer in {LONGEST_ANSWER:.0f} s") from None
        if not line:
            code = self._process.wait()
            why = "killed, perhaps for memory" if code < 0 else f"exit {code}"
            raise CandidateStoppedError(f"its process stopped ({why})")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise CandidateStoppedError(str(answer["error"]))
        return answer
