"""One release is named everywhere."""

import re
import tomllib
from pathlib import Path

from invariclip.version import __version__

ROOT = Path(__file__).parents[1]


def test_one_release_is_named_everywhere():
    named = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    cmake = (ROOT / "runtime" / "cpp" / "CMakeLists.txt").read_text(encoding="utf-8")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert named == __version__
    assert f"project(invariclip VERSION {named} " in cmake
    assert re.search(r"^## (\S+)", changes, re.MULTILINE)[1] in (named, "Unreleased")
    assert f"## {named} (" in changes
