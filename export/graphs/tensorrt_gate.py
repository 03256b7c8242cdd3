"""Whether TensorRT would take a graph, asked of TensorRT-RTX on a machine without a GPU.

Its parser and its builder run on the CPU. Parsing alone is not enough: some operators parse and cannot be built.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from invariclip.errors import ContractError, MissingExtraError

if TYPE_CHECKING:
    from pathlib import Path

BATCHES = (1, 8, 32)
"""Smallest, usual and largest batch of the profile."""
SIDES = (32, 480, 1024)
"""The same of a free height or width, in pixels."""
LENGTHS = (1, 16, 65536)
"""The same of a free text length, in ids; the graph's own limit comes first."""


@dataclass(frozen=True)
class Gate:
    """A graph that was built.

    Attributes:
        version: Of TensorRT-RTX.
        seconds: What parsing and building took.
        engine_bytes: Size of the engine.
    """

    version: str
    seconds: float
    engine_bytes: int


def build_on_cpu(path: Path, *, longest: int = 77) -> Gate:
    """Parses and builds a graph with TensorRT-RTX; no GPU is needed, and the engine is thrown away.

    Args:
        path: The ONNX file.
        longest: Largest text length, where that is free.

    Raises:
        MissingExtraError: TensorRT-RTX is not installed.
        ContractError: It does not parse or does not build; the message is TensorRT's own.
    """
    try:
        import tensorrt_rtx as trt
    except ImportError as error:
        raise MissingExtraError(
            'the TensorRT gate needs tensorrt_rtx: pip install "invariclip[tensorrt-rtx]"'
        ) from error
    began = time.monotonic()
    logger = _quiet_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        reasons = [str(parser.get_error(place)) for place in range(parser.num_errors)]
        raise ContractError(f"{path.name}: TensorRT-RTX {trt.__version__} does not parse it: {_line(reasons)}")
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for place in range(network.num_inputs):
        tensor = network.get_input(place)
        profile.set_shape(tensor.name, *_shapes(tuple(tensor.shape), longest))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ContractError(f"{path.name}: TensorRT-RTX {trt.__version__} cannot build it: {_line(logger.said)}")
    return Gate(str(trt.__version__), time.monotonic() - began, int(engine.nbytes))


def _shapes(shape: tuple[int, ...], longest: int) -> list[tuple[int, ...]]:
    """Smallest, usual and largest shape of an input whose free dimensions are -1."""
    shapes = []
    for which in range(3):
        length = min(LENGTHS[which], longest)
        free = [BATCHES[which]] + ([length] if len(shape) == 2 else [SIDES[which]] * (len(shape) - 1))
        shapes.append(tuple(size if size >= 0 else free[place] for place, size in enumerate(shape)))
    return shapes


def _quiet_logger(trt: Any) -> Any:
    """A logger that keeps what is wrong instead of printing it."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.said: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.said.append(message)

    return Logger()


def _line(reasons: list[str]) -> str:
    return " ".join(" ".join(reasons).split())[:500] or "no reason given"
