"""The first inputs of every fuzzer, and the runner: what it counts, resumes and survives."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
from fuzz import report, runner
from fuzz.base import OUTCOMES, Family, WrongError, attempt
from fuzz.families import NAMES, family

from invariclip.errors import InputError

COUNTS = {"artifact": 60, "configs": 6, "tokenizers": 25, "images": 60, "checkpoints": 60}
DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")
def test_the_first_inputs_are_refused_or_right(name, folder):
    opened = family(name)
    opened.open(folder)
    tried = [attempt(opened, name, number) for number in range(COUNTS.get(name, 80))]
    assert [one for one in tried if one.outcome not in ("refused", "right")] == []
    assert any(one.outcome == "refused" for one in tried)
    again = [attempt(opened, name, number) for number in range(5)]
    assert [(one.kind, one.outcome) for one in again] == [(one.kind, one.outcome) for one in tried[:5]]


class Told(Family):
    """Does what its generator says; stands in for a family in the runner's own process."""

    count, seconds, memory = 12, 5, 1 << 28

    def draw(self, rng):
        what = ACTS[int(rng.random() * 1e6) % len(ACTS)]
        return what.__name__, what


def refuses():
    raise InputError("no")


def is_right():
    pass


def is_wrong():
    raise WrongError("another answer")


def raises():
    raise KeyError("a key")


def panics():
    raise BaseException("a panic")


def takes_memory():
    try:
        return bytearray(1 << 34)
    except MemoryError as error:
        raise InputError("hidden behind a refusal") from error


def dies():
    os._exit(3)


def is_killed():
    os.abort()


def hangs():
    time.sleep(60)


def says_nothing():
    raise InputError(" ")


ACTS = (refuses, is_right, is_wrong, raises, panics, takes_memory, dies, is_killed, hangs, says_nothing)
WANTED = {
    "refuses": "refused", "is_right": "right", "is_wrong": "wrong", "raises": "traceback", "panics": "traceback",
    "takes_memory": "memory", "says_nothing": "wrong",
}  # fmt: skip


@pytest.fixture
def told(monkeypatch, tmp_path):
    """A module `fuzz.families.told_family` that workers find, with this file's family."""
    place = tmp_path / "extra"
    place.mkdir()
    start = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    load = f"import importlib.util as u\ns = u.spec_from_file_location('told', {__file__!r})\n"
    rest = "m = u.module_from_spec(s)\ns.loader.exec_module(m)\nimport fuzz.families as f\n"
    found = "f.family = lambda name: m.Told()\n"
    (place / "sitecustomize.py").write_text(f"{start}{load}{rest}{found}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(place), *filter(None, [os.environ.get("PYTHONPATH")])]))
    return tmp_path


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is bounded on Linux alone")
def test_what_ends_a_process_is_counted_and_the_run_goes_on(told):
    opened, state = Told(), told / "state.json"
    kinds = [opened.draw(runner_rng(number))[0] for number in range(40)]
    assert {"dies", "is_killed", "hangs"} <= set(kinds)
    stop = next(number for number, kind in enumerate(kinds) if kind == "hangs") + 1
    stop = max(stop, *(kinds.index(kind) + 1 for kind in ("dies", "is_killed", "takes_memory", "panics")))
    tally = runner.run("told", opened, stop, told, state=state, key="k")
    assert tally.done == stop
    outcomes = {number: outcome for number, _, outcome, _ in tally.findings}
    for number, kind in enumerate(kinds[:stop]):
        wanted = WANTED.get(kind, "hang" if kind == "hangs" else "crash")
        assert outcomes.get(number, wanted) == wanted
        assert (number in outcomes) == (wanted not in ("refused", "right"))
    assert sum(tally.totals().values()) == stop
    assert any("SIGABRT" in why for *_, why in tally.findings)
    assert any("ended with 3" in why for *_, why in tally.findings)
    # what is done is not done again; another key begins anew
    assert runner.run("told", opened, stop, told, state=state, key="k").to_json() == tally.to_json()
    assert json.loads(state.read_text())["key"] == "k"
    assert runner.run("told", opened, 1, told, state=state, key="other").done == 1


def runner_rng(number):
    from fuzz.base import rng_of

    return rng_of("told", number)


def test_a_family_that_cannot_be_opened_ends_the_run(tmp_path):
    with pytest.raises(runner.FuzzError, match="no_such: cannot be opened"):
        runner.run("no_such", Told(), 3, tmp_path)


def test_the_page_is_that_of_its_record():
    found = json.loads((DOCS / "fuzzing.json").read_text(encoding="utf-8"))
    assert (DOCS / "fuzzing.md").read_text(encoding="utf-8") == report.page(found)
    assert [one["name"] for one in found["families"]] == list(NAMES)
    assert sum(one["done"] for one in found["families"]) >= 60_000
    assert report.all_good(found)
    for one in found["families"]:
        assert sum(one["totals"].values()) == one["done"] == sum(sum(kind.values()) for kind in one["kinds"].values())
    flips = next(one for one in found["families"] if one["name"] == "artifact")
    assert flips["totals"]["refused"] == flips["done"]
    assert set(flips["totals"]) == set(OUTCOMES)
