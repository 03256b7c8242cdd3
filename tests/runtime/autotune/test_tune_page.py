"""Every command and every Python block of docs/tune.md runs as written."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from invariclip.autotune.candidates import default_threads
from invariclip.autotune.checks import IMAGES, SLACK, TEXTS
from invariclip.autotune.tuner import DEFAULT_SECONDS, MAX_BATCH
from invariclip.autotune.verdict import MARGIN

PAGE = (Path(__file__).parents[3] / "docs" / "tune.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines() if line]
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def desk(tmp_path_factory, tiny_artifact, tiny_images):
    """A folder with the files that the page names."""
    folder = tmp_path_factory.mktemp("desk")
    shutil.copytree(tiny_artifact, folder / "mine.icm")
    shutil.copy(tiny_images / "00.png", folder / "cat.png")
    return folder


def run(desk, *arguments):
    return subprocess.run([sys.executable, *arguments], cwd=desk, capture_output=True, text=True, check=False)


def test_the_page_runs_as_written(desk):
    assert len(COMMANDS) == 5
    for command in COMMANDS:
        # A tiny tower needs no minute
        hurry = [] if "--seconds" in command or " tune " not in command else ["--seconds", "1", "--threads", "1"]
        done = run(desk, "-m", *shlex.split(command), *hurry)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert "warning" not in done.stderr
    done = run(desk, "-W", "error", "-c", "\n".join(BLOCKS))
    assert (done.returncode, done.stdout) == (0, "profile here.json\n"), done.stderr


def test_the_pages_numbers_are_those_of_the_code():
    assert (IMAGES, len(TEXTS), SLACK) == (8, 4, 2.0)
    assert "eight images" in PAGE
    assert "four texts" in PAGE
    assert f"up to {MAX_BATCH}" in PAGE
    assert f"search: {DEFAULT_SECONDS:g};" in PAGE
    assert f"{MARGIN - 1:.0%}".replace("%", " %") in PAGE
    assert default_threads(8) == (2, 4, 8)
