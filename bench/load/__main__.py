"""`invariclip serve` under load: `python -m invariclip.bench.load` writes docs/serve.json and docs/serve.md's tables.

Every candidate is a server in a process of its own, and the clients are another process. Servers take turns, so that
what else the machine does meets all of them; one that is not asked sleeps.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

import click
import numpy as np
from PIL import Image

from invariclip.bench.latency.machine import Ticks
from invariclip.cli.main import run_command
from invariclip.console import bar, note
from invariclip.errors import InputError
from invariclip.export.reference import manifest_path
from invariclip.files import scratch_directory, write_atomically
from invariclip.machine import this_machine
from invariclip.measure.statistics import median_of_rounds, percentiles
from invariclip.measure.worker import rotated
from invariclip.preprocessing.find import find_images
from invariclip.threads import available_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

START_SECONDS = 300
IMAGES = 32
"""Different ones that are sent."""
BEGIN, END = "<!-- tables of bench.load -->", "<!-- end of the tables -->"
HEAD = [
    "clients",
    "server",
    "answers/s",
    "rounds from to",
    "p50 ms",
    "p95 ms",
    "p99 ms",
    "images a run",
    "CPU ms",
    "× first",
]


@dataclass(frozen=True)
class LoadedServer:
    """A server.

    Attributes:
        name: What to call it.
        options: Of `invariclip serve`, or, with `torch`, of `torch_server`.
        torch: Whether open_clip stands in the engine's place.
    """

    name: str
    options: tuple[str, ...]
    torch: bool = False

    def command(self, artifact: Path, model: Sequence[str], threads: int | None) -> list[str]:
        """What starts it."""
        at = ["invariclip.bench.load.torch_server"] if self.torch else ["invariclip", "serve"]
        more = model if self.torch else ("--port", "0")
        many = () if threads is None else ("--threads", str(threads))
        return [sys.executable, "-m", *at, str(artifact), *more, *many, *self.options]


BATCHED, ALONE = "batched", "one at a time"
OURS = (LoadedServer(BATCHED, ("--max-batch", "16")), LoadedServer(ALONE, ("--max-batch", "1")))
THEIRS = (
    LoadedServer("PyTorch, batched", ("--max-batch", "16"), torch=True),
    LoadedServer("PyTorch, one at a time", ("--max-batch", "1"), torch=True),
)


@dataclass(frozen=True)
class LoadTurn:
    """One candidate under one load, once.

    Attributes:
        candidate: Its name.
        clients: How many asked at a time.
        round: Which turn it was.
        answers: How many there were with status 200.
        refused: How many with another.
        per_second: Answers a second.
        p50, p95, p99: Of the answers' latencies, in ms.
        batch: Images to a run of the engine, in the mean.
        cpu_ms: The server's processor time for an answer: busy neighbours change it far less than they do the clock.
        steal: Share of the processors' time that other machines of the host took.
        others: Share that other programs of this machine took.
    """

    candidate: str
    clients: int
    round: int
    answers: int
    refused: int
    per_second: float
    p50: float
    p95: float
    p99: float
    batch: float
    cpu_ms: float
    steal: float | None
    others: float | None


@dataclass(frozen=True)
class Server:
    """A process that listens."""

    port: int
    pid: int

    def cpu_s(self) -> float:
        """Processor seconds that it has taken; 0 where the system does not tell."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:  # no Linux
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def batches(self) -> tuple[float, float]:
        """Images and batches that it has answered so far."""
        with urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        numbers = [
            re.search(rf'^invariclip_batch_size_{what}{{kind="images"}} (\S+)$', text, re.MULTILINE)
            for what in ("sum", "count")
        ]
        images, batches = (float(found[1]) if found else 0.0 for found in numbers)
        return images, batches


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path, exists=True))
@click.option("--title", required=True, help="What the table is called; one of the same title is replaced.")
@click.option("--model", help="The checkpoint of the artifact: serve it through PyTorch too.")
@click.option("--random-weights", type=int, help="The seed of the checkpoint's weights, if they are random.")
@click.option("--candidate", "others", multiple=True, metavar="NAME=OPTIONS", help="In place of ours: other options.")
@click.option("--side", type=click.IntRange(min=16), help="Send JPEGs of this side [default: the bundled images].")
@click.option("--clients", multiple=True, type=click.IntRange(min=1), default=(1, 4, 16), show_default=True)
@click.option("--rounds", type=click.IntRange(min=3), default=5, show_default=True)
@click.option("--warm", type=click.FloatRange(min=0), default=2.0, show_default=True, help="Seconds before, uncounted.")
@click.option("--seconds", type=click.FloatRange(min=0.1), default=5.0, show_default=True)
@click.option("--threads", type=click.IntRange(min=1))
@click.option("--out", "-o", type=click.Path(path_type=Path), default=Path("docs/serve.md"), show_default=True)
def load(
    artifact: Path, title: str, model: str | None, random_weights: int | None, others: tuple[str, ...],
    side: int | None, clients: tuple[int, ...], rounds: int, warm: float, seconds: float, threads: int | None,
    out: Path,
) -> int:  # fmt: skip
    """Time an artifact's server under load, with and without batching; tables of other titles stay as they were."""
    candidates = [_named(one) for one in others] or [*OURS, *(THEIRS if model else ())]
    weights = () if random_weights is None else ("--random-weights", str(random_weights))
    of = ("--model", model, *weights) if model else ()
    commands = {one.name: one.command(artifact, of, threads) for one in candidates}
    with scratch_directory() as folder:
        sent = images_to_send(folder, side)
        turns = measure(commands, folder, clients, rounds, warm, seconds)
    setting = {
        "processor": this_machine().processor, "threads": threads or available_threads(), "rounds": rounds,
        "seconds": seconds, "images": sent, "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in ("onnxruntime", "torch", "starlette", "uvicorn")},
    }  # fmt: skip
    group = {"setting": setting, "turns": [asdict(turn) for turn in turns]}
    keep(out, out.with_suffix(".json"), title, group, with_tables)
    return 0


