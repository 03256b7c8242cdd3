"""Every command and every Python block of README and guide runs as written, on tiny files of the names it uses."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# another environment that invariclip is installed in, see test_wheel
PYTHON = os.environ.get("INVARICLIP_README_PYTHON", sys.executable)
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/guide.md")}
ARTIFACT = (ROOT / "docs" / "artifact.md").read_text(encoding="utf-8")


def commands(page):
    return [
        line
        for block in re.findall(r"```sh\n(.*?)```", PAGES[page], re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith(("invariclip ", "curl ")) and not line.startswith("invariclip demo")
    ]


def blocks(page):
    return re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL)


@pytest.fixture(scope="module")
def desk(tmp_path_factory, tiny_checkpoint, tiny_images, tiny_artifact):
    """A folder with the files that the README's examples name."""
    folder = tmp_path_factory.mktemp("desk")
    shutil.copytree(tiny_checkpoint, folder / "checkpoint")
    shutil.copytree(tiny_images, folder / "images")
    shutil.copytree(tiny_artifact, folder / "mine.icm")
    shutil.copy(tiny_images / "00.png", folder / "cat.png")
    sources = [{"kind": "images", "path": "pairs", "interventions": "all"}]
    (folder / "sources.json").write_text(json.dumps({"sources": sources}))
    # The same things in two environments: pairs/<environment>/<class>/<file>
    for index, path in enumerate(sorted(tiny_images.iterdir())):
        for environment in ("day", "night"):
            target = folder / "pairs" / environment / ("cat" if index % 2 else "dog") / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path if environment == "day" else tiny_images / f"{(index + 1) % 12:02d}.png", target)
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_the_page_has_examples(page):
    assert len(commands(page)) >= 5
    assert blocks(page)


@pytest.mark.parametrize(
    "page", sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md")) + list(PAGES)
)
def test_links_lead_somewhere(page):
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (folder / target).exists(), target


def run(desk, *arguments):
    return subprocess.run([PYTHON, *arguments], cwd=desk, capture_output=True, text=True, check=False)


def served(desk, command):
    """The server of a command, on a free port in place of the one that it names."""
    words = ["-m", *shlex.split(command, comments=True), "--port", "0"]
    process = subprocess.Popen([PYTHON, *words], cwd=desk, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if found := re.search(r" at http://[\d.]+:(\d+)$", line.strip()):
            return process, found[1]
    return pytest.fail(f"{command}\nended with {process.wait()}")


def asked(desk, command, port):
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    words = shlex.split(command.replace("localhost:8000", f"127.0.0.1:{port}"))
    done = subprocess.run([*words, "--silent", "--fail-with-body"], cwd=desk, capture_output=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_order_and_then_python(desk, page):
    serving, port = None, ""
    for command in commands(page):
        if command.startswith("invariclip serve"):
            serving, port = served(desk, command)
            continue
        if serving and not command.startswith("curl "):
            serving.send_signal(signal.SIGTERM)
            assert serving.wait(30) == 0
            serving = None
        if command.startswith("curl "):
            asked(desk, command, port)
            continue
        done = run(desk, "-m", *shlex.split(command, comments=True))
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    if serving:
        serving.send_signal(signal.SIGTERM)
        assert serving.wait(30) == 0
    done = run(desk, "-c", "\n".join(blocks(page)))
    assert done.returncode == 0, done.stderr


def test_the_page_of_the_format_names_every_field_and_its_example_runs(desk):
    from dataclasses import fields

    from invariclip.artifact.manifest import SCHEMA_VERSION, FileFacts, Manifest, ModelFacts, ProjectionFacts, Variant
    from invariclip.preprocessing.pixels import PixelSpec
    from invariclip.preprocessing.tokenizer import TextSpec

    for record in (Manifest, ModelFacts, PixelSpec, TextSpec, ProjectionFacts, FileFacts, Variant):
        assert [f.name for f in fields(record) if f"`{f.name}`" not in ARTIFACT] == []
    assert f"`schema_version` is {SCHEMA_VERSION};" in ARTIFACT
    [example] = re.findall(r"```python\n(.*?)```", ARTIFACT, re.DOTALL)
    done = run(desk, "-c", example)
    assert done.returncode == 0, done.stderr


FIGURES = {
    "zero-shot, 825 names": ("stylebench.md", ("Zero-shot: {0} % → {1} %, **+{2} [+{3}, +{4}] points**",)),
    "class prototypes on PACS": ("domains.md", ("{0} → {1}, **+{2} [+{3}, +{4}] points**",)),
    "the same, also adapted": (
        "sites.md",
        ("{0} % without a projection", "{1} adapted to 20 images: +{2} [+{3}, +{4}]"),
    ),
    "a trained ViT-S/14": (
        "bench/reference-vit.md",
        ("PyTorch eager float32 | {1} |", "invariclip int8-bfloat16, openvino | {2} | {3} [{4}, {5}]"),
    ),
    "16 HTTP clients": ("serve.md", ("| 16 | PyTorch, batched | {0} |", "| 16 | batched | {1} |")),
}
"""A row of the README's table: the page that was written by what measured it, and how its numbers stand there."""


@pytest.mark.parametrize("row", FIGURES)
def test_the_readmes_figures_are_those_of_the_pages(row):
    line = next(line for line in PAGES["README.md"].splitlines() if line.startswith(f"| {row}"))
    numbers = re.findall(r"(?<![\w/-])\d+(?:\.\d+)?(?= ?[%×*,\]/]| ms)", line.split(" | ", 1)[1])
    if row == "a trained ViT-S/14":
        numbers = re.findall(r"\d+\.\d+", line)
    page, wanted = FIGURES[row]
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for form in wanted:
        assert form.format(*numbers) in text, (numbers, form)
