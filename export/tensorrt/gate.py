"""Whether TensorRT would take a graph, asked of TensorRT-RTX on a machine without a GPU.

Its parser and its builder run on the CPU. Parsing alone is not enough: some operators parse and cannot be built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir

from invariclip.backends.tensorrt.library import installed, open_library
from invariclip.errors import ContractError, MissingExtraError
from invariclip.export.quantization.symmetric import uint8_values
from invariclip.export.tensorrt.builder import build
from invariclip.export.tensorrt.plan import plan_engine

if TYPE_CHECKING:
    from pathlib import Path

LARGEST = 32
"""Largest batch of the profile; it begins at 1, so every smaller batch is in it."""


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
