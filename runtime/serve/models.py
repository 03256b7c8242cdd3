"""The models that a server answers with, by name; one can take another's place while requests are answered."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING

from invariclip.errors import InputError
from invariclip.serve.limits import UnknownModelError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from invariclip.serve.service import Service


class ServedModel:
    """A model, and how many requests are answered with it; only the event loop touches that.

    Attributes:
        service: Answers.
        requests: That it answers now.
    """

    def __init__(self, service: Service) -> None:
        self.service, self.requests = service, 0
        self._idle: asyncio.Event | None = None

    @contextmanager
    def lease(self) -> Iterator[Service]:
        """Its service, which is not closed before the block ends."""
        self.requests += 1
        try:
            yield self.service
        finally:
            self.requests -= 1
            if self._idle is not None and not self.requests:
                self._idle.set()

    async def idle(self) -> None:
        """Waits until the last of its requests is answered; there must be no new ones."""
        if self.requests:
            self._idle = asyncio.Event()
            await self._idle.wait()


class ServedModels:
    """Services by name. They change in the event loop alone; other threads may read.

    Attributes:
        limits: What a request may bring, whichever model it asks.
        default: The name of the model that answers requests which name none; it stays the same.
        several: Whether there may be others.
    """

    def __init__(self, services: Sequence[Service], *, several: bool = False) -> None:
        """Takes services that may not be warm yet.

        Args:
            services: One or more; `close` ends them.
            several: Whether others may come; always true of several services.

        Raises:
            InputError: Two have one name.
        """
        self.limits, self.default = services[0].limits, services[0].name
        self.several = several or len(services) > 1
        self._loaded = {service.name: ServedModel(service) for service in services}
        self._leaving: list[ServedModel] = []
        if len(self._loaded) < len(services):
            names = [service.name for service in services]
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"two artifacts are called {twice!r}; give one another name, as in NAME=PATH")

    @property
    def loaded(self) -> tuple[ServedModel, ...]:
        """All of them, in the order in which they came."""
        return tuple(self._loaded.values())

    @property
    def names(self) -> tuple[str, ...]:
        """What they are called."""
        return tuple(self._loaded)

    def find(self, name: str | None) -> ServedModel:
        """A model; None is the default.

        Raises:
            UnknownModelError: None is loaded that has this name.
        """
        found = self._loaded.get(self.default if name is None else name)
        if found is None:
            if name is None:
                raise UnknownModelError(self.default, self._available, "; it answers requests that name none")
            raise UnknownModelError(name, self._available)
        return found

    async def warm_up(self) -> None:
        """Makes all of them ready, one after the other; see `Service.warm_up`."""
        for one in self.loaded:
            await asyncio.to_thread(one.service.warm_up)

    def put(self, service: Service) -> ServedModel | None:
        """Takes a warm service; from now on it answers under its name. The one that did before, if any."""
        old = self._loaded.get(service.name)
        self._loaded = {**self._loaded, service.name: ServedModel(service)}
        return old

    def take(self, name: str) -> ServedModel:
        """Removes a model; no request reaches it from now on.

        Raises:
            UnknownModelError: None is loaded that has this name.
        """
        found = self.find(name)
        self._loaded = {each: one for each, one in self._loaded.items() if each != name}
        return found

    async def leave(self, model: ServedModel) -> None:
        """Waits for the last request of a model that was taken out, and closes it."""
        self._leaving.append(model)
        await model.idle()
        await asyncio.to_thread(model.service.close)
        self._leaving.remove(model)

    def close(self) -> None:
        """Closes all of them; no request may be answered any more."""
        for one in (*self.loaded, *self._leaving):
            one.service.close()

    @property
    def _available(self) -> str:
        return ", ".join(self._loaded) or "none"
