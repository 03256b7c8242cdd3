"""One family held against PyTorch: both towers, small and odd batches, every engine that is there.

Runs in a process of its own (`python -m invariclip.bench.studies.parity.family NAME FILE`), so that the memory of one
family is gone before the next, and so that its peak can be told.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.artifact.manifest import EMBEDDING
from invariclip.artifact.projection import Projection
from invariclip.backends import open_backend
from invariclip.errors import ContractError, InvariclipError
from invariclip.export.checkpoints import check_texts
from invariclip.export.checkpoints.families import family, load_family
from invariclip.export.graphs.tower_graph import tower_graph
from invariclip.export.graphs.writing import weight_bytes, write_graph
from invariclip.export.tensorrt.engines import build_on_cpu
from invariclip.export.verification import evidence
from invariclip.export.verification.answers import project
from invariclip.export.verification.figures import SIZES
from invariclip.files import scratch_directory
from invariclip.preprocessing.pixels import stack
from invariclip.text_tower import cut_to_longest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from invariclip.export.checkpoints.checkpoint import Checkpoint
    from invariclip.export.graphs.rewrites import Tower
    from invariclip.preprocessing.tokenizer import TextSpec

LARGE, MOST_MEMORY = 2_000_000_000, 2.5
"""Weights in bytes from which a family is large, and how often the process may hold them."""
ENGINES = ("onnxruntime", "openvino")
SEED, RANK = 0, 64


@dataclass
class TowerParity:
    """What was seen of one tower.

    Attributes:
        tower: `image` or `text`.
        fold: How the projection is in the graph.
        nodes: Of the graph.
        weights: Its bytes of weights.
        seconds: What folding, rewriting, tracing and writing took.
        plan: What became of each rewrite.
        spread: Largest difference between the first two inputs' references: what an answer could be off by.
        diffs: Engine → largest difference of unit embeddings at each of `SIZES`.
        cut_diff: The same for texts cut to the longest one, where the graph takes them; else None.
        tensorrt: `built in N s`, or why not.
    """

    tower: str
    fold: str
    nodes: int
    weights: int
    seconds: float
    plan: list[dict[str, Any]]
    spread: float
    diffs: dict[str, list[float]] = field(default_factory=dict)
    cut_diff: float | None = None
    tensorrt: str = ""


@dataclass
class FamilyParity:
    """What was seen of one family.

    Attributes:
        name: The family's.
        source: Where its weights and its tokenizer come from.
        tolerance: Bound of every difference.
        weights: Bytes of the checkpoint's weights.
        peak: Largest resident memory until both graphs were written, in bytes.
        towers: Image and text.
    """

    name: str
    source: str
    tolerance: float
    weights: int
    peak: int
    towers: list[TowerParity]

    @property
    def broken(self) -> list[str]:
        """Every bound that is broken, in words."""
        found = []
        if self.weights >= LARGE and self.peak > MOST_MEMORY * self.weights:
            found.append(
                f"{self.name}: peak memory {self.peak / self.weights:.2f} × its weights, above {MOST_MEMORY:g}"
            )
        for tower in self.towers:
            worst = {engine: max(values) for engine, values in tower.diffs.items()}
            if tower.cut_diff is not None:
                worst["short texts"] = tower.cut_diff
            found += [
                f"{self.name}, {tower.tower}, {what}: max |Δ| {value:.2g} is above {self.tolerance:g}"
                for what, value in worst.items()
                if not value <= self.tolerance
            ]
            if not tower.tensorrt.startswith("built"):
                found.append(f"{self.name}, {tower.tower}: TensorRT-RTX: {tower.tensorrt}")
        return found

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> FamilyParity:
        """Reads what `asdict` wrote."""
        return cls(**{**plain, "towers": [TowerParity(**tower) for tower in plain["towers"]]})


def family_parity(name: str) -> FamilyParity:
    """Exports both towers of a family, with a projection of rank 64 in them, and compares.

    Args:
        name: One of `families.FAMILIES`.

    Raises:
        InvariclipError: The family cannot be loaded or exported.
    """
    checkpoint = load_family(name, seed=SEED)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in checkpoint.module.state_dict().values())
    matrix = np.random.default_rng(SEED).normal(size=(checkpoint.embed_dim, min(RANK, checkpoint.embed_dim // 2)))
    projection = Projection(matrix, "random")
    inputs = {"image": _images(checkpoint), "text": _texts(checkpoint)}
    wanted = {
        "image": project(checkpoint.encode_images(inputs["image"]), projection),
        "text": project(checkpoint.encode_texts(inputs["text"]), projection),
    }
    with scratch_directory() as folder:
        towers: tuple[Tower, ...] = ("image", "text")
        seen = [_written(checkpoint, tower, projection, folder, wanted[tower]) for tower in towers]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        spec = checkpoint.tokenizer.spec
        del checkpoint
        for tower in seen:
            path = folder / f"{tower.tower}.onnx"
            _compare(tower, path, inputs[tower.tower], wanted[tower.tower], spec)
            try:
                tower.tensorrt = f"built in {build_on_cpu(path, longest=spec.context_length).seconds:.0f} s"
            except ContractError as error:
                tower.tensorrt = str(error)
    return FamilyParity(name, load_source(name), family(name).tolerance, weights, peak, seen)


def load_source(name: str) -> str:
    """What a family's weights and tokenizer are, in words."""
    return f"random weights, seed {SEED}" + (", stand-in tokenizer" if family(name).stand_in else "")


