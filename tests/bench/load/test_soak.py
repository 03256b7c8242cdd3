"""A long run, made short: what is counted, what is wrong, and the table of it."""

import asyncio
import json
import os

import pytest
from click.testing import CliRunner

from invariclip.bench.load.soak import BEGIN, END, GOOD, KINDS, Soak, SoakRecord, soak, state_of, with_tables
from invariclip.errors import InputError


def test_a_server_that_forgets_and_hangs_up_is_noticed(monkeypatch):
    """It answers every classification with another label, refuses broken images as it should, and drops texts."""
    monkeypatch.setattr("invariclip.bench.load.soak.KINDS", ("classify", "texts", "broken", "cut", "gone"))
    asked = []

    async def answer(reader, writer):
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                body = await reader.readexactly(int(head.partition(b"content-length: ")[2].split(b"\r")[0]))
                asked.append(body)
                if b'"texts"' in body:
                    break
                status, told = 200, {"predictions": [{"ranking": [{"label": str(len(asked)), "probability": 1.0}]}]}
                if body == b"im":
                    status, told = 422, {"error": "cannot be read"}
                content = json.dumps(told).encode()
                writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n" % (status, len(content)) + content)
        except (asyncio.IncompleteReadError, OSError):
            pass
        writer.close()

    async def run():
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        clients = Soak(server.sockets[0].getsockname()[1], [b"imag"], "m", 0)
        task = asyncio.create_task(clients.client())
        while len(asked) < 60 and not task.done():
            await asyncio.sleep(0.01)
        clients.stopped = True
        await asyncio.wait_for(task, 30)
        server.close()
        return clients

    clients = asyncio.run(run())
    counts = clients.statuses
    assert set(KINDS) == set(GOOD)
    assert clients.wrong == counts["classify"]["200"] - 1 > 0
    assert counts["broken"]["422"] > 0
    assert clients.lost > 0
    assert counts["cut"]["left"] > 0 < counts["gone"]["left"]
    assert clients.examples[0].startswith("classify: 200 ")


def test_growth_is_of_medians_of_minutes():
    record = SoakRecord(2.0, memory=[100] * 59 + [900] + [100] * 60 + [110] * 60)
    assert record.ends() == (100, 110)
    assert SoakRecord(0.1, memory=[1, 2]).ends() == (1, 2)


def test_a_process_is_looked_at():
    memory, threads, files = state_of(os.getpid())
    assert memory > 1 << 20
    assert threads >= 1
    assert files >= 3
    with pytest.raises(InputError, match="process 0: cannot be looked at"):
        state_of(0)


def test_a_tiny_server_for_seconds(tiny_artifact, tmp_path):
    page = tmp_path / "serve.md"
    page.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    done = CliRunner().invoke(
        soak,
        [str(tiny_artifact), "--title", "tiny", "--minutes", "0.03", "--warm", "0.2", "--clients", "3", "-o", page],
    )
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "soak.json").read_text())["tiny"]
    assert (record["wrong"], record["lost"]) == (0, 0), record["examples"]
    assert sum(record["statuses"]["classify"].values()) > 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert "| 0.03 |" in text
    with pytest.raises(InputError, match="has no place for the tables"):
        with_tables("", {})
