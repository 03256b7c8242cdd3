"""The load of `bench.load`: clients that each ask, wait for the answer, and ask again, in a process of its own.

Requests are made before the clock runs and answers are hardly read, so that as little as possible is taken from the
server, which may have to share its processors with this.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections import Counter
from pathlib import Path
from typing import Literal, get_args

import click

from invariclip.cli.main import run_command
from invariclip.console import emit_json
from invariclip.preprocessing.find import find_images

HOST = "127.0.0.1"
Protocol = Literal["invariclip", "openai", "v2"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)


def request_in(protocol: Protocol, image: bytes, model: str) -> bytes:
    """A question about one image as it goes over the wire.

    Args:
        protocol: `invariclip` classifies; `openai` and `v2` (Open Inference Protocol, binary extension) embed.
        image: An encoded image.
        model: What the server calls its model, for the last two.
    """
    if protocol == "invariclip":
        return _post("/v1/classify", {"content-type": "image/jpeg"}, image)
    if protocol == "openai":
        url = f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"
        body = json.dumps({"model": model, "input": url, "encoding_format": "base64"}).encode()
        return _post("/v1/embeddings", {"content-type": "application/json"}, body)
    content = len(image).to_bytes(4, "little") + image
    head = json.dumps(
        {
            "inputs": [{"name": "images", "datatype": "BYTES", "shape": [1],
                        "parameters": {"binary_data_size": len(content)}}],
            "outputs": [{"name": "embedding", "parameters": {"binary_data": True}}],
        }
    ).encode()  # fmt: skip
    kind = {"content-type": "application/octet-stream", "inference-header-content-length": str(len(head))}
    return _post(f"/v2/models/{model}/infer", kind, head + content)


def _post(path: str, headers: dict[str, str], body: bytes) -> bytes:
    lines = [f"POST {path} HTTP/1.1", f"host: {HOST}", *(f"{key}: {value}" for key, value in headers.items())]
    return "\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode() + body


class Load:
    """What the clients saw."""

    def __init__(self, host: str, port: int, requests: list[bytes]) -> None:
        self._address, self._requests = (host, port), requests
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
        reader, writer = await asyncio.open_connection(*self._address)
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
@click.option("--host", default=HOST)
@click.option("--protocol", type=click.Choice(PROTOCOLS), default="invariclip")
@click.option("--model", default="", help="What the server calls its model, where the protocol names it.")
@click.option("--clients", type=click.IntRange(min=1), required=True)
@click.option("--warm", type=click.FloatRange(min=0), required=True)
@click.option("--seconds", type=click.FloatRange(min=0.1), required=True)
def client(
    port: int, images: Path, host: str, protocol: Protocol, model: str, clients: int, warm: float, seconds: float
) -> None:  # fmt: skip
    """Ask a server for so many seconds."""
    load = Load(host, port, [request_in(protocol, path.read_bytes(), model) for path in find_images([images])])
    asyncio.run(load.run(clients, warm, seconds))
    emit_json({"latencies_ms": load.latencies, "statuses": dict(load.statuses)})


if __name__ == "__main__":
    run_command(client)
