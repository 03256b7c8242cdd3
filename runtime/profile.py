"""The machine profile: which variant, engine, threads and batch were fastest here, and what that rests on.

`invariclip tune` writes it into the artifact's folder as machine-KEY.json; `load` reads it. The key names the machine,
the objective and the fidelity, so machines that share a folder have a file each. The manifest does not list it: no
digest of the artifact covers it, and an artifact that is written anew starts without one. What may change on the same
machine is inside (the manifest's digest, the engines' versions), so `changes` can say why a profile is stale.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from invariclip.artifact.fidelity import Fidelity
from invariclip.errors import InputError, ProfileError
from invariclip.files import write_atomically
from invariclip.machine import Machine
from invariclip.records import read_sealed_json, sealed_json, to_record

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

Objective = Literal["latency", "throughput"]
"""`latency`: the median time of one small batch. `throughput`: images per second, in the batch that gives most."""
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)

SCHEMA_VERSION = 2
MAX_PROFILE_BYTES = 1 << 20
BUSY = 0.5


@dataclass(frozen=True)
class ProfileBasis:
    """What a choice rests on; where any of it differs, it has to be made again.

    Attributes:
        machine: Where it was measured.
        engines: Engines that were installed, and their versions.
        manifest_sha256: Digest of the artifact's manifest, which holds the digests of all its files.
        objective: What was sought.
        fidelity: The level that every candidate had to reach.
        threads: Thread counts that were tried.
        batches: Batch sizes that were tried.
    """

    machine: Machine
    engines: dict[str, str]
    manifest_sha256: str
    objective: Objective
    fidelity: Fidelity
    threads: tuple[int, ...]
    batches: tuple[int, ...]

    def __post_init__(self) -> None:
        """Refuses what no tuning writes.

        Raises:
            ProfileError: A number is out of range.
        """
        if min((*self.threads, *self.batches), default=1) < 1:
            raise ProfileError("threads and batches must be from 1 on")


@dataclass(frozen=True)
class ProfileChoice:
    """What to open.

    Attributes:
        variant: A name in the manifest.
        backend: The engine.
        threads: Its threads.
        batch: Images per run.
    """

    variant: str
    backend: str
    threads: int
    batch: int

    def __post_init__(self) -> None:
        """Refuses what no tuning writes.

        Raises:
            ProfileError: A number is out of range.
        """
        if min(self.threads, self.batch) < 1:
            raise ProfileError("threads and batch must be from 1 on")


@dataclass(frozen=True)
class Measurement:
    """What was measured of one candidate at one batch size, in the last stage that it reached.

    Attributes:
        candidate: What ran.
        fidelity: The closest level that its record reaches.
        stage: 1 for the first; later stages have fewer candidates and more rounds.
        rounds: Turns that it had.
        median_ms: Median over rounds of a batch's time, milliseconds.
        low_ms: First quartile over rounds.
        high_ms: Third quartile over rounds.
        images_per_second: At the median.
        ratio: Speed over the safe default's, round by round, median: above 1 is faster.
        ratio_low: Lower end of its 95 % bootstrap interval over rounds.
        ratio_high: Upper end.
    """

    candidate: ProfileChoice
    fidelity: str
    stage: int
    rounds: int
    median_ms: float
    low_ms: float
    high_ms: float
    images_per_second: float
    ratio: float
    ratio_low: float
    ratio_high: float


@dataclass(frozen=True)
class MachineProfile:
    """A choice, what it rests on and how it came about.

    Attributes:
        basis: What it rests on.
        choice: What to open.
        why: The reason, in words.
        measurements: Every candidate that was timed, fastest first.
        left_out: Candidates that were not timed, or were refused: `candidate` and `why`.
        seconds: How long the search took.
        load: Processes per processor before it: above `BUSY`, other programs had a part in the result; None if unknown.
        date: When it ended: UTC, ISO 8601.
        versions: Of invariclip and Python.
    """

    basis: ProfileBasis
    choice: ProfileChoice
    why: str
    measurements: tuple[Measurement, ...]
    left_out: tuple[dict[str, str], ...]
    seconds: float
    load: float | None
    date: str
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """The profile as it stands in its file."""
        return {"schema_version": SCHEMA_VERSION, "key": file_key(self.basis), **asdict(self)}

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> MachineProfile:
        """Reads what `to_json` wrote.

        Raises:
            ProfileError: A field that is missing, unknown or out of range.
        """
        rest = {name: value for name, value in plain.items() if name not in ("schema_version", "key")}
        profile = to_record(cls, rest, "the profile", error=ProfileError)
        if plain.get("key") != file_key(profile.basis):
            raise ProfileError("the profile's key is not that of what it rests on")
        return profile


def file_key(basis: ProfileBasis) -> str:
    """Names the machine, the objective and the fidelity: 16 hexadecimal digits, the KEY of machine-KEY.json."""
    parts = [json.dumps(asdict(basis.machine), sort_keys=True), basis.objective, basis.fidelity]
    return hashlib.sha256("\n".join(["invariclip-machine-1", *parts]).encode()).hexdigest()[:16]


def profile_path(folder: Path, basis: ProfileBasis) -> Path:
    """Where the profile of this basis lies in an artifact's folder."""
    return folder / f"machine-{file_key(basis)}.json"


def write_profile(path: Path, profile: MachineProfile) -> None:
    """Writes a profile: the whole file or none.

    Raises:
        InputError: The folder cannot be written.
    """
    try:
        write_atomically(path, sealed_json(profile.to_json()))
    except InputError as error:
        raise InputError(f"{error}; name another place with --profile FILE") from error


def read_profile(path: Path) -> MachineProfile:
    """Reads a profile, whose size is bounded and of which nothing is ever executed.

    Raises:
        ProfileError: It is missing, too large, damaged or of another schema version.
    """
    plain = read_sealed_json(
        path, "a machine profile", schema=SCHEMA_VERSION, remedy="tune again", max_bytes=MAX_PROFILE_BYTES,
        error=ProfileError,
    )  # fmt: skip
    try:
        return MachineProfile.from_json(plain)
    except ProfileError as error:
        raise ProfileError(f"{path}: {error}") from error


def changes(then: ProfileBasis, now: ProfileBasis, engines: Collection[str] | None = None) -> list[str]:
    """What differs between the basis of a profile and now, in words; empty where it still holds.

    Args:
        then: Of the profile.
        now: Of this process.
        engines: Compare the versions of these engines only; None compares all.
    """
    named = set(then.engines) | set(now.engines) if engines is None else set(engines)
    pairs: list[tuple[str, object, object]] = [
        ("processor", then.machine.processor, now.machine.processor),
        ("architecture", then.machine.architecture, now.machine.architecture),
        ("instructions", " ".join(then.machine.instructions), " ".join(now.machine.instructions)),
        ("threads of this process", then.machine.threads, now.machine.threads),
        *((name, then.engines.get(name), now.engines.get(name)) for name in sorted(named)),
        ("the artifact's manifest", then.manifest_sha256, now.manifest_sha256),
        ("objective", then.objective, now.objective),
        ("fidelity", then.fidelity, now.fidelity),
        ("threads tried", str([*then.threads])[1:-1], str([*now.threads])[1:-1]),
        ("batches tried", str([*then.batches])[1:-1], str([*now.batches])[1:-1]),
    ]
    return [f"{what}: {_said(old)} → {_said(new)}" for what, old, new in pairs if old != new]


def _said(value: object) -> str:
    return "not installed" if value is None else f"{str(value) or 'none':.60}"
