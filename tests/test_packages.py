"""What `pyproject.toml` names is what there is: an editable install would not notice a package that is forgotten.

Studies are not installed: they are how the committed tables were made.
"""

import re
import tomllib
from pathlib import Path

from invariclip.version import __version__

ROOT = Path(__file__).parents[1]


def test_every_package_is_named():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    rooms = {folder: name for name, folder in tool["package-dir"].items()}
    found = set()
    for room, name in rooms.items():
        for init in (ROOT / room).rglob("__init__.py"):
            found.add(".".join([name, *init.parent.relative_to(ROOT / room).parts]))
    found = {name for name in found if not name.startswith("invariclip.bench.studies")}
    assert set(tool["packages"]) == found


def test_one_release_is_named_everywhere():
    named = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    cmake = (ROOT / "runtime" / "cpp" / "CMakeLists.txt").read_text(encoding="utf-8")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert named == __version__
    assert f"project(invariclip VERSION {named} " in cmake
    assert re.search(r"^## (\S+)", changes, re.MULTILINE)[1] in (named, "Unreleased")
    assert f"## {named} (" in changes
