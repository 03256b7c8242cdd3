"""One run of the bench: cold starts, turns round by round, answers, stages; written down after every step.

`LatencyRecord` is what bench.json keeps: raw turns, so that a run that was stopped resumes.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.artifact.folder import checked_path
from invariclip.bench.latency import machine, stages
from invariclip.bench.latency.flops import graph_flops
from invariclip.bench.latency.peers import OURS, PEAK
from invariclip.bench.latency.prepare import ALTERED, EVIDENCE, PLAIN, figures
from invariclip.bench.latency.worker import LatencyWorker
from invariclip.console import silent
from invariclip.errors import InputError
from invariclip.files import scratch_directory, write_atomically
from invariclip.machine import available_memory
from invariclip.measure.worker import WorkerError, take_turns

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from invariclip.bench.latency.peers import PeerRow
    from invariclip.bench.latency.prepare import Prepared
    from invariclip.console import Progress


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
class LatencyRecord:
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


def open_record(path: Path, key: dict[str, str]) -> LatencyRecord:
    """The record that lies at `path`, to go on with, or a new one.

    Raises:
        InputError: What lies there is not a record, or of another comparison.
    """
    if not path.exists():
        return LatencyRecord(key)
    found = read_record(path)
    if found.key != key:
        other = [name for name in sorted({*key, *found.key}) if found.key.get(name) != key.get(name)]
        raise InputError(
            f"{path}: holds another comparison (its {', '.join(other)} differ); name another --out, or begin again "
            "with --fresh"
        )
    return found


def read_record(path: Path) -> LatencyRecord:
    """Reads what `LatencyRecord.write` wrote.

    Raises:
        InputError: It is not one.
    """
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"{path}: larger than any record of a bench ({path.stat().st_size:,} bytes)")
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        schema = plain.pop("schema")
        if type(schema) is not int or schema != SCHEMA:
            raise InputError(f"{path}: schema {schema!r} is not known, this version reads {SCHEMA}; name another --out")
        del plain["summary"]
        rounds = {batch: [Round(**one) for one in many] for batch, many in plain["rounds"].items()}
        return LatencyRecord(**{**plain, "rounds": rounds})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a record of a bench ({error!r}); name another --out") from error


def _plain(round_: Round) -> dict[str, Any]:
    turns = {name: [round(seconds, 7) for seconds in times] for name, times in round_.turns.items()}
    return {"turns": turns, "steal": round_.steal, "others": round_.others, "idle_cpu_s": round(round_.idle_cpu_s, 4)}


_ROOM = 400_000_000
"""Bytes that a process needs beside twice its weights."""


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        batches: Batch sizes.
        rounds: Turns of every candidate at every batch size, those of earlier runs counted.
        cold: Fresh starts of every candidate after a first one, likewise.
        seconds_per_turn: How long a turn should last.
        threads: Of every candidate.
        stage_rounds: How often the sheets of images are read for the stages.
        head_calls: Calls that the class head's cost is measured on.
    """

    batches: tuple[int, ...] = (1, 8)
    rounds: int = 7
    cold: int = 3
    seconds_per_turn: float = 0.4
    threads: int = 1
    stage_rounds: int = 3
    head_calls: int = 200


