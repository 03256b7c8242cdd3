"""Measuring: parity first, then times; a candidate that answers wrongly is not timed."""

from __future__ import annotations

import shutil
import subprocess
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.bench.gpu.cases import CANDIDATES, REFERENCE, GpuCandidate, missing
from invariclip.bench.gpu.runners import PARITY_ROWS, WARM, open_runner, require_cuda
from invariclip.bench.latency.flops import graph_flops
from invariclip.bench.latency.machine import versions
from invariclip.errors import InvariclipError
from invariclip.measure.statistics import percentiles

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.bench.gpu.cases import Case
    from invariclip.bench.gpu.runners import GraphFiles, Runner

LEAST_COSINE = 0.999
"""Below this on any row, float16 and bfloat16 are not rounding any more: something is wrong."""
RUNS, LEAST_SECONDS = 200, 1.0
"""Runs at most of one measurement, and how long it takes at most once it has a few."""
_FEWEST = 20
_PACKAGES = (
    "torch", "onnxruntime-gpu", "onnxruntime", "tensorrt", "tensorrt-rtx", "cuda-bindings", "open_clip_torch",
)  # fmt: skip
_PEAK_SIDE, _PEAK_RUNS = 8192, 20


def measure(
    questions: Sequence[Case],
    workshop: GraphFiles,
    *,
    deadline: float,
    keep: Callable[[dict[str, Any]], None],
    candidates: Sequence[GpuCandidate] = CANDIDATES,
) -> list[dict[str, Any]]:
    """Every candidate on every case, until the time is up.

    Args:
        questions: The cases, the most important ones first.
        workshop: Makes checkpoints and graphs.
        deadline: By `time.monotonic`; no measurement begins after it, and the rest is listed as not measured.
        keep: Is given every row as soon as it is there.
        candidates: What is compared; the reference has to be among them.

    Returns:
        A row for each case and candidate: figures, or the reason why there are none.
    """
    rows: list[dict[str, Any]] = []
    peak = measured_peak() if questions else 0.0
    for case in questions:
        reference: NDArray[np.float32] | None = None
        for candidate in candidates:
            row = {"case": case.name, "model": case.model, "tower": case.tower, "batch": case.batch,
                   "candidate": candidate.name, "precision": candidate.precision}  # fmt: skip
            reason = missing(candidate)
            if reason is None and time.monotonic() > deadline:
                reason = "the time was up"
            if reason is None and candidate is not REFERENCE and reference is None:
                reason = "the reference could not answer"
            if reason is None:
                found, answers = _one(candidate, case, workshop, reference, peak)
                row.update(found)
                reference = answers if candidate is REFERENCE else reference
            else:
                row["reason"] = reason
            rows.append(row)
            keep(row)
    return rows


def _one(
    candidate: GpuCandidate, case: Case, workshop: GraphFiles, reference: NDArray[np.float32] | None, peak: float
) -> tuple[dict[str, Any], NDArray[np.float32] | None]:
    """Figures of one candidate, or its reason; and what it answered."""
    runner: Runner | None = None
    try:
        began = time.monotonic()
        runner = open_runner(candidate, case, workshop)
        # in runs of the case's own size: an engine is built, and a graph captured, for that
        rows = max(PARITY_ROWS, case.batch)
        given = workshop.inputs(case, rows + -rows % case.batch)
        parts = [runner.answer(given[start : start + case.batch]) for start in range(0, len(given), case.batch)]
        answers = np.concatenate(parts)
        found: dict[str, Any] = {"ready_seconds": round(time.monotonic() - began, 2)}
        if reference is not None:
            found.update(parity(answers, reference))
            if not found["cosine_min"] >= LEAST_COSINE:
                return {**found, "reason": f"answers differ: cosine {found['cosine_min']:.4f}"}, None
        found.update(_times(runner, given[: case.batch]))
        flops = graph_flops(workshop.graph(case, GpuCandidate("", "tensorrt", "float32", "plain")), case.batch)
        fastest = found.get("device_p50_ms") or found["total_p50_ms"]
        found["peak_share"] = flops / (fastest * 1e-3) / peak if peak else None
        return found, answers
    # one candidate's failure, in whatever library, must not take the others' figures away; it is said in its row
    except (InvariclipError, RuntimeError, OSError, ImportError, ValueError) as error:
        return {"reason": " ".join(str(error).split())[:300]}, None
    finally:
        if runner is not None:
            runner.close()


def parity(answers: NDArray[np.float32], reference: NDArray[np.float32]) -> dict[str, Any]:
    """How close embeddings are to the reference's: cosines, and whether each row's nearest other row is the same.

    Args:
        answers: float32 [n, d] of unit length.
        reference: The same of PyTorch in float32.

    Returns:
        `cosine_min`, `cosine_mean`, `nearest_agreement`; a NaN anywhere makes the first two NaN.
    """
    ours, theirs = answers.astype(np.float64), reference.astype(np.float64)
    cosines = (ours * theirs).sum(axis=1) / (np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1))
    nearest = []
    for rows in (ours, theirs):
        alike = rows @ theirs.T
        np.fill_diagonal(alike, -np.inf)
        nearest.append(alike.argmax(axis=1))
    return {
        "cosine_min": float(cosines.min()),
        "cosine_mean": float(cosines.mean()),
        "nearest_agreement": float((nearest[0] == nearest[1]).mean()),
    }


def _times(runner: Runner, rows: NDArray[Any]) -> dict[str, Any]:
    for _ in range(WARM):
        runner.answer(rows)
    total: list[float] = []
    end = time.monotonic() + LEAST_SECONDS
    while len(total) < RUNS and (len(total) < _FEWEST or time.monotonic() < end):
        began = time.perf_counter()
        runner.answer(rows)
        total.append((time.perf_counter() - began) * 1e3)
    device = runner.device_times(rows, len(total))
    return {**run_figures("total", total), **(run_figures("device", device) if device else {})}


def run_figures(what: str, milliseconds: Sequence[float]) -> dict[str, Any]:
    """The median, the 99th percentile and how many there were."""
    found = percentiles([milliseconds])
    return {f"{what}_p50_ms": found["p50"], f"{what}_p99_ms": found["p99"], f"{what}_runs": len(milliseconds)}


def measured_peak() -> float:
    """Operations a second of a large bfloat16 product, as measured: what shares are of.

    Raises:
        DeviceError: PyTorch sees no GPU.
    """
    import torch

    require_cuda(torch)
    left, right = (torch.randn(_PEAK_SIDE, _PEAK_SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    events: Any = torch.cuda.Event  # torch's stubs leave it untyped
    start, end = (events(enable_timing=True) for _ in range(2))
    best = float("inf")
    for _ in range(_PEAK_RUNS):
        start.record()
        torch.matmul(left, right)
        end.record()
        end.synchronize()
        best = min(best, float(start.elapsed_time(end)))
    return 2 * _PEAK_SIDE**3 / (best * 1e-3)


def machine(folder: Path) -> dict[str, Any]:
    """GPU, driver, clocks and versions, as far as they can be read; what cannot is left out by name."""
    found = versions(_PACKAGES)
    facts: dict[str, Any] = {
        "versions": {package: found.get(package) for package in _PACKAGES}, "graphs": folder.name, "gpu": None,
    }  # fmt: skip
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        fields = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit,persistence_mode"
        done = subprocess.run(
            [tool, f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True, check=False,
            timeout=60,
        )  # fmt: skip
        if done.returncode == 0:
            facts["gpu"] = dict(zip(fields.split(","), (part.strip() for part in done.stdout.split(",")), strict=False))
    return facts
