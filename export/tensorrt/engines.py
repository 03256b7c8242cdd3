"""Engines of an artifact: planned, found or built, written with their sidecars, atomically.

`build_on_cpu` asks whether TensorRT would take a graph, on a machine without a GPU: TensorRT-RTX's parser and builder
run on the CPU. Parsing alone is not enough: some operators parse and cannot be built.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from invariclip.artifact.folder import ENGINES
from invariclip.backends.tensorrt.facts import (
    ANY_GPU,
    EngineFacts,
    EngineKey,
    engine_path,
    read_facts,
    write_facts,
)
from invariclip.backends.tensorrt.known_bad import require_sound
from invariclip.backends.tensorrt.library import installed, open_library
from invariclip.console import silent
from invariclip.errors import ArtifactError, ContractError, DeviceError, MissingExtraError
from invariclip.export.quantization.qdq import uint8_values
from invariclip.export.tensorrt.builder import build
from invariclip.export.tensorrt.plan import plan_engine
from invariclip.files import sha256_file, write_atomically

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from invariclip.backends.tensorrt.device import Device, Gpu
    from invariclip.backends.tensorrt.library import Library
    from invariclip.console import Progress
    from invariclip.export.tensorrt.plan import EnginePlan

MAX_TIMINGS = 1 << 30
"""Bytes of a timing cache that are read."""
_FP8 = (8, 9)
LARGEST = 32
"""Largest batch of the profile; it begins at 1, so every smaller batch is in it."""


@dataclass(frozen=True)
class EngineFile:
    """An engine on disk.

    Attributes:
        path: The file.
        facts: Its sidecar.
        found: Whether it was there already.
    """

    path: Path
    facts: EngineFacts
    found: bool


def key_of(plan: EnginePlan, library: Library, gpu: Gpu | None, capabilities: Sequence[str] = ()) -> EngineKey:
    """What the engine of a plan has to match.

    Args:
        plan: What is built.
        library: What builds it.
        gpu: The GPU that it is built on; None without one.
        capabilities: What TensorRT-RTX compiles for; empty means whatever it knows.

    Raises:
        DeviceError: TensorRT is asked for an engine without a GPU, or the GPU has no fp8.
    """
    if gpu is not None and plan.precision == "fp8" and gpu.capability < _FP8:
        raise DeviceError(f"{gpu.name} has no fp8 (compute capability 8.9 or later); build another variant")
    if library.name == "tensorrt_rtx" and not plan.refit:
        name, capability = ANY_GPU, ",".join(capabilities) or ANY_GPU
    elif gpu is None:
        raise DeviceError(f"{library.title} builds this engine for the GPU that it sees, and there is none here")
    else:
        name, capability = gpu.name, f"{gpu.capability[0]}.{gpu.capability[1]}"
    return EngineKey(
        plan.graph_sha256, library.name, library.version, name, capability, plan.precision, plan.profiles, plan.refit,
        plan.tf32,
    )  # fmt: skip


def engine_of(
    graph: Path,
    plan: EnginePlan,
    library: Library,
    device: Device | None,
    *,
    capabilities: Sequence[str] = (),
    accept_known_bad: bool = False,
    progress: Progress = silent,
) -> EngineFile:
    """The engine of a plan: the one that lies there, or a new one.

    Args:
        graph: The ONNX file; the engine goes to `engines/` beside it.
        plan: What to build.
        library: What builds it.
        device: The GPU; None where TensorRT-RTX is to build without.
        capabilities: See `key_of`.
        accept_known_bad: See `known_bad.require_sound`.
        progress: `console.bar` or `console.silent`.

    Raises:
        DeviceError: The library is known to be wrong here, or it needs a GPU.
        ContractError: The graph cannot be parsed or built, or has uint8 levels.
        InputError: The folder cannot be written.
    """
    gpu = None if device is None else device.gpu
    require_sound(
        library.name, library.version, plan.precision, None if gpu is None else gpu.capability, accept=accept_known_bad
    )
    key = key_of(plan, library, gpu, capabilities)
    path = engine_path(graph.parent, plan.graph, key)
    there = _there(path, key)
    if there is not None:
        return EngineFile(path, there, True)
    if plan.precision == "int8":
        require_signed(graph)
    timings = None if gpu is None else graph.parent / ENGINES / timings_name(library, gpu)
    built = build(
        graph, plan, library, capabilities=capabilities, has_gpu=device is not None,
        free_memory=None if device is None else device.free_memory(), timings=_read(timings), progress=progress,
    )  # fmt: skip
    facts = EngineFacts(
        key, plan.graph, {name: tensor.dtype for name, tensor in plan.inputs.items()},
        {name: tensor.dtype for name, tensor in plan.outputs.items()}, hashlib.sha256(built.engine).hexdigest(),
        len(built.engine), round(built.seconds, 3),
        made={
            "driver": None if gpu is None else gpu.driver, "level": plan.level, "phases": list(built.phases),
            "warnings": list(built.warnings), "known_bad_accepted": accept_known_bad,
        },
    )  # fmt: skip
    write_atomically(path, built.engine)
    write_facts(path, facts)  # the sidecar last: without it the engine is not there
    if timings is not None and built.timings is not None:
        write_atomically(timings, built.timings)
    return EngineFile(path, facts, False)


def timings_name(library: Library, gpu: Gpu) -> str:
    """File of the kernel timings of a library's release on a GPU: they are good for nothing else."""
    digest = hashlib.sha256(f"{library.name} {library.version} {gpu.name}".encode()).hexdigest()
    return f"timings.{digest[:16]}.cache"


