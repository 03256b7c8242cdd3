"""The parity table: bounds and what breaks them, the page, and what is kept of a run that was stopped."""

import json
import shutil
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import pytest
from click.testing import CliRunner

import invariclip
from invariclip.bench.studies.parity import __main__ as parity
from invariclip.bench.studies.parity.family import FamilyParity, TowerParity
from invariclip.export.checkpoints.families import FAMILIES
from invariclip.export.verification.figures import SIZES


def tower(name, **fields):
    plan = [{"name": "tidy", "applied": name == "text", "detail": "there was nothing to remove"}]
    given = {
        "fold": "folded", "nodes": 70, "weights": 10**8, "seconds": 3.4, "plan": plan, "spread": 0.3,
        "diffs": {"onnxruntime": [1e-7, 2e-7, 3e-7, 4e-7], "openvino": [5e-7] * 4},
        "cut_diff": 6e-7 if name == "text" else None, "tensorrt": "built in 5 s",
    }  # fmt: skip
    return TowerParity(name, **{**given, **fields})


def figures(name="RN50", **image):
    return FamilyParity(
        name, "random weights, seed 0", 1e-5, 10**8, 4 * 10**8, [tower("image", **image), tower("text")]
    )


def test_within_the_bounds_nothing_is_broken():
    assert figures().broken == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"diffs": {"onnxruntime": [0, 0, 0, 2e-5]}},
            "RN50, image, onnxruntime: max |Δ| 2e-05 is above 1e-05",
        ),
        ({"diffs": {"openvino": [float("inf"), 0, 0, 0]}}, "RN50, image, openvino: max |Δ| inf is above 1e-05"),
        ({"diffs": {"openvino": [float("nan")]}}, "RN50, image, openvino: max |Δ| nan is above 1e-05"),
        ({"cut_diff": 0.5}, "RN50, image, short texts: max |Δ| 0.5 is above 1e-05"),
        ({"tensorrt": "cannot build it"}, "RN50, image: TensorRT-RTX: cannot build it"),
        ({"tensorrt": ""}, "RN50, image: TensorRT-RTX: "),
    ],
)
def test_a_broken_bound_is_named(change, words):
    assert figures(**change).broken == [words]


def test_figures_survive_json():
    one = figures()
    assert FamilyParity.from_json(json.loads(json.dumps(asdict(one)))) == one


def test_the_page_has_every_figure():
    page = parity.page([figures(), figures("ViT-B-32")], ["one", "two"], {"torch": "2.x", "onnx": "1.y"})
    rows = [line for line in page.splitlines() if line.startswith("| RN50 | image")]
    assert rows[0].split("|")[1:] == [
        " RN50 ", " image ", " folded ", " 70 ", " 1.0e-07 ", " 2.0e-07 ", " 3.0e-07 ", " 4.0e-07 ", " 5.0e-07 ", " – ",
        " 3.0e-01 ", " 1e-05 ", " built in 5 s ", "",
    ]  # fmt: skip
    assert rows[1] == "| RN50 | image | tidy | there was nothing to remove |"
    assert "Broken bounds: one; two." in page
    assert "Broken bounds: none." in parity.page([figures()], [], {})
    assert "(4.00 ×)" in page
    assert page.rstrip().endswith("Versions: torch 2.x, onnx 1.y.")
    for table in page.split("\n\n"):
        assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) <= 1
    assert all(f"batch {size}" in page for size in SIZES)


# ---------------------------------------------------------------- a run that goes on


@pytest.fixture
def ran(monkeypatch):
    """Families that were measured in this run; each takes a process of its own, here none."""
    seen = []

    def run(command, **_):
        name, out = command[-2:]
        seen.append(name)
        with open(out, "w") as file:
            json.dump(asdict(figures(name)), file)
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(parity.subprocess, "run", run)
    return seen


def invoke(folder, *arguments):
    given = ["--out", str(folder / "parity.md"), "--cache", str(folder / "cache"), *arguments]
    return CliRunner().invoke(parity.parity, given, standalone_mode=False)


def test_what_is_done_is_not_done_again(ran, tmp_path, monkeypatch):
    assert invoke(tmp_path, "--family", "RN50").return_value == 0
    assert invoke(tmp_path, "--family", "RN50", "--family", "ViT-B-32").return_value == 0
    assert ran == ["RN50", "ViT-B-32"]
    page = (tmp_path / "parity.md").read_text()
    assert "| RN50 | image" in page
    assert "| ViT-B-32 | text" in page
    # figures of other code or other versions are not taken over
    monkeypatch.setattr(parity, "versions", lambda: {"torch": "another"})
    invoke(tmp_path, "--family", "RN50")
    assert ran == ["RN50", "ViT-B-32", "RN50"]


def test_all_families_are_the_default(ran, tmp_path):
    assert invoke(tmp_path).return_value == 0
    assert ran == [one.name for one in FAMILIES]


def test_a_broken_bound_is_exit_1(ran, tmp_path, monkeypatch):
    broken = deepcopy(figures(tensorrt="refused"))
    monkeypatch.setattr(parity, "figures_of", lambda name, cache, key: broken)
    assert invoke(tmp_path, "--family", "RN50").return_value == 1
    assert "Broken bounds: RN50, image: TensorRT-RTX: refused." in (tmp_path / "parity.md").read_text()


def test_a_family_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch):
    given = {"RN50": "RN50: it broke (exit 1)", "ViT-B-32": figures("ViT-B-32")}
    monkeypatch.setattr(parity, "figures_of", lambda name, cache, key: given[name])
    run = invoke(tmp_path, "--family", "RN50", "--family", "ViT-B-32")
    assert run.return_value == 1
    assert "1 families, 1 bounds broken" in run.output
    page = (tmp_path / "parity.md").read_text()
    assert "Broken bounds: RN50: it broke (exit 1)." in page
    assert "| ViT-B-32 | image" in page


def test_a_process_that_fails_gives_its_last_line(tmp_path):
    (tmp_path / "cache").mkdir()
    said = parity.figures_of("RN51", tmp_path / "cache", "key")
    assert said.startswith("RN51: invariclip: RN51: not a family; available: ViT-B-32, ")
    assert said.endswith(" (exit 1)")
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_unknown_family_is_a_usage_error(tmp_path):
    run = CliRunner().invoke(parity.parity, ["--family", "RN51", "--out", str(tmp_path / "p.md")])
    assert run.exit_code == 2
    assert "'RN51' is no family; available: ViT-B-32, " in run.output


def test_code_and_versions_are_in_the_state(tmp_path, monkeypatch):
    assert parity.state({"torch": "1"}) == parity.state({"torch": "1"}) != parity.state({"torch": "2"})
    # the runtime lies where its package does, in a working tree or installed
    runtime, before = tmp_path / "somewhere", parity.state({})
    shutil.copytree(Path(invariclip.__file__).parent, runtime)
    monkeypatch.setattr(invariclip, "__file__", str(runtime / "__init__.py"))
    assert parity.state({}) == before
    with (runtime / "pixels.py").open("a") as file:
        file.write("# changed")
    assert parity.state({}) != before
