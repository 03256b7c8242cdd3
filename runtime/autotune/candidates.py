"""What may be timed at all: variants that were proved on an engine at the level asked for, times thread counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from invariclip.artifact.fidelity import LEVELS, reached, reaches
from invariclip.backends import BACKENDS, DEFAULT_BACKEND, GPU_BACKENDS, is_installed
from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from invariclip.artifact.fidelity import Fidelity
    from invariclip.artifact.manifest import Manifest, Variant


@dataclass(frozen=True)
class TuneCandidate:
    """One way to answer, which a process of its own runs.

    Attributes:
        variant: A name in the manifest.
        backend: The engine.
        threads: Its threads.
        claimed: The closest level that its parity record reaches; it is checked against this one's bounds.
        plain: Its `plainness`, so that of equals the simpler is picked.
    """

    variant: str
    backend: str
    threads: int
    claimed: Fidelity
    plain: int

    @property
    def name(self) -> str:
        """How reports call it."""
        return f"{self.variant} on {self.backend}, {self.threads} thread{'s' if self.threads > 1 else ''}"

    @property
    def preference(self) -> tuple[int, int, bool, int]:
        """Smaller is better where speed says nothing: closer, then fewer threads, the default engine, float32."""
        return LEVELS.index(self.claimed), self.threads, self.backend != DEFAULT_BACKEND, -self.plain


def enumerate_candidates(
    manifest: Manifest, fidelity: Fidelity, threads: Sequence[int]
) -> tuple[list[TuneCandidate], list[dict[str, str]]]:
    """Candidates, and the pairs of variant and engine that are none, each with the reason.

    Args:
        manifest: The artifact's.
        fidelity: The level that a record must reach.
        threads: Thread counts to try.

    Returns:
        The candidates, and `candidate` and `why` of each pair that was left out.
    """
    found: list[TuneCandidate] = []
    left_out: list[dict[str, str]] = []
    for name, variant in manifest.variants.items():
        for backend, record in variant.parity.items():
            reason = _why_not(variant, backend, record, fidelity)
            claimed = reached(record)
            if reason or claimed is None:
                left_out.append({"candidate": f"{name} on {backend}", "why": reason})
                continue
            found += [TuneCandidate(name, backend, count, claimed, plainness(variant)) for count in threads]
    return found, left_out


def plainness(variant: Variant) -> int:
    """How many of a variant's weights and arithmetic are float32, 0 to 2."""
    return (variant.precision, variant.compute).count("float32")


def default_threads(available: int) -> tuple[int, ...]:
    """All threads that this process may use, half and a quarter of them: more is not always faster.

    Args:
        available: How many it may use.
    """
    return tuple(sorted({count for count in (available, available // 2, available // 4) if count >= 1}))


def require_threads(threads: Sequence[int], available: int) -> tuple[int, ...]:
    """Thread counts to try, sorted and each once; none given takes `default_threads`.

    Raises:
        InputError: One is below 1 or above what this process may use.
    """
    bad = [count for count in threads if not 1 <= count <= available]
    if bad:
        raise InputError(f"threads must be from 1 to the {available} that this process may use, not {bad[0]}")
    return tuple(sorted(set(threads))) or default_threads(available)


def require_candidates(
    folder: Path, found: Sequence[TuneCandidate], left_out: Sequence[dict[str, str]], fidelity: Fidelity
) -> None:
    """Makes sure that there is something to choose from.

    Raises:
        InputError: There is no candidate; the line says why not.
    """
    if not found:
        reasons = "; ".join(f"{item['candidate']}: {item['why']}" for item in left_out)
        raise InputError(
            f"{folder}: nothing in it can be tuned at fidelity {fidelity}: {reasons or 'nothing was proved'}"
        )


def _why_not(variant: Variant, backend: str, record: Any, fidelity: Fidelity) -> str:
    """Why a pair is no candidate; empty if it is one."""
    if backend in GPU_BACKENDS:
        return "it runs on a GPU, and the search is among the engines of the processor"
    if backend not in BACKENDS:
        return f"no engine of this version is called {backend!r:.40}"
    if not isinstance(record, dict) or record.get("passed") is not True:
        return "its parity record did not pass"
    if "fidelity" not in record:
        return "its parity record names no fidelity; export it again"
    if not reaches(record, fidelity):
        return f"was proved at {reached(record) or 'no level'}, not at {fidelity}"
    if variant.front == "resize" and backend != DEFAULT_BACKEND:
        return f"{backend} computes ONNX's Resize differently"
    if not is_installed(backend):
        return "the engine is not installed"
    return ""
