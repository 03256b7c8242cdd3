"""Who is compared: PyTorch, engines on the export as torch gives it, NNCF, and every proved variant of an artifact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from invariclip.bench.latency import machine
from invariclip.bench.latency.prepare import PLAIN
from invariclip.bench.latency.worker import LatencyCandidate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from invariclip.bench.latency.prepare import Prepared, ReferenceRequest

PYTORCH, PEER, OURS, PEAK = "pytorch", "peer", "ours", "peak"


@dataclass(frozen=True)
class PeerRow:
    """One row of the comparison.

    Attributes:
        candidate: What is run.
        group: `pytorch` (the first is the yardstick), `peer`, `ours` or `peak` (matrix products, no tower).
        arithmetic: What most of its products are computed in, so which peak it is held against.
        reason: Why it cannot run here; empty if nothing is known against it.
    """

    candidate: LatencyCandidate
    group: str
    arithmetic: str
    reason: str = ""


def entries(wanted: ReferenceRequest, prepared: Prepared) -> list[PeerRow]:
    """Every candidate, those that cannot run with the reason; names differ."""
    return [*_pytorch(wanted, prepared), *_peers(prepared), *_ours(prepared), *_peaks()]


def _pytorch(wanted: ReferenceRequest, prepared: Prepared) -> Iterator[PeerRow]:
    for compiled in (False, True):
        for compute in ("float32", "bfloat16"):
            candidate = LatencyCandidate(
                f"PyTorch {'compiled' if compiled else 'eager'} {compute}",
                "pytorch",
                wanted.model,
                checkpoint=None if prepared.weights is None else str(prepared.weights),
                compute=compute,
                compiled=compiled,
                tokenizer=wanted.tokenizer,
            )
            reason = _no_bfloat16(compute)
            if compiled and machine.compiler() is None:
                reason = "torch.compile needs a C++ compiler, and none of g++, clang++ and cl is on the PATH"
            yield PeerRow(candidate, PYTORCH, compute, reason)


def _peers(prepared: Prepared) -> Iterator[PeerRow]:
    plain = str(prepared.folder / PLAIN)
    found = machine.versions()
    yield PeerRow(LatencyCandidate("ONNX Runtime float32", "onnxruntime", plain), PEER, "float32")
    no_openvino = "" if "openvino" in found else "needs openvino: pip install openvino"
    for compute in ("float32", "bfloat16"):
        candidate = LatencyCandidate(f"OpenVINO {compute}", "openvino", plain, compute=compute)
        yield PeerRow(candidate, PEER, compute, no_openvino or _no_bfloat16(compute))
    for compute in ("float32", "bfloat16"):
        # What NNCF left unquantised runs in this; both are here, so that the better one is beaten
        name = f"OpenVINO NNCF int8, rest {compute}"
        candidate = LatencyCandidate(name, "openvino", str(prepared.quantised or ""), compute=compute)
        yield PeerRow(candidate, PEER, "int8", prepared.missing.get("nncf", "") or _no_bfloat16(compute))


def _ours(prepared: Prepared) -> Iterator[PeerRow]:
    for name, variant in prepared.manifest.variants.items():
        for backend in variant.parity:
            candidate = LatencyCandidate(
                f"invariclip {name}, {backend}", "artifact", str(prepared.artifact), backend=backend, variant=name
            )
            arithmetic = "int8" if "int8" in f"{name} {variant.precision}" else variant.compute
            yield PeerRow(candidate, OURS, arithmetic)


def _peaks() -> Iterator[PeerRow]:
    for compute in ("float32", "bfloat16", "int8"):
        yield PeerRow(
            LatencyCandidate(f"peak {compute}", "peak", "", compute=compute), PEAK, compute, _no_bfloat16(compute)
        )


def _no_bfloat16(compute: str) -> str:
    if compute != "bfloat16" or machine.has_bfloat16():
        return ""
    return f"the processor has no bfloat16 instructions ({', '.join(machine.BFLOAT16_FLAGS)})"
