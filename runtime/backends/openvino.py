"""OpenVINO on the CPU, in the arithmetic that was asked for and nothing less.

Left to itself, OpenVINO computes a float32 graph in bfloat16 or float16 on processors that have it. The hints below
forbid or ask that, and what the compiled graph says of itself is read back, so that `describe` tells what really runs.
"""

from __future__ import annotations

import sys
from collections import Counter
from queue import Empty, LifoQueue
from threading import BoundedSemaphore
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.errors import ArtifactError, InputError
from invariclip.machine import this_machine
from invariclip.threads import calls_at_once, chosen_threads

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.artifact.manifest import Compute

# `import openvino` reports itself over the network where openvino_telemetry is installed, which its wheel requires. A
# server must not: while that package cannot be imported, OpenVINO takes the silent stub that it carries.
_telemetry = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("openvino_telemetry")}
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
try:
    import openvino
    from openvino import properties
    from openvino.properties import hint
finally:
    del sys.modules["openvino_telemetry"]
    sys.modules.update(_telemetry)

DEVICE = "CPU"
VERSION = openvino.__version__.split("-")[0]
_TYPES = {"float32": openvino.Type.f32, "bfloat16": openvino.Type.bf16, "float16": openvino.Type.f16}
_NAMES = {kind: name for name, kind in _TYPES.items()}
# what OpenVINO calls a processor's own arithmetic of that width
_CAPABILITIES = {"bfloat16": "BF16", "float16": "FP16"}
# What OpenVINO keeps of the shapes that it has seen, in compiled primitives. By its own default 5,000, which is no
# bound: 500 batch sizes of a tiny tower then cost 350 MB. A tower has a dozen different primitives or two.
_KEPT_PRIMITIVES = 128
# The layers of a compiled graph that multiply by weights, and what OpenVINO calls the arithmetic of each
_PRODUCTS = ("FullyConnected", "MatMul", "Convolution")
_ARITHMETIC = {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "i8": "int8", "u8": "int8"}


class OpenVinoBackend:
    """One ONNX graph, compiled once; calls that run at the same time have an infer request each, of a bounded pool."""

    def __init__(self, path: Path, *, threads: int | None = None, compute: Compute = "float32") -> None:
        """Loads and compiles the graph.

        Args:
            path: The ONNX file.
            threads: Threads that inference may use; None takes what affinity and cgroup allow.
            compute: What float32 parts of the graph are computed in.

        Raises:
            ArtifactError: The file is not a graph that this OpenVINO can load, or it would run in another arithmetic.
            InputError: `threads` is below 1, or this processor lacks the arithmetic.
        """
        model, self._compiled = compile_graph(path, threads=threads, compute=compute)
        self.threads = int(self._compiled.get_property(properties.inference_num_threads))
        # Compiling may give a port further names; the model as it was read has the graph's own.
        self.input_names = tuple(str(port.get_any_name()) for port in model.inputs)
        self.output_names = tuple(str(port.get_any_name()) for port in model.outputs)
        self.input_shapes = {
            name: tuple(side.get_length() if side.is_static else None for side in port.get_partial_shape())
            for name, port in zip(self.input_names, model.inputs, strict=True)
        }
        self._ports = dict(zip(self.input_names, model.inputs, strict=True))
        self._path = path
        self._idle: LifoQueue[Any] = LifoQueue()
        self._turns = BoundedSemaphore(calls_at_once(self.threads))

    def run(self, inputs: dict[str, NDArray[Any]], outputs: tuple[str, ...] | None = None) -> dict[str, NDArray[Any]]:
        """Answers the named outputs (all, if None), in arrays of the caller's own; inputs are read where they lie.

        Raises:
            InputError: An input or output is not the graph's, or an input is of another shape or dtype.
        """
        self._check(inputs, outputs or ())
        with self._turns:
            try:
                request = self._idle.get_nowait()
            except Empty:
                request = self._compiled.create_infer_request()
            try:
                answers = request.infer(inputs, share_inputs=True, share_outputs=True)
            except Exception as error:  # the request may be broken, so it does not go back
                raise InputError(
                    f"{self._path}: OpenVINO {VERSION} cannot answer this input: {_reason(error)}"
                ) from error
            # The next run of this request overwrites what it answered
            copies = {name: np.array(answers[self.output_names.index(name)]) for name in outputs or self.output_names}
            self._idle.put(request)
        if not all(value.size for value in copies.values()):
            # Shapes that cannot be added up, like ids beyond the context, may come out as no rows at all
            raise InputError(f"{self._path}: OpenVINO {VERSION} cannot answer this input: its answer is empty")
        return copies

    def describe(self) -> dict[str, Any]:
        """What really runs, as the compiled graph tells it; `products` counts its weight layers by their arithmetic."""
        return {
            "engine": "openvino",
            "version": VERSION,
            "execution_provider": ", ".join(self._compiled.get_property(properties.execution_devices)),
            "processor": this_machine().processor,
            "computes_in": _NAMES[self._compiled.get_property(hint.inference_precision)],
            "execution_mode": self._compiled.get_property(hint.execution_mode).name.lower(),
            "products": self._products(),
            "threads": self.threads,
            "spinning": False,
        }

    def _products(self) -> dict[str, int]:
        counted: Counter[str] = Counter()
        for node in self._compiled.get_runtime_model().get_ops():
            facts = node.get_rt_info()
            if facts["layerType"].astype(str) in _PRODUCTS:
                kind = facts["runtimePrecision"].astype(str)
                counted[_ARITHMETIC.get(kind, kind)] += 1
        return dict(sorted(counted.items()))

    def _check(self, inputs: dict[str, NDArray[Any]], outputs: tuple[str, ...]) -> None:
        """Refuses what ONNX Runtime would: OpenVINO takes tensors of other shapes and dtypes without a word."""
        unknown = [name for name in outputs if name not in self.output_names]
        if set(inputs) != set(self._ports) or unknown:
            raise InputError(
                f"{self._path}: got inputs {', '.join(inputs) or 'none'} and outputs {', '.join(outputs) or 'all'}; "
                f"its inputs are {', '.join(self.input_names)}, its outputs {', '.join(self.output_names)}"
            )
        for name, value in inputs.items():
            shape, dtype = self._ports[name].get_partial_shape(), self._ports[name].get_element_type().to_dtype()
            if value.dtype != dtype or not shape.compatible(openvino.PartialShape(list(value.shape))):
                raise InputError(
                    f"{self._path}: input {name} is {value.dtype} {list(value.shape)}; it takes {dtype} {shape}"
                )


