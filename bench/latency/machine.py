"""The machine that was measured on: what it is, and who else was using it meanwhile."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invariclip.machine import available_memory, this_machine
from invariclip.threads import cgroup_cores

if TYPE_CHECKING:
    from collections.abc import Sequence

BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16", "svebf16")
"""Instructions for bfloat16; without one it is slower than float32."""
PACKAGES = ("invariclip", "torch", "onnxruntime", "openvino", "nncf", "open_clip_torch", "onnx", "numpy", "pillow")
MOST_STEAL = 0.02
"""Share of processor time given to other machines of the host, above which timings mean little."""
MOST_OTHERS = 0.05
"""Share of processor time taken by other programs of this machine, above which timings mean little."""

_STAT = Path("/proc/stat")


@dataclass(frozen=True)
class Ticks:
    """Processor time of the whole machine since it started, in ticks; all 0 where the system does not tell.

    Attributes:
        busy: Spent on programs and the system.
        steal: Wanted, but given to other machines of the same host.
        total: Everything, idle time included.
    """

    busy: int = 0
    steal: int = 0
    total: int = 0

    @classmethod
    def now(cls, stat: Path = _STAT) -> Ticks:
        """Reads the first line of /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal."""
        try:
            fields = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return cls()
        if len(fields) < 8:
            return cls()
        return cls(sum(fields[:3]) + fields[5] + fields[6], fields[7], sum(fields))

    def since(self, before: Ticks, own_cpu_s: float = 0.0) -> dict[str, float | None]:
        """What happened between two readings.

        Args:
            before: The earlier reading.
            own_cpu_s: Processor seconds that the measurement itself took.

        Returns:
            `steal` and `others`, shares of all processor time from 0 to 1; None where the system does not tell.
        """
        total = self.total - before.total
        if total <= 0:
            return {"steal": None, "others": None}
        busy = self.busy - before.busy - own_cpu_s * os.sysconf("SC_CLK_TCK")
        return {"steal": (self.steal - before.steal) / total, "others": max(0.0, busy / total)}


def facts() -> dict[str, Any]:
    """What the machine is: processor, instructions, threads, memory, system, versions."""
    machine = this_machine()
    return {
        "processor": machine.processor,
        "architecture": machine.architecture,
        "instructions": list(machine.instructions),
        "threads_available": machine.threads,
        "cgroup_cores": cgroup_cores(),
        "processors_online": os.cpu_count(),
        "memory_available_bytes": available_memory(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions(),
    }


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """The packages that are installed, and their versions."""
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def has_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16."""
    return not set(BFLOAT16_FLAGS).isdisjoint(this_machine().instructions)


def compiler() -> str | None:
    """The C++ compiler that torch.compile would take, or None."""
    named = os.environ.get("CXX")
    return next((name for name in (named, "g++", "clang++", "cl") if name and shutil.which(name)), None)


def peak_bytes() -> int:
    """This process's high-water mark of resident memory, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # `ru_maxrss` may be the parent's, whose memory this process was born with
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
