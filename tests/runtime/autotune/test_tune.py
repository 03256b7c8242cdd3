"""`tune` end to end on tiny graphs: the fastest that keeps its word is taken, a planted bad variant never is."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import invariclip
from invariclip.artifact.folder import describe_file, read_manifest, write_manifest
from invariclip.autotune import TuneSettings, tune
from invariclip.autotune.candidates import TuneCandidate, default_threads, enumerate_candidates
from invariclip.autotune.halving import Search, stages_for
from invariclip.autotune.worker import TuneWorker
from invariclip.errors import (
    ArtifactError,
    ContractError,
    InputError,
    ProfileWarning,
    TuningInterruptedError,
    UntrueVariantWarning,
)
from invariclip.export.graphs.writing import write_facts
from invariclip.measure.worker import WorkerError
from invariclip.records import seal

QUICK = {"threads": (1,), "seconds": 2.0}
ORT = "onnxruntime"


def after_embedding(model, nodes, constants=()):
    """Puts nodes between what made `embedding` and whoever reads it; they read `inner` and write `embedding`."""
    graph = model.graph
    place, maker = next((i, node) for i, node in enumerate(graph.node) if "embedding" in node.output)
    maker.output[list(maker.output).index("embedding")] = "inner"
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants)
    for offset, node in enumerate(nodes, start=1):
        graph.node.insert(place + offset, node)


def slow_down(model):
    """Adds milliseconds of work that change nothing: the tiny tower itself takes a tenth of one."""
    rng = np.random.default_rng(0)
    side = 320
    constants = [
        ("ones", np.ones((side, side), np.float32)),
        ("spin", np.linalg.qr(rng.normal(size=(side, side)))[0].astype(np.float32)),
        ("nothing", np.float32(1e-30)),
    ]
    nodes = [
        helper.make_node("ReduceMean", ["inner"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["ones", "mean"], ["turn0"]),
        *(helper.make_node("MatMul", [f"turn{i}", "spin"], [f"turn{i + 1}"]) for i in range(6)),
        helper.make_node("ReduceMean", ["turn6"], ["end"], keepdims=0),
        helper.make_node("Mul", ["end", "nothing"], ["little"]),
        helper.make_node("Add", ["inner", "little"], ["embedding"]),
    ]
    after_embedding(model, nodes, constants)


def turn_away(model):
    """Answers of unit length, but others."""
    rng = np.random.default_rng(1)
    turned = np.linalg.qr(rng.normal(size=(8, 8)))[0].astype(np.float32)
    after_embedding(model, [helper.make_node("MatMul", ["inner", "other"], ["embedding"])], [("other", turned)])


def make_nan(model):
    nodes = [
        helper.make_node("Sub", ["inner", "inner"], ["zero"]),
        helper.make_node("Div", ["zero", "zero"], ["embedding"]),
    ]
    after_embedding(model, nodes)


def only_in_eights(model):
    """NaN in any batch but one of eight, the size in which candidates are first looked at."""
    nodes = [
        helper.make_node("Shape", ["inner"], ["shape"], start=0, end=1),
        helper.make_node("Equal", ["shape", "eight"], ["right"]),
        helper.make_node("Where", ["right", "one", "nan"], ["factor"]),
        helper.make_node("Mul", ["inner", "factor"], ["embedding"]),
    ]
    constants = [("eight", np.array([8])), ("one", np.ones(1, np.float32)), ("nan", np.full(1, np.nan, np.float32))]
    after_embedding(model, nodes, constants)


def unchanged(model):
    del model


class Plant:
    """An artifact with a slow default and whatever variants a test plants beside it."""

    def __init__(self, source, folder):
        self.folder = folder
        shutil.copytree(source, folder)
        manifest = read_manifest(folder)
        self._graphs = {tower: (folder / f"{tower}.onnx").read_bytes() for tower in ("image", "text")}
        self._first = manifest.variants["float32"]
        slow = self._write("image", "image.onnx", slow_down)
        write_manifest(folder, replace(manifest, variants={"float32": replace(self._first, image=slow)}))

    @property
    def record(self):
        return self._first.parity[ORT]

    def _write(self, tower, name, edit):
        model = onnx.load_from_string(self._graphs[tower])
        edit(model)
        onnx.save(model, self.folder / name)
        write_facts(self.folder / name, read_manifest(self.folder).facts(name))
        return describe_file(self.folder, name)

    def add(self, name, image=unchanged, text=unchanged, parity=None, **facts):
        manifest = read_manifest(self.folder)
        variant = replace(
            self._first,
            image=self._write("image", f"image.{name}.onnx", image),
            text=self._write("text", f"text.{name}.onnx", text),
            parity={ORT: self.record} if parity is None else parity,
            **facts,
        )
        write_manifest(self.folder, replace(manifest, variants={**manifest.variants, name: variant}))
        return self


@pytest.fixture
def plant(tiny_artifact, tmp_path):
    return Plant(tiny_artifact, tmp_path / "p.icm")


def profiles(folder):
    return sorted(folder.glob("machine-*.json"))


def reasons(tuned):
    return {item["candidate"].split(" on ")[0]: item["why"] for item in tuned.profile.left_out}


def test_the_fastest_is_chosen_written_reused_and_served(plant, run, tiny_images):
    folder = plant.add("quick").folder
    tuned = tune(folder, TuneSettings(**QUICK))
    assert (tuned.profile.choice.variant, tuned.reused) == ("quick", False)
    speed = {one.candidate.variant: one for one in tuned.profile.measurements}
    assert speed["quick"].ratio > 2
    assert speed["quick"].rounds >= 6
    assert speed["float32"].ratio == 1.0
    assert profiles(folder) == [tuned.path]
    path = tuned.path
    path.write_bytes(seal(json.dumps({**json.loads(path.read_text()), "load": 7.0}).encode()))
    content = path.read_bytes()
    code, out, err = run("tune", folder, "--threads", 1, "--quiet")
    assert (code, err.count("\n")) == (0, 1)
    assert "the machine was busy (7.0 processes per processor before the search)" in err
    assert "nothing was measured" in out
    assert tuned.path.read_bytes() == content

    model = invariclip.load(folder)
    assert (model.variant, model.describe()["threads"]) == ("quick", 1)
    assert model.describe()["chosen_by"] == f"profile {tuned.path.name}"
    code, out, _ = run("predict", folder, tiny_images / "00.png", "--json", "--quiet")
    assert (code, json.loads(out)["engine"]["variant"]) == (0, "quick")
    _, out, _ = run("inspect", folder)
    assert tuned.path.name in out
    _, out, _ = run("inspect", folder, "--json")
    assert json.loads(out)["tuned"]["latency"]["variant"] == "quick"


def test_no_planted_variant_is_picked_and_each_is_refused_for_its_fault(plant):
    silent = {name: value for name, value in plant.record.items() if name != "fidelity"}
    plant.add("liar", image=turn_away)
    plant.add("nan", image=make_nan)
    plant.add("deaf", text=turn_away)
    plant.add("silent", parity={ORT: silent})
    plant.add("failed", parity={ORT: {**plant.record, "passed": False}})
    plant.add("near", parity={ORT: {**plant.record, "fidelity": ["near", "fast"]}})
    plant.add("other", parity={"abacus": plant.record})
    plant.add("half", compute="bfloat16")
    with pytest.warns(UntrueVariantWarning) as warned:
        tuned = tune(plant.folder, TuneSettings(**QUICK))
    assert tuned.profile.choice.variant == "float32"
    why = reasons(tuned)
    assert "cosine" in why["liar"]
    assert "NaN" in why["nan"]
    assert "texts: cosine" in why["deaf"]
    assert "names no fidelity" in why["silent"]
    assert "did not pass" in why["failed"]
    assert "was proved at near, not at exact" in why["near"]
    assert "no engine of this version is called 'abacus'" in why["other"]
    assert "onnxruntime computes float32 on the CPU" in why["half"]
    assert {str(one.message).split(" on ")[0] for one in warned} == {"liar", "nan", "deaf"}
    assert not {one.candidate.variant for one in tuned.profile.measurements} & set(why)


def test_a_variant_that_fails_in_its_own_batch_size_is_not_picked(plant):
    plant.add("eights", image=only_in_eights)
    with pytest.warns(UntrueVariantWarning, match="in batches of 1: 8 of 8 answers are NaN"):
        tuned = tune(plant.folder, TuneSettings(**QUICK))
    assert tuned.profile.choice.variant == "float32"


def test_a_default_that_fails_here_is_an_error(tiny_artifact, tmp_path):
    plant = Plant(tiny_artifact, tmp_path / "p.icm")
    broken = plant._write("image", "image.onnx", make_nan)
    manifest = read_manifest(plant.folder)
    variant = replace(manifest.variants["float32"], image=broken)
    write_manifest(plant.folder, replace(manifest, variants={"float32": variant}))
    with pytest.raises(ContractError, match="the safe default, float32 on onnxruntime, 1 thread, answers NaN"):
        tune(plant.folder, TuneSettings(**QUICK))
    assert profiles(plant.folder) == []


def test_engines_compete_and_throughput_answers_with_a_batch(plant):
    pytest.importorskip("openvino")
    manifest = read_manifest(plant.folder)
    both = replace(manifest.variants["float32"], parity={ORT: plant.record, "openvino": plant.record})
    write_manifest(plant.folder, replace(manifest, variants={"float32": both}))
    tuned = tune(plant.folder, TuneSettings(objective="throughput", batches=(1, 8), **QUICK))
    measured = tuned.profile.measurements
    assert {one.candidate.backend for one in measured} == {ORT, "openvino"}
    # An image in a batch of eight shares the milliseconds that the slow graph spends per run
    assert tuned.profile.choice.batch == 8
    assert tuned.profile.basis.objective == "throughput"
    assert invariclip.load(plant.folder, threads=1).describe()["chosen_by"] == "default"
    served = invariclip.load(plant.folder, objective="throughput").describe()
    assert served["chosen_by"].startswith("profile ")
    assert served["engine"] == tuned.profile.choice.backend


def test_heats_share_seats_and_find_the_same(plant):
    names = ("quick", "second", "third")
    for name in names:
        plant.add(name)
    found, _ = enumerate_candidates(read_manifest(plant.folder), "exact", (1,))
    default = next(one for one in found if one.variant == "float32")
    open_at_once = []
    with Search(plant.folder, default, 1, seats=2, progress=lambda items, **_: watched(items)) as search:

        def watched(items):
            for item in items:
                open_at_once.append(len(search._open))
                yield item

        finalists = search.run(found, stages_for("latency", (1,)), 1.0)
    assert max(open_at_once) == 2
    assert {entry.candidate.variant for entry in search.timed} == {"float32", *names}
    assert max(finalists, key=lambda one: one.ratio).entry.candidate.variant in names
    assert len(finalists) == 2


def test_a_process_that_dies_is_left_out_and_the_others_go_on(plant):
    plant.add("quick").add("doomed")
    found, _ = enumerate_candidates(read_manifest(plant.folder), "exact", (1,))
    by_name = {one.variant: one for one in found}
    search = Search(plant.folder, by_name["float32"], 1, seats=9, progress=lambda items, **_: killing(items))

    def killing(items):
        for number, item in enumerate(items):
            if number == 1 and by_name["doomed"] in search._open:
                search._open[by_name["doomed"]]._process.kill()
            yield item

    with search:
        finalists = search.run(found, stages_for("latency", (1,)), 1.0)
    assert [(item["candidate"], "killed" in item["why"]) for item in search.left_out] == [
        (by_name["doomed"].name, True)
    ]
    assert "doomed" not in {one.entry.candidate.variant for one in finalists}


def test_what_cannot_be_opened_says_why(tiny_artifact):
    with pytest.raises(WorkerError, match="no variant 'absent'; available: float32"):
        TuneWorker(tiny_artifact, TuneCandidate("absent", ORT, 1, "exact", 2))


def interrupting(after):
    """A progress that presses Ctrl-C while the rounds of a stage run."""

    def progress(items, *, total=None, desc=""):
        for number, item in enumerate(items):
            if desc.startswith("stage") and number == after:
                raise KeyboardInterrupt
            yield item

    return progress


def children():
    """Processes that this one started and that still run; None where the system does not tell."""
    listed = Path(f"/proc/self/task/{os.getpid()}/children")
    return listed.read_text().split() if listed.exists() else None


def test_an_interrupted_search_says_what_was_best_and_writes_nothing(plant, run, monkeypatch):
    folder = plant.add("quick").folder
    before = children()
    with pytest.raises(TuningInterruptedError, match="interrupted; nothing was measured; nothing was written"):
        tune(folder, TuneSettings(**QUICK), progress=interrupting(0))
    monkeypatch.setattr("invariclip.cli.tune_command.bar", interrupting(2))
    code, out, err = run("tune", folder, "--threads", 1)
    assert (code, out, err.count("\n")) == (130, "", 1)
    assert "best so far: quick on onnxruntime, 1 thread, batch 1" in err
    assert "over 2 round(s); nothing was written" in err
    assert profiles(folder) == []
    assert children() == before


def test_another_artifact_or_search_makes_a_profile_stale(plant, run):
    folder = plant.folder
    first = tune(folder, TuneSettings(**QUICK))
    again = tune(folder, TuneSettings(**QUICK, again=True))
    assert (again.reused, again.changed) == (False, ())
    manifest = read_manifest(folder)
    write_manifest(folder, replace(manifest, left_out={"int8": "too far off"}))
    with pytest.warns(ProfileWarning, match="the artifact's manifest: .* → .*; `invariclip tune` makes a new one"):
        model = invariclip.load(folder)
    assert model.describe()["chosen_by"] == "default"
    code, out, _ = run("tune", folder, "--threads", 1, "--seconds", 1, "--json")
    assert code == 0
    told = json.loads(out)
    assert (told["reused"], told["profile"]) == (False, str(first.path))
    assert [word.split(":")[0] for word in told["changed"]] == ["the artifact's manifest"]
    assert invariclip.load(folder).describe()["chosen_by"] == f"profile {first.path.name}"


def test_a_profile_elsewhere_is_written_and_used_when_named(plant, tmp_path):
    path = tmp_path / "mine.json"
    tuned = tune(plant.add("quick").folder, TuneSettings(**QUICK, profile=path))
    assert tuned.path == path
    assert profiles(plant.folder) == []
    assert invariclip.load(plant.folder).variant == "float32"
    assert invariclip.load(plant.folder, profile=path).variant == "quick"


def test_a_place_that_cannot_be_written_is_said_before_anything_is_measured(tiny_artifact, tmp_path):
    def never(items, **_):
        raise AssertionError("it measured")

    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written .*; name another place with --profile FILE"):
        tune(tiny_artifact, TuneSettings(profile=tmp_path / "file" / "x.json"), progress=never)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"threads": (4096,)}, "threads must be from 1 to the"),
        ({"threads": (0,)}, "threads must be from 1 to the"),
        ({"batches": (65,), "objective": "throughput"}, "a batch must be from 1 to 64, not 65"),
        ({"batches": (1, 2)}, "latency is sought at one batch size"),
        ({"seconds": 0}, "seconds must be above 0"),
        ({"seconds": float("nan")}, "seconds must be above 0"),
        ({"fidelity": "close"}, "no fidelity is called 'close'"),
        ({"objective": "power"}, "no objective is called 'power'; available: latency, throughput"),
    ],
)
def test_wrong_settings_are_one_typed_line(tiny_artifact, settings, reason):
    with pytest.raises(InputError, match=reason):
        tune(tiny_artifact, TuneSettings(**settings))


def test_nothing_to_choose_from_says_why(plant):
    manifest = read_manifest(plant.folder)
    only = replace(manifest.variants["float32"], parity={ORT: {**plant.record, "fidelity": ["exact"]}})
    write_manifest(plant.folder, replace(manifest, variants={"float32": only}))
    with pytest.raises(InputError, match="tuned at fidelity fast: float32 on onnxruntime: was proved at exact, not at"):
        tune(plant.folder, TuneSettings(fidelity="fast"))
    unproved = replace(only, parity={ORT: {**plant.record, "fidelity": ["fast"]}})
    write_manifest(plant.folder, replace(manifest, variants={"float32": unproved}))
    with pytest.raises(ArtifactError, match="which the others would be checked against, was not proved exact"):
        tune(plant.folder, TuneSettings(fidelity="fast"))


def test_threads_that_are_tried():
    assert [default_threads(n) for n in (1, 2, 3, 8)] == [(1,), (1, 2), (1, 3), (2, 4, 8)]


def test_a_search_needs_no_heavy_library(plant):
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'onnx', 'open_clip', 'scipy'), None));"
        "from invariclip.cli.main import main;"
        f"main(['tune', {str(plant.folder)!r}, '--threads', '1', '--seconds', '1', '--quiet'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "chosen: float32" in done.stdout


def test_the_worker_keeps_its_answers_apart_from_what_engines_print(tiny_artifact):
    named = json.dumps({"folder": str(tiny_artifact), "variant": "float32", "backend": ORT, "threads": 1})
    code = (
        "import sys, os; from invariclip.autotune import worker;"
        "real = worker.Bench.__init__;"
        "worker.Bench.__init__ = lambda self, **named: (os.write(1, b'noise\\n'), real(self, **named))[1];"
        f"sys.argv = ['worker', {named!r}]; worker.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], input="", capture_output=True, text=True, check=False)
    assert json.loads(done.stdout)["engine"] == ORT
    assert "noise" in done.stderr
