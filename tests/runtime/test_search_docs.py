"""What docs/search.md shows runs as written, on tiny files of the names that it uses."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from invariclip import load, read_embeddings
from invariclip.artifact.embeddings_table import TableFacts
from invariclip.artifact.quantized import LEVELS, NEIGHBOURS, RECALL_FROM, RECALL_QUERIES, WIDER
from invariclip.embedding import GROUP_ROWS, PART_IMAGES

PAGE = (Path(__file__).parents[2] / "docs" / "search.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("invariclip ")
]
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def desk(tmp_path_factory, tiny_images, tiny_artifact):
    """Where the page's commands were run."""
    pytest.importorskip("pyarrow")
    folder = tmp_path_factory.mktemp("desk")
    shutil.copytree(tiny_images, folder / "images")
    shutil.copytree(tiny_artifact, folder / "mine.icm")
    for line in COMMANDS:
        words = shlex.split(line)
        done = subprocess.run([sys.executable, "-m", *words], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    return folder


def test_faiss_finds_what_numpy_finds(desk):
    pytest.importorskip("faiss")
    done = subprocess.run([sys.executable, "-c", BLOCKS[0]], cwd=desk, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    model = load(desk / "mine.icm")
    paths = sorted((desk / "images").iterdir())
    cosines = model.embed_texts(["a cat", "a dog"]) @ model.embed_images(paths).T
    for line, row in zip(done.stdout.splitlines(), cosines, strict=True):
        found = re.findall(r"'images/(\d+\.png)', (-?[\d.]+)", line)
        best = [-cosine for cosine in sorted(-row)[:3]]
        assert [float(cosine) for _, cosine in found] == pytest.approx(best, abs=1e-3)
        for name, cosine in found:
            assert row[paths.index(desk / "images" / name)] == pytest.approx(float(cosine), abs=1e-3)


def test_codes_are_scored_again_and_go_into_faiss(desk):
    pytest.importorskip("faiss")
    done = subprocess.run([sys.executable, "-c", BLOCKS[1]], cwd=desk, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *found, distances = done.stdout.splitlines()
    exact, queries = read_embeddings(desk / "images.parquet"), read_embeddings(desk / "texts.parquet")
    differ = ((queries.vectors > 0)[:, None] != (exact.vectors > 0)[None]).sum(axis=2)
    assert json.loads(distances) == np.sort(differ, axis=1)[:, :6].tolist()
    for line, bits, row in zip(found, differ, queries.vectors @ exact.vectors.T, strict=True):
        near = np.argsort(bits, kind="stable")[:6]
        best = near[np.argsort(-row[near], kind="stable")][:3]
        assert re.findall(r"'([^']+)'", line) == [exact.items[place] for place in best]


@pytest.mark.skipif(find_spec("lance") is None, reason="pylance is not installed: 85 MB, and nothing of ours needs it")
def test_lance_takes_the_file_and_its_facts(desk):
    done = subprocess.run([sys.executable, "-c", BLOCKS[2]], cwd=desk, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    embeddings = read_embeddings(desk / "images.parquet")
    nearest = np.argsort(-embeddings.vectors @ embeddings.vectors[0], kind="stable")[:3]
    assert done.stdout.strip() == f"True {[embeddings.items[place] for place in nearest]}"


def test_the_numbers_and_names_are_the_code_s():
    assert f"parts of {PART_IMAGES} images" in PAGE
    assert f"{GROUP_ROWS:,} rows" in PAGE
    assert f"on its own vectors (from {RECALL_FROM} on): {RECALL_QUERIES} of them" in PAGE
    assert f"{NEIGHBOURS} exact neighbours" in PAGE
    assert f"the {WIDER} nearest" in PAGE
    assert f"max |v| / {LEVELS}" in PAGE
    for name in TableFacts.__dataclass_fields__:
        assert f"`{name}`" in PAGE, name
