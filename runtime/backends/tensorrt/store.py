"""Which engine belongs to a graph on this machine; one that does not match in every point is never loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from invariclip.backends.tensorrt.facts import ANY_GPU, FOLDER, graph_digest, read_facts
from invariclip.errors import ArtifactError
from invariclip.files import sha256_file

if TYPE_CHECKING:
    from pathlib import Path

    from invariclip.backends.tensorrt.device import Gpu
    from invariclip.backends.tensorrt.facts import EngineFacts
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
    folder = graph.parent / FOLDER
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
