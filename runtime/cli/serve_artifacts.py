"""The artifacts that `serve` was asked for, and how each is opened, at the start and whenever it is loaded again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invariclip.artifact.projection import read_projection
from invariclip.errors import InputError
from invariclip.loading import load
from invariclip.serve.repository import NAME
from invariclip.serve.service import Service, name_of
from invariclip.serve.sites import LiveSiteOptions, SiteRegistry, read_sites
from invariclip.sites.site import read_site

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from invariclip.results import AbstainAbove, UncertaintyKind
    from invariclip.serve.batcher import Watcher
    from invariclip.serve.limits import Limits
    from invariclip.serve.service import Batching, Processors


def named_artifacts(given: Sequence[str]) -> dict[str, Path]:
    """Artifacts by what requests call them.

    Args:
        given: PATH, which is called after its folder, or NAME=PATH.

    Raises:
        InputError: Two have one name.
    """
    found: dict[str, Path] = {}
    for one in given:
        before, sign, after = one.partition("=")
        named = sign and NAME.fullmatch(before)
        name, path = (before, Path(after)) if named else (name_of(Path(one)), Path(one))
        if named and not after:
            raise InputError(f"{one}: no artifact is named; write NAME=PATH")
        if name in found:
            raise InputError(f"two artifacts are called {name!r}, {found[name]} and {path}; name one, as in NAME=PATH")
        found[name] = path
    return found


@dataclass(frozen=True)
class ServedOptions:
    """How artifacts are opened and served; projection and sites are read each time.

    Attributes:
        limits: What a request may bring.
        batching: How requests are put together.
        opening: What `load` takes besides the folder.
        classes: That models answer with; empty for the artifact's own.
        templates: Of their prompts, likewise.
        projection: A file of another projection.
        site: A file of the site of requests that name none.
        sites: A folder of sites; of several artifacts each has a folder of its name in it.
        running: Whether and how sites are measured; of several artifacts each has a folder of its name in the log.
        several: Whether there may be several artifacts.
        abstain_above: Above what no label is given.
        uncertainty: Which one answers tell.
        keys: How many API keys there are.
        images: Is told of images and their batches.
        texts: Likewise of texts.
        processors: What all services share.
    """

    limits: Limits
    batching: Batching
    opening: Mapping[str, Any]
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    projection: Path | None
    site: Path | None
    sites: Path | None
    running: LiveSiteOptions | None
    several: bool
    abstain_above: AbstainAbove
    uncertainty: UncertaintyKind | None
    keys: int
    images: Watcher
    texts: Watcher
    processors: Processors

    def __post_init__(self) -> None:
        """Refuses what belongs to one artifact where there may be several.

        Raises:
            InputError: There is such a thing.
        """
        for option, value in (("--projection", self.projection), ("--site", self.site)):
            if self.several and value is not None:
                raise InputError(f"{option} belongs to one artifact; serve that one alone, without --model-root")

    def service(self, name: str, folder: Path) -> Service:
        """Opens an artifact; its service is not warm yet.

        Args:
            name: What requests call it.
            folder: The artifact.

        Raises:
            InvariclipError: See `load`, `SiteRegistry` and `Service`.
        """
        projection = None if self.projection is None else read_projection(self.projection)
        default, known = None if self.site is None else read_site(self.site), {}
        sites = self.sites / name if self.sites is not None and self.several else self.sites
        if sites is not None and (sites.is_dir() or not self.several):
            known = read_sites(sites)
        model = load(folder, **self.opening)
        model = model if projection is None else model.with_projection(projection)
        names = self.classes or model.classes
        if names and (names != model.classes or self.templates or projection is not None):
            model = model.with_classes(names, self.templates or None)
        running = self.running
        if running is not None and running.log is not None and self.several:
            running = LiveSiteOptions(running.most, running.window, running.log / name, running.log_bytes)
        registry = SiteRegistry(model, default=default, known=known, running=running, keys=self.keys)
        return Service(
            model, self.limits, self.batching, abstain_above=self.abstain_above, uncertainty=self.uncertainty,
            sites=registry, keys=self.keys, images=self.images, texts=self.texts, name=name, processors=self.processors,
        )  # fmt: skip
