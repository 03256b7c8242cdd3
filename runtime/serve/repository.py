"""Loads, exchanges and unloads models while requests are answered, one at a time."""

from __future__ import annotations

import asyncio
import gc
import logging
import re
import threading
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from invariclip.artifact.manifest import MANIFEST
from invariclip.console import note
from invariclip.errors import InputError, InvariclipError
from invariclip.serve.limits import RefusedError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence
    from pathlib import Path

    from invariclip.serve.models import ServedModel, ServedModels
    from invariclip.serve.service import Service

log = logging.getLogger("invariclip.serve")
T = TypeVar("T")

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What an artifact in a folder of artifacts may be called: it is a part of a path and a metric's label."""
SUFFIX = ".icm"
MAX_LISTED = 1_000
"""Artifacts of a folder of artifacts that are listed."""
MAX_MODELS = 8


@dataclass(frozen=True)
class LoadedModel:
    """What was loaded.

    Attributes:
        name: What requests call it.
        state: It answers.
        replaced: Whether another one answered under this name before.
        space_id: Of its embeddings.
        variant: That it runs.
        engine: That runs it.
        sites_ended: Sites that were measured from requests, and begin anew because the new model's space or classes
            are others.
    """

    name: str
    state: Literal["READY"]
    replaced: bool
    space_id: str
    variant: str
    engine: str
    sites_ended: int


@dataclass(frozen=True)
class ListedModel:
    """A model that is loaded, or that could be.

    Attributes:
        name: What requests call it.
        version: Always 1.
        state: `READY`, `LOADING` or `UNAVAILABLE`.
        reason: What its last loading failed with; empty if it did not.
    """

    name: str
    version: str
    state: Literal["READY", "LOADING", "UNAVAILABLE"]
    reason: str


def require_loadable(count: int, roots: Sequence[Path], most: int) -> None:
    """Refuses what a repository cannot be made of.

    Args:
        count: Models at the start.
        roots: Folders of artifacts.
        most: Models that may be loaded at a time.

    Raises:
        InputError: A root is no folder, or there are more models than may be loaded.
    """
    for root in roots:
        if not root.is_dir():
            raise InputError(f"{root}: no such folder; --model-root names one that holds artifacts, NAME{SUFFIX}")
    if count > most:
        raise InputError(f"{count} artifacts are more than --max-models {most}; raise it")


