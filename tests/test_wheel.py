"""The sdist and the wheel as users get them: what is in them, and what runs in an empty environment."""

import http.client
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_BYTES = 1_200_000
"""51 kB of it is what the C++ runtime knows of characters."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel that was built from an sdist, which was built from what git has."""
    folder = tmp_path_factory.mktemp("wheel")
    known = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    for name in filter(None, os.fsdecode(known).split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("docs/", "tests/")):
            target = folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
    built = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", folder / "dist", folder / "source"], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    [path] = (folder / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """An environment with pip alone; gives its folder of programs."""
    folder = tmp_path_factory.mktemp("environment") / "env"
    venv.create(folder, with_pip=True)
    return folder / "bin"


def _run(*arguments, **how):
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        list(map(str, arguments)), capture_output=True, text=True, check=False, env=clean, timeout=300, **how
    )


def _install(programs, what):
    done = _run(programs / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", what)
    assert done.returncode == 0, done.stderr


def test_the_wheel_is_small_and_holds_what_is_served(wheel):
    assert wheel.stat().st_size < MOST_BYTES
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
        metadata = packed.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    inside = ("py.typed", "preprocessing/templates.txt", "serve/page.html", "cpp/CMakeLists.txt",
              "calibrate/report/calibration_page.html", "bench/demo/demo.html")  # fmt: skip
    wanted = [f"invariclip/{name}" for name in inside]
    assert set(wanted) <= set(names)
    assert "\nLicense-Expression: Apache-2.0\n" in metadata  # neither images nor weights of others are inside
    assert re.findall(r"^License-File: (.*)$", metadata, re.MULTILINE) == ["LICENSE"]
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    [sdist] = wheel.parent.glob("*.tar.gz")
    with tarfile.open(sdist) as packed:
        carried = {name.partition("/")[2] for name in packed.getnames()}
    assert {"LICENSE", "export/reference/LICENSES.md", "export/reference/GPL-2.txt"} <= carried
    strange = [name for name in names if re.search(r"studies|tests/|\.(webp|png|jpg|safetensors|onnx|jsonl)$", name)]
    assert not strange


def test_the_core_answers_in_an_empty_environment(wheel, empty, tiny_artifact, tiny_images, tmp_path):
    _install(empty, wheel)
    images = sorted(tiny_images.iterdir())[:2]
    done = _run(empty / "invariclip", "predict", tiny_artifact, *images, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {one["label"] for one in json.loads(done.stdout)["predictions"]} <= {"cat", "dog", "tree"}
    done = _run(empty / "invariclip", "licenses", "--json", "--sbom", "bom.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(part["fetched"] for part in json.loads(done.stdout)["parts"])
    bill = json.loads((tmp_path / "bom.json").read_text())
    assert {"numpy", "onnxruntime"} <= {component["name"] for component in bill["components"]}
    assert "torch" not in {component["name"] for component in bill["components"]}
    there = _run(empty / "python", "-c", "import sys, invariclip.model; print('torch' in sys.modules)", cwd=tmp_path)
    assert there.stdout.strip() == "False"
    for command, extra in (("export", "export"), ("calibrate", "calibrate"), ("serve", "serve"), ("demo", "bench")):
        done = _run(empty / "invariclip", command, "--help", cwd=tmp_path)
        assert done.returncode == 2
        assert f'pip install "invariclip[{extra}]"' in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_the_lean_runtime_installs_by_digest(wheel, tiny_artifact, tiny_images, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    programs = tmp_path / "env" / "bin"
    for what in (["--require-hashes", "-r", ROOT / "requirements.txt"], ["--no-deps", wheel]):
        done = _run(programs / "python", "-m", "pip", "install", "--quiet", *what)
        assert done.returncode == 0, done.stderr
    assert _run(programs / "python", "-m", "pip", "check").returncode == 0
    shutil.copytree(tiny_artifact, tmp_path / "mine.icm")
    for command in (
        ["sign", "mine.icm", "--new-key", "own.pem"],
        ["predict", "mine.icm", min(tiny_images.iterdir()), "--require-signature", "own.pub.pem"],
        ["serve", "--help"],
    ):
        done = _run(programs / "invariclip", *command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr


def test_what_the_readme_does_with_an_artifact_runs_from_the_wheel(wheel, empty, tiny_artifact, tiny_images, tmp_path):
    _install(empty, wheel)
    shutil.copytree(tiny_artifact, tmp_path / "mine.icm")
    shutil.copytree(tiny_images, tmp_path / "images")
    shutil.copy(min(tiny_images.iterdir()), tmp_path / "cat.png")
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^invariclip (?:predict|adapt) .*$", page, re.MULTILINE)
    assert len(lines) >= 3
    for line in lines:
        done = _run(empty / "invariclip", *shlex.split(line)[1:], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    [block] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    done = _run(empty / "python", "-c", block, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_server_runs_from_the_wheel(wheel, empty, tiny_artifact, tiny_images, tmp_path):
    _install(empty, f"{wheel}[serve]")
    command = [str(empty / "invariclip"), "serve", str(tiny_artifact), "--port", "0"]
    server = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        lines = (re.search(r" at http://[\d.]+:(\d+)$", line.strip()) for line in server.stderr)
        port = next(found[1] for found in lines if found)
        link = http.client.HTTPConnection("127.0.0.1", int(port), timeout=30)
        link.request("POST", "/v1/classify", min(tiny_images.iterdir()).read_bytes(), {"content-type": "image/png"})
        assert json.load(link.getresponse())["predictions"][0]["label"] in ("cat", "dog", "tree")
        link.close()
    finally:
        server.terminate()
        assert server.wait(30) == 0


@pytest.mark.skipif("INVARICLIP_TEST_EXPORT_WHEEL" not in os.environ,
                    reason="installs PyTorch, minutes: set INVARICLIP_TEST_EXPORT_WHEEL=1")  # fmt: skip
def test_exporting_runs_from_the_wheel(wheel, empty, tiny_checkpoint, tiny_images, tmp_path):
    _install(empty, f"{wheel}[export]")
    done = _run(empty / "invariclip", "export", "--model", tiny_checkpoint, "--images", tiny_images, "--classes",
                "cat,dog", "-o", "a.icm", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = _run(empty / "invariclip", "predict", "a.icm", *sorted(tiny_images.iterdir())[:1], cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif("INVARICLIP_TEST_EXPORT_WHEEL" not in os.environ,
                    reason="installs PyTorch, minutes: set INVARICLIP_TEST_EXPORT_WHEEL=1")  # fmt: skip
def test_readme_and_guide_run_from_the_wheel(wheel, empty):
    _install(empty, f"{wheel}[calibrate,openvino,serve,sign]")
    how = {**os.environ, "INVARICLIP_README_PYTHON": str(empty / "python")}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/test_readme.py"], cwd=ROOT, env=how,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout
