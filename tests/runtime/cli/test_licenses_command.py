"""Licences and the bill of materials: what is installed, all of it, and the same every time."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path

import pytest
from click.testing import CliRunner

from invariclip.cli import licenses_command as module
from invariclip.cli.licenses_command import bill_of_materials, installed, licenses
from invariclip.errors import InputError
from invariclip.export.reference import credits as reference

PURL = re.compile(r"pkg:pypi/[a-z0-9-]+@[A-Za-z0-9.%!-]+")
ROOT = Path(__file__).parents[3]


def run(*arguments):
    done = CliRunner().invoke(licenses, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def test_project_parts_and_dependencies_are_listed():
    told = json.loads(run("--json"))
    assert told["project"]["name"] == "invariclip"
    assert told["project"]["licence"] == "Apache-2.0"
    packages = {one["name"]: one for one in told["dependencies"]}
    assert {"numpy", "onnxruntime", "pillow", "tokenizers"} <= set(packages)
    assert not packages["numpy"]["optional"]
    assert packages["torch"]["optional"]
    assert "numpy" in packages["onnxruntime"]["requires"]
    assert packages["pillow"]["licence"] == "MIT-CMU"
    licences = {part["what"]: part["licence"] for part in told["parts"]}
    assert licences["images of openmoji/, openmoji-black/"] == "CC BY-SA 4.0"
    assert licences["images of photograph/"].startswith("GPL-2.0-only")
    fetched = [part for part in told["parts"] if part["fetched"]]
    assert len(fetched) == 3
    assert all(part["authors"] and part["source"].startswith("pip: ") for part in fetched)
    text = run()
    assert "invariclip 0." in text
    for part in told["parts"]:
        assert part["authors"] in text


def test_a_wheel_names_what_it_fetches_and_nothing_that_it_lacks(monkeypatch, tmp_path):
    monkeypatch.setattr(reference, "LICENSES", tmp_path / "none")
    monkeypatch.setattr(reference, "LEARNT_FILE", "none")
    assert {credit.fetched for credit in reference.credits_of_parts()} == {True}


def test_every_bundled_folder_is_credited():
    credited = " ".join(part.what for part in reference.credits_of_parts())
    for folder in (ROOT / "export" / "reference" / "images").iterdir():
        assert f"{folder.name}/" in credited


def test_the_bill_of_materials_is_what_cyclonedx_requires(tmp_path, monkeypatch):
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    run("--sbom", tmp_path / "a.json")
    run("--sbom", tmp_path / "b.json", "--json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    bill = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert (bill["bomFormat"], bill["specVersion"], bill["version"]) == ("CycloneDX", "1.6", 1)
    assert re.fullmatch(r"urn:uuid:[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}", bill["serialNumber"])
    assert "timestamp" not in bill["metadata"]
    components = [bill["metadata"]["component"], *bill["components"]]
    for component in components:
        assert component["type"] in ("application", "library")
        assert component["name"]
        assert component["version"]
        assert PURL.fullmatch(component["purl"])
        assert component.get("scope", "required") in ("required", "optional")
        for licence in component.get("licenses", []):
            assert set(licence) in ({"expression"}, {"license"})
            assert "expression" not in licence or len(component["licenses"]) == 1
            assert "license" not in licence or licence["license"]["name"]
    references = [component["bom-ref"] for component in components]
    assert len(set(references)) == len(references)
    assert sorted(entry["ref"] for entry in bill["dependencies"]) == sorted(references)
    for entry in bill["dependencies"]:
        assert set(entry["dependsOn"]) <= set(references)
        assert len(set(entry["dependsOn"])) == len(entry["dependsOn"])
    reached, todo = set(), [bill["metadata"]["component"]["bom-ref"]]
    graph = {entry["ref"]: entry["dependsOn"] for entry in bill["dependencies"]}
    while todo:
        one = todo.pop()
        if one not in reached:
            reached.add(one)
            todo += graph[one]
    assert reached == set(references)


def test_a_time_is_written_only_where_it_is_given(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    bill = bill_of_materials(*installed())
    assert bill["metadata"]["timestamp"] == "1970-01-01T00:00:00Z"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    assert "timestamp" not in bill_of_materials(*installed())["metadata"]


class Stated(Distribution):
    def __init__(self, *lines):
        self._text = "\n".join(["Metadata-Version: 2.4", "Name: x", "Version: 1", *lines, ""])

    def read_text(self, filename):
        return self._text if filename == "METADATA" else None

    def locate_file(self, path):
        return path


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["License-Expression: MIT", "License: BSD"], ("MIT", True)),
        (["License: BSD"], ("BSD", False)),
        (["License: " + "a whole text " * 9, "Classifier: License :: OSI Approved :: MIT License"],
         ("MIT License", False)),
        (["License: UNKNOWN", "Classifier: License :: OSI Approved"], ("not stated", False)),
        ([], ("not stated", False)),
    ],
)  # fmt: skip
def test_what_metadata_say_of_a_licence(lines, said):
    assert module._licence(Stated(*lines)) == said


def test_sources_that_are_not_installed(monkeypatch):
    monkeypatch.setattr(module, "PROJECT", "invariclip-that-is-not-installed")
    with pytest.raises(InputError, match="is not installed here"):
        installed()


def test_a_bill_that_cannot_be_written_is_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "invariclip", "licenses", "--sbom", "/proc/x/" + "a" * 300], capture_output=True,
        check=False, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1