class ModelRepository:
    """Where models come from; for one event loop.

    Only one is loaded at a time, and the next not before the one in whose place it came is closed: there is never more
    than one model beside those that answer.
    """

    def __init__(
        self,
        models: ServedModels,
        make: Callable[[str, Path], Service],
        folders: Mapping[str, Path],
        *,
        roots: Sequence[Path] = (),
        most: int = MAX_MODELS,
    ) -> None:
        """Loads nothing yet.

        Args:
            models: Those that answer.
            make: Opens an artifact under a name, not warm yet.
            folders: The artifacts that `models` were opened from, by name.
            roots: Folders of artifacts, NAME.icm each, which may be loaded by their names.
            most: Models that may be loaded at a time.

        Raises:
            InputError: See `require_loadable`.
        """
        require_loadable(len(models.names), roots, most)
        self.models, self._make, self._roots, self._most = models, make, tuple(roots), most
        self._given = dict(folders)
        self._changing = asyncio.Lock()
        self._loading = ""
        self._failed: dict[str, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._reload_asked = False
        self._reloading: asyncio.Task[None] | None = None

    async def load(self, name: str) -> LoadedModel:
        """Loads a model; one that answers under this name already is exchanged for what its artifact is now.

        What is loaded beside it is warm before it takes its place. If it cannot be loaded, the old one goes on.

        Raises:
            RefusedError: There is no such artifact, it cannot be loaded, or another one is being loaded.
            InputError: No more models may be loaded, or a link leads out of the folder of artifacts.
        """
        self._require_free()
        await self._changing.acquire()
        return await self._begun(name)

    async def unload(self, name: str) -> None:
        """Takes a model away, and waits until its last request is answered.

        Raises:
            RefusedError: None is loaded that has this name, or another one is being loaded.
        """
        self._require_free()
        self.models.find(name)
        await self._changing.acquire()
        await asyncio.shield(self._kept(self._unloaded(name)))

    async def listed(self) -> list[ListedModel]:
        """All that are loaded, and all that could be."""
        there = await _in_thread(self._there)
        loaded = self.models.names
        names = dict.fromkeys((*loaded, *self._given, *sorted(there)))
        return [
            ListedModel(
                name, "1", "READY" if name in loaded else "LOADING" if name == self._loading else "UNAVAILABLE",
                self._failed.get(name, ""),
            )
            for name in names
        ]  # fmt: skip

    def reload(self) -> None:
        """Loads all loaded models again, one after the other, once whatever is being loaded is done."""
        self._reload_asked = True
        if self._reloading is None or self._reloading.done():
            self._reloading = self._kept(self._reload())

    async def _reload(self) -> None:
        while self._reload_asked:
            self._reload_asked = False
            for name in self.models.names:
                await self._changing.acquire()
                if name not in self.models.names:  # unloaded meanwhile
                    self._changing.release()
                    continue
                with suppress(InvariclipError):  # it was told
                    await self._begun(name)

    def _require_free(self) -> None:
        if self._changing.locked():
            what = "a model that is leaving still answers its last requests"
            what = f"{self._loading} is being loaded" if self._loading else what
            raise RefusedError(503, f"{what}; try again in 1 s", {"retry-after": "1"}, reason="loading")

    async def _begun(self, name: str) -> LoadedModel:
        """Loads while `_changing` is held, and releases it; goes on when nobody waits for it any more."""
        done: asyncio.Future[LoadedModel] = asyncio.get_running_loop().create_future()
        done.add_done_callback(lambda one: one.cancelled() or one.exception())  # nobody may be there to hear of it
        self._kept(self._exchanged(name, done))
        return await asyncio.shield(done)

    def _kept(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _unloaded(self, name: str) -> None:
        try:
            model = self.models.take(name)
            _tell(f"{name}: unloaded")
            await self.models.leave(model)
            del model
            await _in_thread(gc.collect)  # a service and its threads refer to each other
        finally:
            self._changing.release()

    async def _exchanged(self, name: str, done: asyncio.Future[LoadedModel]) -> None:
        try:
            old: ServedModel | None = None
            try:
                folder = await _in_thread(lambda: self._folder(name))
                self._loading = name
                service = await _in_thread(lambda: self._opened(name, folder))
            except Exception as error:
                done.set_exception(self._told(name, error))
                return
            finally:
                self._loading = ""
            ended = 0
            if name in self.models.names:
                ended = service.sites.take_over(self.models.find(name).service.sites)
            old = self.models.put(service)
            self._failed.pop(name, None)
            model = service.model
            lost = f"; {ended} measured sites begin anew" if ended else ""
            again = "loaded" if old is None else "loaded again"
            _tell(f"{name}: {again} from {folder} ({model.variant} on {model.backend}){lost}")
            done.set_result(
                LoadedModel(name, "READY", old is not None, model.space_id, model.variant, model.backend, ended)
            )
            if old is not None:
                await self.models.leave(old)
                del old
                await _in_thread(gc.collect)  # a service and its threads refer to each other
        finally:
            self._changing.release()

    def _told(self, name: str, error: Exception) -> Exception:
        """The error of a loading that failed, after one line of it."""
        there = name in self.models.names
        goes_on = "; the one that was loaded before goes on" if there else ""
        if not isinstance(error, InvariclipError):
            log.error("%s: not loaded%s", name, goes_on, exc_info=error)
            self._failed[name] = f"an unexpected error ({type(error).__name__}); the server's log has more"
            return error
        line = " ".join(str(error).split())
        if there or not (isinstance(error, RefusedError) and error.status == 404):  # no names that clients make up
            self._failed[name] = line
            _tell(f"{name}: not loaded{goes_on}: {line}")
        if isinstance(error, (RefusedError, InputError)) and not there:
            return error
        return RefusedError(422, f"{name} was not loaded{goes_on}: {line}", reason="load_failed")

    def _opened(self, name: str, folder: Path) -> Service:
        service = self._make(name, folder)
        try:
            service.warm_up()
        except BaseException:
            service.close()
            raise
        return service

    def _folder(self, name: str) -> Path:
        """Where a model is loaded from: as it was given at the start, or by its name from a folder of artifacts."""
        folder = self._given[name] if name in self._given else self._in_root(name)
        if name not in self.models.names and len(self.models.names) >= self._most:
            raise InputError(
                f"{len(self.models.names)} models are loaded ({', '.join(self.models.names)}), and no more than "
                f"--max-models may be; unload one first"
            )
        return folder

    def _in_root(self, name: str) -> Path:
        if NAME.fullmatch(name):
            for root in self._roots:
                path = root / f"{name}{SUFFIX}"
                if not path.is_dir():
                    continue
                if not path.resolve().is_relative_to(root.resolve()):
                    raise InputError(f"{path}: the link leads out of {root}, from which artifacts are loaded")
                return path.resolve()
        available = ", ".join(dict.fromkeys((*self._given, *sorted(self._there())))) or "none"
        raise RefusedError(404, f"no artifact is called {name!r:.100}; available: {available:.1000}")

    def _there(self) -> set[str]:
        """Names of what may be loaded from folders of artifacts."""
        found: set[str] = set()
        for root in self._roots:
            for path in root.glob(f"*{SUFFIX}"):
                if len(found) >= MAX_LISTED:
                    log.warning("%s: there are more artifacts than the %d that are listed", root, MAX_LISTED)
                    return found
                if NAME.fullmatch(path.stem) and (path / MANIFEST).is_file():
                    found.add(path.stem)
        return found


def _tell(line: str) -> None:
    with suppress(OSError, ValueError):  # standard error may be closed, or on a full disk
        note(f"invariclip: {line}")


async def _in_thread(function: Callable[[], T]) -> T:
    """What a function gives; its thread does not keep the process from ending, as one of an executor would."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # whoever waits raises it
            future.set_exception(error)

    threading.Thread(target=work, name="load-model", daemon=True).start()
    return await asyncio.wrap_future(future)