def _images(checkpoint: Checkpoint) -> NDArray[Any]:
    paths = check_texts.spread(list(evidence.images_of(None, checkpoint.pixels).paths), max(SIZES))
    return stack(paths, checkpoint.pixels)


def _texts(checkpoint: Checkpoint) -> NDArray[Any]:
    return check_texts.ids_of(check_texts.spread(list(check_texts.TEXTS), max(SIZES)), checkpoint.tokenizer)


def _written(
    checkpoint: Checkpoint, tower: Tower, projection: Projection, folder: Path, wanted: NDArray[np.float64]
) -> TowerParity:
    began = time.monotonic()
    graph = tower_graph(checkpoint, tower, projection)
    nodes, size = len(graph.model.graph), weight_bytes(graph.model)
    write_graph(graph.model, folder / f"{tower}.onnx")
    return TowerParity(
        tower=tower,
        fold=graph.fold,
        nodes=nodes,
        weights=size,
        seconds=time.monotonic() - began,
        plan=[asdict(step) for step in graph.plan],
        spread=float(np.abs(wanted[0] - wanted[1]).max()),
    )


def _compare(tower: TowerParity, path: Path, rows: NDArray[Any], wanted: NDArray[np.float64], spec: TextSpec) -> None:
    """Runs every engine at every size; the graph checks that it loads there at all."""
    short = any(step["applied"] for step in tower.plan if step["name"] == "text-cut")
    for engine in ENGINES:
        backend = open_backend(engine, path)
        name = backend.input_names[0]
        tower.diffs[engine] = [
            _diff(backend.run({name: rows[:size]}, (EMBEDDING,))[EMBEDDING], wanted[:size]) for size in SIZES
        ]
        if short:
            few = rows[: SIZES[2]]
            diff = _diff(backend.run({name: cut_to_longest(few, spec)}, (EMBEDDING,))[EMBEDDING], wanted[: len(few)])
            tower.cut_diff = max(diff, tower.cut_diff or 0.0)
        del backend


def _diff(got: NDArray[Any], wanted: NDArray[np.float64]) -> float:
    difference = np.abs(got.astype(np.float64) - wanted).max()
    return float(difference) if np.isfinite(difference) else float("inf")


def main() -> None:
    """Writes one family's figures as JSON."""
    name, out = sys.argv[1:3]
    warnings.simplefilter("ignore")  # about other published checkpoints' preprocessing; the weights here are random
    Path(out).write_text(json.dumps(asdict(family_parity(name)), indent=1))


if __name__ == "__main__":
    try:
        main()
    except InvariclipError as error:
        sys.exit(f"invariclip: {error}")
