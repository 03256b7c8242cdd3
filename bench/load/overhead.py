"""What HTTP costs beside decoding and the engine: `python -m invariclip.bench.load.overhead` writes docs/overhead.json.

A saturated server and a process without one answer the same encoded images in batches of the same size, by turns. What
is compared is processor time for an image: the clients' own is not in it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from invariclip.bench.latency.machine import Ticks
from invariclip.bench.load.__main__ import (
    images_to_send,
    keep,
    others_in,
    own_seconds,
    placed,
    started,
    versions_in,
)
from invariclip.cli.main import run_command
from invariclip.console import bar
from invariclip.errors import InputError
from invariclip.files import scratch_directory
from invariclip.machine import this_machine
from invariclip.measure.statistics import median_of_rounds
from invariclip.threads import available_threads

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from invariclip.bench.load.__main__ import Server

BEGIN, END = "<!-- tables of bench.load.overhead -->", "<!-- end of the tables of overhead -->"
HEAD = ["clients", "images a run", "without a server, CPU ms", "served, CPU ms", "HTTP, ms a request",
        "without / served", "answers/s without", "served"]  # fmt: skip


@dataclass(frozen=True)
class OverheadTurn:
    """Both sides, once.

    Attributes:
        clients: That asked the server at a time.
        batch: Images to a run of the process without a server.
        round: Which turn it was.
        raw_cpu_ms: Processor time for an image without a server.
        served_cpu_ms: Of the server, for an answer.
        raw_per_second: Images a second without a server.
        served_per_second: Answers a second, with the clients beside it.
        served_batch: Images to a run of the server, in the mean.
        others: Share of the processors' time that other programs took while the server was asked.
    """

    clients: int
    batch: int
    round: int
    raw_cpu_ms: float
    served_cpu_ms: float
    raw_per_second: float
    served_per_second: float
    served_batch: float
    others: float | None


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path, exists=True))
@click.option("--title", required=True, help="What the table is called; one of the same title is replaced.")
@click.option("--side", type=click.IntRange(min=16), help="Send JPEGs of this side [default: the bundled images].")
@click.option("--load", "loads", type=(int, int), multiple=True, default=((1, 1), (16, 8)), show_default=True,
              help="Clients, and images to a run; repeatable.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(min=3), default=5, show_default=True)
@click.option("--warm", type=click.FloatRange(min=0), default=2.0, show_default=True)
@click.option("--seconds", type=click.FloatRange(min=0.1), default=5.0, show_default=True)
@click.option("--threads", type=click.IntRange(min=1))
@click.option("--out", "-o", type=click.Path(path_type=Path), default=Path("docs/serve.md"), show_default=True)
def overhead(
    artifact: Path, title: str, side: int | None, loads: tuple[tuple[int, int], ...], rounds: int, warm: float,
    seconds: float, threads: int | None, out: Path,
) -> int:  # fmt: skip
    """Compare a server's processor time for an image with that of its work alone."""
    many = () if threads is None else ("--threads", str(threads))
    largest = max(batch for _, batch in loads)
    command = [
        sys.executable,
        "-m",
        "invariclip",
        "serve",
        str(artifact),
        "--port",
        "0",
        "--max-batch",
        str(largest),
        *many,
    ]
    with scratch_directory() as folder, started(command) as server:
        sent = images_to_send(folder, side)
        turns = list(measure(server, artifact, folder, loads, rounds, warm, seconds, many))
    setting = {
        "processor": this_machine().processor, "threads": threads or available_threads(), "rounds": rounds,
        "seconds": seconds, "images": sent, "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in ("onnxruntime", "starlette", "uvicorn")},
    }  # fmt: skip
    group = {"setting": setting, "turns": [asdict(turn) for turn in turns]}
    keep(out, out.with_name("overhead.json"), title, group, with_tables)
    return 0


def measure(
    server: Server, artifact: Path, images: Path, loads: Sequence[tuple[int, int]], rounds: int, warm: float,
    seconds: float, threads: Sequence[str] = (),
) -> Iterator[OverheadTurn]:  # fmt: skip
    """Server and process take turns, in both orders.

    Raises:
        InputError: The server refused something.
    """
    how = ["--warm", str(warm), "--seconds", str(seconds)]
    plan = [(number, load) for number in range(rounds) for load in loads]
    for number, (clients, batch) in bar(plan, total=len(plan), desc="turns"):
        told: dict[str, Any] = {}
        for side in ("raw", "served") if number % 2 else ("served", "raw"):
            if side == "raw":
                told["raw"] = _json("raw", str(artifact), str(images), "--batch", str(batch), *how, *threads)
                continue
            before, cpu, ticks, own = server.batches(), server.cpu_s(), Ticks.now(), own_seconds(server)
            seen = _json("client", str(server.port), str(images), "--clients", str(clients), *how)
            took, after = server.cpu_s() - cpu, server.batches()
            told["others"] = Ticks.now().since(ticks, own_seconds(server) - own)["others"]
            if set(seen["statuses"]) != {"200"}:
                raise InputError(f"the server answered with {seen['statuses'] or 'nothing'}")
            count, runs = after[0] - before[0], after[1] - before[1]
            told["served"] = 1000 * took / count, seen["statuses"]["200"] / seconds, count / runs
        yield OverheadTurn(
            clients, batch, number, told["raw"]["cpu_ms"], told["served"][0], told["raw"]["per_second"],
            told["served"][1], told["served"][2], told["others"],
        )  # fmt: skip


def _json(module: str, *words: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", f"invariclip.bench.load.{module}", *words], check=True, capture_output=True, text=True
    )
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def with_tables(page: str, groups: dict[str, Any]) -> str:
    """The page with its tables of this replaced.

    Raises:
        InputError: It does not hold `BEGIN` and `END`, once and in this order.
    """
    return placed(page, BEGIN, END, [_table(title, group) for title, group in groups.items()])


def _table(title: str, group: dict[str, Any]) -> str:
    setting, turns = group["setting"], group["turns"]
    about = (
        f"{setting['images']}; {setting['rounds']} rounds of {setting['seconds']:g} s a side, medians over rounds; "
        f"{setting['threads']} engine threads; {setting['processor']}; {versions_in(setting)}; "
        f"{setting['date']}{others_in(turns)}"
    )
    loads = sorted({(turn["clients"], turn["batch"]) for turn in turns})
    lines = [HEAD, ["---"] * len(HEAD)]
    lines += [_row([turn for turn in turns if (turn["clients"], turn["batch"]) == load]) for load in loads]
    return f"**{title}** ({about})\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(turns: Sequence[dict[str, Any]]) -> list[str]:
    def of(what: str) -> list[float]:
        return [turn[what] for turn in turns]

    share = median_of_rounds([raw / served for raw, served in zip(of("raw_cpu_ms"), of("served_cpu_ms"), strict=True)])
    more = [served - raw for raw, served in zip(of("raw_cpu_ms"), of("served_cpu_ms"), strict=True)]
    return [
        str(turns[0]["clients"]), f"{turns[0]['batch']}, served {median(of('served_batch')):.1f}",
        f"{median(of('raw_cpu_ms')):.1f}", f"{median(of('served_cpu_ms')):.1f}",
        f"{median(more):.2f} ({min(more):.2f} to {max(more):.2f})",
        f"{share.value:.3f} [{share.low:.3f}, {share.high:.3f}]", f"{median(of('raw_per_second')):.1f}",
        f"{median(of('served_per_second')):.1f}",
    ]  # fmt: skip


if __name__ == "__main__":
    run_command(overhead)
