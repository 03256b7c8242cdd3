"""Requests at a rate: when they are due, what is counted, and a tiny server that is asked for more than it can."""

import asyncio
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from invariclip.bench.load.arrivals import BEGIN, END, PERCENTILES, arrivals, halves, with_tables
from invariclip.bench.load.arrivals_client import Arrivals, due_times
from invariclip.bench.load.client import PROTOCOLS, request_in
from invariclip.errors import InputError


@given(st.floats(1, 500), st.floats(1, 20), st.floats(0, 5), st.integers(0, 9))
def test_arrivals_are_in_order_and_in_time(rate, seconds, ramp, seed):
    times = np.array(due_times(rate, seconds, ramp, seed))
    assert (np.diff(times) >= 0).all()
    assert ((times >= 0) & (times < ramp + seconds)).all()


def test_arrivals_are_a_poisson_process_after_a_ramp():
    counts, before = [], []
    for seed in range(200):
        times = np.array(due_times(50, 4, 2, seed))
        counts.append((times >= 2).sum())
        before.append([(times < 1).sum(), ((times >= 1) & (times < 2)).sum()])
    assert np.mean(counts) == pytest.approx(200, rel=0.03)
    assert np.var(counts) == pytest.approx(200, rel=0.35)  # of a Poisson process the mean and the variance are alike
    # a rate that grows evenly to 50 in 2 s: 12.5 in the first, 37.5 in the second
    assert np.mean(before, axis=0) == pytest.approx([12.5, 37.5], rel=0.06)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_requests_are_http_whose_length_is_said(protocol):
    head, _, body = request_in(protocol, b"abc", "mine").partition(b"\r\n\r\n")
    lines = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:])
    assert int(lines[b"content-length"]) == len(body)
    if protocol == "v2":
        rest = body[int(lines[b"inference-header-content-length"]) :]
        assert rest == b"\x03\x00\x00\x00abc"


def test_what_a_server_does_is_counted():
    """One that answers, refuses, changes its mind, and hangs up, in turn."""
    said = [b'{"predictions":[{"ranking":[{"label":"cat"}]}]}', b'{"predictions":[{"ranking":[{"label":"dog"}]}]}']
    asked = []

    async def answer(reader, writer):
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                break
            await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split(b"\r")[0]))
            asked.append(1)
            place = len(asked) % 4
            if place == 3:
                break
            status, body = [(b"200 OK", said[0]), (b"503 Busy", b"{}"), (b"200 OK", said[1])][place]
            writer.write(b"HTTP/1.1 %s\r\ncontent-length: %d\r\n\r\n%s" % (status, len(body), body))
        writer.close()

    async def run():
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        client = Arrivals("127.0.0.1", port, [request_in("invariclip", b"abc", "")])
        async with server:
            return await client.run([0.02 * number for number in range(16)], 0, 1)

    seen = asyncio.run(run())
    assert sum(seen.statuses.values()) == 16
    assert seen.statuses["200"] == len(seen.latencies_ms) == seen.in_time
    assert seen.statuses["503"] >= 3
    assert 1 <= seen.wrong <= seen.statuses["200"]


def turn(load, number, goodput, **more):
    return {
        "candidate": "batched", "load": load, "round": number, "capacity": 40.0, "due": 80.0, "goodput": goodput,
        "refused": 0.5, "other": 0.0, "wrong": 0, "latencies": [10.0, 20.0, 30.0, 40.0], "behind": 1.0, "others": 0.1,
        **more,
    }  # fmt: skip


def test_the_table_compares_goodput_with_the_capacity_of_its_own_round():
    setting = {"processor": "P", "threads": 2, "rounds": 3, "seconds": 5.0, "images": "32 images", "date": "today",
               "timeout": 2.0, "apart": True, "versions": {"onnxruntime": "1"}}  # fmt: skip
    turns = [turn(2.0, 0, 40.0), turn(2.0, 1, 36.0), turn(2.0, 2, 19.0, capacity=20.0, wrong=2)]
    page = with_tables(f"a\n{BEGIN}\nold\n{END}\nz\n", {"Tiny": {"setting": setting, "turns": turns}})
    [row] = [line for line in page.splitlines() if line.startswith("| 2 ")]
    none = with_tables(f"{BEGIN}\n{END}", {"Tiny": {"setting": setting, "turns": [turn(2.0, 0, 0.0, latencies=[])]}})
    assert "| 0.00 | 50.0% | 0.0% | 0 | – | – | – | – | 1 |" in none
    assert row == ("| 2 | batched | 80.0 | 36.0 | 0.95 [0.90, 1.00] | 50.0% | 0.0% | 2 | 10 | 20 | 30 | 40 | 1 |")
    assert page.startswith("a\n")
    assert page.endswith("z\n")
    with pytest.raises(InputError, match="no place for the tables"):
        with_tables("nothing", {})


def test_a_tiny_server_is_asked_for_more_than_it_can(tiny_artifact, tmp_path):
    page = tmp_path / "serve.md"
    page.write_text(f"{BEGIN}\n{END}\n")
    done = CliRunner().invoke(
        arrivals,
        [str(tiny_artifact), "--title", "Tiny", "--load", "0.2", "--load", "1.5", "--rounds", "1", "--seconds", "0.5",
         "--threads", "1", "--out", str(page)],
        catch_exceptions=False,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    group = json.loads((tmp_path / "arrivals.json").read_text())["Tiny"]
    assert [one["load"] for one in group["turns"]] == [0.2, 1.5]
    for one in group["turns"]:
        assert one["wrong"] == 0
        assert one["due"] > 0
        assert len(one["latencies"]) in (0, len(PERCENTILES))  # a busy machine may answer nothing in time
        assert one["latencies"] or not one["goodput"]
    assert page.read_text().count("| batched |") == 2


def test_nothing_to_ask_is_said():
    result = CliRunner().invoke(arrivals, ["--title", "x"])
    assert isinstance(result.exception, InputError)
    result = CliRunner().invoke(arrivals, ["--title", "x", "--url", "other=ftp://here"])
    assert "must be NAME=http://HOST:PORT" in str(result.exception)


def test_servers_and_clients_apart():
    code = (
        "import os, subprocess, sys; from invariclip.bench.load.arrivals import halves, on\n"
        "ours, theirs = halves(); before = os.sched_getaffinity(0)\n"
        "assert ours and theirs and not ours & theirs and ours | theirs == before\n"
        "ask = [sys.executable, '-c', 'import os; print(sorted(os.sched_getaffinity(0)))']\n"
        "with on(ours):\n    assert subprocess.check_output(ask, text=True).strip() == str(sorted(ours))\n"
        "with on(None):\n    assert os.sched_getaffinity(0) == before\n"
    )
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one processor alone")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr == ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.sched_getaffinity", lambda _: {0})
        with pytest.raises(InputError, match="--apart needs two processors"):
            halves()
