"""How many threads this process may use: never the host's count, always what it was given.

A CPU limit may stand in the process's own control group and in each group above it, so all of them are read and the
smallest holds. Both generations of control groups are read: machines are met that mount both.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

_PROCESS = Path("/proc/self")


def available_threads() -> int:
    """The smaller of the affinity mask and the control groups' quota (a part of a core counts as one), at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_cores()
    return max(1, allowed if quota is None else min(allowed, math.ceil(quota)))


def chosen_threads(threads: int | None) -> int:
    """The number that was asked for; None takes `available_threads`.

    Raises:
        InputError: It is below 1.
    """
    if threads is not None and threads < 1:
        raise InputError(f"threads must be at least 1, not {threads}")
    return available_threads() if threads is None else threads


def calls_at_once(threads: int) -> int:
    """How many answers of one loaded graph may be under way; further calls wait.

    Every answer under way holds the activations of its batch, so a crowd of callers must not mean a crowd of those.
    Two for each thread keep the threads busy while some callers copy, decode or wait for Python.
    """
    return 2 * threads


def cgroup_cores() -> float | None:
    """Cores that the strictest control group around this process allows; None without a limit, or off Linux."""
    limits = [cores for folder in _groups() if (cores := _limit(folder)) is not None]
    return min(limits, default=None)


def _groups() -> Iterator[Path]:
    """Folders of the control groups that this process is in, from its own up to what is mounted of their tree."""
    try:
        memberships = (_PROCESS / "cgroup").read_text().splitlines()
        mounts = (_PROCESS / "mountinfo").read_text().splitlines()
    except OSError:
        return
    # Lines "0::/path" for the second generation, "4:cpu,cpuacct:/path" for each hierarchy of the first
    paths = {controllers: path for _, controllers, path in (line.split(":", 2) for line in memberships if ":" in line)}
    for line in mounts:
        before, _, after = line.partition(" - ")
        place, kind = before.split(), after.split()
        if len(place) < 5 or len(kind) < 3:
            continue
        for controllers, path in paths.items():
            unified = kind[0] == "cgroup2" and not controllers
            if unified or (kind[0] == "cgroup" and "cpu" in controllers.split(",") and "cpu" in kind[2].split(",")):
                mount, inside = Path(_plain(place[4])), _inside(path, _plain(place[3]))
                yield from (mount / part for part in (inside, *inside.parents))


def _inside(path: str, root: str) -> Path:
    """Where a group lies below a mount of the tree's part `root`; the mount itself where it cannot be seen there."""
    whole, top = Path(path.lstrip("/")), Path(root.lstrip("/"))
    if ".." in whole.parts or not whole.is_relative_to(top):
        return Path()
    return whole.relative_to(top)


def _plain(escaped: str) -> str:
    """A path as mountinfo writes it, with spaces and the like as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), escaped)


def _limit(folder: Path) -> float | None:
    """Cores that one group allows, or None."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((folder / name).read_text() for name in names).split()[:2]
            if float(quota) > 0 and float(period) > 0:
                return float(quota) / float(period)
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return None