def _there(path: Path, key: EngineKey) -> EngineFacts | None:
    """The sidecar of an engine that is whole and matches; None, and it is built anew, in any other case."""
    sidecar = path.with_name(f"{path.name}.json")
    if not path.is_file() or not sidecar.is_file():
        return None
    try:
        facts = read_facts(sidecar)
    except ArtifactError:
        return None
    whole = path.stat().st_size == facts.size_bytes and sha256_file(path) == facts.engine_sha256
    return facts if whole and facts.key == key else None


def _read(timings: Path | None) -> bytes | None:
    if timings is None or not timings.is_file() or timings.stat().st_size > MAX_TIMINGS:
        return None
    return timings.read_bytes()


@dataclass(frozen=True)
class Gate:
    """A graph that was built.

    Attributes:
        version: Of TensorRT-RTX.
        seconds: What parsing and building took.
        engine_bytes: Size of the engine.
        precision: What the graph computes in.
    """

    version: str
    seconds: float
    engine_bytes: int
    precision: str


def build_on_cpu(path: Path, *, longest: int = 77) -> Gate:
    """Parses and builds a graph with TensorRT-RTX; no GPU is needed, and the engine is thrown away.

    Args:
        path: The ONNX file.
        longest: Largest text length, where that is free.

    Raises:
        MissingExtraError: TensorRT-RTX is not installed.
        ContractError: It does not parse or does not build (the message is TensorRT's own), or holds uint8 levels.
    """
    if "tensorrt_rtx" not in installed():
        raise MissingExtraError('the TensorRT gate needs tensorrt_rtx: pip install "invariclip[tensorrt-rtx]"')
    library = open_library("tensorrt_rtx")
    try:
        plan = plan_engine(path, batches=(LARGEST,), longest=longest)
    except Exception as error:
        raise ContractError(f"{path.name}: {library.title} does not parse it: {error}") from error
    if plan.precision == "int8":
        require_signed(path)
    built = build(path, plan, library)
    return Gate(library.version, built.seconds, len(built.engine), plan.precision)


def require_signed(path: Path) -> None:
    """Refuses a Q/DQ graph with uint8 levels: TensorRT builds some of them and promises nothing of their answers.

    Raises:
        ContractError: It has some.
    """
    unsigned = uint8_values(ir.load(path))
    if unsigned:
        raise ContractError(
            f"{path.name}: holds uint8 levels ({', '.join(unsigned[:3])}{' ...' if len(unsigned) > 3 else ''}), and "
            "TensorRT's are int8 without a zero point; export with --variant int8-symmetric"
        )
