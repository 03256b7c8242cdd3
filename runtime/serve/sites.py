"""The sites that requests name: known ones from files, and running ones that the requests' own images move.

A running site belongs to the API key that named it, and each key has an equal share of them: what one client shows
moves nothing for another, and nobody can use up what others need.
"""

from __future__ import annotations

import re
import threading
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from invariclip.console import note
from invariclip.errors import InputError, SiteError
from invariclip.files import remove_left, require_writable
from invariclip.serve.limits import MIB, RefusedError
from invariclip.sites.live_site import LiveSite, SiteWindow
from invariclip.sites.measuring import begun, model_mean
from invariclip.sites.site import read_site
from invariclip.sites.site_log import SiteLog

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.model import Model
    from invariclip.sites.live_site import Event
    from invariclip.sites.site import Site

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What a site may be called: it becomes a folder's name and a metric's label."""
MAX_KNOWN = 10_000
_LISTED = 200  # characters of names in an error


@dataclass(frozen=True)
class LiveSiteOptions:
    """How sites are measured from requests.

    Attributes:
        most: Running sites of all keys.
        window: How much of the past counts.
        log: A folder that keeps what each was shown; None keeps nothing.
        log_bytes: Of one site's log.
    """

    most: int = 64
    window: SiteWindow = field(default_factory=SiteWindow)
    log: Path | None = None
    log_bytes: int = 256 * MIB


class SiteHandle(NamedTuple):
    """A site as one request sees it.

    Attributes:
        site: What is known of it now.
        live: Where it is moved by what the request shows, the running site.
    """

    site: Site
    live: LiveSite | None

    def take(self, embeddings: NDArray[np.float32]) -> tuple[NDArray[np.float32], Site]:
        """Embeddings [N, d] less the site's shift, and the site that it is of."""
        if self.live is not None:
            return self.live.take(embeddings)
        return self.site.apply(embeddings), self.site


class SiteRegistry:
    """Finds them; safe to share between threads."""

    def __init__(
        self,
        model: Model,
        *,
        default: Site | None = None,
        known: Mapping[str, Site] | None = None,
        running: LiveSiteOptions | None = None,
        keys: int = 1,
    ) -> None:
        """Checks that the model can take them all.

        Args:
            model: Without a site.
            default: For requests that name none.
            known: By name, whatever they call themselves; where sites run, what they start with.
            running: Whether and how requests move sites.
            keys: API keys that there are.

        Raises:
            InputError: The model cannot be adapted; or sites are to run, and it has no classes or training mean, there
                are more keys than sites, or the log cannot be written.
            SiteError: A site is of another space, or, where sites run, was measured with other classes.
        """
        self.default = default
        self.known = {name: replace(site, name=name) for name, site in (known or {}).items()}
        self.running = running
        self.share = 0 if running is None else running.most // max(1, keys)
        self._model = model
        self._ready = self._handed_on = False
        self._lock = threading.Lock()
        self._live: dict[tuple[int, str], LiveSite] = {}
        self._logs: list[tuple[LiveSite, SiteLog]] = []
        for site in (*self.known.values(), *([default] if default else [])):
            model.require_adaptable(site)
        if running is not None:
            if not model.classes:
                raise InputError("--adapt needs classes, to count the kinds of things that a site shows; name some")
            if not self.share:
                raise InputError(f"--max-sites {running.most} leaves none to each of {keys} API keys; raise it")
            self._mean = model_mean(model)
            for start in (None, *self.known.values()):
                model.require_adaptable(begun(model, "", self._mean, start))
            if running.log is not None:
                require_writable(running.log / "key-0", "; name another folder")

    def __bool__(self) -> bool:
        """Whether a request may be answered with a site."""
        return bool(self.default or self.known or self.running)

    def prepare(self, hosted: Model) -> None:
        """Takes a model whose classes are embedded already; before, no site is measured."""
        self._model, self._ready = hosted, True

    def take_over(self, other: SiteRegistry) -> int:
        """Goes on with the sites that another registry has measured; how many of them are lost.

        None is, if this one's model is of the same space and has the same classes. Call it before anybody asks this
        registry; requests that asked the other one may still count.
        """
        with other._lock:
            live = len(other._live)
            if not live or not self._continues(other):
                return live
            self._live, self._logs, self._lock = other._live, other._logs, other._lock
            other._handed_on = True
            return 0

    def _continues(self, other: SiteRegistry) -> bool:
        """Whether sites mean the same for both models."""
        ours, theirs = self._model, other._model
        return (
            self.running is not None
            and self.running == other.running
            and (ours.space_id, ours.classes) == (theirs.space_id, theirs.classes)
            and np.array_equal(ours.class_bank(), theirs.class_bank())
        )

    def find(self, name: str | None, key: int) -> SiteHandle | None:
        """The site that a request means.

        Args:
            name: As the request says; None takes the default, "" none.
            key: The number of the request's API key; 0 where none is demanded.

        Raises:
            InputError: No site has that name, or no site may.
            RefusedError: The key has its share of running sites already.
        """
        if name == "":
            return None
        if name is None:
            return None if self.default is None else SiteHandle(self.default, None)
        if self.running is None:
            if name not in self.known:
                there = ", ".join(sorted(self.known))
                raise InputError(f"no site is called {name!r:.80}; available: {_cut(there) or 'none'}")
            return SiteHandle(self.known[name], None)
        if not NAME.fullmatch(name):
            raise InputError(f"a site's name has letters, digits, '.', '_' and '-', up to 64 of them, not {name!r:.80}")
        live = self._begun(name, key, self.running)
        return SiteHandle(live.site, live)

    def existing(self, name: str, key: int) -> SiteHandle:
        """A site that is known, or runs already for this key.

        Raises:
            RefusedError: There is none.
        """
        live = self._live.get((key, name))
        site = self.known.get(name) if live is None else live.site
        if site is None:
            raise RefusedError(404, f"no site is called {name!r:.80}; GET /v1/sites lists those that there are")
        return SiteHandle(site, live)

    def tell(self, name: str, key: int, event: Event) -> LiveSite:
        """Freezes, thaws or resets a running site of this key.

        Raises:
            InputError: There is no such event.
            RefusedError: It does not run.
        """
        live = self._live.get((key, name))
        if live is None:
            raise RefusedError(404, f"no site called {name!r:.80} is measured from this key's requests")
        live.tell(event)
        return live

    def listed(self, key: int) -> list[dict[str, Any]]:
        """What this key may know of all its sites, JSON-ready."""
        with self._lock:
            own = [name for owner, name in self._live if owner == key]
        names = sorted({*self.known, *own})
        return [site_facts(self.existing(name, key)) for name in names]

    def live(self) -> list[tuple[int, LiveSite]]:
        """All running sites, with the numbers of their keys."""
        with self._lock:
            return [(key, live) for (key, _), live in self._live.items()]

    def close(self) -> None:
        """Writes what the logs have not written yet, unless another registry goes on with them."""
        if not self._handed_on:
            for live, log in self._logs:
                live.close(log.flush)

    def _begun(self, name: str, key: int, running: LiveSiteOptions) -> LiveSite:
        with self._lock:
            found = self._live.get((key, name))
            if found is not None:
                return found
            if not self._ready:
                raise RefusedError(503, "warming up; ask again", {"retry-after": "1"}, reason="warming_up")
            own = sorted(each for owner, each in self._live if owner == key)
            if len(own) >= self.share:
                raise RefusedError(
                    429, f"{self.share} sites are measured from this key's requests already, {_cut(', '.join(own))}; "
                    "name one of them, or restart with a greater --max-sites"
                )  # fmt: skip
            start = begun(self._model, name, self._mean, self.known.get(name))
            log = _log(name, key, start, running)
            live = LiveSite(start, self._model.class_bank(), running.window, log=log)
            self._live[key, name] = live
            if log is not None:
                self._logs.append((live, log))
            return live


