"""What `/v1/model` says: the artifact, the engine it runs in, and what a request may bring."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from invariclip.version import __version__

if TYPE_CHECKING:
    from invariclip.serve.service import Service


def described(service: Service) -> dict[str, Any]:
    """The facts as JSON; `parity` is of the variant and engine that run."""
    model = service.model
    manifest = model.manifest
    record = manifest.variants[model.variant].parity.get(model.backend)
    return {
        "version": __version__,
        "model": manifest.model.name,
        "checkpoint_sha256": manifest.model.checkpoint_sha256,
        "projection": None if manifest.projection is None else asdict(manifest.projection),
        "space_id": model.space_id,
        "site_sha256": service.sites.default.digest if service.sites.default else model.site_sha256 or None,
        "sites": sorted(service.sites.known),
        "adapting": service.sites.running is not None,
        "width": model.width,
        "variant": model.variant,
        "engine": model.describe(),
        "classes": list(model.classes),
        "templates": list(model.templates),
        "parity": record,
        "semantics": None if manifest.cdc is None else asdict(manifest.cdc),
        "uncertainty": service.uncertainty,
        "abstain_above": service.abstain_above,
        "image_size": list(manifest.pixels.image_size),
        "context_length": manifest.text.context_length,
        "max_batch": service.images.max_batch,
        "limits": service.limits.to_json(),
    }
