"""From options to services: each artifact opened as they say, at the start and whenever it is loaded again."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from invariclip.artifact.projection import read_projection
from invariclip.errors import InputError
from invariclip.loading import load
from invariclip.serve.limits import Limits
from invariclip.serve.repository import NAME
from invariclip.serve.service import Batching, Service, name_of
from invariclip.serve.sites import SiteRegistry, read_sites
from invariclip.sites.site import read_site

if TYPE_CHECKING:
    from collections.abc import Sequence

    from invariclip.preprocessing.pixels import PixelMode
    from invariclip.results import AbstainAbove, UncertaintyKind
    from invariclip.serve.batcher import Watcher
    from invariclip.serve.metrics import Metrics
    from invariclip.serve.service import Processors
    from invariclip.serve.sites import LiveSiteOptions


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
class ServiceOptions:
    """How artifacts are opened and served; plain values and paths, so that another process or machine may do it too.

    Projection and sites are read each time.

    Attributes:
        variant: See `loading.load`, and so for the next five.
        backend: The engine.
        threads: Its threads.
        fidelity: A level that the variant must have been proved at.
        objective: Whose machine profile to take.
        pixel_mode: How images are decoded.
        require_signature: Public keys, one of which must have signed the artifact.
        projection: A file with another projection.
        classes: That models answer with; empty for the artifact's own.
        templates: Of their prompts, likewise.
        site: A file of the site of requests that name none.
        sites: A folder of sites; of several artifacts each has a folder of its name in it.
        running: Whether and how sites are measured; of several artifacts each has a folder of its name in the log.
        several: Whether there may be several artifacts.
        abstain_above: Above what no label is given.
        uncertainty: Which one answers tell.
        keys: How many API keys there are.
        limits: What a request may bring.
        batching: How requests are put together.
    """

    variant: str | None = None
    backend: str | None = None
    threads: int | None = None
    fidelity: str | None = None
    objective: str | None = None
    pixel_mode: PixelMode = "exact"
    require_signature: str | None = None
    projection: Path | None = None
    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    site: Path | None = None
    sites: Path | None = None
    running: LiveSiteOptions | None = None
    several: bool = False
    abstain_above: AbstainAbove = None
    uncertainty: UncertaintyKind | None = None
    keys: int = 1
    limits: Limits = field(default_factory=Limits)
    batching: Batching = field(default_factory=Batching)

    def __post_init__(self) -> None:
        """Refuses what belongs to one artifact where there may be several.

        Raises:
            InputError: There is such a thing.
        """
        for option, value in (("--projection", self.projection), ("--site", self.site)):
            if self.several and value is not None:
                raise InputError(f"{option} belongs to one artifact; serve that one alone, without --model-root")


def open_service(
    options: ServiceOptions, name: str, folder: Path, metrics: Metrics, processors: Processors | None = None
) -> Service:
    """Opens an artifact; its service is not warm yet.

    Args:
        options: How.
        name: What requests call it.
        folder: The artifact.
        metrics: Is told of its batches.
        processors: What all services of this process share; None gives it its own.

    Raises:
        InvariclipError: What `loading.load`, `SiteRegistry`, `Service` and the readers of its files raise.
    """
    projection = None if options.projection is None else read_projection(options.projection)
    default, known = None if options.site is None else read_site(options.site), {}
    sites = options.sites / name if options.sites is not None and options.several else options.sites
    if sites is not None and (sites.is_dir() or not options.several):
        known = read_sites(sites)
    model = load(
        folder, variant=options.variant, backend=options.backend, threads=options.threads, fidelity=options.fidelity,
        objective=options.objective, pixel_mode=options.pixel_mode, require_signature=options.require_signature,
    )  # fmt: skip
    model = model if projection is None else model.with_projection(projection)
    names = options.classes or model.classes
    if names and (names != model.classes or options.templates or projection is not None):
        model = model.with_classes(names, options.templates or None)
    running = options.running
    if running is not None and running.log is not None and options.several:
        running = replace(running, log=running.log / name)
    # An image's size has bounds of ours; Python would keep a record of every size that Pillow warns of
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    registry = SiteRegistry(model, default=default, known=known, running=running, keys=options.keys)
    watchers: dict[str, Watcher] = {kind: metrics.watcher(kind) for kind in ("images", "texts")}
    return Service(
        model, options.limits, options.batching, abstain_above=options.abstain_above, uncertainty=options.uncertainty,
        sites=registry, keys=options.keys, name=name, processors=processors, **watchers,
    )  # fmt: skip
