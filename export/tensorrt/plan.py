"""What an engine is to be, decided before anything is built: shapes, precision, what stays exchangeable.

A plan needs neither a GPU nor TensorRT. It is plain data, so it can be looked at, kept and compared.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import onnx

from invariclip.artifact.manifest import PROJECTION_INPUT
from invariclip.backends.batching import buckets
from invariclip.backends.tensorrt.facts import ShapeProfile, graph_digest
from invariclip.errors import ArtifactError, InputError
from invariclip.export.graphs.head import CLASS_BANK

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

BATCHES = (1, 8, 64)
"""Batch sizes that engines are tuned for, unless others are named."""
SIDES = (32, 480, 1024)
"""Smallest, usual and largest free height or width, in pixels."""
LENGTHS = (1, 16, 65536)
"""The same of a free text length, in ids; the tower's own limit comes first."""
EXCHANGEABLE = (PROJECTION_INPUT, CLASS_BANK)
"""Initializers that a refit may replace: what calibration and new classes change."""
_FLOAT8 = (onnx.TensorProto.FLOAT8E4M3FN, onnx.TensorProto.FLOAT8E5M2)
_PRODUCTS = ("MatMul", "Gemm", "Conv")


@dataclass(frozen=True)
class Tensor:
    """An input or output: its dtype in numpy's words, and its shape, -1 where a dimension is free."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class EnginePlan:
    """What is built.

    Attributes:
        graph: Name of the ONNX file.
        graph_sha256: Its digest, weights included.
        precision: What its products compute in: `float32`, `float16`, `int8` or `fp8`. It is read from the graph;
            no setting of the builder changes it.
        inputs: By name; those that a caller may feed, without initializers.
        outputs: By name.
        profiles: One for each tuned batch size.
        refit: Initializers that stay exchangeable.
        tf32: Whether float32 products may be taken in TensorFloat-32, which has 11 bits.
        level: The builder's optimisation level, 0 to 5; None leaves it to the library.
    """

    graph: str
    graph_sha256: str
    precision: str
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    profiles: tuple[ShapeProfile, ...]
    refit: tuple[str, ...] = ()
    tf32: bool = False
    level: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        return asdict(self)


def plan_engine(
    graph: Path,
    *,
    batches: Sequence[int] = BATCHES,
    longest: int = 77,
    sides: tuple[int, int, int] = SIDES,
    refit: bool = False,
    tf32: bool = False,
    level: int | None = None,
) -> EnginePlan:
    """Plans the engine of a graph; its weights are digested and not loaded.

    Args:
        graph: The ONNX file.
        batches: Batch sizes to tune for; the largest is the most that a run may take.
        longest: Largest text length, where that is free.
        sides: Smallest, usual and largest height and width, where they are free.
        refit: Keep `EXCHANGEABLE` exchangeable, those that the graph has.
        tf32: See `EnginePlan`.
        level: See `EnginePlan`.

    Raises:
        ArtifactError: The file is not a graph.
        InputError: A batch size or the level is out of range, or the graph has nothing to exchange.
    """
    if level is not None and not 0 <= level <= 5:
        raise InputError(f"the builder's level is from 0 to 5, not {level}")
    try:
        model = onnx.load(str(graph), load_external_data=False)
    except Exception as error:  # protobuf's errors share no base class with onnx's
        raise ArtifactError(f"{graph}: is not an ONNX graph ({error})") from error
    held = {item.name for item in model.graph.initializer}
    inputs = {value.name: _tensor(value) for value in model.graph.input if value.name not in held}
    names = tuple(name for name in EXCHANGEABLE if name in held) if refit else ()
    if refit and not names:
        raise InputError(
            f"{graph}: has nothing to exchange: neither classes nor an open projection; "
            "export with --classes, or with --projection-as-input"
        )
    return EnginePlan(
        graph.name,
        graph_digest(graph),
        precision_of(model),
        inputs,
        {value.name: _tensor(value) for value in model.graph.output},
        profiles_of(inputs, batches, longest=longest, sides=sides),
        names,
        tf32,
        level,
    )


def profiles_of(
    inputs: dict[str, Tensor], batches: Sequence[int], *, longest: int = 77, sides: tuple[int, int, int] = SIDES
) -> tuple[ShapeProfile, ...]:
    """One profile for each tuned batch size: from just above the one before it up to itself, tuned for itself.

    So every bucket that `batching.plan` runs lies in exactly one of them, and batch 1 has one of its own.

    Args:
        inputs: The graph's.
        batches: Batch sizes, in any order; each is rounded down to a bucket.
        longest: See `plan_engine`.
        sides: See `plan_engine`.

    Raises:
        InputError: There is no batch size, or one is below 1.
    """
    if not batches:
        raise InputError("an engine needs a batch size to be tuned for; name one")
    tuned = sorted({buckets(batch)[-1] for batch in batches})
    profiles, smallest = [], 1
    for batch in tuned:
        three = {
            name: _three(tensor.shape, (smallest, batch, batch), longest, sides)
            for name, tensor in inputs.items()
            if any(side < 0 for side in tensor.shape)
        }
        profiles.append(ShapeProfile(three))
        smallest = batch + 1
    return tuple(profiles)


def precision_of(model: onnx.ModelProto) -> str:
    """What a graph's products compute in: by far the most of its work.

    Quantised where a Q/DQ pair stands before a product; else float16 where its weights are.
    """
    types = {item.name: item.data_type for item in model.graph.initializer}
    made = {name: node for node in model.graph.node for name in node.output}
    precisions = set()
    for node in model.graph.node:
        if node.op_type not in _PRODUCTS or len(node.input) < 2:
            continue
        weights = node.input[1]
        dequantize = made.get(weights)
        if dequantize is not None and dequantize.op_type == "DequantizeLinear":
            precisions.add("fp8" if types.get(dequantize.input[0]) in _FLOAT8 else "int8")
        elif types.get(weights) == onnx.TensorProto.FLOAT16:
            precisions.add("float16")
    return next((name for name in ("fp8", "int8", "float16") if name in precisions), "float32")


def _three(
    shape: tuple[int, ...], rows: tuple[int, int, int], longest: int, sides: tuple[int, int, int]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Smallest, usual and largest shape of an input whose free dimensions are -1."""
    shapes = []
    for which in range(3):
        length = min(LENGTHS[which], longest)
        free = [rows[which], *([length] if len(shape) == 2 else [sides[which]] * (len(shape) - 1))]
        shapes.append(tuple(size if size >= 0 else free[place] for place, size in enumerate(shape)))
    return shapes[0], shapes[1], shapes[2]


def _tensor(value: onnx.ValueInfoProto) -> Tensor:
    tensor = value.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    shape = tuple(side.dim_value if side.HasField("dim_value") else -1 for side in tensor.shape.dim)
    return Tensor(str(dtype), shape)
