"""TensorRT or TensorRT-RTX, whichever is installed: two packages with one interface."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, get_args

from invariclip.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Iterable

Name = Literal["tensorrt", "tensorrt_rtx"]
NAMES: tuple[Name, ...] = get_args(Name)
"""In the order in which they are taken: TensorRT tunes for the one GPU it sees, TensorRT-RTX compiles for many."""
TITLES: dict[Name, str] = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
EXTRAS: dict[Name, str] = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}


@dataclass(frozen=True)
class Library:
    """An imported library.

    Attributes:
        name: Of its package.
        version: As it says it.
        trt: The module.
    """

    name: Name
    version: str
    trt: Any

    @property
    def title(self) -> str:
        """What people call it, with its version."""
        return f"{TITLES[self.name]} {self.version}"


def installed() -> tuple[Name, ...]:
    """The libraries whose packages are there; nothing is imported."""
    return tuple(name for name in NAMES if _is_there(name))


def open_library(name: str | None = None) -> Library:
    """Imports one of the two.

    Args:
        name: `tensorrt` or `tensorrt_rtx`; None takes the first that is installed.

    Raises:
        InputError: Another name.
        MissingExtraError: It is not installed, or its own libraries are not.
    """
    if name is not None and name not in NAMES:
        raise InputError(f"no TensorRT library is called {name!r}; available: {', '.join(NAMES)}")
    wanted = NAMES if name is None else tuple(known for known in NAMES if known == name)
    broken = []
    for known in wanted:
        if not _is_there(known):
            continue
        try:
            trt = import_module(known)
            return Library(known, str(trt.__version__), trt)
        # a stub whose libraries did not come along fails in ways of its own: ImportError, OSError, RuntimeError, ...
        except Exception as error:
            broken.append(f"{known} is installed and cannot be imported ({_line([error])})")
    raise MissingExtraError("; ".join([*broken, _advice(wanted)]))


def numbers(version: str) -> tuple[int, ...]:
    """A version's leading numbers, to compare by: `10.7.0.post1` → (10, 7, 0).

    Raises:
        InputError: It has none.
    """
    found = re.match(r"\d+(\.\d+)*", version)
    if found is None:
        raise InputError(f"{version!r} is not a version; it begins with numbers, as in 10.7.0")
    return tuple(int(part) for part in found[0].split("."))


class Messages:
    """What a library said while it worked: errors for our messages, warnings for whoever wants them."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def line(self) -> str:
        """The errors in one line of bounded length."""
        return _line(self.errors) or "no reason given"


def logger(trt: Any, messages: Messages) -> Any:
    """A logger of a library that keeps what it is told instead of printing it.

    Args:
        trt: The library's module.
        messages: Where it goes.
    """

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                messages.errors.append(message)
            elif severity == trt.ILogger.WARNING:
                messages.warnings.append(message)

    return Logger()


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ValueError:  # an interpreter that was told that the package is not there
        return False


def _advice(wanted: tuple[Name, ...]) -> str:
    ways = " or ".join(f'pip install "invariclip[{EXTRAS[name]}]"' for name in wanted)
    return f"TensorRT engines need the package {' or '.join(wanted)}: {ways}"


def _line(parts: Iterable[object]) -> str:
    return " ".join(" ".join(map(str, parts)).split())[:500]
