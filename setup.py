"""The packages to install: every one in the rooms, except the studies. All else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup

ROOMS = {
    "invariclip": "runtime",
    "invariclip.export": "export",
    "invariclip.calibrate": "calibrate",
    "invariclip.bench": "bench",
}
"""Package: folder. `runtime/` *is* the package invariclip; the other rooms install as its subpackages."""


def packages() -> list[str]:
    """The packages of all rooms; studies are how committed tables were made, and are not installed."""
    found = [
        ".".join([package, *init.parent.relative_to(folder).parts])
        for package, folder in ROOMS.items()
        for init in Path(folder).rglob("__init__.py")
    ]
    return sorted(name for name in found if not name.startswith("invariclip.bench.studies"))


setup(packages=packages(), package_dir=ROOMS)
