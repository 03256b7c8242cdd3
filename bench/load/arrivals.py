"""Servers at given arrival rates: `python -m invariclip.bench.load.arrivals` writes docs/arrivals.json and its table.

A rate is a multiple of what the same server answered a moment ago to clients that wait for their answers, so 2 is twice
as much as it can do. Goodput is what it answered in time all the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click
import numpy as np

from invariclip.bench.latency.machine import Ticks
from invariclip.bench.load.__main__ import (
    OURS,
    THEIRS,
    images_to_send,
    keep,
    others_in,
    own_seconds,
    placed,
    started,
    versions_in,
)
from invariclip.bench.load.client import PROTOCOLS
from invariclip.cli.main import run_command
from invariclip.console import bar
from invariclip.errors import InputError
from invariclip.files import scratch_directory
from invariclip.machine import this_machine
from invariclip.measure.statistics import median_of_rounds
from invariclip.measure.worker import rotated
from invariclip.threads import available_threads

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from invariclip.bench.load.__main__ import Server
    from invariclip.bench.load.client import Protocol

BEGIN, END = "<!-- tables of bench.load.arrivals -->", "<!-- end of the tables of arrivals -->"
CLIENTS = 16
"""Clients that wait for their answers, by which the capacity is measured."""
PERCENTILES = (50, 95, 99, 99.9)
HEAD = ["rate × capacity", "server", "due/s", "goodput/s", "goodput / capacity", "503", "other", "wrong",
        *(f"p{share:g} ms" for share in PERCENTILES), "client behind ms"]  # fmt: skip


@dataclass(frozen=True)
class ArrivalTurn:
    """One server at one rate, once.

    Attributes:
        candidate: The server's name.
        load: The rate, as a multiple of `capacity`.
        round: Which turn it was.
        capacity: Answers a second to `CLIENTS` clients that wait, just before.
        due: Requests a second.
        goodput: Answers of status 200 a second, between the end of the ramp and the end of the arrivals.
        refused: Share of requests that were answered with 503.
        other: Share with another end: other statuses, lost connections, none within a minute.
        wrong: Answers that differ from the first one to the same image.
        latencies: ms at `PERCENTILES` of the answers of status 200, from when they were due; empty without any.
        behind: ms that the client sent later than due, at most.
        others: Share of the processors' time that other programs took.
    """

    candidate: str
    load: float
    round: int
    capacity: float
    due: float
    goodput: float
    refused: float
    other: float
    wrong: int
    latencies: tuple[float, ...]
    behind: float
    others: float | None


@click.command()
@click.argument("artifact", required=False, type=click.Path(path_type=Path, exists=True))
@click.option("--title", required=True, help="What the table is called; one of the same title is replaced.")
@click.option("--url", "urls", multiple=True, metavar="NAME=URL", help="A server that runs already; repeatable.")
@click.option("--protocol", type=click.Choice(PROTOCOLS), default="invariclip", show_default=True,
              help="What every server is asked in; the last two embed.")  # fmt: skip
@click.option("--served-name", default="", help="What the servers call the model, in those two.")
@click.option("--model", help="The checkpoint of the artifact: serve it through PyTorch too.")
@click.option("--side", type=click.IntRange(min=16), help="Send JPEGs of this side [default: the bundled images].")
@click.option("--load", "loads", multiple=True, type=click.FloatRange(min=0, min_open=True),
              default=(0.5, 0.8, 1.0, 1.5, 2.0), show_default=True, help="Times the capacity; repeatable.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--seconds", type=click.FloatRange(min=0.1), default=8.0, show_default=True)
@click.option("--threads", type=click.IntRange(min=1))
@click.option("--timeout", type=click.FloatRange(min=0.1), default=2.0, show_default=True,
              help="The servers' own, in seconds; of those that are started here.")  # fmt: skip
@click.option("--apart", is_flag=True, help="Give servers one half of the processors and clients the other.")
@click.option("--out", "-o", type=click.Path(path_type=Path), default=Path("docs/serve.md"), show_default=True)
def arrivals(
    artifact: Path | None, title: str, urls: tuple[str, ...], protocol: Protocol, served_name: str, model: str | None,
    side: int | None, loads: tuple[float, ...], rounds: int, seconds: float, threads: int | None, timeout: float,
    apart: bool, out: Path,
) -> int:  # fmt: skip
    """Send requests at rates around a server's capacity; tables of other titles stay as they were."""
    if artifact is None and not urls:
        raise InputError("name an artifact to serve, or servers that run already with --url NAME=URL")
    candidates = [] if artifact is None else [OURS[0], *(THEIRS[:1] if model else ())]
    ours, theirs = halves() if apart else (None, None)
    threads = threads or (None if ours is None else len(ours))
    commands = {
        one.name: [*one.command(artifact or Path(), ("--model", model) if model else (), threads),
                   "--timeout", str(timeout)]
        for one in candidates
    }  # fmt: skip
    with scratch_directory() as folder, ExitStack() as stack:
        sent = images_to_send(folder, side)
        with on(ours):  # a process that is started inherits them
            servers: dict[str, Server | None] = {
                name: stack.enter_context(started(command)) for name, command in commands.items()
            }
        addresses = {name: ("127.0.0.1", server.port) for name, server in servers.items() if server is not None}
        for given in urls:
            name, address = _address(given)
            servers[name], addresses[name] = None, address
        asked = ("--protocol", protocol, "--model", served_name)
        with on(theirs):
            turns = list(measure(servers, addresses, folder, loads, rounds, seconds, asked))
    setting = {
        "processor": this_machine().processor, "threads": threads or available_threads(), "rounds": rounds,
        "seconds": seconds, "images": sent, "timeout": timeout, "protocol": protocol, "apart": apart,
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in ("onnxruntime", "torch", "starlette", "uvicorn")},
    }  # fmt: skip
    group = {"setting": setting, "turns": [asdict(turn) for turn in turns]}
    keep(out, out.with_name("arrivals.json"), title, group, with_tables)
    return 0


