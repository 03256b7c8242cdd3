"""A server beside its work alone: both sides of a tiny artifact, and the table of them."""

import json

import pytest
from click.testing import CliRunner

from invariclip.bench.load.overhead import BEGIN, END, HEAD, OverheadTurn, overhead, with_tables
from invariclip.errors import InputError


def test_both_sides_are_measured(tiny_artifact, tmp_path):
    page = tmp_path / "serve.md"
    page.write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    words = ["--title", "tiny", "--rounds", "3", "--warm", "0.1", "--seconds", "0.2", "--load", "3", "2", "-o", page]
    done = CliRunner().invoke(overhead, [str(tiny_artifact), *map(str, words)])
    assert done.exit_code == 0, done.output
    group = json.loads((tmp_path / "overhead.json").read_text())["tiny"]
    assert [turn["round"] for turn in group["turns"]] == [0, 1, 2]
    for turn in group["turns"]:
        assert (turn["clients"], turn["batch"]) == (3, 2)
        assert min(turn["raw_cpu_ms"], turn["served_cpu_ms"], turn["raw_per_second"], turn["served_per_second"]) > 0
        assert 1 <= turn["served_batch"] <= 2
    assert "| 3 | 2, served " in page.read_text()


def test_the_table_compares_turns_of_the_same_round():
    turns = [vars(OverheadTurn(1, 1, place, 9.0 + place, 10.0 + place, 5.0, 4.0, 1.0, 0.0)) for place in range(3)]
    setting = {
        "processor": "p",
        "threads": 1,
        "rounds": 3,
        "seconds": 1.0,
        "images": "some",
        "date": "d",
        "versions": {},
    }
    page = with_tables(f"{BEGIN}{END}", {"t": {"setting": setting, "turns": turns}})
    row = next(line for line in page.splitlines() if line.startswith("| 1 |"))
    assert row.count("|") == len(HEAD) + 1
    assert "| 1.00 (1.00 to 1.00) |" in row
    assert "| 0.909 [0.9" in row
    with pytest.raises(InputError, match="has no place"):
        with_tables("", {})
