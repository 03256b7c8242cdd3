"""What a family is, and what one input comes to."""

import random
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

from invariclip.errors import InvariclipError

REFUSED, RIGHT, WRONG, TRACEBACK, MEMORY, CRASH, HANG = (
    "refused", "right", "wrong", "traceback", "memory", "crash", "hang",
)  # fmt: skip
OUTCOMES = (REFUSED, RIGHT, WRONG, TRACEBACK, MEMORY, CRASH, HANG)
GOOD = (REFUSED, RIGHT)
LONGEST_LINE = 2000
"""Characters of a refusal."""
_NO_MEMORY = re.compile(r"bad_?alloc|can't allocate memory|not enough memory|cannot allocate memory", re.IGNORECASE)


class WrongError(AssertionError):
    """An input was accepted, and what came of it is not what the reference says; or its refusal is no line."""


@dataclass(frozen=True)
class Try:
    """What one input came to.

    Attributes:
        kind: What was done to it, in words; rows of the page are counted by it.
        outcome: One of `OUTCOMES`.
        why: The refusal, or what is wrong.
    """

    kind: str
    outcome: str
    why: str = ""


class Family(ABC):
    """A kind of input.

    Attributes:
        count: Inputs of a whole run.
        what: What is tried, for the page.
        reference: What an accepted input is held against, for the page.
        memory: Bytes that an input may take beyond what the process has before the first one.
        seconds: After which an input hangs.
    """

    count = 1000
    what = ""
    reference = ""
    memory = 1 << 30
    seconds = 60

    def open(self, folder):  # noqa: B027 - a family may need no files
        """Makes or finds the undamaged files below `folder`, and makes sure that they are accepted."""

    @abstractmethod
    def draw(self, rng):
        """What is tried: its kind, and a function that returns where it was right, or raises."""


def rng_of(name, number):
    """The generator that makes a family's input of that number, the same on every machine."""
    return random.Random(f"invariclip {name} {number}")  # noqa: S311 - nothing is kept secret


def attempt(family, name, number):
    """Tries one input; whatever it raises is an outcome."""
    kind, act = family.draw(rng_of(name, number))
    try:
        act()
    except InvariclipError as error:
        return Try(kind, *_of_refusal(error))
    except (KeyboardInterrupt, SystemExit):
        raise
    except WrongError as error:
        return Try(kind, WRONG, f"{error}"[:LONGEST_LINE])
    except BaseException as error:
        outcome = MEMORY if _ran_out(error) else TRACEBACK
        return Try(kind, outcome, f"{type(error).__name__}: {error}"[:LONGEST_LINE] + _place(error))
    return Try(kind, RIGHT)


def _of_refusal(error):
    line = str(error)
    if _ran_out(error):
        return MEMORY, line[:LONGEST_LINE]
    if not line.strip() or len(line.splitlines()) != 1 or len(line) > LONGEST_LINE:
        return WRONG, f"a refusal that is not one line: {line[:LONGEST_LINE]!r}"
    return REFUSED, line


def _ran_out(error):
    """Whether memory ended anywhere on the way to an error, also where that was caught and called something else."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _place(error):
    """Where it was raised, the last of our own lines."""
    place, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "invariclip" in file:
            place = f" ({file.rpartition('invariclip/')[2]}:{trace.tb_lineno})"
        trace = trace.tb_next
    return place