def measure(
    commands: Mapping[str, Sequence[str]],
    images: Path,
    clients: Sequence[int],
    rounds: int,
    warm: float,
    seconds: float,
) -> list[LoadTurn]:
    """Starts every server, lets them take turns, and ends them.

    Args:
        commands: What starts each, by name.
        images: A folder of those that are sent.
        clients: How many ask at a time.
        rounds: Turns of each server with each number of clients.
        warm: Seconds of a turn that are not counted: as long as an answer takes at least.
        seconds: That are.

    Raises:
        InputError: A server did not start, or did not answer.
    """
    with ExitStack() as stack:
        servers = {name: stack.enter_context(started(command)) for name, command in commands.items()}
        return list(_turns(servers, images, clients, rounds, warm, seconds))


@contextmanager
def started(command: Sequence[str]) -> Iterator[Server]:
    """A server's process, until the block ends; gives it.

    Raises:
        InputError: It ended before it listened.
    """
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None  # noqa: S101 (a pipe was asked for)
            said = []
            for line in process.stderr:
                said.append(line.strip())
                if found := re.search(r" at http://[\d.]+:(\d+)$", line.strip()):
                    yield Server(int(found[1]), process.pid)
                    return
            raise InputError(f"{shlex.join(command)}: ended before it listened: {' '.join(said)}")
        finally:
            process.terminate()
            process.wait(START_SECONDS)


def _named(given: str) -> LoadedServer:
    name, equals, options = given.partition("=")
    if not equals:
        raise click.BadParameter(f"{given!r} is not NAME=OPTIONS")
    return LoadedServer(name, tuple(shlex.split(options)))


def images_to_send(folder: Path, side: int | None) -> str:
    """Bundled images of every style, as they are, or as larger JPEGs; says what they are."""
    every = find_images([manifest_path().parent])
    chosen = [every[place] for place in np.linspace(0, len(every) - 1, IMAGES).astype(int)]
    for number, path in enumerate(chosen):
        data = path.read_bytes()
        if side is not None:
            stream = io.BytesIO()
            larger = Image.open(path).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
            larger.save(stream, "JPEG", quality=90)
            data = stream.getvalue()
        (folder / f"{number:03d}{path.suffix if side is None else '.jpg'}").write_bytes(data)
    return f"{IMAGES} bundled images" + ("" if side is None else f", enlarged to JPEGs of {side}x{side}")


def _turns(
    servers: dict[str, Server], folder: Path, clients: Sequence[int], rounds: int, warm: float, seconds: float
) -> Iterator[LoadTurn]:
    plan = [
        (number, many, name) for number in range(rounds) for many in clients for name in rotated(list(servers), number)
    ]
    for number, many, name in bar(plan, total=len(plan), desc="turns"):
        server = servers[name]
        before, ticks, own, cpu = server.batches(), Ticks.now(), own_seconds(server), server.cpu_s()
        command = [sys.executable, "-m", "invariclip.bench.load.client", str(server.port), str(folder), "--clients",
                   str(many), "--warm", str(warm), "--seconds", str(seconds)]  # fmt: skip
        told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        took = server.cpu_s() - cpu
        after, shares = server.batches(), Ticks.now().since(ticks, own_seconds(server) - own)
        times, good = told["latencies_ms"], told["statuses"].get("200", 0)
        if not good or len(times) != good:
            raise InputError(f"{name} with {many} clients: answered with {told['statuses'] or 'nothing'}")
        images = after[0] - before[0]
        yield LoadTurn(
            name, many, number, good, len(times) - good, good / seconds, **percentiles([times]),
            batch=images / max(1.0, after[1] - before[1]), cpu_ms=1000 * took / max(1.0, images), steal=shares["steal"],
            others=shares["others"],
        )  # fmt: skip


