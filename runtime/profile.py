"""The machine profile: which variant, engine, threads and batch were fastest here, and what that rests on.

`invariclip tune` writes it into the artifact's folder as machine-KEY.json; `load` reads it. The key names the machine,
the objective and the fidelity, so machines that share a folder have a file each. The manifest does not list it: no
digest of the artifact covers it, and an artifact that is written anew starts without one. What may change on the same
machine is inside (the manifest's digest, the engines' versions), so `changes` can say why a profile is stale.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from invariclip.artifact.fidelity import LEVELS, Fidelity
from invariclip.errors import InputError, ProfileError
from invariclip.files import write_atomically
from invariclip.machine import Machine, machine_from_json

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

Objective = Literal["latency", "throughput"]
"""`latency`: the median time of one small batch. `throughput`: images per second, in the batch that gives most."""
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)

SCHEMA_VERSION = 1
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
            TypeError: A field is of another type or out of range.
        """
        words = [self.manifest_sha256, *self.engines, *self.engines.values()]
        numbers = [*self.threads, *self.batches]
        if not (
            all(isinstance(word, str) for word in words)
            and all(type(number) is int and number >= 1 for number in numbers)
            and self.objective in OBJECTIVES
            and self.fidelity in LEVELS
        ):
            raise TypeError("what it rests on is not understood")


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
            TypeError: A field is of another type or out of range.
        """
        numbers = (self.threads, self.batch)
        if not (isinstance(self.variant, str) and isinstance(self.backend, str)) or not all(
            type(number) is int and number >= 1 for number in numbers
        ):
            raise TypeError(f"the choice {self!r:.200} is not understood")


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

    def __post_init__(self) -> None:
        """Refuses what no tuning writes.

        Raises:
            TypeError: A field is of another type or not finite.
        """
        numbers = [getattr(self, field.name) for field in fields(self) if field.type in ("int", "float")]
        if not isinstance(self.fidelity, str) or not all(
            isinstance(number, int | float) and math.isfinite(number) for number in numbers
        ):
            raise TypeError("a measurement is not understood")


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
            ProfileError: Another schema version, or a field that is missing, unknown or out of range.
        """
        if plain.get("schema_version") != SCHEMA_VERSION:
            raise ProfileError(
                f"schema_version {plain.get('schema_version')!r:.50} is not known; this version reads {SCHEMA_VERSION}"
            )
        try:
            rest = {name: value for name, value in plain.items() if name not in ("schema_version", "key")}
            basis = rest["basis"]
            profile = cls(
                **{
                    **rest,
                    "basis": ProfileBasis(
                        **{
                            **basis,
                            "machine": machine_from_json(basis["machine"]),
                            "engines": dict(basis["engines"]),
                            "threads": tuple(basis["threads"]),
                            "batches": tuple(basis["batches"]),
                        }
                    ),
                    "choice": ProfileChoice(**rest["choice"]),
                    "measurements": tuple(
                        Measurement(**{**item, "candidate": ProfileChoice(**item["candidate"])})
                        for item in rest["measurements"]
                    ),
                    "left_out": tuple(
                        {key: str(item[key]) for key in ("candidate", "why")} for item in rest["left_out"]
                    ),
                }
            )
            # What is of another type cannot be added up, which is a TypeError too
            words, number = profile.why + profile.date, profile.seconds + (profile.load or 0)
            if not isinstance(words, str) or not math.isfinite(number):
                raise TypeError("its words or numbers are none")
            if plain.get("key") != file_key(profile.basis):
                raise TypeError("its key is not that of what it rests on")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ProfileError(f"the profile is not understood ({error})") from error
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
    text = json.dumps(profile.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
    try:
        write_atomically(path, text + "\n")
    except InputError as error:
        raise InputError(f"{error}; name another place with --profile FILE") from error


def read_profile(path: Path) -> MachineProfile:
    """Reads a profile, whose size is bounded and of which nothing is ever executed.

    Raises:
        ProfileError: It is missing, too large, damaged or of another schema version.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_PROFILE_BYTES + 1)
        if len(content) > MAX_PROFILE_BYTES:
            raise ProfileError(f"{path}: larger than any machine profile ({MAX_PROFILE_BYTES:,} bytes)")
        plain = json.loads(content.decode("utf-8"), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise ProfileError(f"{path}: not readable as a machine profile ({error!s:.200})") from error
    if not isinstance(plain, dict):
        raise ProfileError(f"{path}: must hold a JSON object")
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


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number that a profile holds")
