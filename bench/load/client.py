"""The load of `bench.load`: clients that each ask, wait for the answer, and ask again, in a process of its own.

Requests are made before the clock runs and answers are hardly read, so that as little as possible is taken from the
server, which may have to share its processors with this.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path

import click

from invariclip.cli.main import run_command
from invariclip.console import emit_json
from invariclip.preprocessing.find import find_images

HOST = "127.0.0.1"


def request_of(image: bytes) -> bytes:
    """A question to `/v1/classify`, as it goes over the wire."""
    head = f"POST /v1/classify HTTP/1.1\r\nhost: {HOST}\r\ncontent-type: image/jpeg\r\ncontent-length: {len(image)}"
    return head.encode() + b"\r\n\r\n" + image


class Load:
    """What the clients saw."""

    def __init__(self, port: int, requests: list[bytes]) -> None:
        self._port, self._requests = port, requests
        self.latencies: list[float] = []
        self.statuses: Counter[str] = Counter()

    async def run(self, clients: int, warm: float, seconds: float) -> None:
        """Asks for `warm` seconds, which are not counted, and then for so many more."""
        begin = time.perf_counter() + warm
        end = begin + seconds
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(self._client(number, begin, end))

    async def _client(self, number: int, begin: float, end: float) -> None:
        reader, writer = await asyncio.open_connection(HOST, self._port)
        while time.perf_counter() < end:
            request = self._requests[number % len(self._requests)]
            number += 1
            asked = time.perf_counter()
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in head.lower().splitlines() if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.partition(b":")[2]))
            told = time.perf_counter()
            # An answer belongs to the seconds in which it came
            if begin <= told < end:
                self.latencies.append(1000 * (told - asked))
                self.statuses[head.split(None, 2)[1].decode()] += 1
        writer.close()


@click.command()
@click.argument("port", type=int)
@click.argument("images", type=click.Path(path_type=Path, exists=True))
@click.option("--clients", type=click.IntRange(min=1), required=True)
@click.option("--warm", type=click.FloatRange(min=0), required=True)
@click.option("--seconds", type=click.FloatRange(min=0.1), required=True)
def client(port: int, images: Path, clients: int, warm: float, seconds: float) -> None:
    """Ask a server for so many seconds."""
    load = Load(port, [request_of(path.read_bytes()) for path in find_images([images])])
    asyncio.run(load.run(clients, warm, seconds))
    emit_json({"latencies_ms": load.latencies, "statuses": dict(load.statuses)})


if __name__ == "__main__":
    run_command(client)
