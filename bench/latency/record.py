"""What was measured so far, as bench.json keeps it: raw turns, so that a run that was stopped goes on."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from invariclip.errors import InputError
from invariclip.files import write_atomically

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA = 1
MAX_BYTES = 256 << 20


@dataclass
class Round:
    """One turn of every candidate at one batch size.

    Attributes:
        turns: Candidate to seconds of each of its batches.
        steal: Share of processor time that went to other machines of the host, or None.
        others: Share that went to other programs, or None.
        idle_cpu_s: Most processor seconds that a candidate took while it should have slept.
    """

    turns: dict[str, list[float]]
    steal: float | None
    others: float | None
    idle_cpu_s: float


@dataclass
class Record:
    """Everything measured of one comparison.

    Attributes:
        key: What is compared, see `prepare.Prepared.key`, and on which processor, with how many threads.
        settings: Further facts of the run: model, artifact, date.
        machine: See `machine.facts`.
        entries: The candidates, in order: `name`, `group`, `arithmetic`, `reason`, `engine`.
        cold: Candidate to its fresh starts, each `start_s`, `load_s`, `first_s`; the first one warms the disk.
        rounds: Batch size (as text, JSON has no other keys) to its rounds.
        memory: Candidate to the most bytes it had resident.
        accuracy: Candidate to the figures of `accuracy.figures`.
        stages: Candidate to what `stages.time_stages` and `time_head` answered.
        flops: Batch size to the operations of one run, of the export without rewrites.
        peaks: `peak` candidate to the operations of one product.
    """

    key: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    entries: list[dict[str, Any]] = field(default_factory=list)
    cold: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    rounds: dict[str, list[Round]] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    accuracy: dict[str, dict[str, Any]] = field(default_factory=dict)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)

    def write(self, path: Path, summary: dict[str, Any] | None = None) -> None:
        """Writes everything, and what follows from it where that is known already."""
        plain = {"schema": SCHEMA, **{part.name: getattr(self, part.name) for part in fields(self)}}
        plain["rounds"] = {batch: [_plain(round_) for round_ in rounds] for batch, rounds in self.rounds.items()}
        write_atomically(path, json.dumps({**plain, "summary": summary or {}}, indent=1, allow_nan=False))


def open_record(path: Path, key: dict[str, str]) -> Record:
    """The record that lies at `path`, to go on with, or a new one.

    Raises:
        InputError: What lies there is not a record, or of another comparison.
    """
    if not path.exists():
        return Record(key)
    found = read_record(path)
    if found.key != key:
        other = [name for name in sorted({*key, *found.key}) if found.key.get(name) != key.get(name)]
        raise InputError(
            f"{path}: holds another comparison (its {', '.join(other)} differ); name another --out, or begin again "
            "with --fresh"
        )
    return found


def read_record(path: Path) -> Record:
    """Reads what `Record.write` wrote.

    Raises:
        InputError: It is not one.
    """
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path}: larger than any record of a bench ({path.stat().st_size:,} bytes)")
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        schema = plain.pop("schema")
        if schema != SCHEMA:
            raise InputError(f"{path}: schema {schema!r} is not known, this version reads {SCHEMA}; name another --out")
        del plain["summary"]
        rounds = {batch: [Round(**one) for one in many] for batch, many in plain["rounds"].items()}
        return Record(**{**plain, "rounds": rounds})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a record of a bench ({error!r}); name another --out") from error


def _plain(round_: Round) -> dict[str, Any]:
    turns = {name: [round(seconds, 7) for seconds in times] for name, times in round_.turns.items()}
    return {"turns": turns, "steal": round_.steal, "others": round_.others, "idle_cpu_s": round(round_.idle_cpu_s, 4)}
