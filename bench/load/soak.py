"""A server under mixed requests for minutes: `python -m invariclip.bench.load.soak` writes docs/soak.json and a table.

Good requests of every kind, broken ones, and clients that go away in the middle of a request; memory, threads and open
files of the server are looked at all the time. Growth is of the median of the last minute over that of the first one
after the warm-up.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

import click
import numpy as np

from invariclip.bench.load.__main__ import images_to_send, keep, placed, started, versions_in
from invariclip.bench.load.client import request_in
from invariclip.cli.main import run_command
from invariclip.console import bar
from invariclip.errors import InputError
from invariclip.files import scratch_directory
from invariclip.machine import this_machine
from invariclip.preprocessing.find import find_images
from invariclip.serve.inference_http import HEADER_LENGTH

if TYPE_CHECKING:
    from collections.abc import Sequence

    from invariclip.bench.load.__main__ import Server

BEGIN, END = "<!-- tables of bench.load.soak -->", "<!-- end of the tables of soak -->"
KINDS = ("classify", "classes", "texts", "embed", "v2", "broken", "cut", "gone")
"""What clients do, by turns drawn at random; the last three are no good requests."""
GOOD = {"classify": 200, "classes": 200, "texts": 200, "embed": 200, "v2": 200, "broken": 422, "cut": 0, "gone": 0}
"""The status that is right; 0 where the client does not wait for one. 503 is right for each where it is refused."""
CLOSE = 1e-4
"""Largest difference of a number from the first answer to the same question: batches round otherwise."""
SAMPLE_S, MINUTE = 1.0, 60.0
_WORDS = [f"{kind} {thing}" for kind in ("red", "old", "small", "wooden", "wet", "paper") for thing in
          ("cat", "dog", "house", "boat", "tree", "car", "hat", "cup", "book", "lamp")]  # fmt: skip
HEAD = ["minutes", "requests", "refused (503)", "wrong", "lost", "memory MB, first minute", "last minute", "growth",
        "threads", "open files"]  # fmt: skip


@dataclass
class SoakRecord:
    """What was seen.

    Attributes:
        minutes: After the warm-up.
        statuses: Answers by kind and status.
        wrong: Answers of another status than `GOOD` says, or that differ from the first one to the same question.
        lost: Connections that ended without an answer.
        memory: Bytes the server held, every `SAMPLE_S`, after the warm-up.
        threads: Of the server, in the first and the last sample.
        files: Open ones, likewise.
        examples: Some of the wrong answers.
    """

    minutes: float
    statuses: dict[str, dict[str, int]] = field(default_factory=dict)
    wrong: int = 0
    lost: int = 0
    memory: list[int] = field(default_factory=list)
    threads: tuple[int, int] = (0, 0)
    files: tuple[int, int] = (0, 0)
    examples: list[str] = field(default_factory=list)

    def ends(self) -> tuple[float, float]:
        """Median bytes of the first and the last minute."""
        count = max(1, min(round(MINUTE / SAMPLE_S), len(self.memory) // 2))
        return median(self.memory[:count]), median(self.memory[-count:])


class Soak:
    """Clients of all kinds."""

    def __init__(self, port: int, images: Sequence[bytes], model: str, seed: int) -> None:
        """Asks nothing yet.

        Args:
            port: Where the server listens.
            images: Encoded ones.
            model: What the server calls its model.
            seed: Of what is drawn.
        """
        self._port, self._images, self._model = port, images, model
        self._rng = np.random.default_rng(seed)
        self._first: dict[tuple[str, int], Any] = {}
        self._counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
        self.wrong = self.lost = 0
        self.examples: list[str] = []
        self.stopped = False

    @property
    def statuses(self) -> dict[str, dict[str, int]]:
        """Answers by kind and status."""
        return {kind: dict(counts) for kind, counts in self._counts.items()}

    async def client(self) -> None:
        """Asks one question after the other until `stopped`."""
        link: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        while not self.stopped:
            kind = KINDS[int(self._rng.integers(len(KINDS)))]
            place = int(self._rng.integers(len(self._images)))
            link = link or await asyncio.open_connection("127.0.0.1", self._port)
            try:
                kept = await self._one(kind, place, *link)
            except (OSError, asyncio.IncompleteReadError):
                self.lost += 1
                kept = False
            if not kept:
                link[1].close()
                with suppress(OSError):
                    await link[1].wait_closed()
                link = None
        if link is not None:
            link[1].close()

    async def _one(self, kind: str, place: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Asks once; whether the connection can be used again."""
        request, words = self._request(kind, place)
        if kind in ("cut", "gone"):
            writer.write(request[: len(request) // 2] if kind == "cut" else request)
            await writer.drain()
            self._counts[kind]["left"] += 1
            return False
        writer.write(request)
        await writer.drain()
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = next(line for line in head.splitlines() if line.startswith(b"content-length:"))
        body = await reader.readexactly(int(length.partition(b":")[2]))
        status = int(head.split(None, 2)[1])
        self._counts[kind][str(status)] += 1
        if status not in (GOOD[kind], 503) or (
            status == GOOD[kind] == 200 and not self._right(kind, place, head, body, words)
        ):
            self.wrong += 1
            self.examples += [f"{kind}: {status} {body[:200]!r}"] if len(self.examples) < 5 else []
        return b"connection: close" not in head

    def _request(self, kind: str, place: int) -> tuple[bytes, list[str]]:
        image = self._images[place]
        words = [str(word) for word in self._rng.choice(_WORDS, 3, replace=False)]
        if kind == "broken":
            return request_in("invariclip", image[: len(image) // 2], ""), words
        if kind == "classes":
            question = {"images": [base64.b64encode(image).decode()], "classes": words}
            return _json("/v1/classify", question), words
        if kind == "texts":
            return _json("/v1/embed", {"texts": [_WORDS[place % len(_WORDS)]]}), words
        if kind == "embed":
            return _json("/v1/embed", {"images": [base64.b64encode(image).decode()]}), words
        if kind == "v2":
            return request_in("v2", image, self._model), words
        return request_in("invariclip", image, ""), words

    def _right(self, kind: str, place: int, head: bytes, body: bytes, words: list[str]) -> bool:
        if kind == "classes":
            ranking = json.loads(body)["predictions"][0]["ranking"]
            total = sum(one["probability"] for one in ranking)
            return sorted(one["label"] for one in ranking) == sorted(words) and abs(total - 1) < CLOSE
        numbers, labels = _content(kind, head, body)
        first = self._first.setdefault((kind, place), (numbers, labels))
        return labels == first[1] and bool(np.allclose(numbers, first[0], rtol=0, atol=CLOSE))


def _json(path: str, question: dict[str, Any]) -> bytes:
    body = json.dumps(question).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    return f"{head}\r\n\r\n".encode() + body


def _content(kind: str, head: bytes, body: bytes) -> tuple[Any, list[str]]:
    """Numbers and labels of an answer."""
    if kind == "v2":
        line = next(line for line in head.splitlines() if line.startswith(HEADER_LENGTH.encode()))
        return np.frombuffer(body[int(line.partition(b":")[2]) :], dtype="<f4"), []
    told = json.loads(body)
    if kind == "classify":
        ranking = told["predictions"][0]["ranking"]
        return [one["probability"] for one in ranking], [one["label"] for one in ranking]
    return told["embeddings"], []


def state_of(pid: int) -> tuple[int, int, int]:
    """Resident bytes, threads and open files of a process.

    Raises:
        InputError: It has ended, or the system has no /proc.
    """
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        files = len(os.listdir(f"/proc/{pid}/fd"))
    except OSError as error:
        raise InputError(f"process {pid}: cannot be looked at ({error.strerror or error}); Linux alone can") from error
    facts = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return 1024 * int(facts["VmRSS"].split()[0]), int(facts["Threads"]), files


async def watched(server: Server, soak: Soak, clients: int, warm: float, seconds: float) -> SoakRecord:
    """Lets clients ask for so long after a warm-up, and looks at the server meanwhile."""
    record, states = SoakRecord(seconds / MINUTE), []
    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(soak.client())
        await asyncio.sleep(warm)
        steps = max(2, round(seconds / SAMPLE_S))
        for _ in bar(range(steps), total=steps, desc="seconds"):
            states.append(state_of(server.pid))
            await asyncio.sleep(SAMPLE_S)
        soak.stopped = True
    record.statuses, record.wrong, record.lost = soak.statuses, soak.wrong, soak.lost
    record.memory, record.examples = [state[0] for state in states], soak.examples
    record.threads = states[0][1], states[-1][1]
    record.files = states[0][2], states[-1][2]
    return record


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path, exists=True))
@click.option("--title", required=True, help="What the table is called; one of the same title is replaced.")
@click.option("--minutes", type=click.FloatRange(min=0.01), default=10.0, show_default=True)
@click.option("--warm", type=click.FloatRange(min=0), default=60.0, show_default=True, help="Seconds before.")
@click.option("--clients", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--option", "options", multiple=True, help="Of `invariclip serve`; repeatable.")
@click.option("--out", "-o", type=click.Path(path_type=Path), default=Path("docs/serve.md"), show_default=True)
def soak(
    artifact: Path, title: str, minutes: float, warm: float, clients: int, seed: int, options: tuple[str, ...],
    out: Path,
) -> int:  # fmt: skip
    """Ask a server for minutes; tables of other titles stay as they were."""
    command = [sys.executable, "-m", "invariclip", "serve", str(artifact), "--port", "0", *options]
    with scratch_directory() as folder, started(command) as server:
        sent = images_to_send(folder, None)
        with urlopen(f"http://127.0.0.1:{server.port}/v1/models", timeout=30) as answer:
            name = json.load(answer)["data"][0]["id"]
        clients_ = Soak(server.port, [path.read_bytes() for path in find_images([folder])], name, seed)
        record = asyncio.run(watched(server, clients_, clients, warm, MINUTE * minutes))
    setting = {
        "processor": this_machine().processor, "clients": clients, "warm": warm, "seed": seed, "images": sent,
        "options": list(options), "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in ("onnxruntime", "starlette", "uvicorn")},
    }  # fmt: skip
    keep(out, out.with_name("soak.json"), title, {"setting": setting, **asdict(record)}, with_tables)
    return 0


def with_tables(page: str, groups: dict[str, Any]) -> str:
    """The page with its tables of long runs replaced.

    Raises:
        InputError: It does not hold `BEGIN` and `END`, once and in this order.
    """
    return placed(page, BEGIN, END, [_table(title, group) for title, group in groups.items()])


def _table(title: str, group: dict[str, Any]) -> str:
    setting = group["setting"]
    record = SoakRecord(**{name: value for name, value in group.items() if name != "setting"})
    first, last = record.ends()
    answers = [count for counts in record.statuses.values() for count in counts.values()]
    refused = sum(counts.get("503", 0) for counts in record.statuses.values())
    about = (
        f"{setting['clients']} clients; {setting['warm']:g} s of warm-up; {setting['images']}; kinds: "
        f"{', '.join(record.statuses)}; {setting['processor']}; {versions_in(setting)}; {setting['date']}"
    )
    row = [
        f"{record.minutes:g}", f"{sum(answers):,}", f"{refused:,}", str(record.wrong), str(record.lost),
        f"{first / 1e6:.0f}", f"{last / 1e6:.0f}", f"{last / first - 1:+.1%}",
        f"{record.threads[0]} → {record.threads[1]}", f"{record.files[0]} → {record.files[1]}",
    ]  # fmt: skip
    lines = [HEAD, ["---"] * len(HEAD), row]
    return f"**{title}** ({about})\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    run_command(soak)