def measure(
    servers: Mapping[str, Server | None],
    addresses: Mapping[str, tuple[str, int]],
    images: Path,
    loads: Sequence[float],
    rounds: int,
    seconds: float,
    asked: Sequence[str] = (),
) -> Iterator[ArrivalTurn]:
    """Servers take turns: the capacity of each, then a rate.

    Args:
        servers: Those that were started here, by name; None for others.
        addresses: Host and port of each.
        images: A folder of those that are sent.
        loads: Rates, as multiples of the capacity.
        rounds: Turns of each server at each rate.
        seconds: Of a turn.
        asked: Further options of the clients.

    Raises:
        InputError: A server did not answer.
    """
    plan = [
        (number, load, name) for number in range(rounds) for load in loads for name in rotated(list(servers), number)
    ]
    for number, load, name in bar(plan, total=len(plan), desc="turns"):
        host, port = addresses[name]
        capacity = _capacity(host, port, images, min(seconds, 4.0), asked, name)
        ticks, own = Ticks.now(), own_seconds(servers[name])
        told = _client(host, port, images, load * capacity, seconds, number, asked)
        shares = Ticks.now().since(ticks, own_seconds(servers[name]) - own)
        statuses, times = told["statuses"], told["latencies_ms"]
        due = sum(statuses.values())
        if not due:
            raise InputError(f"{name}: nothing was due in {seconds:g} s at {load * capacity:g} a second; take longer")
        refused = statuses.get("503", 0) + statuses.get("429", 0)
        yield ArrivalTurn(
            name, load, number, capacity, due / seconds, told["in_time"] / seconds, refused / due,
            (due - refused - statuses.get("200", 0)) / due, told["wrong"],
            tuple(float(value) for value in np.percentile(times, PERCENTILES)) if times else (), told["behind_ms"],
            shares["others"],
        )  # fmt: skip