def compile_graph(
    path: Path, *, threads: int | None = None, compute: Compute = "float32", profiled: bool = False
) -> tuple[Any, Any]:
    """The graph as it was read, and compiled; arguments and errors are those of `OpenVinoBackend`.

    Args:
        path: The ONNX file.
        threads: Threads that inference may use.
        compute: What float32 parts of the graph are computed in.
        profiled: Let infer requests time every layer, which takes a little time itself.
    """
    config = {
        hint.inference_precision: _TYPES[compute],
        hint.execution_mode: hint.ExecutionMode.ACCURACY if compute == "float32" else hint.ExecutionMode.PERFORMANCE,
        hint.performance_mode: hint.PerformanceMode.LATENCY,
        # The affinity mask and the quota were counted already; pinning to cores of the host would fight them.
        hint.enable_cpu_pinning: False,
        properties.inference_num_threads: chosen_threads(threads),
        properties.enable_profiling: profiled,
        "CPU_RUNTIME_CACHE_CAPACITY": _KEPT_PRIMITIVES,
    }
    try:
        core = openvino.Core()
        _require_arithmetic(core, compute)
        model = core.read_model(str(path))
        compiled = core.compile_model(model, DEVICE, config)
    except InputError:
        raise
    except Exception as error:  # OpenVINO's exceptions share no base class of their own
        raise ArtifactError(f"{path}: OpenVINO {VERSION} cannot load it: {_reason(error)}") from error
    kind = compiled.get_property(hint.inference_precision)
    if kind != _TYPES[compute]:
        raise ArtifactError(
            f"{path}: OpenVINO {VERSION} would run it in {kind.get_type_name()}, not {compute}; take another one"
        )
    return model, compiled


def _require_arithmetic(core: Any, compute: Compute) -> None:
    """Refuses an arithmetic that the processor only emulates: slower than float32, and less exact.

    Raises:
        InputError: It has no such instructions.
    """
    has = core.get_property(DEVICE, properties.device.capabilities)
    wanted = _CAPABILITIES.get(compute)
    if wanted is not None and wanted not in has:
        able = ["float32", *(name for name, word in _CAPABILITIES.items() if word in has)]
        raise InputError(f"this processor has no {compute} arithmetic; available: {', '.join(able)}")


def _reason(error: Exception) -> str:
    """The line of OpenVINO's message that says what is wrong; the others name its own source files."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
