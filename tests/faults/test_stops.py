"""Commands that are stopped while they work: no leftovers, and the same results from the same command afterwards.

A short version of `python -m invariclip.bench.studies.stops`, and its committed record.
"""

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from invariclip.bench.studies.stops.__main__ import moments, page
from invariclip.bench.studies.stops.trial import Trials, command_named
from invariclip.bench.studies.stops.world import COMMANDS
from invariclip.errors import InvariclipError

DOCS = Path(__file__).parents[2] / "docs"
KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
STOPS = {
    "collect": [(KILL, 0.7, True, True), (TERM, 0.7, False, False)],
    "embed": [(KILL, 0.7, True, False), (INT, 0.7, False, False)],
    "export": [(KILL, "work/.artifact.icm.*/image.onnx", True, False)],
    "build": [(KILL, "work/artifact.icm.work/projection-*.safetensors", False, False)],
    "tune": [(KILL, 0.7, False, False)],
    "serve": [(KILL, "work/log/*/*/*", False, False)],
}
"""Of each command: the signal, its moment, whether over an older output, whether resumed."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("stops")


def shorter(command):
    """`export` without variants, which take it twice as long."""
    return replace(command, words=tuple(w for w in command.words if w not in ("--variant", "int8", "--fast-pixels")))


@pytest.mark.parametrize("name", STOPS)
def test_a_stopped_command_leaves_nothing_and_gives_the_same_afterwards(root, name):
    trials = Trials(shorter(command_named(name)), root)
    for number, moment, over, resumed in STOPS[name]:
        record = trials.stop(number, moment, over=over, resumed=resumed)
        assert record.problems == []
        assert (record.signal, record.after_s > 0) == (number.name, True)


def test_what_is_not_right_is_noticed(root, monkeypatch):
    trials = Trials(command_named("embed"), root)
    finish, folder = trials._finish, root / "embed"

    def careless():
        problems = finish()
        (folder / "tmp" / "litter").write_text("")
        (folder / "work" / "embeddings.safetensors").write_text("half")
        return problems

    monkeypatch.setattr(trials, "_finish", careless)
    found = trials.stop(KILL, 0.5).problems
    assert found == ["tmp/litter: left", "work/embeddings.safetensors: other bytes"]
    monkeypatch.undo()
    start = trials._start

    def cut():
        (folder / "work" / "embeddings.safetensors").write_text("half")
        return start()

    monkeypatch.setattr(trials, "_start", cut)
    assert trials.stop(KILL, 0.3).problems == ["embeddings.safetensors: neither the old one nor the new one"]
    with pytest.raises(InvariclipError, match=r"embed fails without a stop: .*exit code 2: .*no such folder"):
        Trials(replace(command_named("embed"), words=("embed", "nowhere.icm", "x", "-o", "y")), root)


def test_every_command_is_killed_at_its_own_moments_and_over_its_whole_time():
    for command in COMMANDS:
        plan = list(moments(command, 10, 2))
        kills = [moment for number, moment, _, _ in plan if number is KILL]
        assert len(kills) == 10
        assert kills[: len(command.moments)] == list(command.moments)
        shares = [moment for moment in kills if isinstance(moment, float)]
        assert min(shares) < 0.2
        assert max(shares) > 0.8
        assert {over for _, _, over, _ in plan} == {True, False}
        assert [number for number, *_ in plan].count(TERM) == [number for number, *_ in plan].count(INT) == 2


def test_the_page_is_of_the_committed_record():
    record = json.loads((DOCS / "stops.json").read_text(encoding="utf-8"))
    assert page(record) == (DOCS / "stops.md").read_text(encoding="utf-8")
    assert set(record["whole_s"]) == {command.name for command in COMMANDS}
    assert sum(1 for one in record["stops"] if one["signal"] == "SIGKILL") >= 60
    assert [one for one in record["stops"] if one["problems"]] == []
    wrong = {**record, "stops": [{**record["stops"][0], "problems": ["x: left"]}, *record["stops"][1:]]}
    assert "1 not right" in page(wrong)
    assert "x: left" in page(wrong)
