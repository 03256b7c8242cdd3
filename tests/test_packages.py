"""One release is named everywhere, and what a server installs is pinned by digest to what was tested."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from invariclip.version import __version__

ROOT = Path(__file__).parents[1]


def test_one_release_is_named_everywhere():
    named = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    header = (ROOT / "runtime" / "cpp" / "include" / "invariclip" / "invariclip.h").read_text(encoding="utf-8")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert named == __version__
    assert ".".join(re.findall(r"^#define INVARICLIP_VERSION_\w+ (\d+)$", header, re.MULTILINE)) == named
    assert re.search(r"^## (\S+)", changes, re.MULTILINE)[1] in (named, "Unreleased")
    assert f"## {named} (" in changes


def test_what_a_server_installs_is_pinned_by_digest():
    """Every package that the lean runtime, `serve` and `sign` need, at the version that is tested, with digests."""
    constraints = dict(
        line.lower().split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    blocks = re.split(r"\n(?=\S)", (ROOT / "requirements.txt").read_text(encoding="utf-8"))
    pinned = {}
    for block in blocks:
        if block.startswith("#"):
            continue
        name, version = re.match(r"([\w.-]+)==([\w.]+)", block).groups()
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), name
        pinned[canonicalize_name(name)] = version
    tested = {canonicalize_name(name): version for name, version in constraints.items()}
    assert {name: tested.get(name, version) for name, version in pinned.items()} == pinned
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["serve"], *extras["sign"]]
    assert {canonicalize_name(Requirement(one).name) for one in needed} <= set(pinned)
