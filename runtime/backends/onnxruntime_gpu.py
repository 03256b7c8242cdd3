"""ONNX Runtime on a GPU: its CUDA, TensorRT and TensorRT-RTX execution providers, with bound memory and CUDA graphs.

ONNX Runtime goes on with the CPU where a provider cannot start, and says so in a log at most. Here that is an error:
what the session really took is read back.
"""

from __future__ import annotations

from collections import OrderedDict
from importlib.metadata import PackageNotFoundError, version
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from invariclip.errors import ArtifactError, DeviceError, InputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.artifact.manifest import Compute


CPU = "CPUExecutionProvider"
WORK = frozenset(
    {
        "Attention", "Conv", "FastGelu", "FusedConv", "FusedGemm", "FusedMatMul", "Gelu", "Gemm", "LayerNormalization",
        "MatMul", "MatMulInteger", "MultiHeadAttention", "QLinearConv", "QLinearMatMul", "SkipLayerNormalization",
        "Softmax",
    }
)  # fmt: skip
"""What must not run on the CPU beside a GPU; arithmetic of shapes may, and ONNX Runtime puts it there on purpose."""
# TensorFloat-32 has 11 bits: float32 means float32 here, as everywhere in this project
DEFAULTS: dict[str, dict[str, str]] = {
    "CUDAExecutionProvider": {
        "use_tf32": "0",
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "do_copy_in_default_stream": "1",
    },
    "TensorrtExecutionProvider": {"trt_engine_cache_enable": "1", "trt_timing_cache_enable": "1"},
    "NvTensorRTRTXExecutionProvider": {},
}
GRAPHS = {
    "CUDAExecutionProvider": "enable_cuda_graph",
    "TensorrtExecutionProvider": "trt_cuda_graph_enable",
    "NvTensorRTRTXExecutionProvider": "enable_cuda_graph",
}
"""What each provider calls the capture of its work."""
_CACHES = {
    "TensorrtExecutionProvider": ("trt_engine_cache_path", "trt_timing_cache_path"),
    "NvTensorRTRTXExecutionProvider": ("nv_runtime_cache_path",),
}


def require_provider(provider: str) -> None:
    """Makes sure that this ONNX Runtime was built with a provider.

    Raises:
        DeviceError: It was not.
    """
    there = onnxruntime.get_available_providers()
    if provider in there:
        return
    mend = 'pip install "invariclip[gpu]"'
    if _is_installed("onnxruntime-gpu") and _is_installed("onnxruntime"):
        # both packages write the same folder, and the CPU one came last
        mend = "pip uninstall onnxruntime onnxruntime-gpu, then install onnxruntime-gpu alone"
    raise DeviceError(
        f"ONNX Runtime {onnxruntime.__version__} has no {provider}; available: {', '.join(there)}; {mend} "
        "(docs/gpu.md says which package brings which provider)"
    )


