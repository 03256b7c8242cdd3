"""A site that is measured from the traffic itself: bounded, inspectable, and the same again from the same images.

The latest images count, in blocks that are forgotten whole, so that what is exported is a `Site` like any other. The
shift changes in steps, and only after a floor of images. An image that repeats one of the latest, or that is unlike
all before it, does not count; where nothing else comes for long, the site has changed, and measuring starts again. All
of it depends on the order of the images alone, not on how they were batched.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from invariclip.errors import InputError, SiteError
from invariclip.sites.site import Site, new_site, require_unit, taken_for

Event = Literal["freeze", "thaw", "reset"]
EVENTS: tuple[Event, ...] = ("freeze", "thaw", "reset")
REASONS = ("repeated", "unlike")
"""Why images do not count."""
LATEST = 16
"""Accepted images that a new one is compared with."""
SAME = 0.995
"""Cosine above which an image repeats another: frames of a camera that nothing moves before."""
UNLIKE = 3.0
"""Standard deviations of the squared distance from the mean above which an image is unlike the others: of 400 images
of each training style of stylebench up to 4 are, and a black or a noisy frame beside three of those five styles."""
CHANGED = 32
"""Unlike images in a row that say that the site has changed."""


@dataclass(frozen=True)
class SiteWindow:
    """How much of the past counts.

    Attributes:
        floor: Images before anything is taken away.
        step: Images between two changes of the shift.
        block: Images that are forgotten together.
        blocks: Blocks that count: at most block · blocks images.
    """

    floor: int = 32
    step: int = 16
    block: int = 64
    blocks: int = 16

    def __post_init__(self) -> None:
        """Refuses what cannot be counted.

        Raises:
            InputError: A number is not a whole one from 1, `block` is no multiple of `step`, or fewer images count
                than `floor`.
        """
        for each in fields(self):
            value = getattr(self, each.name)
            if type(value) is not int or value < 1:
                raise InputError(f"{each.name} must be a whole number from 1, not {value!r}")
        if self.block % self.step:
            raise InputError(f"a block of {self.block} images is no multiple of a step of {self.step}")
        if self.floor > self.block * self.blocks:
            raise InputError(f"a floor of {self.floor} images is never reached: {self.block * self.blocks} count")


@dataclass
class _Block:
    """Sums over some images; `apart` and `apart_squared` are of their distances, see `_apart`."""

    images: int
    total: NDArray[np.float64]
    taken_for: NDArray[np.float64]
    apart: float = 0.0
    apart_squared: float = 0.0
    spread: int = 0
    """Images whose distances were added."""


@dataclass
class _State:
    """All that changes."""

    site: Site
    blocks: deque[_Block]
    mean: NDArray[np.float64]
    pending: list[NDArray[np.float32]] = field(default_factory=list)
    first_mean: NDArray[np.float64] | None = None
    in_a_row: int = 0


class LiveSite:
    """A running site; safe to share between threads."""

    def __init__(
        self,
        start: Site,
        bank: NDArray[np.float32],
        window: SiteWindow | None = None,
        *,
        log: Callable[[NDArray[np.float32] | Event], None] | None = None,
    ) -> None:
        """Begins.

        Args:
            start: What is known of the site, see `site.new_site`. It holds until the first change of the shift, and
                counts as half a window of images at most.
            bank: [K, d], unit-length embeddings of the site's classes.
            window: How much of the past counts.
            log: Is given all rows and events, in order, before they count: see `site_log`.

        Raises:
            InputError: The bank is of other classes.
        """
        if bank.shape != (len(start.taken_for), start.width):
            raise InputError(f"the site has {len(start.taken_for)} classes of width {start.width}, "
                             f"the bank is {list(bank.shape)}")  # fmt: skip
        self.window = window or SiteWindow()
        self._start, self._bank, self._log = start, bank, log  # many sites share the bank
        self._lock = threading.Lock()
        self._latest = np.zeros((LATEST, start.width), dtype=np.float32)
        self._place = 0
        self._state = self._begun(start)
        self.seen = self.revision = self.changes = self.too_far = 0
        self.rejected = dict.fromkeys(REASONS, 0)
        self.frozen = False

    @property
    def name(self) -> str:
        """The site's."""
        return self._start.name

    @property
    def site(self) -> Site:
        """The site as it stands: what is taken away now."""
        return self._state.site

    def take(self, embeddings: NDArray[np.float32]) -> tuple[NDArray[np.float32], Site]:
        """Embeddings [N, d] less the shift that was known before them, and the site that it was of; then they count.

        Raises:
            SiteError: They are of another width, or not of unit length.
        """
        site = self.site
        adapted = site.apply(embeddings)
        self.add(embeddings)
        return adapted, site

    def add(self, embeddings: NDArray[np.float32]) -> None:
        """Counts images of the site.

        Args:
            embeddings: float32 [N, d], of unit length, without any site's shift, in the order that they were taken.

        Raises:
            SiteError: They are of another width, or not of unit length.
        """
        require_unit(embeddings, self._start.width)
        rows = np.asarray(embeddings, dtype=np.float32)
        with self._lock:
            if self._log is not None:
                self._log(rows)
            for row in rows:
                self._count(row)

    def tell(self, event: Event) -> None:
        """Freezes the shift, lets it change again, or forgets all that was seen since the start.

        Raises:
            InputError: There is no such event.
        """
        if event not in EVENTS:
            raise InputError(f"no event is called {event!r:.60}; available: {', '.join(EVENTS)}")
        with self._lock:
            if self._log is not None:
                self._log(event)
            if event == "reset":
                self._latest[:] = 0
                self._state = self._begun(self._start)
                self.revision += 1
            else:
                self.frozen = event == "freeze"

    def facts(self) -> dict[str, Any]:
        """What is known, JSON-ready; `drift` is how far the mean has moved since it was first told, or started with."""
        with self._lock:
            site, first = self._state.site, self._state.first_mean
            drift = 0.0 if first is None else float(np.linalg.norm(site.mean - first))
            return {
                **site.facts(), "seen": self.seen, "rejected": dict(self.rejected), "revision": self.revision,
                "changes": self.changes, "too_far": self.too_far, "frozen": self.frozen, "drift": round(drift, 6),
                "window": asdict(self.window),
            }  # fmt: skip

    def close(self, last: Callable[[], None]) -> None:
        """Runs the log's last step where nothing is added meanwhile; afterwards nothing is logged."""
        with self._lock:
            last()
            self._log = None

    def _begun(self, start: Site) -> _State:
        blocks: deque[_Block] = deque()
        if start.images:
            counted = min(start.images, max(1, self.window.block * self.window.blocks // 2))
            part = counted / start.images
            blocks.append(_Block(counted, start.total * part, start.taken_for * part))
        return _State(start, blocks, start.mean, first_mean=start.mean if start.images else None)

    def _count(self, row: NDArray[np.float32]) -> None:
        self.seen += 1
        if self.frozen:
            return
        state = self._state
        if float((self._latest @ row).max()) > SAME:
            self.rejected["repeated"] += 1
            return
        if self._unlike(row):
            self.rejected["unlike"] += 1
            state.in_a_row += 1
            if state.in_a_row >= CHANGED:  # these are what the site looks like now
                self.changes += 1
                self.revision += 1
                empty = new_site(self.name, self._start.space_id, self._start.training_mean, len(self._bank),
                                 self._start.provenance)  # fmt: skip
                self._state = replace(self._begun(empty), first_mean=state.first_mean)
            return
        state.in_a_row = 0
        self._latest[self._place] = row
        self._place = (self._place + 1) % LATEST
        state.pending.append(row.copy())  # a view would keep its whole batch
        if len(state.pending) == self.window.step:
            self._step(state)

    def _unlike(self, row: NDArray[np.float32]) -> bool:
        blocks = self._state.blocks
        counted = sum(block.spread for block in blocks)
        if counted < self.window.floor:
            return False
        middle = sum(block.apart for block in blocks) / counted
        spread = max(0.0, sum(block.apart_squared for block in blocks) / counted - middle**2) ** 0.5
        known = sum(block.images for block in blocks)
        return bool(_apart(row[None], self._state.mean, known)[0] > middle + UNLIKE * spread)

    @staticmethod
    def _newly_apart(rows: NDArray[np.float64], state: _State) -> NDArray[np.float64]:
        """How far rows lie from what is known before them, or from each other; a first one alone lies from nothing."""
        before = sum(each.images for each in state.blocks)
        if before:
            return _apart(rows, state.mean, before)
        return _apart(rows, rows.mean(axis=0), -len(rows)) if len(rows) > 1 else np.empty(0)

    def _step(self, state: _State) -> None:
        """Counts the pending images, and takes what is then known."""
        rows = np.stack(state.pending).astype(np.float64)
        state.pending = []
        if not state.blocks or state.blocks[-1].images + len(rows) > self.window.block:
            state.blocks.append(_Block(0, np.zeros(self._start.width), np.zeros(len(self._bank))))
        while sum(each.images for each in state.blocks) + len(rows) > self.window.block * self.window.blocks:
            state.blocks.popleft()
        apart = self._newly_apart(rows, state)
        block = state.blocks[-1]
        block.images += len(rows)
        block.total += rows.sum(axis=0)
        block.taken_for += taken_for(rows, self._bank).sum(axis=0)
        images = sum(each.images for each in state.blocks)
        total, shares = np.zeros(self._start.width), np.zeros(len(self._bank))
        for each in state.blocks:
            total += each.total
            shares += each.taken_for
        state.mean = total / images
        block.apart += float(apart.sum())
        block.apart_squared += float(np.square(apart).sum())
        block.spread += len(apart)
        if images < self.window.floor:
            return
        try:
            site = replace(self._start, images=images, total=total, taken_for=shares)
        except SiteError:  # farther than can be taken away: what held before still does
            self.too_far += 1
            return
        state.site = site
        state.first_mean = site.mean if state.first_mean is None else state.first_mean
        self.revision += 1


def _apart(rows: NDArray[Any], mean: NDArray[np.float64], images: int) -> NDArray[np.float64]:
    """Squared distances [N] from a mean of so many other images, or of −n that hold them, as if from the true mean.

    A mean of n images lies v/n off where one image lies v off.
    """
    return np.asarray(np.square(rows - mean).sum(axis=1) * (images / (images + 1)), dtype=np.float64)
