"""The documentation as a site: every page and link of it, all of the public API, and every command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import invariclip
from invariclip.cli.main import COMMANDS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built strictly: a dead link or a page that the navigation lacks is an error."""
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", folder], cwd=ROOT, capture_output=True,
        text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_the_start_page_is_the_readme(site):
    page = (site / "index.html").read_text(encoding="utf-8")
    assert "make demo" in page
    assert 'src="stylebench.svg"' in page


def test_all_of_the_public_api_is_there(site):
    page = (site / "reference" / "api" / "index.html").read_text(encoding="utf-8")
    for name in set(invariclip.__all__) - {"__version__", "errors"}:
        assert f'.{name}"' in page, name


def test_every_command_is_there(site):
    page = (site / "reference" / "cli" / "index.html").read_text(encoding="utf-8")
    for command in COMMANDS:
        assert f'id="invariclip-{command}"' in page, command