def _cut(names: str) -> str:
    """As much of a list as an answer may say; there may be thousands."""
    return names if len(names) <= _LISTED else f"{names[:_LISTED]} ..."


def _log(name: str, key: int, start: Site, running: LiveSiteOptions) -> SiteLog | None:
    """The next log of a site; None, and a line, where it cannot be written: that is no reason not to answer."""
    if running.log is None:
        return None
    above = running.log / f"key-{key}" / name
    earlier = [path for path in above.glob("*") if path.name.isdecimal()]
    for folder in earlier:
        remove_left(folder)
    last = max((int(path.name) for path in earlier), default=0)
    while True:
        last += 1
        try:
            return SiteLog(above / f"{last:04d}", start, running.window, running.log_bytes)
        except SiteError:  # another process was first
            continue
        except InputError as error:
            with suppress(OSError):  # standard error may be a file on the same disk
                note(f"invariclip: {error}; what this site is shown is not logged")
            return None


def site_facts(handle: SiteHandle) -> dict[str, Any]:
    """What a site says of itself, JSON-ready."""
    if handle.live is not None:
        return {**handle.live.facts(), "live": True}
    return {**handle.site.facts(), "live": False}


def read_sites(folder: Path) -> dict[str, Site]:
    """The sites of a folder, NAME.safetensors each.

    Raises:
        InputError: It is no folder, or holds none or too many, or one whose name no request can say.
        SiteError: A file is not a site.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; it should hold sites, NAME.safetensors each")
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise InputError(f"{folder}: holds no site; `invariclip adapt ... -o {folder}/NAME.safetensors` writes one")
    if len(found) > MAX_KNOWN:
        raise InputError(f"{folder}: {len(found):,} sites are too many; up to {MAX_KNOWN:,} are read")
    for path in found:
        if not NAME.fullmatch(path.stem):
            raise InputError(f"{path}: a site's name has letters, digits, '.', '_' and '-', up to 64 of them")
    return {path.stem: read_site(path) for path in found}
