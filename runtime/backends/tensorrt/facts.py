"""What lies beside an engine: what it was built from, by what, for which GPU and shapes; and the name that follows.

An engine is good for one graph, one release of one library and one GPU. All of it enters the key, so an engine that is
found under the name of a key is the right one, and one that does not match in every point is never loaded.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from invariclip.artifact.folder import ENGINES
from invariclip.backends.tensorrt.library import Name
from invariclip.errors import ArtifactError
from invariclip.files import sha256_file, write_atomically
from invariclip.records import read_sealed_json, sealed_json, to_record

if TYPE_CHECKING:
    from pathlib import Path

    from invariclip.backends.tensorrt.device import Gpu
    from invariclip.backends.tensorrt.library import Library


def find_engine(graph: Path, library: Library, gpu: Gpu) -> tuple[Path, EngineFacts]:
    """The engine of a graph for this library and GPU, its digest checked.

    Args:
        graph: The ONNX file; engines lie in `engines/` beside it.
        library: What would load it.
        gpu: Where it would run.

    Returns:
        Its path and its sidecar; of several the one that takes the largest batch, then the newest.

    Raises:
        ArtifactError: None matches; the message says of each one that is there why not.
    """
    folder = graph.parent / ENGINES
    digest = graph_digest(graph)
    fitting: list[tuple[int, float, Path, EngineFacts]] = []
    refused: list[str] = []
    for sidecar in sorted(folder.glob(f"{graph.name.removesuffix('.onnx')}.*.engine.json")):
        engine = sidecar.with_name(sidecar.name.removesuffix(".json"))
        try:
            facts = read_facts(sidecar)
        except ArtifactError as error:
            refused.append(str(error))
            continue
        reasons = why_not(facts, digest, library, gpu)
        if not reasons and not engine.is_file():
            reasons = ["the file is missing"]
        if reasons:
            refused.append(f"{engine.name}: {', '.join(reasons)}")
        else:
            fitting.append((_rows(facts), engine.stat().st_mtime, engine, facts))
    if not fitting:
        there = "; there are: " + "; ".join(refused) if refused else ""
        raise ArtifactError(
            f"{graph}: has no engine for {library.title} on {gpu.name}; "
            f"`invariclip engines {graph.parent}` builds one{there}"
        )
    _, _, engine, facts = max(fitting, key=lambda item: item[:2])
    if engine.stat().st_size != facts.size_bytes or sha256_file(engine) != facts.engine_sha256:
        raise ArtifactError(f"{engine}: is not the engine that was built (digest differs); build it again")
    return engine, facts


def why_not(facts: EngineFacts, graph_sha256: str, library: Library, gpu: Gpu) -> list[str]:
    """Why an engine must not be loaded, in words; empty where it may.

    Args:
        facts: Its sidecar.
        graph_sha256: Digest of the graph as it is now.
        library: What would load it.
        gpu: Where it would run.
    """
    key, reasons = facts.key, []
    if key.graph_sha256 != graph_sha256:
        reasons.append("the graph has changed since")
    if (key.library, key.library_version) != (library.name, library.version):
        reasons.append(f"it was built by {key.library} {key.library_version}, here is {library.name} {library.version}")
    if key.gpu not in (ANY_GPU, gpu.name):
        reasons.append(f"it was built for {key.gpu}")
    elif key.capability != ANY_GPU and f"{gpu.capability[0]}.{gpu.capability[1]}" not in key.capability.split(","):
        reasons.append(f"it was built for compute capability {key.capability}")
    return reasons


def _rows(facts: EngineFacts) -> int:
    return max((high[0] for profile in facts.key.profiles for _, _, high in profile.shapes.values()), default=0)


SCHEMA_VERSION = 2
MAX_SIDECAR_BYTES = 4 << 20
ANY_GPU = "any"
"""What an engine of TensorRT-RTX is built for, unless capabilities are named: it is compiled again on the GPU."""


@dataclass(frozen=True)
class ShapeProfile:
    """Shapes that an engine is prepared for.

    Attributes:
        shapes: Input to its smallest, usual and largest shape.
    """

    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]

    def takes(self, given: dict[str, tuple[int, ...]]) -> bool:
        """Whether these shapes, of every input with a profile, lie inside."""
        return all(
            name in given
            and len(given[name]) == len(low)
            and all(a <= side <= b for a, side, b in zip(low, given[name], high, strict=True))
            for name, (low, _, high) in self.shapes.items()
        )


@dataclass(frozen=True)
class EngineKey:
    """What an engine must match.

    Attributes:
        graph_sha256: Digest of the graph, its weights included.
        library: `tensorrt` or `tensorrt_rtx`.
        library_version: Its version, whole.
        gpu: The GPU's name, or `any`.
        capability: Its compute capability as `9.0`; several joined by commas for TensorRT-RTX.
        precision: What the graph computes in, see `known_bad.EVERY`.
        profiles: In the order in which the engine has them.
        refit: Names of the initializers that may be exchanged.
        tf32: Whether float32 products may be taken in TensorFloat-32.
    """

    graph_sha256: str
    library: Name
    library_version: str
    gpu: str
    capability: str
    precision: str
    profiles: tuple[ShapeProfile, ...]
    refit: tuple[str, ...] = ()
    tf32: bool = False

    @property
    def digest(self) -> str:
        """Hexadecimal sha256 over all of it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class EngineFacts:
    """The sidecar of an engine.

    Attributes:
        key: What it must match.
        graph: Name of the graph's file.
        inputs: The graph's inputs and their dtypes, in numpy's words.
        outputs: The same of its outputs.
        engine_sha256: Digest of the engine.
        size_bytes: Its size.
        seconds: What building took.
        agreement: How closely its graph answered the float32 graph, where that was asked; for people.
        made: Versions and settings of the build, for people.
    """

    key: EngineKey
    graph: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    engine_sha256: str
    size_bytes: int
    seconds: float
    agreement: dict[str, Any] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)


def graph_digest(path: Path) -> str:
    """sha256 of an ONNX file, and of the weights beside it where it has some."""
    data = path.with_name(f"{path.name}.data")
    parts = [sha256_file(path), *([sha256_file(data)] if data.is_file() else [])]
    return parts[0] if len(parts) == 1 else hashlib.sha256(" ".join(parts).encode()).hexdigest()


def engine_path(folder: Path, graph: str, key: EngineKey) -> Path:
    """Where the engine of a graph and a key lies: `engines/GRAPH.KEY.engine` in the artifact's folder."""
    return folder / ENGINES / f"{graph.removesuffix('.onnx')}.{key.digest[:16]}.engine"


def write_facts(engine: Path, facts: EngineFacts) -> None:
    """Writes the sidecar `NAME.engine.json`."""
    plain = {"schema_version": SCHEMA_VERSION, **asdict(facts)}
    write_atomically(engine.with_name(f"{engine.name}.json"), sealed_json(plain))


def read_facts(sidecar: Path) -> EngineFacts:
    """Reads a sidecar.

    Raises:
        ArtifactError: It is not one, or of another schema version.
    """
    plain = read_sealed_json(
        sidecar, "an engine's sidecar", schema=SCHEMA_VERSION, remedy="build the engine again",
        max_bytes=MAX_SIDECAR_BYTES, error=ArtifactError,
    )  # fmt: skip
    del plain["schema_version"]
    return to_record(EngineFacts, plain, str(sidecar), error=ArtifactError)