def halves() -> tuple[set[int], set[int]]:
    """The processors of this process in two halves.

    Raises:
        InputError: There is one alone, or the system does not tell.
    """
    have = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(have) < 2:
        raise InputError("--apart needs two processors, on Linux; leave it out")
    return set(have[: len(have) // 2]), set(have[len(have) // 2 :])


@contextmanager
def on(processors: set[int] | None) -> Iterator[None]:
    """Lets this process, and what it starts, run on some processors alone; None changes nothing."""
    if processors is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, processors)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _capacity(host: str, port: int, images: Path, seconds: float, asked: Sequence[str], name: str) -> float:
    """Answers a second to clients that wait for theirs."""
    command = [sys.executable, "-m", "invariclip.bench.load.client", str(port), str(images), "--clients", str(CLIENTS),
               "--warm", "1", "--seconds", str(seconds), "--host", host, *asked]  # fmt: skip
    told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    good = int(told["statuses"].get("200", 0))
    if not good:
        raise InputError(f"{name}: answered with {told['statuses'] or 'nothing'}")
    return good / seconds


def _client(
    host: str, port: int, images: Path, rate: float, seconds: float, seed: int, asked: Sequence[str]
) -> dict[str, Any]:
    command = [sys.executable, "-m", "invariclip.bench.load.arrivals_client", host, str(port), str(images), "--rate",
               str(rate), "--seconds", str(seconds), "--seed", str(seed), *asked]  # fmt: skip
    told: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return told


def _address(given: str) -> tuple[str, tuple[str, int]]:
    name, equals, url = given.partition("=")
    parts = urlsplit(url)
    if not equals or parts.scheme != "http" or not parts.hostname:
        raise InputError(f"--url {given!r}: must be NAME=http://HOST:PORT")
    return name, (parts.hostname, parts.port or 80)


def with_tables(page: str, groups: dict[str, Any]) -> str:
    """The page with its tables of arrivals replaced.

    Raises:
        InputError: It does not hold `BEGIN` and `END`, once and in this order.
    """
    return placed(page, BEGIN, END, [_table(title, group) for title, group in groups.items()])


def _table(title: str, group: dict[str, Any]) -> str:
    setting, turns = group["setting"], group["turns"]
    where = "clients on processors of their own; " if setting["apart"] else ""
    about = (
        f"{setting['images']}; Poisson arrivals; {setting['rounds']} rounds of {setting['seconds']:g} s a row; "
        f"timeout {setting['timeout']:g} s; {setting['threads']} engine threads; {where}{setting['processor']}; "
        f"{versions_in(setting)}; {setting['date']}{others_in(turns)}"
    )
    names = list(dict.fromkeys(turn["candidate"] for turn in turns))
    loads = sorted({turn["load"] for turn in turns})
    rows = [_row([turn for turn in turns if (turn["load"], turn["candidate"]) == (load, name)])
            for load in loads for name in names]  # fmt: skip
    lines = [HEAD, ["---"] * len(HEAD), *rows]
    return f"**{title}** ({about})\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _row(turns: Sequence[dict[str, Any]]) -> list[str]:
    def middle(what: str) -> float:
        return float(median(turn[what] for turn in turns))

    kept = [turn["goodput"] / turn["capacity"] for turn in turns]
    share = f"{median(kept):.2f}"
    if min(kept) > 0:
        known = median_of_rounds(kept)
        share = f"{known.value:.2f} [{known.low:.2f}, {known.high:.2f}]"
    answered = [turn["latencies"] for turn in turns if turn["latencies"]]
    times = [f"{median(column):.0f}" for column in zip(*answered, strict=True)] or ["–"] * len(PERCENTILES)
    return [
        f"{turns[0]['load']:g}", turns[0]["candidate"], f"{middle('due'):.1f}", f"{middle('goodput'):.1f}",
        share, f"{middle('refused'):.1%}", f"{middle('other'):.1%}",
        str(sum(turn["wrong"] for turn in turns)), *times, f"{middle('behind'):.0f}",
    ]  # fmt: skip


if __name__ == "__main__":
    run_command(arrivals)
