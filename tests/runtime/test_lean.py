"""The runtime stays lean: no torch, no other room, and quick to import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "torchvision", "open_clip", "timm", "onnx", "onnxscript", "scipy", "matplotlib"}
BLOCK = f"import sys; sys.modules.update(dict.fromkeys({sorted(HEAVY)!r}, None));"


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "module", ["invariclip", "invariclip.model", "invariclip.cli.predict_command", "invariclip.cli.main"]
)
def test_runtime_imports_where_heavy_libraries_cannot(module):
    rooms = ("invariclip.export", "invariclip.calibrate", "invariclip.bench")
    code = f"{BLOCK} import {module}; print([m for m in sys.modules if m.startswith({rooms!r})])"
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_importing_the_package_alone_does_not_load_the_engine():
    done = run("import sys, invariclip; print([m for m in ('onnxruntime', 'numpy', 'PIL') if m in sys.modules])")
    assert done.stdout.strip() == "[]"


def test_a_command_without_its_extra_says_what_to_install():
    done = run(f"{BLOCK} from invariclip.cli.main import main; main(['export', '--help'])")
    assert done.returncode == 2
    assert 'pip install "invariclip[export]"' in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_server_without_its_extra_says_what_to_install():
    web = ("starlette", "uvicorn", "prometheus_client", "python_multipart")
    block = f"import sys; sys.modules.update(dict.fromkeys({web!r}, None));"
    done = run(f"{block} from invariclip.cli.main import main; main(['serve', '--help'])")
    assert done.returncode == 2
    assert 'pip install "invariclip[serve]"' in done.stderr
    assert done.stderr.count("\n") == 1
    done = run(f"{block} {BLOCK} import invariclip.serve.service, invariclip.serve.requests")
    assert done.returncode == 0, done.stderr


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", sorted((ROOT / "runtime").rglob("*.py")), ids=lambda p: p.name)
def test_no_runtime_module_names_a_heavy_library_or_another_room(path):
    for name in imported(path):
        assert name.partition(".")[0] not in HEAVY
        assert not name.startswith(("invariclip.export", "invariclip.calibrate", "invariclip.bench"))


@pytest.mark.parametrize("path", sorted((ROOT / "export").rglob("*.py")), ids=lambda p: p.name)
def test_export_knows_neither_calibrate_nor_bench(path):
    for name in imported(path):
        assert not name.startswith(("invariclip.calibrate", "invariclip.bench"))


@pytest.mark.parametrize("path", sorted((ROOT / "calibrate").rglob("*.py")), ids=lambda p: p.name)
def test_calibrate_does_not_know_bench(path):
    for name in imported(path):
        assert not name.startswith("invariclip.bench")
