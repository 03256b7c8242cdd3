"""What `pyproject.toml` names is what there is: an editable install would not notice a package that is forgotten.

Studies are not installed: they are how the committed tables were made.
"""

import tomllib
from pathlib import Path

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
