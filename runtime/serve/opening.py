"""From options to a service: the artifact opened as they say, with its classes, projection and sites."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from invariclip.artifact.projection import read_projection
from invariclip.loading import load
from invariclip.serve.limits import Limits
from invariclip.serve.service import Batching, Service
from invariclip.serve.sites import SiteRegistry, read_sites
from invariclip.sites.site import read_site

if TYPE_CHECKING:
    from invariclip.preprocessing.pixels import PixelMode
    from invariclip.results import AbstainAbove, UncertaintyKind
    from invariclip.serve.batcher import Watcher
    from invariclip.serve.metrics import Metrics
    from invariclip.serve.sites import LiveSiteOptions


@dataclass(frozen=True)
class ServiceOptions:
    """How an artifact is served; plain values and paths, so that another process or machine may open it too.

    Attributes:
        artifact: Its folder.
        variant: See `loading.load`, and so for the next five.
        backend: The engine.
        threads: Its threads.
        fidelity: A level that the variant must have been proved at.
        objective: Whose machine profile to take.
        pixel_mode: How images are decoded.
        require_signature: Public keys, one of which must have signed the artifact.
        projection: A file with another projection.
        classes: Class names; none take the artifact's.
        templates: Their prompts; none take the artifact's.
        site: The site of images that name none.
        sites: A folder of sites that requests name.
        abstain_above: See `Service`, and so for the next.
        uncertainty: Which one answers tell.
        limits: What a request may bring.
        batching: How requests are put together.
    """

    artifact: Path
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
    abstain_above: AbstainAbove = None
    uncertainty: UncertaintyKind | None = None
    limits: Limits = field(default_factory=Limits)
    batching: Batching = field(default_factory=Batching)


def open_service(
    options: ServiceOptions, metrics: Metrics, *, keys: int = 1, running: LiveSiteOptions | None = None
) -> Service:
    """Opens it; nothing is warm yet.

    Args:
        options: What and how.
        metrics: Is told of its batches.
        keys: How many API keys there are.
        running: How sites are measured from the traffic; None measures none.

    Raises:
        InvariclipError: What `loading.load`, `Service` and the readers of its files raise.
    """
    other = None if options.projection is None else read_projection(options.projection)
    default = None if options.site is None else read_site(options.site)
    known = {} if options.sites is None else read_sites(options.sites)
    model = load(
        options.artifact, variant=options.variant, backend=options.backend, threads=options.threads,
        fidelity=options.fidelity, objective=options.objective, pixel_mode=options.pixel_mode,
        require_signature=options.require_signature,
    )  # fmt: skip
    model = model if other is None else model.with_projection(other)
    names = options.classes or model.classes
    if names and (names != model.classes or options.templates or other is not None):
        model = model.with_classes(names, options.templates or None)
    # An image's size has bounds of ours; Python would keep a record of every size that Pillow warns of
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    registry = SiteRegistry(model, default=default, known=known, running=running, keys=keys)
    watchers: dict[str, Watcher] = {name: metrics.watcher(name) for name in ("images", "texts")}
    return Service(
        model, options.limits, options.batching, abstain_above=options.abstain_above, uncertainty=options.uncertainty,
        sites=registry, keys=keys, **watchers,
    )  # fmt: skip
