"""`load`: an artifact opened as this machine's profile says, or as the caller does."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from invariclip.artifact.folder import read_manifest
from invariclip.model import Model
from invariclip.preprocessing.pixels import PixelMode
from invariclip.selection import choose
from invariclip.sites.site import Site, read_site
from invariclip.text_tower import DEFAULT_TEXT_CACHE


def load(
    folder: str | os.PathLike[str],
    *,
    variant: str | None = None,
    backend: str | None = None,
    threads: int | None = None,
    fidelity: str | None = None,
    objective: str | None = None,
    profile: str | os.PathLike[str] | None = None,
    pixel_mode: PixelMode = "exact",
    text_cache: int = DEFAULT_TEXT_CACHE,
    engine_options: Mapping[str, str] | None = None,
    site: str | os.PathLike[str] | Site | None = None,
    require_signature: str | os.PathLike[str] | None = None,
) -> Model:
    """Opens an artifact; what is not named is taken from this machine's profile, else it is the safe default.

    Args:
        folder: The `name.icm` folder.
        variant: One of those that the manifest lists.
        backend: The engine, one of `invariclip.backends.ALL_BACKENDS`.
        threads: Threads of the engine; None takes the profile's, or what affinity and cgroup allow.
        fidelity: A level that the variant must have been proved at: `exact`, `near` or `fast`.
        objective: Whose profile to take: `latency` (the default) or `throughput`.
        profile: The profile's file where it does not lie in the folder (see `invariclip tune --profile`).
        pixel_mode: `exact`, or `fast`, which decodes large JPEGs smaller (see `pixels.pixels`).
        text_cache: Embeddings of texts that are kept (see `text_tower.TextCache`); 0 keeps none.
        engine_options: Of a GPU's engine, see `backends.open_backend`.
        site: The site that images come from, or its file, see `Model.with_site`; None adapts to none.
        require_signature: A PEM file of Ed25519 public keys, one of which must have signed the artifact (`invariclip
            sign`); None takes the file that the environment variable INVARICLIP_REQUIRE_SIGNATURE names, if any.

    Raises:
        ArtifactError: Not an artifact, damaged, of another schema version, or without that variant.
        SignatureError: It is not signed as required.
        InputError: No engine, level or objective has the name, or what is named was not proved at `fidelity`; or a bad
            `pixel_mode` or `text_cache`.
        MissingExtraError: The engine's package is not installed.
        DeviceError: The engine needs a GPU, driver or library that is missing, too old or known to be wrong.
        SiteError: The site's file is damaged, or it was measured in another space.
        ProfileError: The file `profile` is damaged, stale or of another machine.

    Warns:
        ProfileWarning: This machine's profile lies in the folder and cannot be used.
    """
    where, manifest = Path(folder), read_manifest(folder, require_signature)
    chosen = choose(
        where, manifest, variant=variant, backend=backend, threads=threads, fidelity=fidelity, objective=objective,
        profile=profile,
    )  # fmt: skip
    model = Model(
        where, manifest, variant=chosen.variant, backend=chosen.backend, threads=chosen.threads, chosen_by=chosen.by,
        pixel_mode=pixel_mode, text_cache=text_cache, engine_options=engine_options,
        require_signature=require_signature,
    )  # fmt: skip
    if site is None:
        return model
    return model.with_site(site if isinstance(site, Site) else read_site(site))
