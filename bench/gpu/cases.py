"""What is measured on a GPU, in the order of what matters most: time there is short, and what is left is said."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from invariclip.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

MODELS = ("ViT-B-32", "ViT-L-14", "ViT-B-16")
BATCHES = (1, 8, 64, 256)
CONTEXT, SIDE = 77, 224
"""Of these models: ids in a text, pixels of an image's side."""
Tower = Literal["image", "text"]
TOWERS: tuple[Tower, ...] = ("image", "text")
Engine = Literal["torch", "compile", "cudagraph", "onnxruntime-cuda", "onnxruntime-tensorrt", "tensorrt"]
Precision = Literal["float32", "float16", "bfloat16"]
Graph = Literal["none", "plain", "ours"]


@dataclass(frozen=True)
class Case:
    """One question: a tower of a model at a batch size."""

    model: str
    tower: Tower
    batch: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the input: uint8 [batch, side, side, 3], or int64 [batch, context]."""
        return (self.batch, SIDE, SIDE, 3) if self.tower == "image" else (self.batch, CONTEXT)

    @property
    def name(self) -> str:
        """For people and for keys."""
        return f"{self.model} {self.tower} {self.batch}"


@dataclass(frozen=True)
class GpuCandidate:
    """One way to answer it.

    Attributes:
        name: For people and for keys.
        engine: What runs.
        precision: What it computes in.
        graph: `plain` is the export without rewrites, `ours` the artifact's; `none` is PyTorch's own module.
        packages: What has to be installed; of each group one.
    """

    name: str
    engine: Engine
    precision: Precision
    graph: Graph = "none"
    packages: tuple[tuple[str, ...], ...] = (("torch",),)


_TRT = (("tensorrt", "tensorrt_rtx"), ("cuda",))
REFERENCE = GpuCandidate("PyTorch float32", "torch", "float32")
"""What answers are held against, on the same GPU, TensorFloat-32 switched off."""
CANDIDATES = (
    REFERENCE,
    GpuCandidate("invariclip, TensorRT float16 islands", "tensorrt", "float16", "ours", _TRT),
    GpuCandidate("torch.compile float16", "compile", "float16"),
    GpuCandidate("PyTorch CUDA graph float16", "cudagraph", "float16"),
    GpuCandidate("PyTorch float16", "torch", "float16"),
    GpuCandidate("TensorRT float16, plain export", "tensorrt", "float16", "plain", _TRT),
    GpuCandidate("ONNX Runtime CUDA float16", "onnxruntime-cuda", "float16", "ours", (("onnxruntime",),)),
    GpuCandidate("ONNX Runtime TensorRT float16", "onnxruntime-tensorrt", "float16", "ours", (("onnxruntime",),)),
    GpuCandidate("PyTorch CUDA graph bfloat16", "cudagraph", "bfloat16"),
    GpuCandidate("PyTorch bfloat16", "torch", "bfloat16"),
    GpuCandidate("torch.compile bfloat16", "compile", "bfloat16"),
    GpuCandidate("invariclip, TensorRT float32", "tensorrt", "float32", "ours", _TRT),
)


def cases(
    models: Sequence[str] = MODELS, towers: Sequence[str] = TOWERS, batches: Sequence[int] = BATCHES
) -> list[Case]:
    """Every question, images one by one first: that is what the goal is stated for.

    Raises:
        InputError: A model or tower is not one of these, or a batch size is below 1.
    """
    unknown = [name for name in models if name not in MODELS] + [name for name in towers if name not in TOWERS]
    if unknown or any(batch < 1 for batch in batches):
        raise InputError(
            f"{', '.join(unknown) or 'a batch size below 1'} is not measured; available: {', '.join(MODELS)}; "
            f"{', '.join(TOWERS)}; batch sizes from 1"
        )
    return [
        Case(model, tower, batch)
        for tower in TOWERS
        if tower in towers
        for batch in sorted(set(batches))
        for model in MODELS
        if model in models
    ]


def missing(candidate: GpuCandidate) -> str | None:
    """The package that a candidate lacks here, in words; None where it has all."""
    for group in candidate.packages:
        if not any(_is_there(name) for name in group):
            return f"{' or '.join(group)} is not installed"
    return None


def plan(questions: Sequence[Case]) -> dict[str, Any]:
    """What would be measured, as plain data: shapes, candidates and why some cannot run; nothing is loaded."""
    return {
        "cases": [{**asdict(case), "shape": list(case.shape)} for case in questions],
        "candidates": [
            {"name": one.name, "engine": one.engine, "precision": one.precision, "graph": one.graph,
             "missing": missing(one)}
            for one in CANDIDATES
        ],
        "measurements": len(questions) * sum(missing(one) is None for one in CANDIDATES),
    }  # fmt: skip


def _is_there(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # an interpreter that was told that the package is not there
        return False