def own_seconds(server: Server | None) -> float:
    """Processor seconds of a server that was started here, and of the clients that have ended."""
    ended = os.times()
    return (0.0 if server is None else server.cpu_s()) + ended.children_user + ended.children_system


def keep(
    out: Path, data: Path, title: str, group: dict[str, Any], render: Callable[[str, dict[str, Any]], str]
) -> None:
    """Puts a group of turns into a record, in the place of one of the same title, and all tables into its page.

    Args:
        out: The page.
        data: The record, JSON.
        title: The group's.
        group: Its `setting` and `turns`.
        render: The page and all groups to the new page.
    """
    groups: dict[str, Any] = json.loads(data.read_text(encoding="utf-8")) if data.is_file() else {}
    groups[title] = group
    write_atomically(data, json.dumps(groups, indent=1))
    write_atomically(out, render(out.read_text(encoding="utf-8"), groups))
    note(f"{out}, {data}")


def placed(page: str, begin: str, end: str, tables: Sequence[str]) -> str:
    """The page with what stands between two lines replaced.

    Raises:
        InputError: It does not hold them, once and in this order.
    """
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise InputError(f"the page has no place for the tables: it needs the lines {begin} and {end}")
    return before + "\n".join([begin, "\n\n".join(tables), end]) + after


def versions_in(setting: dict[str, Any]) -> str:
    """The versions of a record's setting, in words."""
    return ", ".join(f"{name} {number}" for name, number in setting["versions"].items())


def others_in(turns: Sequence[dict[str, Any]]) -> str:
    """What other programs took while turns ran, in words; empty where the system did not tell."""
    shares = [turn["others"] for turn in turns if turn["others"] is not None]
    return f"; other programs took {median(shares):.0%} of the processors' time in the median turn" if shares else ""


def with_tables(page: str, groups: dict[str, Any]) -> str:
    """The page with its tables replaced.

    Args:
        page: Markdown that holds `BEGIN` and `END`.
        groups: Setting and turns by title, see `LoadTurn`.

    Raises:
        InputError: It does not hold them, once and in this order.
    """
    return placed(page, BEGIN, END, [_table(title, group) for title, group in groups.items()])


def _table(title: str, group: dict[str, Any]) -> str:
    setting, turns = group["setting"], group["turns"]
    busy = "".join(
        f"; {who} took {median(shares):.0%} of the processors' time in the median turn, {max(shares):.0%} at most"
        for what, who in (("others", "other programs"), ("steal", "other machines of the host"))
        if (shares := [turn[what] for turn in turns if turn[what] is not None])
    )
    about = (
        f"{setting['images']}; {setting['rounds']} rounds of {setting['seconds']:g} s a row, medians over rounds; "
        f"{setting['threads']} engine threads; {setting['processor']}; {versions_in(setting)}; "
        f"{setting['date']}{busy}"
    )
    names = list(dict.fromkeys(turn["candidate"] for turn in turns))
    clients = sorted({turn["clients"] for turn in turns})
    rows = [_row(turns, many, name, names[0]) for many in clients for name in names]
    lines = [HEAD, ["---"] * len(HEAD), *rows]
    return f"**{title}** ({about})\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(turns: Sequence[dict[str, Any]], clients: int, name: str, first: str) -> list[str]:
    def of(candidate: str, what: str) -> list[float]:
        found = [turn for turn in turns if (turn["clients"], turn["candidate"]) == (clients, candidate)]
        return [turn[what] for turn in sorted(found, key=lambda turn: turn["round"])]

    speed = of(name, "per_second")
    compared = ""
    if name != first:
        times = median_of_rounds([own / other for own, other in zip(speed, of(first, "per_second"), strict=True)])
        compared = f"{times.value:.2f} [{times.low:.2f}, {times.high:.2f}]"
    return [
        str(clients), name, f"{median(speed):.1f}", f"{min(speed):.1f} to {max(speed):.1f}",
        *(f"{median(of(name, what)):.0f}" for what in ("p50", "p95", "p99")),
        f"{median(of(name, 'batch')):.1f}", f"{median(of(name, 'cpu_ms')):.1f}", compared,
    ]  # fmt: skip


if __name__ == "__main__":
    run_command(load)
