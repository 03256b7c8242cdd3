"""Requests at a rate that does not wait for answers, in a process of their own, as unrelated clients send them.

Latencies count from the moment that a request was due, so a server that falls behind cannot hide it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from invariclip.bench.load.client import PROTOCOLS, Protocol, request_in
from invariclip.cli.main import run_command
from invariclip.console import emit_json
from invariclip.preprocessing.find import find_images

if TYPE_CHECKING:
    from collections.abc import Sequence

PATIENCE = 60.0
"""Seconds after the last arrival in which answers are still waited for."""
_MOST_BYTES = 64 << 20


def due_times(rate: float, seconds: float, ramp: float, seed: int) -> list[float]:
    """When requests are due, in seconds from the start: a Poisson process, which `ramp` seconds lead up to evenly.

    Args:
        rate: Requests a second.
        seconds: At that rate.
        ramp: Seconds before in which the rate grows from 0.
        seed: Of the draws.
    """
    rng = np.random.default_rng(seed)
    expected = rng.exponential(size=int(2 * rate * (seconds + ramp)) + 100).cumsum()  # of a process of rate 1
    reached = rate * ramp / 2  # arrivals that the ramp is expected to have
    times = np.where(
        expected < reached, np.sqrt(2 * expected * ramp / rate), ramp + (expected - reached) / rate
    )  # the inverse of what is expected by a time
    return [float(time) for time in times if time < ramp + seconds]


@dataclass
class Seen:
    """What became of the requests that were due after the ramp.

    Attributes:
        latencies_ms: Of answers with status 200, from when they were due.
        in_time: Answers with status 200 between the ramp's end and the arrivals' end, also to requests of the ramp.
        statuses: How often each status came; `lost` is a connection that ended, `late` no answer within `PATIENCE`.
        wrong: Answers with another label than the first one for the same image.
        behind_ms: How much later than due requests were sent, at most: above a few ms this client is the bottleneck.
    """

    latencies_ms: list[float] = field(default_factory=list)
    in_time: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    behind_ms: float = 0.0


class Arrivals:
    """Sends requests when they are due, each on a connection of its own or on one that is idle."""

    def __init__(self, host: str, port: int, requests: Sequence[bytes]) -> None:
        self._address, self._requests = (host, port), requests
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._labels: dict[int, str] = {}
        self.seen = Seen()

    async def run(self, times: Sequence[float], ramp: float, seconds: float) -> Seen:
        """Sends everything, and waits for the answers.

        Args:
            times: See `due_times`.
            ramp: Requests due before are not counted.
            seconds: Of arrivals after it.
        """
        begin = time.perf_counter()
        tasks = []
        for number, due in enumerate(times):
            wait = begin + due - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            elif due >= ramp:
                self.seen.behind_ms = max(self.seen.behind_ms, -1000 * wait)
            window = begin + ramp, begin + ramp + seconds
            tasks.append(asyncio.create_task(self._one(number, begin + due, due >= ramp, window)))
        _, late = await asyncio.wait(tasks, timeout=PATIENCE)
        for task in late:
            task.cancel()
        self.seen.statuses["late"] += len(late)
        for _, writer in self._idle:
            writer.close()
        return self.seen

    async def _one(self, number: int, due: float, counts: bool, window: tuple[float, float]) -> None:
        place = number % len(self._requests)
        try:
            status, body = await self._asked(self._requests[place])
        except (OSError, asyncio.IncompleteReadError, ValueError):
            status, body = "lost", b""
        told = time.perf_counter()
        # where a queue stands, what is answered in a while was due a while before
        self.seen.in_time += status == "200" and window[0] <= told < window[1]
        if not counts:
            return
        self.seen.statuses[status] += 1
        if status == "200":
            self.seen.latencies_ms.append(1000 * (told - due))
            label = _label(body)
            self.seen.wrong += self._labels.setdefault(place, label) != label

    async def _asked(self, request: bytes) -> tuple[str, bytes]:
        kept = bool(self._idle)
        link = self._idle.pop() if kept else await asyncio.open_connection(*self._address)
        reader, writer = link
        try:
            writer.write(request)
            await writer.drain()
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
        except (OSError, asyncio.IncompleteReadError):
            writer.close()
            if kept:  # an idle connection may end at any time; HTTP asks again on another one
                return await self._asked(request)
            raise
        length = next(line for line in head.splitlines() if line.startswith(b"content-length:"))
        size = int(length.partition(b":")[2])
        if size > _MOST_BYTES:
            writer.close()
            raise ValueError("an answer is larger than any that is asked for")
        body = await reader.readexactly(size)
        if b"connection: close" in head:
            writer.close()
        else:
            self._idle.append(link)
        return head.split(None, 2)[1].decode(), body


def _label(body: bytes) -> str:
    """What an answer says is best; "" where it says nothing of the kind."""
    try:
        return str(json.loads(body)["predictions"][0]["ranking"][0]["label"])
    except (ValueError, KeyError, IndexError, TypeError):
        return ""


@click.command()
@click.argument("host")
@click.argument("port", type=int)
@click.argument("images", type=click.Path(path_type=Path, exists=True))
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), required=True)
@click.option("--seconds", type=click.FloatRange(min=0.1), required=True)
@click.option("--ramp", type=click.FloatRange(min=0), default=1.0)
@click.option("--seed", type=int, default=0)
@click.option("--protocol", type=click.Choice(PROTOCOLS), default="invariclip")
@click.option("--model", default="")
def client(
    host: str, port: int, images: Path, rate: float, seconds: float, ramp: float, seed: int, protocol: Protocol,
    model: str,
) -> None:  # fmt: skip
    """Send images at a rate, and tell what became of them."""
    requests = [request_in(protocol, path.read_bytes(), model) for path in find_images([images])]
    arrivals = Arrivals(host, port, requests)
    seen = asyncio.run(arrivals.run(due_times(rate, seconds, ramp, seed), ramp, seconds))
    emit_json({**vars(seen), "statuses": dict(seen.statuses)})


if __name__ == "__main__":
    run_command(client)
