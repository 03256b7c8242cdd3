"""Releases of TensorRT that are known to answer CLIP wrongly, by name, with the reason and where it was reported.

Only what is on record stands here. Reports of float16 asked for by builder flag (as NVIDIA/TensorRT#2709, F1 0.85 →
0.15 on CLIP ViT-B/32) are no reason to refuse a release: our networks are strongly typed, with the fragile parts in
float32. That a release is not listed proves nothing: the contract is what decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from invariclip.backends.tensorrt.library import TITLES, numbers
from invariclip.errors import DeviceError

if TYPE_CHECKING:
    from invariclip.backends.tensorrt.library import Name

EVERY = ("float32", "float16", "int8", "fp8")
"""What a graph's precision may be."""


@dataclass(frozen=True)
class KnownBad:
    """A range of releases, and where they go wrong.

    Attributes:
        library: Whose.
        first: The first version that is affected.
        after: The first that is not; None where no later one is known to be right.
        precisions: Graphs that are affected.
        capability: The GPUs that are affected, by compute capability; None means all.
        reason: What goes wrong.
        source: Where it was reported.
        mend: What to do instead.
    """

    library: Name
    first: tuple[int, ...]
    after: tuple[int, ...] | None
    precisions: tuple[str, ...]
    capability: tuple[int, int] | None
    reason: str
    source: str
    mend: str


MINIMUM: dict[Name, tuple[int, ...]] = {"tensorrt": (10, 0), "tensorrt_rtx": (1, 2)}
"""Below these, networks cannot be strongly typed as ours are, or the library was never tried."""
KNOWN_BAD = (
    KnownBad(
        "tensorrt", (10, 0, 0), (10, 0, 1), ("float16", "int8", "fp8"), None,
        "its release notes say that fused attention (_gemm_mha_v2) in float16 does not answer like PyTorch",
        "NVIDIA/TensorRT#3777", "install 10.0.1 or later",
    ),
    KnownBad(
        "tensorrt", (10, 7), (10, 8), EVERY, None,
        "it computes the attention of open_clip's models wrongly, in float32 too",
        "NVIDIA/TensorRT#4328 and #4333", "install another release",
    ),
    KnownBad(
        "tensorrt", (10, 0), (10, 16, 2), ("float16", "int8", "fp8"), (12, 0),
        "fused attention in float16 is silently wrong on GPUs of compute capability 12.0",
        "NVIDIA/TensorRT#4837", "install a later release, or build the graph in float32",
    ),
)  # fmt: skip
"""The last range ends after the last release that the report names; what came later has to be measured."""


def known_faults(library: Name, version: str, precision: str, capability: tuple[int, int] | None) -> list[KnownBad]:
    """What is on record against a release.

    Args:
        library: `tensorrt` or `tensorrt_rtx`.
        version: Its version.
        precision: Of the graph, see `EVERY`.
        capability: Of the GPU; None where it is not known, and then faults of single GPUs do not count.
    """
    release = numbers(version)
    return [
        fault
        for fault in KNOWN_BAD
        if fault.library == library
        and _at_least(release, fault.first)
        and (fault.after is None or not _at_least(release, fault.after))
        and precision in fault.precisions
        and fault.capability in (None, capability)
    ]


def require_sound(
    library: Name, version: str, precision: str, capability: tuple[int, int] | None, *, accept: bool = False
) -> None:
    """Refuses a release that is too old, or that is known to answer wrongly.

    Args:
        library: `tensorrt` or `tensorrt_rtx`.
        version: Its version.
        precision: Of the graph.
        capability: Of the GPU, where it is known.
        accept: Take a release with a known fault all the same; one that is too old stays refused.

    Raises:
        DeviceError: It is one.
    """
    oldest = MINIMUM[library]
    if not _at_least(numbers(version), oldest):
        raise DeviceError(f"{TITLES[library]} {version} is too old; install {'.'.join(map(str, oldest))} or later")
    faults = [] if accept else known_faults(library, version, precision, capability)
    if faults:
        said = "; ".join(f"{fault.reason} ({fault.source}); {fault.mend}" for fault in faults)
        raise DeviceError(
            f"{TITLES[library]} {version} is refused for {precision} graphs: {said}; --accept-known-bad builds all the "
            "same, and only `invariclip verify` on that GPU tells whether its answers can be used"
        )


def _at_least(version: tuple[int, ...], bound: tuple[int, ...]) -> bool:
    """Compared by as many numbers as either has: (10, 7) is the beginning of all of 10.7."""
    width = max(len(version), len(bound))
    return version + (0,) * (width - len(version)) >= bound + (0,) * (width - len(bound))