class Session:
    """Measures what a record lacks."""

    def __init__(
        self,
        record: LatencyRecord,
        path: Path,
        entries: Sequence[PeerRow],
        prepared: Prepared,
        plan: Plan,
        *,
        progress: Progress = silent,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Takes the record, and writes it to `path` after every step; the others are what and how much to measure."""
        self._record, self._path, self._entries, self._prepared = record, path, entries, prepared
        self._plan, self._progress, self._tell = plan, progress, tell
        self._reasons = {entry.candidate.name: entry.reason for entry in entries if entry.reason}
        self._environment = {"TORCHINDUCTOR_CACHE_DIR": str((prepared.folder / "inductor").resolve())}
        self._engines: dict[str, dict[str, Any]] = {}

    def run(self) -> None:
        """Everything that is still missing.

        Raises:
            InputError: Not one candidate could be started.
        """
        self._record.flops = {str(batch): self._flops(batch) for batch in self._plan.batches}
        self._note()
        self._cold_starts()
        with ExitStack() as stack:
            workers = []
            for entry in self._able():
                worker = self._start(entry) if self._lacks(entry) else None
                if worker is not None:
                    workers.append(stack.enter_context(worker))
            if not workers and not self._record.accuracy:
                raise InputError(f"no candidate runs here: {'; '.join(sorted(set(self._reasons.values())))}")
            self._note()
            for batch in self._plan.batches:
                self._time(workers, batch)
            self._ask(workers)
        self._note()

    def _able(self) -> list[PeerRow]:
        return [entry for entry in self._entries if entry.candidate.name not in self._reasons]

    def _lacks(self, entry: PeerRow) -> bool:
        """Whether something of a candidate is still to be measured; a round needs all of them."""
        if any(len(self._record.rounds.get(str(batch), ())) < self._plan.rounds for batch in self._plan.batches):
            return True
        name = entry.candidate.name
        answered = entry.group == PEAK or name in self._record.accuracy
        return not answered or (entry.group == OURS and name not in self._record.stages)

    def _flops(self, batch: int) -> float:
        return self._record.flops.get(str(batch)) or graph_flops(self._prepared.folder / PLAIN, batch)

    def _note(self) -> None:
        """The candidates as they stand now, and the file."""
        earlier = {entry["name"]: entry.get("engine", {}) for entry in self._record.entries}
        self._record.entries = [
            {
                "name": entry.candidate.name,
                "group": entry.group,
                "arithmetic": entry.arithmetic,
                "reason": self._reasons.get(entry.candidate.name, ""),
                "engine": self._engines.get(entry.candidate.name, earlier.get(entry.candidate.name, {})),
            }
            for entry in self._entries
        ]
        self._record.write(self._path)

    def _start(self, entry: PeerRow) -> LatencyWorker | None:
        """A running candidate, or None and a reason."""
        name, room, needed = entry.candidate.name, available_memory(), _needed(entry)
        if room is not None and room < needed:
            self._reasons[name] = f"needs about {needed >> 20:,} MiB of memory, {room >> 20:,} are left"
            return None
        try:
            worker = LatencyWorker(entry.candidate, self._plan.threads, self._environment)
        except WorkerError as error:
            self._fail(name, error.reason)
            return None
        self._engines[name] = worker.facts["engine"]
        if entry.group == PEAK:
            self._record.peaks[name] = float(worker.facts["engine"]["flop"])
        return worker

    def _fail(self, name: str, reason: str) -> None:
        self._reasons[name] = reason
        self._tell(f"{name}: not measured: {reason}")

    def _cold_starts(self) -> None:
        """Fresh processes, one at a time, candidates in turn; the first start of each is kept but not counted."""
        towers = [entry for entry in self._able() if entry.group != PEAK]
        steps = [
            entry
            for start in range(self._plan.cold + 1)
            for entry in towers
            if len(self._record.cold.get(entry.candidate.name, ())) <= start
        ]
        for entry in self._progress(steps, total=len(steps), desc="cold starts"):
            name = entry.candidate.name
            worker = None if name in self._reasons else self._start(entry)
            if worker is not None:
                with worker:
                    facts = {"start_s": worker.start_s, **{key: worker.facts[key] for key in ("load_s", "first_s")}}
                self._record.cold.setdefault(name, []).append({key: round(value, 4) for key, value in facts.items()})
            self._note()

    def _time(self, workers: list[LatencyWorker], batch: int) -> None:
        """Rounds at one batch size; a candidate that stops is left out of those that follow."""
        rounds = self._record.rounds.setdefault(str(batch), [])
        if len(rounds) >= self._plan.rounds:
            return
        repetitions: dict[str, int] = {}
        for worker in self._progress(list(workers), total=len(workers), desc=f"warming up batch {batch}"):
            try:
                repetitions[worker.name] = worker.repetitions(self._plan.seconds_per_turn, batch=batch)
            except WorkerError as error:
                self._drop(workers, worker.name, error.reason)
        total = self._plan.rounds - len(rounds)
        for _ in self._progress(range(total), total=total, desc=f"timing batch {batch}"):
            before = machine.Ticks.now()
            turns, stopped = take_turns(workers, repetitions, len(rounds), batch=batch)
            used = machine.Ticks.now().since(before, sum(turn.cpu_s for turn in turns.values()))
            for name, reason in stopped.items():
                self._drop(workers, name, reason)
            idle = max((turn.idle_cpu_s for turn in turns.values()), default=0.0)
            rounds.append(
                Round({name: turn.times for name, turn in turns.items()}, used["steal"], used["others"], idle)
            )
            self._note()

    def _drop(self, workers: list[LatencyWorker], name: str, reason: str) -> None:
        self._fail(name, reason)
        workers[:] = [worker for worker in workers if worker.name != name]

    def _ask(self, workers: list[LatencyWorker]) -> None:
        """Memory first, then answers, then stages: each may raise the high-water mark of the one before."""
        groups = {entry.candidate.name: entry for entry in self._entries}
        towers = [worker for worker in workers if groups[worker.name].group != PEAK]
        for worker in towers:
            self._record.memory.setdefault(worker.name, worker.ask("memory")["peak_bytes"])
        with scratch_directory(self._path.parent) as scratch:
            for worker in self._progress(towers, total=len(towers), desc="answers"):
                if worker.name not in self._record.accuracy:
                    self._guard(workers, worker, lambda worker: self._answers(worker, groups[worker.name], scratch))
            ours = [worker for worker in towers if groups[worker.name].group == OURS]
            lacking = [worker for worker in ours if worker.name not in self._record.stages]
            if lacking:
                self._sheets(scratch)
            for worker in self._progress(lacking, total=len(lacking), desc="stages"):
                self._guard(workers, worker, lambda worker: self._stages(worker, groups[worker.name], scratch))

    def _guard(
        self, workers: list[LatencyWorker], worker: LatencyWorker, work: Callable[[LatencyWorker], None]
    ) -> None:
        try:
            work(worker)
        except (WorkerError, InputError) as error:
            self._drop(workers, worker.name, error.reason if isinstance(error, WorkerError) else str(error))
        self._note()

    def _answers(self, worker: LatencyWorker, entry: PeerRow, scratch: Path) -> None:
        found = []
        for name in (EVIDENCE, ALTERED):
            out = scratch / f"answers-{name}"
            images = str((self._prepared.folder / name).resolve())
            worker.ask("embed", images=images, batch=max(self._plan.batches), out=str(out.resolve()))
            found.append(np.load(out, allow_pickle=False))
        reference = self._prepared.reference(projected=entry.group == OURS)
        self._record.accuracy[worker.name] = figures(reference, found[0], found[1])

    def _sheets(self, scratch: Path) -> None:
        from invariclip.export.reference import images_path
        from invariclip.preprocessing.find import find_images

        (scratch / "sheets").mkdir()
        size = stages.write_jpegs(find_images([images_path()]), scratch / "sheets")
        self._record.settings["sheet_bytes"] = size

    def _stages(self, worker: LatencyWorker, entry: PeerRow, scratch: Path) -> None:
        candidate, manifest = entry.candidate, self._prepared.manifest
        variant = manifest.variants[candidate.variant]
        common = {"backend": candidate.backend, "threads": self._plan.threads}
        found = worker.ask(
            "stages",
            **common,
            artifact=str(self._prepared.artifact.resolve()),
            variant=candidate.variant,
            images=str((scratch / "sheets").resolve()),
            rounds=self._plan.stage_rounds,
        )
        heads = scratch / f"heads-{variant.image.sha256[:16]}"
        if not heads.is_dir():
            heads.mkdir()
            model = manifest.model
            stages.write_heads(
                checked_path(self._prepared.artifact, variant.image), heads, width=manifest.width,
                logit_scale=model.logit_scale, logit_bias=model.logit_bias,
            )  # fmt: skip
        files = {"bare": str((heads / "bare.onnx").resolve()), "headed": str((heads / "head.onnx").resolve())}
        found["head"] = worker.ask(
            "head", **common, **files, compute=variant.compute, repetitions=self._plan.head_calls
        )
        self._record.stages[worker.name] = found


def _needed(entry: PeerRow) -> int:
    """Bytes that a candidate will take, roughly: its weights twice, and the libraries."""
    candidate = entry.candidate
    if entry.group == PEAK:
        return _ROOM
    model = Path(candidate.model)
    named = [Path(candidate.checkpoint)] if candidate.checkpoint else []
    files = [path for path in (*named, model, model.with_suffix(".bin"), model / "image.onnx") if path.is_file()]
    return _ROOM + 2 * sum(path.stat().st_size for path in files)
