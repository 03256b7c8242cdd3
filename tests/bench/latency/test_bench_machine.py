"""What is known of the machine, and who else used it."""

import os

import pytest

from invariclip.bench.latency import machine
from invariclip.bench.latency.machine import Ticks


def stat(tmp_path, *fields):
    path = tmp_path / "stat"
    path.write_text(f"cpu  {' '.join(map(str, fields))} 0 0\ncpu0 1 2 3\n")
    return Ticks.now(path)


def test_steal_and_others_are_shares_of_all_time(tmp_path):
    before = stat(tmp_path, 100, 10, 50, 800, 20, 5, 5, 10)
    assert before == Ticks(busy=170, steal=10, total=1000)
    after = stat(tmp_path, 700, 10, 50, 1150, 20, 5, 5, 60)
    own = 450 / os.sysconf("SC_CLK_TCK")  # of the 600 busy ticks, 450 are the measurement's own
    assert after.since(before, own) == {"steal": pytest.approx(0.05), "others": pytest.approx(0.15)}
    # time that is rounded differently must not become negative
    assert after.since(before, own * 2)["others"] == 0


def test_a_system_that_does_not_tell(tmp_path):
    assert Ticks.now(tmp_path / "none") == Ticks()
    (tmp_path / "odd").write_text("cpu a b\n")
    assert Ticks.now(tmp_path / "odd") == Ticks()
    assert Ticks().since(Ticks()) == {"steal": None, "others": None}


def test_the_facts_name_processor_threads_and_versions():
    found = machine.facts()
    assert found["processor"]
    assert found["threads_available"] >= 1
    assert {"invariclip", "torch", "onnxruntime"} <= set(found["versions"])


def test_a_compiler_is_one_that_is_on_the_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert machine.compiler() is None
    fake = tmp_path / "clang++"
    fake.write_text("#!/bin/sh\n")
    fake.chmod(0o755)
    assert machine.compiler() == "clang++"