def nodes_elsewhere(session: Any, provider: str) -> dict[str, int] | None:
    """Operators that another provider than the one asked for runs, and how many of each; None where nobody can tell.

    Args:
        session: Opened with `session.record_ep_graph_assignment_info`.
        provider: The one asked for.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):  # older releases
        return None
    found: dict[str, int] = {}
    for part in session.get_provider_graph_assignment_info():
        if part.ep_name != provider:
            for node in part.get_nodes():
                found[node.op_type] = found.get(node.op_type, 0) + 1
    return dict(sorted(found.items()))


def provider_options(provider: str, path: Path, given: Mapping[str, str] | None) -> dict[str, str]:
    """A provider's options: ours, then the caller's over them. Everything is text, as ONNX Runtime wants it.

    Engines and timings that a provider builds by itself are kept in `engines/` beside the graph.

    Args:
        provider: Its name.
        path: The graph.
        given: The caller's.
    """
    caches = {name: str(path.parent / "engines") for name in _CACHES.get(provider, ())}
    return {**DEFAULTS[provider], **caches, GRAPHS[provider]: "1", **{k: str(v) for k, v in (given or {}).items()}}


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


UNCAPTURED = -1
"""What ONNX Runtime calls a run that is not to be captured; without a number it is captured as number 0."""
MAX_GRAPHS = 64
"""Sets of shapes whose work is captured; further ones run without."""


class OnnxRuntimeGpuBackend:
    """One ONNX graph in one session on a GPU; `PROVIDER` is set by the classes below."""

    PROVIDER = ""
    MEMORY = "cuda"
    """What ONNX Runtime calls the GPU's memory."""

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        compute: Compute = "float32",
        options: Mapping[str, str] | None = None,
    ) -> None:
        """Loads the graph on the GPU.

        Args:
            path: The ONNX file.
            threads: Means nothing on a GPU; must be None or at least 1.
            compute: `float32` alone: a graph's precision is its own, see the variant `float16-islands`.
            options: The provider's own, by the names of ONNX Runtime's documentation, over `DEFAULTS`.

        Raises:
            DeviceError: This ONNX Runtime has no such provider, or it cannot start.
            ArtifactError: The file is not a graph that it can load.
            InputError: `threads` or `compute` is out of range.
        """
        if threads is not None and threads < 1:
            raise InputError(f"threads must be at least 1, not {threads}")
        if compute != "float32":
            raise InputError(
                f"{self.PROVIDER} computes what the graph says, not {compute} on demand; "
                "export with --variant float16-islands"
            )
        require_provider(self.PROVIDER)
        self._options = provider_options(self.PROVIDER, path, options)
        self._captures = self._options.get(GRAPHS[self.PROVIDER]) == "1"
        self._session = self._open(path)
        self.input_names = tuple(item.name for item in self._session.get_inputs())
        self.output_names = tuple(item.name for item in self._session.get_outputs())
        self.input_shapes = {
            item.name: tuple(side if isinstance(side, int) else None for side in item.shape)
            for item in self._session.get_inputs()
        }
        self._path = path
        self._lock = Lock()
        self._bound: OrderedDict[Any, _Binding] = OrderedDict()

    def run(self, inputs: dict[str, NDArray[Any]], outputs: tuple[str, ...] | None = None) -> dict[str, NDArray[Any]]:
        """Answers the named outputs (all, if None), in arrays of the caller's own.

        A captured graph has one place for each tensor, so with CUDA graphs calls of several threads take turns; the
        GPU is one, and a queue in front of it is what they would meet anyway.

        Raises:
            InputError: An input or output is not the graph's, or an input is of another shape or dtype.
        """
        names = tuple(outputs or self.output_names)
        try:
            if not self._captures:
                return self._bound_run(inputs, names)
            with self._lock:
                return self._captured_run(inputs, names)
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            reason = " ".join(str(error).split())
            raise InputError(f"ONNX Runtime {onnxruntime.__version__} cannot answer this input: {reason}") from error

    def describe(self) -> dict[str, Any]:
        """What really runs, as the session tells it."""
        return {
            "engine": "onnxruntime",
            "version": onnxruntime.__version__,
            "execution_provider": self._session.get_providers()[0],
            "provider_options": self._session.get_provider_options().get(self.PROVIDER, {}),
            "processor": f"GPU {self._device_id()}",
            "computes_in": "the graph's own types",
            "nodes_on_cpu": "this ONNX Runtime cannot tell" if self._elsewhere is None else self._elsewhere,
            "cuda_graphs": self._captures,
            "threads": 1,
            "spinning": False,
        }

    def _open(self, path: Path) -> Any:
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        try:
            session = onnxruntime.InferenceSession(
                str(path), settings, providers=[(self.PROVIDER, dict(self._options))]
            )
        except Exception as error:
            raise ArtifactError(
                f"{path}: ONNX Runtime {onnxruntime.__version__} cannot load it with {self.PROVIDER}: {error}"
            ) from error
        taken = session.get_providers()
        if not taken or taken[0] != self.PROVIDER:
            raise DeviceError(
                f"{path}: {self.PROVIDER} did not start, and ONNX Runtime took {', '.join(taken)} instead, which is "
                "refused; its driver or CUDA libraries are missing or of another version (see docs/gpu.md)"
            )
        session.disable_fallback()
        self._elsewhere = nodes_elsewhere(session, self.PROVIDER)
        slow = sorted({node for node in self._elsewhere or () if node in WORK})
        if slow:
            raise DeviceError(
                f"{path}: {self.PROVIDER} leaves {', '.join(slow)} to the CPU, with a copy each way, which is refused; "
                "take another variant or another provider"
            )
        return session

    def _bound_run(self, inputs: dict[str, NDArray[Any]], names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        binding = self._session.io_binding()
        for name, value in inputs.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for name in names:
            binding.bind_output(name)
        self._session.run_with_iobinding(binding, _graph_options(UNCAPTURED))
        return dict(zip(names, binding.copy_outputs_to_cpu(), strict=True))

    def _captured_run(self, inputs: dict[str, NDArray[Any]], names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        """Runs in memory that stays where it is, so that what was captured once can be launched again."""
        key = (names, *sorted((name, value.shape, value.dtype.str) for name, value in inputs.items()))
        bound = self._bound.get(key)
        if bound is None:
            if len(self._bound) >= MAX_GRAPHS:
                return self._bound_run(inputs, names)
            shapes = {name: value.shape for name, value in self._bound_run(inputs, names).items()}
            bound = _Binding(self._session, inputs, shapes, (self.MEMORY, self._device_id()), len(self._bound) + 1)
            self._bound[key] = bound
        return bound.run(self._session, inputs, names)

    def _device_id(self) -> int:
        return int(self._options.get("device_id", "0"))


class CudaBackend(OnnxRuntimeGpuBackend):
    """ONNX Runtime's own CUDA kernels."""

    PROVIDER = "CUDAExecutionProvider"


class TensorRtProviderBackend(OnnxRuntimeGpuBackend):
    """TensorRT under ONNX Runtime."""

    PROVIDER = "TensorrtExecutionProvider"


class TensorRtRtxProviderBackend(OnnxRuntimeGpuBackend):
    """TensorRT-RTX under ONNX Runtime."""

    PROVIDER = "NvTensorRTRTXExecutionProvider"


class _Binding:
    """Device memory of one set of shapes, bound once."""

    def __init__(
        self,
        session: Any,
        inputs: dict[str, NDArray[Any]],
        outputs: dict[str, tuple[int, ...]],
        memory: tuple[str, int],
        number: int,
    ) -> None:
        self._binding = session.io_binding()
        self._options = _graph_options(number)
        self._given = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value), *memory)
            for name, value in inputs.items()
        }
        kinds = {item.name: _dtype(item.type) for item in session.get_outputs()}
        self._answers = {
            name: onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(shape), kinds[name], *memory)
            for name, shape in outputs.items()
        }
        for name, value in self._given.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in self._answers.items():
            self._binding.bind_ortvalue_output(name, value)

    def run(self, session: Any, inputs: dict[str, NDArray[Any]], names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        """Copies in, runs or launches, copies out."""
        for name, value in inputs.items():
            self._given[name].update_inplace(np.ascontiguousarray(value))
        session.run_with_iobinding(self._binding, self._options)
        return {name: np.array(self._answers[name].numpy()) for name in names}


def _graph_options(number: int) -> Any:
    """Options of a run whose work is captured, or launched, under a number."""
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(number))
    return options


def _dtype(kind: str) -> Any:
    """Numpy's word for what ONNX Runtime calls `tensor(float)`."""
    names = {"float": "float32", "double": "float64"}
    inner = kind.removeprefix("tensor(").removesuffix(")")
    return np.dtype(names.get(inner, inner)).type
