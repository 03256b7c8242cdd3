"""The machine as far as it decides which variant is fastest: processor, instructions, threads, engines, free memory.

Read from what the system says in text, without asking an engine: `load` needs it before it knows which one to import.
"""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from invariclip.threads import available_threads

INSTRUCTIONS = frozenset(
    {
        "avx", "avx2", "fma", "f16c", "avx_vnni", "avx_vnni_int8", "avx_ne_convert", "avx512f", "avx512bw", "avx512dq",
        "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "amx_fp16",
        "asimd", "asimdhp", "asimddp", "asimdfhm", "i8mm", "bf16", "sve", "sve2", "svei8mm", "svebf16", "sme",
    }
)  # fmt: skip
"""Those that engines have kernels for; the others change nothing here."""
# Every processor has a block of its own in /proc/cpuinfo; the first says it all, and servers have hundreds.
_FIRST_BLOCK = 16 << 10
_CPUINFO, _MEMINFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")
_CGROUP_MAX, _CGROUP_NOW = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")


@dataclass(frozen=True)
class Machine:
    """What a measured choice is good for.

    Attributes:
        processor: Its name, and what tells two of the same name apart.
        architecture: `x86_64`, `aarch64` and so on.
        instructions: Those of `INSTRUCTIONS` that it has, sorted.
        threads: How many this process may use: affinity and cgroup, not the host's count.
    """

    processor: str
    architecture: str
    instructions: tuple[str, ...]
    threads: int


def this_machine() -> Machine:
    """The machine that this process runs on."""
    try:
        with _CPUINFO.open("rb") as stream:
            text = stream.read(_FIRST_BLOCK).decode("ascii", "replace")
    except OSError:  # no Linux
        text = ""
    processor, instructions = parse_cpuinfo(text)
    return Machine(
        processor or platform.processor() or "unknown", platform.machine(), instructions, available_threads()
    )


def parse_cpuinfo(text: str) -> tuple[str, tuple[str, ...]]:
    """The processor's name and its instructions, from the first block of /proc/cpuinfo; empty where it says none.

    Args:
        text: The file, or its beginning.
    """
    facts: dict[str, str] = {}
    for line in text.splitlines():
        if not line.strip() and facts:
            break
        name, _, value = line.partition(":")
        facts.setdefault(name.strip().lower(), " ".join(value.split()))
    # Clouds hide the model behind "Intel(R) Xeon(R) Processor"; ARM has no name at all
    numbers = [
        f"{word} {facts[name]}"
        for name, word in (
            ("cpu family", "family"), ("model", "model"), ("stepping", "stepping"), ("cpu implementer", "implementer"),
            ("cpu part", "part"), ("cpu variant", "variant"),
        )
        if facts.get(name)
    ]  # fmt: skip
    name = facts.get("model name", "")
    processor = f"{name} ({', '.join(numbers)})" if name and numbers else name or ", ".join(numbers)
    flags = set((facts.get("flags") or facts.get("features") or "").split())
    return processor, tuple(sorted(flags & INSTRUCTIONS))


def available_memory() -> int | None:
    """Bytes that processes may still take: what the system has, or less where a cgroup allows less; None if unknown."""
    known = []
    with suppress(OSError, KeyError, ValueError, IndexError):  # no Linux
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines() if ":" in line)
        known.append(int(lines["MemAvailable"].split()[0]) << 10)
    with suppress(OSError, ValueError):  # no cgroup, or "max"
        known.append(max(0, int(_CGROUP_MAX.read_text()) - int(_CGROUP_NOW.read_text())))
    return min(known) if known else None


def load_before() -> float | None:
    """Processes per processor that ran or waited in the last minute, of the whole machine; None if unknown."""
    if not hasattr(os, "getloadavg"):  # Windows
        return None
    return os.getloadavg()[0] / (os.cpu_count() or 1)
