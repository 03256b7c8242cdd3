"""The whole bench on tiny models: what is measured, what is not and why, how it resumes, what it writes."""

import json
from dataclasses import replace

import numpy as np
import pytest

from invariclip.artifact.folder import read_manifest
from invariclip.bench.latency import machine, peers, quantise_peer, report, stages
from invariclip.bench.latency.peers import OURS, PEAK, PEER, PYTORCH, PeerRow
from invariclip.bench.latency.prepare import ALTERED, CALIBRATION, EVIDENCE, PLAIN, ReferenceRequest, prepare
from invariclip.bench.latency.report import write_page
from invariclip.bench.latency.session import Plan, Session, open_record, read_record
from invariclip.bench.latency.worker import LatencyCandidate
from invariclip.errors import CheckpointError, InputError

PLAN = Plan(
    batches=(1, 2), rounds=2, cold=1, seconds_per_turn=0.002, threads=1, stage_rounds=1, head_calls=4
)  # fmt: skip


@pytest.fixture(scope="module")
def wanted(tiny_checkpoint, tiny_artifact, tiny_images):
    return ReferenceRequest(str(tiny_checkpoint), None, None, None, tiny_artifact, (tiny_images,), 1)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def prepared(wanted, out):
    """Everything but NNCF, which is not installed as far as this module knows: it needs half a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantise_peer, "versions", lambda: {"openvino": "1"})
        return prepare(wanted, out)


@pytest.fixture(scope="module")
def few(wanted, prepared):
    """Of all candidates those that start in a second, one that cannot start, and what is known not to run."""
    known = {entry.candidate.name: entry for entry in peers.entries(wanted, prepared)}
    missing = LatencyCandidate("missing file", "openvino", str(prepared.folder / "none.onnx"))
    return [
        PeerRow(missing, PEER, "float32"),
        known["ONNX Runtime float32"],
        known["OpenVINO float32"],
        known["OpenVINO NNCF int8, rest float32"],
        known["invariclip float32, onnxruntime"],
        known["peak float32"],
    ]


@pytest.fixture(scope="module")
def measured(prepared, few, out):
    record = open_record(out / "bench.json", prepared.key)
    record.machine, record.settings = machine.facts(), {"model": "tiny", "threads": 1, "date": "now", "seconds": 1.0}
    Session(record, out / "bench.json", few, prepared, PLAN).run()
    return record


def test_what_is_prepared_is_made_once_and_names_no_folder(wanted, prepared, out, monkeypatch, tmp_path):
    shown, altered = (np.load(prepared.folder / name) for name in (EVIDENCE, ALTERED))
    assert len(shown) == len(altered) == 12
    assert not np.array_equal(shown, altered)
    assert len(np.load(prepared.folder / CALIBRATION)) > 12
    assert prepared.missing == {"nncf": "needs nncf: pip install nncf"}
    # ours is projected to rank 8, peers know no projection
    assert [prepared.reference(projected).plain.shape for projected in (True, False)] == [(12, 8), (12, 24)]
    monkeypatch.setattr(quantise_peer, "versions", lambda: {"openvino": "1"})
    monkeypatch.setattr("invariclip.bench.latency.prepare.load", lambda *_: pytest.fail("loaded again"))
    assert prepare(wanted, out).key == prepared.key
    assert str(tmp_path.parent) not in json.dumps(prepared.key)


def test_an_artifact_of_another_checkpoint_is_refused(wanted, out, monkeypatch):
    monkeypatch.setattr(quantise_peer, "versions", lambda: {"openvino": "1"})
    with pytest.raises(CheckpointError, match="was exported from another checkpoint"):
        prepare(replace(wanted, model="reference"), out)


def test_every_kind_is_there_and_what_cannot_run_says_why(wanted, prepared, monkeypatch):
    monkeypatch.setattr(machine, "compiler", lambda: None)
    monkeypatch.setattr(machine, "has_bfloat16", lambda: False)
    monkeypatch.setattr(machine, "versions", lambda: {"torch": "2"})
    found = {entry.candidate.name: entry for entry in peers.entries(wanted, prepared)}
    groups = [entry.group for entry in found.values()]
    assert [groups.count(group) for group in (PYTORCH, PEER, OURS, PEAK)] == [4, 5, 1, 3]
    assert next(iter(found)) == "PyTorch eager float32"
    reasons = {name: entry.reason for name, entry in found.items()}
    assert not reasons["PyTorch eager float32"]
    assert not reasons["invariclip float32, onnxruntime"]
    assert "no bfloat16 instructions" in reasons["PyTorch eager bfloat16"]
    assert "C++ compiler" in reasons["PyTorch compiled float32"]
    assert reasons["OpenVINO float32"] == "needs openvino: pip install openvino"
    assert reasons["OpenVINO NNCF int8, rest float32"] == "needs nncf: pip install nncf"


def test_ours_is_every_variant_on_every_backend_it_was_proved_on(wanted, prepared):
    manifest = read_manifest(wanted.artifact)
    (record,) = manifest.variants["float32"].parity.values()
    variant = replace(manifest.variants["float32"], parity={"onnxruntime": record, "openvino": record})
    both = replace(manifest, variants={"float32": variant, "bfloat16": replace(variant, compute="bfloat16")})
    found = [entry for entry in peers.entries(wanted, replace(prepared, manifest=both)) if entry.group == OURS]
    assert [(entry.candidate.variant, entry.candidate.backend, entry.arithmetic) for entry in found] == [
        (name, backend, name) for name in ("float32", "bfloat16") for backend in ("onnxruntime", "openvino")
    ]


def test_what_was_measured(measured, few):
    able = {"ONNX Runtime float32", "OpenVINO float32", "invariclip float32, onnxruntime"}
    assert set(measured.cold) == set(measured.memory) == set(measured.accuracy) == able
    assert all(len(starts) == 2 for starts in measured.cold.values())
    assert {batch: len(rounds) for batch, rounds in measured.rounds.items()} == {"1": 2, "2": 2}
    assert all(set(one.turns) == able | {"peak float32"} for rounds in measured.rounds.values() for one in rounds)
    assert measured.flops["2"] == 2 * measured.flops["1"] > 0
    for figures in measured.accuracy.values():
        assert figures["cosine_min"] > 0.999999
        assert figures["top1_agreement"] == 1
        assert abs(figures["gap_increase"]) < 1e-5
    # peers are matched with what they know: no projection
    gaps = {name: figures["gap_reference"] for name, figures in measured.accuracy.items()}
    assert gaps["ONNX Runtime float32"] == gaps["OpenVINO float32"] != gaps["invariclip float32, onnxruntime"]
    assert set(measured.stages) == {"invariclip float32, onnxruntime"}


def test_the_summary_and_the_table_say_all_of_it(measured):
    summary = report.summarise(measured)
    assert summary["yardstick"] == "ONNX Runtime float32"
    assert summary["best_peer"] == {"1": "OpenVINO float32", "2": "OpenVINO float32"}
    for batch, rows in summary["batches"].items():
        assert set(rows) == set(measured.accuracy)
        for row in rows.values():
            assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
            assert row["ratio"]["rounds"] == 2
            assert row["per_second"] == pytest.approx(int(batch) * 1e3 / row["p50_ms"])
            assert row["peak_share"] > 0
    assert set(summary["levels"].values()) == {"exact"}
    assert set(summary["not_measured"]) == {"missing file", "OpenVINO NNCF int8, rest float32"}
    assert any("2 rounds are too few" in line for line in summary["warnings"])
    taken = summary["stages"]["invariclip float32, onnxruntime"]
    assert all(taken[stage] > 0 for stage in stages.STAGES)
    text = report.summary_table(measured, summary)
    assert "OpenVINO NNCF int8, rest float32: not measured: needs nncf: pip install nncf" in text
    assert text.count("invariclip float32, onnxruntime") == 2
    assert "around / encode" in report.stage_table(summary)


def test_a_run_goes_on_where_it_stopped_and_refuses_another_comparison(measured, prepared, few, out, monkeypatch):
    again = open_record(out / "bench.json", prepared.key)
    first = [one.turns for one in again.rounds["1"]]
    assert first
    starts = {name: list(found) for name, found in again.cold.items()}
    Session(again, out / "bench.json", few[1:2], prepared, replace(PLAN, rounds=3)).run()
    stored = read_record(out / "bench.json")
    assert [len(rounds) for rounds in stored.rounds.values()] == [3, 3]
    assert [one.turns for one in stored.rounds["1"][:2]] == first
    assert list(stored.rounds["1"][2].turns) == ["ONNX Runtime float32"]
    assert stored.cold == starts
    monkeypatch.setattr(Session, "_start", lambda *_: pytest.fail("nothing is left to do"))
    Session(stored, out / "bench.json", few[1:], prepared, replace(PLAN, rounds=3)).run()
    with pytest.raises(InputError, match="its checkpoint differ"):
        open_record(out / "bench.json", {**prepared.key, "checkpoint": "another"})
    (out / "bench.json").write_text("[]")
    with pytest.raises(InputError, match="not a record of a bench"):
        read_record(out / "bench.json")


def test_nothing_that_runs_is_an_error(prepared, few, tmp_path):
    record = open_record(tmp_path / "bench.json", prepared.key)
    with pytest.raises(InputError, match="no candidate runs here: "):
        Session(record, tmp_path / "bench.json", few[:1], prepared, PLAN).run()


def test_the_page_is_one_file_and_escapes_names(measured, tmp_path):
    measured.entries[0]["reason"] = "broken <b>"
    write_page(tmp_path / "index.html", measured, report.summarise(measured))
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2 + 2 + 1 + 2
    assert "broken &lt;b&gt;" in page
    assert "too few for an interval" in page
    assert 'src="http' not in page
    assert 'href="http' not in page.replace('href="http://www.w3.org', "")


def test_sheets_are_images_of_the_size_that_is_said(tiny_images, tmp_path):
    from PIL import Image

    from invariclip.preprocessing.find import find_images

    size = stages.write_jpegs(find_images([tiny_images]), tmp_path, count=2)
    files = sorted(tmp_path.glob("*.jpg"))
    assert size == sum(path.stat().st_size for path in files) // 2
    assert [Image.open(path).size for path in files] == [(640, 480)] * 2
    with pytest.raises(InputError, match="no image to make a sheet of"):
        stages.write_jpegs([], tmp_path)


def test_the_plain_export_holds_no_projection(prepared):
    import onnx

    (answer,) = onnx.load(prepared.folder / PLAIN).graph.output
    assert answer.type.tensor_type.shape.dim[1].dim_value == 24


def test_the_command_writes_record_and_page_and_answers_as_json(run, wanted, monkeypatch, tmp_path):
    # Of the candidates that start slowly one is enough: torch has to import, and to compile
    monkeypatch.setattr(machine, "compiler", lambda: None)
    monkeypatch.setattr(machine, "has_bfloat16", lambda: False)
    monkeypatch.setattr(quantise_peer, "versions", dict)
    out = tmp_path / "out"
    command = ["bench", wanted.artifact, "--model", wanted.model, "--images", wanted.images[0], "--batch", 1]
    options = [
        "--rounds",
        1,
        "--cold",
        0,
        "--seconds-per-turn",
        0.01,
        "--threads",
        1,
        "--out",
        out,
        "--quiet",
        "--json",
    ]
    code, printed, _ = run(*command, *options)
    assert code == 0
    answer = json.loads(printed)
    assert answer["yardstick"] == "PyTorch eager float32"
    assert set(answer["batches"]["1"]) == {
        "PyTorch eager float32", "ONNX Runtime float32", "OpenVINO float32", "invariclip float32, onnxruntime"
    }  # fmt: skip
    assert set(answer["levels"].values()) == {"exact"}
    assert answer["not_measured"]["OpenVINO NNCF int8, rest float32"].startswith("needs nncf and openvino")
    stored = json.loads((out / "bench.json").read_text())
    assert stored["summary"]["batches"] == answer["batches"]
    assert str(tmp_path) not in json.dumps(stored)
    assert str(wanted.model) not in json.dumps(stored)
    assert "<svg" in (out / "index.html").read_text()


def test_wrong_usage_is_one_line(run, tmp_path):
    code, _, told = run("bench", tmp_path / "none.icm", "--quiet")
    assert code == 2
    assert "not an artifact" in told
    code, _, told = run("bench", "--model", "reference", "--random-weights", 1, "--out", tmp_path / "o", "--quiet")
    assert code == 2
    assert "has weights of its own" in told
