"""The GPU bench without a GPU: its plan, its judgement of answers, its deadline, its pages, and its luggage."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from invariclip.bench.gpu import cases as cases_module
from invariclip.bench.gpu import measure as measure_module
from invariclip.bench.gpu.cases import BATCHES, CANDIDATES, MODELS, REFERENCE, Case, GpuCandidate, cases, missing, plan
from invariclip.bench.gpu.measure import LEAST_COSINE, measure, parity, run_figures
from invariclip.bench.gpu.page import GOAL_BEFORE, GOAL_OURS, as_text, cells, goals, has_figures, line, write_page
from invariclip.bench.gpu.runners import GraphRunner, require_cuda, rows_of, tower_module
from invariclip.errors import DeviceError, InputError


def test_the_most_important_questions_come_first():
    asked = cases()
    assert len(asked) == len(set(asked)) == len(MODELS) * 2 * len(BATCHES)
    assert [case.name for case in asked[:2]] == ["ViT-B-32 image 1", "ViT-L-14 image 1"]
    assert (asked[0].shape, Case("ViT-B-32", "text", 8).shape) == ((1, 224, 224, 3), (8, 77))
    assert [case.name for case in cases(("ViT-B-16",), ("text",), (8, 1, 8))] == ["ViT-B-16 text 1", "ViT-B-16 text 8"]
    for wrong in ({"models": ("GPT",)}, {"towers": ("sound",)}, {"batches": (0,)}):
        with pytest.raises(InputError, match="is not measured; available: ViT-B-32"):
            cases(**wrong)
    assert CANDIDATES[0] is REFERENCE
    assert {GOAL_BEFORE, GOAL_OURS} <= {one.name for one in CANDIDATES}


def test_what_is_not_installed_is_named(monkeypatch):
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    (ours,) = [one for one in CANDIDATES if one.name == GOAL_OURS]
    assert missing(ours) == "tensorrt or tensorrt_rtx is not installed"
    planned = plan(cases(("ViT-B-32",), ("image",), (1,)))
    assert planned["cases"] == [{"model": "ViT-B-32", "tower": "image", "batch": 1, "shape": [1, 224, 224, 3]}]
    able = [one for one in planned["candidates"] if one["missing"] is None]
    assert planned["measurements"] == len(able) < len(CANDIDATES)
    assert cases_module.missing(REFERENCE) is None


def bench(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "invariclip.bench.gpu", *arguments], capture_output=True, text=True, check=False
    )


def test_a_dry_run_shows_shapes_and_plan_and_loads_nothing():
    done = bench("--dry-run", "--model", "ViT-B-32", "--batch", "8")
    assert done.returncode == 0, done.stderr
    assert "[8, 224, 224, 3]" in done.stdout
    assert "torch.compile float16" in done.stdout
    planned = json.loads(bench("--dry-run", "--json").stdout)
    assert len(planned["cases"]) == 24
    code = (
        "import sys; sys.argv = ['x', '--dry-run']\n"
        "sys.modules.update(dict.fromkeys(['torch', 'onnx', 'onnx_ir', 'open_clip', 'cuda'], None))\n"
        "from invariclip.bench.gpu.__main__ import main; main(standalone_mode=False)"
    )
    bare = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert bare.returncode == 0, bare.stderr
    assert "torch is not installed" in bare.stdout


def test_without_a_gpu_it_is_one_line(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = bench("--model", "ViT-B-32", "--batch", "1", "--out", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("invariclip: PyTorch ")
    assert done.stderr.count("\n") == 1
    with pytest.raises(DeviceError, match=r"was built without CUDA|sees no GPU"):
        require_cuda(torch)
    done = bench("--model", "GPT", "--dry-run")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


@given(st.integers(2, 12), st.integers(3, 8), st.integers(0, 2**16))
def test_parity_is_one_for_the_same_answers_and_falls_with_noise(rows, width, seed):
    rng = np.random.default_rng(seed)
    unit = rng.normal(size=(rows, width))
    unit = (unit / np.linalg.norm(unit, axis=1, keepdims=True)).astype(np.float32)
    same = parity(unit, unit)
    assert same["cosine_min"] == pytest.approx(1, abs=1e-6)
    assert same["nearest_agreement"] == 1
    assert parity(-unit, unit)["cosine_min"] == pytest.approx(-1, abs=1e-6)
    broken = unit.copy()
    broken[0, 0] = np.nan
    assert np.isnan(parity(broken, unit)["cosine_min"])


class Ready:
    """A candidate that answers, at a cosine."""

    def __init__(self, cosine=1.0, device=(0.5, 0.7)):
        self.cosine, self.device, self.closed, self.sizes = cosine, device, False, []

    def answer(self, rows):
        self.sizes.append(len(rows))
        base = np.random.default_rng(0).normal(size=(64, 16))[: len(rows)]
        off = np.random.default_rng(1).normal(size=(64, 16))[: len(rows)]
        base /= np.linalg.norm(base, axis=1, keepdims=True)
        off -= (off * base).sum(axis=1, keepdims=True) * base
        off /= np.linalg.norm(off, axis=1, keepdims=True)
        return (self.cosine * base + np.sqrt(max(0, 1 - self.cosine**2)) * off).astype(np.float32)

    def device_times(self, rows, runs):
        return list(self.device)

    def close(self):
        self.closed = True


class Shop:
    def __init__(self, graph):
        self._graph = graph

    def graph(self, case, candidate):
        return self._graph

    def inputs(self, case, rows):
        return np.zeros((rows, 32, 32, 3), np.uint8)


@pytest.fixture
def measured(monkeypatch, tiny_artifact):
    """Measures with candidates that are played; answers the rows."""
    monkeypatch.setattr(measure_module, "measured_peak", lambda: 1e12)
    monkeypatch.setattr(measure_module, "LEAST_SECONDS", 0.0)

    def of(runners, *, seconds=60, batch=8):
        def open_runner(candidate, case, workshop):
            runner = runners[candidate.name]
            if isinstance(runner, Exception):
                raise runner
            return runner

        monkeypatch.setattr(measure_module, "open_runner", open_runner)
        chosen = [REFERENCE if name == REFERENCE.name else GpuCandidate(name, "torch", "float16") for name in runners]
        kept = []
        rows = measure(
            [Case("ViT-B-32", "image", batch)], Shop(tiny_artifact / "image.onnx"), deadline=time.monotonic() + seconds,
            keep=kept.append, candidates=chosen,
        )  # fmt: skip
        assert kept == rows
        return rows

    return of


def test_answers_are_judged_before_times_are_taken(measured):
    runners = {
        REFERENCE.name: Ready(), "right": Ready(0.9999), "wrong": Ready(LEAST_COSINE - 0.01),
        "not a number": Ready(float("nan")), "broken": RuntimeError("CUDA out\nof memory"),
        "silent": Ready(0.9999, ()),
    }  # fmt: skip
    rows = {row["candidate"]: row for row in measured(runners)}
    assert rows["right"]["cosine_min"] == pytest.approx(0.9999, abs=1e-6)
    assert (rows["right"]["device_p50_ms"], rows["right"]["device_runs"]) == (0.6, 2)
    assert rows["right"]["peak_share"] > 0
    assert rows["wrong"]["reason"] == "answers differ: cosine 0.9890"
    assert rows["not a number"]["reason"] == "answers differ: cosine nan"
    assert rows["broken"]["reason"] == "CUDA out of memory"
    assert "device_p50_ms" not in rows["silent"]
    assert all("total_p50_ms" not in rows[name] for name in ("wrong", "not a number", "broken"))
    assert "cosine_min" not in rows[REFERENCE.name]
    assert all(runner.closed for runner in runners.values() if isinstance(runner, Ready))
    assert set(runners["right"].sizes) == {8}


def test_without_a_reference_nothing_is_called_right(measured):
    rows = measured({REFERENCE.name: DeviceError("no GPU"), "ours": Ready()})
    assert [row["reason"] for row in rows] == ["no GPU", "the reference could not answer"]


def test_what_there_was_no_time_for_is_listed(measured):
    rows = measured({REFERENCE.name: Ready(), "ours": Ready()}, seconds=-1)
    assert [row["reason"] for row in rows] == ["the time was up"] * 2


def record_of(rows):
    return {"date": "2026-11-28", "short": False, "machine": {"versions": {"torch": "2.13"}, "gpu": None}, "rows": rows}


def row_of(candidate, device, **but):
    row = {"case": "ViT-B-32 image 1", "model": "ViT-B-32", "tower": "image", "batch": 1, "candidate": candidate,
           "precision": "float16", "ready_seconds": 1.0, **run_figures("total", [2.0, 3.0]), "cosine_min": 0.99999,
           "peak_share": 0.25}  # fmt: skip
    return {**row, **(run_figures("device", [device]) if device else {}), **but}


def test_the_goal_is_told_from_device_times_of_single_images():
    rows = [row_of(GOAL_BEFORE, 1.4), row_of(GOAL_OURS, 1.0)]
    assert goals(rows) == ["ViT-B-32 image 1: 1.40 × torch.compile float16 (goal 1.3 ×: reached)"]
    assert "missed" in goals([row_of(GOAL_BEFORE, 1.2), row_of(GOAL_OURS, 1.0)])[0]
    assert goals([row_of(GOAL_BEFORE, None), row_of(GOAL_OURS, 1.0)]) == ["ViT-B-32 image 1: the goal was not measured"]


def test_pages_hold_every_row_and_escape_it(tmp_path):
    rows = [
        row_of(GOAL_BEFORE, 1.4), row_of(GOAL_OURS, None),
        {"case": "ViT-B-32 image 1", "model": "ViT-B-32", "tower": "image", "batch": 1, "candidate": "<b>",
         "reason": "<script>alert(1)</script>"},
    ]  # fmt: skip
    text = as_text(record_of(rows))
    write_page(tmp_path / "index.html", record_of(rows))
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert text.endswith("Not measured:\n<b>: <script>alert(1)</script> (ViT-B-32 image 1)")
    assert text.count("ViT-B-32 image 1") == 4
    assert [has_figures(row) for row in rows] == [True, True, False]
    assert line(rows[2]) == "ViT-B-32 image 1  <b>  not measured: <script>alert(1)</script>"
    assert line(rows[0]).split("  ") == cells(rows[0])
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert page.count("<tr") == 3
    assert "<svg" in page
    assert "http" not in page.split("<svg")[0]
    assert cells(rows[0])[6] == "25.0%"
    assert all(len(cells(row)) == 9 for row in rows[:2])


def test_pytorchs_own_tower_answers_like_the_checkpoint(tiny_checkpoint, tiny_artifact):
    import torch

    from invariclip.export.checkpoints.checkpoint import load_checkpoint

    loaded = load_checkpoint(str(tiny_checkpoint))
    for tower in ("image", "text"):
        rows = rows_of(loaded, tower, 5)
        assert len(rows) == 5
        raw = loaded.encode_images(rows) if tower == "image" else loaded.encode_texts(rows)
        wanted = raw / np.linalg.norm(raw, axis=1, keepdims=True)
        with torch.inference_mode():
            got = tower_module(torch, loaded, tower, torch.float32)(torch.from_numpy(rows)).numpy()
            half = tower_module(torch, loaded, tower, torch.bfloat16)(torch.from_numpy(rows)).numpy()
        assert np.abs(got - wanted).max() < 1e-5
        assert 1e-6 < np.abs(half - wanted).max() < 0.05
    assert next(loaded.module.visual.parameters()).dtype == torch.float32  # the checkpoint itself is left alone
    runner = GraphRunner(
        GpuCandidate("CPU", "onnxruntime", "float32", "ours"),
        Case("ViT-B-32", "image", 2),
        Shop(tiny_artifact / "image.onnx"),
    )
    assert runner.answer(np.zeros((2, 32, 32, 3), np.uint8)).shape == (2, 8)
    assert runner.device_times(np.zeros((2, 32, 32, 3), np.uint8), 3) == []
