"""Quantisers that others keep: ONNX Runtime's dynamic and static int8, and NNCF's post-training quantisation.

They are candidates like our own, judged by the same contract.
"""

from __future__ import annotations

import io
import logging
import sys
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from typing import TYPE_CHECKING, Any

import onnx

from invariclip.errors import ContractError, MissingExtraError
from invariclip.export.graphs.nodes import HEAD

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

NNCF_SAMPLES = 60
"""Images that NNCF looks at: it answers every value of the graph for each of them alone, which is slow."""


def dynamic(source: Path, target: Path) -> None:
    """ONNX Runtime's dynamic int8: weights per channel, each value's range found at every run; needs no images."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _QuietQuantiser(), _failing("ONNX Runtime's dynamic quantizer"):
        quantize_dynamic(
            source, target, per_channel=True, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"],
            nodes_to_exclude=_left_out(source),
        )  # fmt: skip


def static(source: Path, target: Path, batches: Iterable[NDArray[np.uint8]]) -> None:
    """ONNX Runtime's static Q/DQ int8: ranges by minimum and maximum on the calibration images."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    with _QuietQuantiser(), _failing("ONNX Runtime's static quantizer"):
        quantize_static(
            source, target, _reader(source, batches), quant_format=QuantFormat.QDQ, per_channel=True,
            op_types_to_quantize=["MatMul", "Gemm"], activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            nodes_to_exclude=_left_out(source), calibrate_method=CalibrationMethod.MinMax,
            extra_options={"WeightSymmetric": True},
        )  # fmt: skip


def nncf(source: Path, target: Path, batches: Iterable[NDArray[np.uint8]], *, samples: int = NNCF_SAMPLES) -> None:
    """NNCF's post-training quantisation for transformers, with its SmoothQuant and its bias correction.

    Raises:
        MissingExtraError: NNCF is not installed.
    """
    if find_spec("nncf") is None:
        raise MissingExtraError('int8 by NNCF needs the package nncf: pip install "invariclip[nncf]"')
    library = _nncf()
    library.set_log_level(logging.ERROR)
    model = onnx.load(str(source))
    name = model.graph.input[0].name
    images = [{name: image[None]} for image in islice(_single(batches), samples)]
    attends = any(node.op_type == "Softmax" for node in model.graph.node)
    # its progress bars; a command's answer goes to standard output
    with redirect_stdout(io.StringIO()), _failing("NNCF"):
        quantised = library.quantize(
            model,
            library.Dataset(images),
            subset_size=len(images),
            model_type=library.ModelType.TRANSFORMER if attends else None,
            ignored_scope=library.IgnoredScope(names=_head(model)),
        )
    onnx.save(quantised, str(target))


@contextmanager
def _failing(what: str) -> Iterator[None]:
    """Whatever another's quantizer raises is why its variant is left out; the export goes on.

    Raises:
        ContractError: It could not quantize the graph.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ContractError(f"{what} cannot quantize the graph ({type(error).__name__}: {reason})") from error


def _nncf() -> Any:
    """NNCF, imported without openvino_telemetry, through which it would report its use over the network."""
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("openvino_telemetry")}
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        return import_module("nncf")
    finally:
        del sys.modules["openvino_telemetry"]
        sys.modules.update(kept)


def _single(batches: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
    for batch in batches:
        yield from batch


def _left_out(source: Path) -> list[str]:
    """What stays float32: products of two values (attention's scores and sums), and the class head."""
    model = onnx.load(str(source), load_external_data=False)
    held = {item.name for item in model.graph.initializer}
    moving = [node.name for node in model.graph.node if node.op_type == "MatMul" and not held.intersection(node.input)]
    return moving + _head(model)


def _head(model: onnx.ModelProto) -> list[str]:
    return [node.name for node in model.graph.node if node.name.startswith(HEAD)]


def _reader(source: Path, batches: Iterable[NDArray[np.uint8]]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    name = onnx.load(str(source), load_external_data=False).graph.input[0].name
    left = iter(batches)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Hands the batches on."""

        def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
            batch = next(left, None)
            return None if batch is None else {name: batch}

    return Reader()


class _QuietQuantiser:
    """The quantiser's advice to preprocess is for graphs that were not prepared; it goes to the root logger."""

    def __enter__(self) -> None:
        self._level = logging.getLogger().level
        logging.getLogger().setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        logging.getLogger().setLevel(self._level)
