"""`tune`: finds what is fastest here among what was proved, checks it, and writes it down for `load`."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from invariclip.artifact.fidelity import LEVELS, reaches, require_level
from invariclip.artifact.folder import read_manifest
from invariclip.autotune.candidates import (
    TuneCandidate,
    enumerate_candidates,
    plainness,
    require_candidates,
    require_threads,
)
from invariclip.autotune.halving import Search, middle, stages_for
from invariclip.autotune.verdict import decide
from invariclip.console import silent
from invariclip.errors import ArtifactError, ContractError, InputError, ProfileError, TuningInterruptedError
from invariclip.files import require_writable
from invariclip.machine import available_memory, load_before, this_machine
from invariclip.profile import MachineProfile, ProfileChoice, changes, profile_path, read_profile, write_profile
from invariclip.selection import basis_of, require_objective, safe_default, why_not
from invariclip.version import __version__

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from invariclip.artifact.manifest import Manifest
    from invariclip.autotune.verdict import Timed
    from invariclip.console import Progress
    from invariclip.profile import Objective, ProfileBasis

THROUGHPUT_BATCHES = (1, 4, 16, 64)
MAX_BATCH = 64
DEFAULT_SECONDS = 60.0
# Of a process: interpreter and engine; a graph's weights as they are and as the engine packs them, and room to compute.
_PROCESS_BYTES, _PER_FILE_BYTE = 400 << 20, 3
_MEMORY_SHARE = 0.6


@dataclass(frozen=True)
class TuneSettings:
    """What to search.

    Attributes:
        objective: `latency` or `throughput`.
        fidelity: The level that every candidate must have been proved at.
        threads: Thread counts to try; empty takes all, half and a quarter of what this process may use.
        batches: Batch sizes up to 64; empty takes 1 for latency, `THROUGHPUT_BATCHES` for throughput.
        seconds: How long the search should take; large models take longer, for nothing is judged by less than three
            rounds.
        again: Measure even where a profile is there that holds.
        profile: Where to write; None takes the artifact's folder.
    """

    objective: str = "latency"
    fidelity: str = "exact"
    threads: tuple[int, ...] = ()
    batches: tuple[int, ...] = ()
    seconds: float = DEFAULT_SECONDS
    again: bool = False
    profile: Path | None = None


@dataclass(frozen=True)
class Tuned:
    """What `tune` answers.

    Attributes:
        profile: The profile that holds now.
        path: Its file.
        reused: Whether it was there already, and nothing was measured.
        changed: Why the one that was there did not hold, in words.
    """

    profile: MachineProfile
    path: Path
    reused: bool
    changed: tuple[str, ...]


def tune(folder: str | os.PathLike[str], settings: TuneSettings | None = None, *, progress: Progress = silent) -> Tuned:
    """Measures what is fastest on this machine and writes a machine profile, or finds that the one there holds.

    Args:
        folder: The artifact's.
        settings: What to search; None takes the defaults.
        progress: `console.bar` or `console.silent`.

    Raises:
        ArtifactError: Not an artifact, damaged, or without an exact variant to check others against.
        InputError: A setting is out of range, nothing was proved at the fidelity, or the profile cannot be written.
        ContractError: The safe default fails here, or nothing answers as was proved.
        TuningInterruptedError: Ctrl-C; the message says what was best so far.

    Warns:
        UntrueVariantWarning: A variant does not answer here as its record says; it is not picked.
    """
    where, wanted = Path(folder), settings or TuneSettings()
    manifest = read_manifest(where)
    basis = _basis(where, wanted)
    path = wanted.profile or profile_path(where, basis)
    there, changed = _there(path, basis, manifest)
    if there is not None and not changed and not wanted.again:
        return Tuned(there, path, reused=True, changed=())
    require_writable(path, "; name another place with --profile FILE")
    found, left_out = enumerate_candidates(manifest, basis.fidelity, basis.threads)
    require_candidates(where, found, left_out, basis.fidelity)
    began, load = time.monotonic(), load_before()
    search = Search(where, _yardstick(where, manifest, basis), middle(basis.batches), _seats(where, manifest), progress)
    search.left_out += left_out
    try:
        with search:
            finalists = search.run(found, stages_for(basis.objective, basis.batches), wanted.seconds)
            taken, why = _checked(search, finalists)
    except KeyboardInterrupt as stop:
        raise TuningInterruptedError(f"{where}: interrupted; {_best_so_far(search)}; nothing was written") from stop
    candidate = taken.entry.candidate
    profile = MachineProfile(
        basis=basis,
        choice=ProfileChoice(candidate.variant, candidate.backend, candidate.threads, taken.entry.batch),
        why=why,
        measurements=tuple(
            one.measurement() for one in sorted(search.timed.values(), key=lambda one: (-one.stage, -one.ratio))
        ),
        left_out=tuple(search.left_out),
        seconds=round(time.monotonic() - began, 1),
        load=load if load is None else round(load, 2),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={"invariclip": __version__, "python": platform.python_version()},
    )
    if basis_of(where, basis.objective, basis.fidelity, basis.threads, basis.batches) != basis:
        raise InputError(f"{where}: the artifact or the machine changed while it was measured; run it again")
    write_profile(path, profile)
    return Tuned(profile, path, reused=False, changed=tuple(changed))


def _basis(folder: Path, settings: TuneSettings) -> ProfileBasis:
    objective = require_objective(settings.objective)
    fidelity = require_level(settings.fidelity)
    threads = require_threads(settings.threads, this_machine().threads)
    if not settings.seconds > 0:
        raise InputError(f"seconds must be above 0, not {settings.seconds}")
    return basis_of(folder, objective, fidelity, threads, _batches(settings.batches, objective))


def _batches(batches: Sequence[int], objective: Objective) -> tuple[int, ...]:
    bad = [batch for batch in batches if not 1 <= batch <= MAX_BATCH]
    if bad:
        raise InputError(f"a batch must be from 1 to {MAX_BATCH}, not {bad[0]}")
    if objective == "latency" and len(set(batches)) > 1:
        raise InputError("latency is sought at one batch size; several --batch go with --objective throughput")
    return tuple(sorted(set(batches))) or ((1,) if objective == "latency" else THROUGHPUT_BATCHES)


def _there(path: Path, basis: ProfileBasis, manifest: Manifest) -> tuple[MachineProfile | None, list[str]]:
    """The profile that lies there, and why it does not hold; no profile and no reason where there is none."""
    if not path.exists():
        return None, []
    try:
        profile = read_profile(path)
    except ProfileError as error:
        return None, [str(error)]
    return profile, changes(profile.basis, basis) or why_not(profile, basis, manifest)


def _yardstick(folder: Path, manifest: Manifest, basis: ProfileBasis) -> TuneCandidate:
    """The safe default with the most threads: what others are timed and checked against.

    Raises:
        ArtifactError: It was not proved exact.
    """
    variant, backend = safe_default(folder, manifest)
    facts = manifest.variants[variant]
    if not reaches(facts.parity.get(backend, {}), "exact"):
        raise ArtifactError(
            f"{folder}: {variant} on {backend}, which the others would be checked against, was not proved exact; "
            "export it again"
        )
    return TuneCandidate(variant, backend, basis.threads[-1], LEVELS[0], plainness(facts))


def _seats(folder: Path, manifest: Manifest) -> int:
    """How many processes may be open at once."""
    memory = available_memory()
    if memory is None:
        return 4
    sizes = [variant.image.size_bytes for variant in manifest.variants.values()]
    for variant in manifest.variants.values():
        data = folder / f"{variant.image.path}.data"
        sizes.append(variant.image.size_bytes + (data.stat().st_size if data.is_file() else 0))
    return max(2, int(memory * _MEMORY_SHARE / (_PROCESS_BYTES + _PER_FILE_BYTE * max(sizes))))


def _checked(search: Search, finalists: Sequence[Timed]) -> tuple[Timed, str]:
    """The best finalist whose answers agree with the default's.

    Raises:
        ContractError: None is left.
    """
    left = list(finalists)
    while left:
        taken, why = decide(left)
        problem = search.recheck(taken.entry)
        if not problem:
            return taken, why
        search.refuse(taken.entry.candidate, problem)
        left = [one for one in left if one.entry.candidate != taken.entry.candidate]
    reasons = "; ".join(f"{item['candidate']}: {item['why']}" for item in search.left_out)
    raise ContractError(f"{search.folder}: no candidate answers here as was proved, nothing was written: {reasons}")


def _best_so_far(search: Search) -> str:
    if not search.timed:
        return "nothing was measured"
    stage = max(one.stage for one in search.timed.values())
    best = max((one for one in search.timed.values() if one.stage == stage), key=lambda one: one.ratio)
    return f"best so far: {best.entry.name}, {best.ratio:.2f} × the safe default over {len(best.seconds)} round(s)"
