"""What `load` opens: what its caller named, else what this machine's profile says, else the safe default."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from invariclip.artifact.fidelity import LEVELS, reaches, require_level
from invariclip.artifact.manifest import MANIFEST
from invariclip.backends import BACKENDS, DEFAULT_BACKEND, engine_versions, is_installed, require_backend
from invariclip.errors import (
    ArtifactError,
    InputError,
    ProfileError,
    ProfileWarning,
    ProjectionError,
    UnprovedBackendWarning,
)
from invariclip.files import sha256_file
from invariclip.machine import this_machine
from invariclip.preprocessing.pixels import require_pixel_mode
from invariclip.profile import OBJECTIVES, ProfileBasis, changes, profile_path, read_profile

if TYPE_CHECKING:
    import os

    from invariclip.artifact.fidelity import Fidelity
    from invariclip.artifact.manifest import Manifest, Variant
    from invariclip.artifact.projection import Projection
    from invariclip.profile import MachineProfile, Objective

SAFE_VARIANT = "float32"
_STACK = 5  # from the warning up to the caller of `load`


@dataclass(frozen=True)
class VariantSelection:
    """What to open, and who says so.

    Attributes:
        variant: A name in the manifest.
        backend: The engine.
        threads: Its threads; None takes what affinity and cgroup allow.
        by: `caller`, `default`, or `profile FILE`.
    """

    variant: str
    backend: str
    threads: int | None
    by: str


def choose(
    folder: Path,
    manifest: Manifest,
    *,
    variant: str | None = None,
    backend: str | None = None,
    threads: int | None = None,
    fidelity: str | None = None,
    objective: str | None = None,
    profile: str | os.PathLike[str] | None = None,
) -> VariantSelection:
    """Picks a variant and an engine; the arguments are those of `loading.load`.

    Raises:
        ArtifactError: No variant reaches the fidelity, or none has the name.
        InputError: No level, objective or engine has the name, or the pair does not reach the fidelity.
        ProfileError: The profile that the caller named cannot be used.
    """
    level = None if fidelity is None else require_level(fidelity)
    sought = None if objective is None else require_objective(objective)
    if variant is not None and variant not in manifest.variants:
        raise ArtifactError(f"{folder}: no variant {variant!r}; available: {', '.join(manifest.variants) or 'none'}")
    chosen = None
    if variant is None or backend is None:
        chosen = _from_profile(folder, manifest, level, sought, None if profile is None else Path(profile))
    if chosen is not None and variant in (None, chosen.variant) and backend in (None, chosen.backend):
        return chosen if threads is None else replace(chosen, threads=threads, by=f"{chosen.by}, threads by caller")
    if variant is not None and backend is not None:
        pair = variant, backend
    elif variant is not None:
        pair = variant, _proved_engine(manifest.variants[variant])
    elif backend is not None:
        pair = _variant_on(manifest, backend), backend
    else:
        pair = safe_default(folder, manifest)
    if level is not None and not keeps(manifest.variants[pair[0]], pair[1], level):
        raise InputError(
            f"{folder}: {pair[0]} on {pair[1]} was not proved at fidelity {level}; available: "
            f"{_listed(manifest, level)}"
        )
    by = "default" if variant is None and backend is None else "caller"
    return VariantSelection(*pair, threads, by)


def safe_default(folder: Path, manifest: Manifest) -> tuple[str, str]:
    """Variant and engine where nothing is asked for: the closest, first of all `float32` on ONNX Runtime.

    Raises:
        ArtifactError: No variant is exact, and none is called `float32`.
    """
    pairs = [(name, engine) for name, variant in manifest.variants.items() for engine in variant.parity]
    exact = [
        (name, engine)
        for name, engine in pairs
        if engine in BACKENDS and is_installed(engine) and reaches(manifest.variants[name].parity[engine], "exact")
    ]
    if exact:
        return min(exact, key=lambda pair: (pair[0] != SAFE_VARIANT, pair[1] != DEFAULT_BACKEND))
    if SAFE_VARIANT in manifest.variants:
        return SAFE_VARIANT, DEFAULT_BACKEND  # proved elsewhere, or before there were levels: `Model` warns
    raise ArtifactError(
        f"{folder}: no variant that runs here was proved exact; name one with variant=, or export again; available: "
        f"{', '.join(manifest.variants)}"
    )


def keeps(variant: Variant, backend: str, level: Fidelity) -> bool:
    """Whether a variant was proved on an engine at a level, or at a closer one."""
    record = variant.parity.get(backend, {})
    return any(reaches(record, closer) for closer in LEVELS[: LEVELS.index(level) + 1])


def require_objective(objective: str) -> Objective:
    """The objective of this name.

    Raises:
        InputError: There is none.
    """
    for known in OBJECTIVES:
        if objective == known:
            return known
    raise InputError(f"no objective is called {objective!r}; available: {', '.join(OBJECTIVES)}")


def basis_of(
    folder: Path,
    objective: Objective,
    fidelity: Fidelity,
    threads: tuple[int, ...] = (),
    batches: tuple[int, ...] = (),
) -> ProfileBasis:
    """What a choice made now, on this machine and of this artifact, rests on."""
    return ProfileBasis(
        this_machine(), engine_versions(), sha256_file(folder / MANIFEST), objective, fidelity, threads, batches
    )


def why_not(profile: MachineProfile, now: ProfileBasis, manifest: Manifest) -> list[str]:
    """Why a profile must not be used, in words; empty where it may.

    What other engines than the chosen one are at does not matter to whoever serves; `tune` asks about them too.
    """
    choice, tried = profile.choice, profile.basis
    now = replace(now, threads=tried.threads, batches=tried.batches)
    reasons = changes(tried, now, engines=(choice.backend,))
    if not reasons and choice.backend not in now.engines:
        reasons.append(f"{choice.backend} is not installed")
    variant = manifest.variants.get(choice.variant)
    if not reasons and (variant is None or not keeps(variant, choice.backend, tried.fidelity)):
        reasons.append(f"{choice.variant} on {choice.backend} was not proved at fidelity {tried.fidelity}")
    if choice.threads > now.machine.threads:
        reasons.append(f"{choice.threads} threads are more than the {now.machine.threads} of this process")
    return reasons


def profile_of(
    folder: Path, manifest: Manifest, level: Fidelity | None = None, objective: Objective = "latency"
) -> tuple[Path, MachineProfile] | None:
    """This machine's profile of an artifact, where there is a usable one.

    Args:
        folder: The artifact's.
        manifest: Its manifest.
        level: The fidelity asked for: that level's profile, else a closer one's. None takes what was tuned last.
        objective: What was sought.

    Warns:
        ProfileWarning: One lies there and is damaged, foreign or stale.
    """
    if next(folder.glob("machine-*.json"), None) is None:
        return None
    found: list[tuple[Path, MachineProfile]] = []
    here = basis_of(folder, objective, LEVELS[0])
    for wanted in LEVELS if level is None else LEVELS[: LEVELS.index(level) + 1]:
        now = replace(here, fidelity=wanted)
        path = profile_path(folder, now)
        if not path.exists():
            continue
        try:
            profile = read_profile(path)
            reasons = why_not(profile, now, manifest)
            if reasons:
                raise ProfileError(f"{path}: {'; '.join(reasons)}")
        except ProfileError as error:
            warnings.warn(
                f"the machine profile is not used: {error}; `invariclip tune` makes a new one",
                ProfileWarning,
                stacklevel=_STACK,
            )
            continue
        found.append((path, profile))
    if not found:
        return None
    # What was tuned last is what its user wants now; of two of the same second the closer comes first
    return max(found, key=lambda item: item[1].date) if level is None else found[-1]


def _from_profile(
    folder: Path, manifest: Manifest, level: Fidelity | None, objective: Objective | None, named: Path | None
) -> VariantSelection | None:
    if named is None:
        found = profile_of(folder, manifest, level, objective or OBJECTIVES[0])
    else:
        profile = read_profile(named)
        now = basis_of(folder, objective or profile.basis.objective, level or profile.basis.fidelity)
        reasons = why_not(profile, now, manifest)
        if reasons:
            raise ProfileError(f"{named}: is not used: {'; '.join(reasons)}; run `invariclip tune --profile {named}`")
        found = named, profile
    if found is None:
        return None
    path, profile = found
    choice = profile.choice
    return VariantSelection(choice.variant, choice.backend, choice.threads, f"profile {path.name}")


def _proved_engine(variant: Variant) -> str:
    """ONNX Runtime where the variant was proved on it, else the first engine that it was proved on."""
    if DEFAULT_BACKEND in variant.parity:
        return DEFAULT_BACKEND
    return next((name for name in variant.parity if name in BACKENDS), DEFAULT_BACKEND)


def _variant_on(manifest: Manifest, backend: str) -> str:
    """`float32`, else the first that was proved exact on the engine, else the first."""
    if SAFE_VARIANT in manifest.variants:
        return SAFE_VARIANT
    exact = (name for name, variant in manifest.variants.items() if reaches(variant.parity.get(backend, {}), "exact"))
    return next(exact, next(iter(manifest.variants)))


def _listed(manifest: Manifest, level: Fidelity) -> str:
    pairs = [
        f"{name} on {engine}"
        for name, variant in manifest.variants.items()
        for engine in variant.parity
        if keeps(variant, engine, level)
    ]
    return ", ".join(pairs) or "none"


def require_openable(folder: Path, manifest: Manifest, variant: str, backend: str, pixel_mode: str) -> Variant:
    """The variant of this name, once it is known that it may run in an engine with images read in a mode.

    Raises:
        ArtifactError: There is no such variant.
        InputError: The variant broke the contract on this engine; see also `require_right` and `require_proved_pixels`.
    """
    require_proved_pixels(folder, manifest, pixel_mode)
    if variant not in manifest.variants:
        raise ArtifactError(f"{folder}: no variant {variant!r}; available: {', '.join(manifest.variants) or 'none'}")
    missed = manifest.left_out.get(f"{variant} on {backend}")
    if missed is not None:
        raise InputError(
            f"{folder}: {variant} broke the contract on {backend} when it was exported ({missed}); "
            f"it was proved on {', '.join(manifest.variants[variant].parity)}"
        )
    require_right(folder, manifest.variants[variant], backend)
    return manifest.variants[variant]


def require_right(folder: Path, variant: Variant, backend: str) -> None:
    """Refuses an engine that is known to answer a graph wrongly, and says so where one was never tried.

    Raises:
        InputError: The graph resizes by ONNX's Resize, which other engines than ONNX Runtime compute differently.
    """
    require_backend(backend)
    if variant.front == "resize" and backend != DEFAULT_BACKEND:
        raise InputError(
            f"{folder}: its image graph resizes by ONNX's Resize, which {backend} computes differently; "
            f"use {DEFAULT_BACKEND}, or export with --pixels-in-graph matmul"
        )
    if backend not in variant.parity:
        warnings.warn(
            f"{folder}: was proved on {', '.join(variant.parity) or 'no engine'}, not on {backend}; "
            f"`invariclip verify --backend {backend}` tells whether it answers alike",
            UnprovedBackendWarning,
            stacklevel=_STACK,
        )


def require_proved_pixels(folder: Path, manifest: Manifest, mode: str) -> None:
    """Makes sure that a pixel mode exists, and that the fast one kept the contract in this artifact.

    Raises:
        InputError: It does not, or did not.
    """
    require_pixel_mode(mode)
    if mode == "exact" or manifest.fast_pixels.get("passed") is True:
        return
    broken = manifest.fast_pixels.get("broken")
    fact = f"failed ({'; '.join(map(str, broken))})" if broken else "was not proved"
    raise InputError(
        f"{folder}: the fast pixel mode {fact} at its export; leave it out, or export with --fast-pixels to prove it"
    )


EXCHANGING_BACKENDS = ("onnxruntime",)
"""Engines that let an initializer be overridden at a run; the others read it as a constant."""


def require_exchangeable(folder: Path, manifest: Manifest, backend: str, projection: Projection) -> None:
    """Refuses a projection that an artifact cannot take.

    Raises:
        ArtifactError: The artifact was exported with its projection folded in, or without one.
        InputError: The engine cannot exchange it, or learned templates were trained in the artifact's own space.
        ProjectionError: It is of another shape.
    """
    if manifest.cdc is not None:
        raise InputError(
            f"{folder}: its learned templates were trained in the space of its own projection, so that one cannot be "
            "exchanged; train templates with the other one and export again"
        )
    facts, model = manifest.projection, manifest.model
    how = "none" if facts is None else f"image {facts.image_fold}, text {facts.text_fold}"
    if facts is None or {facts.image_fold, facts.text_fold} != {"input"}:
        raise ArtifactError(
            f"{folder}: its projection cannot be exchanged ({how}); export it again with "
            "--projection FILE --projection-as-input-initializer"
        )
    if backend not in EXCHANGING_BACKENDS:
        raise InputError(
            f"backend {backend!r} cannot exchange the projection; available: {', '.join(EXCHANGING_BACKENDS)}"
        )
    if projection.A_inv.shape != (model.embed_dim, facts.rank):
        raise ProjectionError(
            f"the projection is {projection.embed_dim} → {projection.rank}, the artifact's towers take "
            f"{model.embed_dim} → {facts.rank}; calibrate with --rank {facts.rank}, or export again"
        )
