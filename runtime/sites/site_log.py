"""What a live site was shown, on disk: the same images in the same order give the same shift again, bit for bit."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from invariclip.console import note
from invariclip.errors import InputError, SiteError
from invariclip.files import write_atomically
from invariclip.records import Record, read_sealed_json, sealed_json, to_record
from invariclip.sites.live_site import Event, LiveSite, SiteWindow
from invariclip.sites.site import read_site, write_site

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.sites.site import Site

LOG_SCHEMA = 2
ROWS = 256
"""Embeddings, or events, to a file."""


@dataclass(frozen=True)
class LogPartFacts:
    """What a part of a log says beside its embeddings.

    Attributes:
        events: How many of the part's embeddings came before, and the event.
    """

    events: tuple[tuple[int, Event], ...]


PART_FILE = Record(
    "invariclip.events", "a part of a live site's log", "`serve --adapt-log`", 2, 1 << 26, SiteError, LogPartFacts
)
_START, _FACTS = "start.safetensors", "log.json"


class SiteLog:
    """A folder that takes what a `LiveSite` gives its `log`; the caller has the site's lock.

    The site does not depend on its log: where no more can be kept, a line says so, and what is kept stays as it is.

    Attributes:
        full: Whether nothing more is kept.
    """

    def __init__(self, folder: Path, start: Site, window: SiteWindow, limit: int) -> None:
        """Begins a log.

        Args:
            folder: Is made; what stands there is not touched.
            start: As the live site's.
            window: Likewise.
            limit: Bytes of embeddings and events that are kept; what comes after them is not.

        Raises:
            InputError: The folder cannot be written.
            SiteError: It exists.
        """
        try:
            folder.mkdir(parents=True)  # by one process alone
        except FileExistsError as error:
            raise SiteError(f"{folder}: exists already; a log begins in a folder of its own") from error
        except OSError as error:
            raise InputError(f"{folder}: cannot be written ({error.strerror or error})") from error
        write_site(folder / _START, start)
        write_atomically(folder / _FACTS, sealed_json({"schema_version": LOG_SCHEMA, "window": asdict(window)}))
        self.folder, self.limit, self.full = folder, limit, False
        self._rows: list[NDArray[np.float32]] = []
        self._events: list[tuple[int, Event]] = []
        self._files = self._bytes = 0

    def __call__(self, what: NDArray[np.float32] | Event) -> None:
        """Keeps rows or an event."""
        if isinstance(what, str):
            self._keep(event=what)
            return
        for row in what:
            self._keep(row=row)

    def flush(self) -> None:
        """Writes what is not on disk yet."""
        if self.full or not (self._rows or self._events):
            return
        rows = np.stack(self._rows) if self._rows else np.empty((0, 0), dtype=np.float32)
        content = PART_FILE.to_bytes({"embeddings": rows}, {"events": self._events})
        self._bytes += len(content)
        if self._bytes > self.limit:
            self._stop(f"{self.folder}: is full ({self.limit:,} bytes)")
            return
        self._files += 1
        try:
            write_atomically(self.folder / f"{self._files:06d}.safetensors", content)
        except InputError as error:  # no client's fault, and with a part missing the rest would be of another site
            self._stop(str(error))
            return
        self._rows, self._events = [], []

    def _keep(self, row: NDArray[np.float32] | None = None, event: Event | None = None) -> None:
        if self.full:
            return
        if row is not None:
            self._rows.append(row.copy())
        if event is not None:
            self._events.append((len(self._rows), event))
        if ROWS in (len(self._rows), len(self._events)):
            self.flush()

    def _stop(self, why: str) -> None:
        self.full = True
        left = len(self._rows)
        self._rows, self._events = [], []
        with suppress(OSError):  # standard error may be a file on the same disk
            note(f"invariclip: {why}; the last {left} images, and what comes now, are not logged")


def replay(folder: Path, bank: NDArray[np.float32]) -> LiveSite:
    """The live site that a log is of, as it stood at its end.

    Args:
        folder: What a `SiteLog` wrote.
        bank: [K, d], as the live site's.

    Raises:
        SiteError: It is no log, or damaged.
        InputError: The bank is of other classes.
    """
    facts = read_sealed_json(
        folder / _FACTS, "a log of a live site", schema=LOG_SCHEMA, remedy="log again", max_bytes=1 << 16,
        error=SiteError,
    )  # fmt: skip
    unknown = next((name for name in facts if name not in ("schema_version", "window")), None)
    if unknown is not None:
        raise SiteError(f"{folder / _FACTS}: has a field that is not known: {unknown!r:.100}")
    window = to_record(SiteWindow, facts.get("window"), str(folder / _FACTS), error=SiteError)
    if asdict(window) != facts["window"]:  # a field that is missing would become another default one day
        raise SiteError(f"{folder / _FACTS}: its window lacks a field; available: {', '.join(asdict(window))}")
    live = LiveSite(read_site(folder / _START), bank, window)
    files = sorted(folder.glob("[0-9]*.safetensors"))
    for number, path in enumerate(files, 1):
        if path.name != f"{number:06d}.safetensors":
            raise SiteError(f"{folder}: {number:06d}.safetensors is missing")
        _replayed(live, path)
    return live


def _replayed(live: LiveSite, path: Path) -> None:
    rows, events = _read(path)
    done = 0
    for place, event in events:
        if not done <= place <= len(rows):
            raise SiteError(f"{path}: an event is out of order")
        if place > done:
            live.add(rows[done:place])
        live.tell(event)
        done = place
    if done < len(rows):
        live.add(rows[done:])


def _read(path: Path) -> tuple[NDArray[np.float32], tuple[tuple[int, Event], ...]]:
    tensors, facts = PART_FILE.read(path)
    try:
        rows = tensors["embeddings"]
    except KeyError as error:
        PART_FILE.refuse(path, f"{error} is missing")
    if rows.dtype != np.float32 or rows.ndim != 2 or len(tensors) != 1:
        PART_FILE.refuse(path, "its rows are of another type")
    return rows, facts.events
