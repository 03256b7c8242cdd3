"""ONNX Runtime on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnxruntime

from invariclip.backends.threads import available_threads
from invariclip.errors import ArtifactError, InputError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.manifest import Compute

PROVIDER = "CPUExecutionProvider"


class OnnxRuntimeBackend:
    """One ONNX graph in one session, shared by any number of threads."""

    def __init__(self, path: Path, *, threads: int | None = None, compute: Compute = "float32") -> None:
        """Loads the graph.

        Args:
            path: The ONNX file.
            threads: Intra-op threads; None takes what affinity and cgroup allow.
            compute: What it may compute in; on the CPU this engine knows float32 alone.

        Raises:
            ArtifactError: The file is not a graph that this ONNX Runtime can load.
            InputError: `threads` is below 1, or another `compute` than float32 is asked for.
        """
        if threads is not None and threads < 1:
            raise InputError(f"threads must be at least 1, not {threads}")
        if compute != "float32":
            raise InputError(f"onnxruntime computes float32 on the CPU, not {compute}; the backend openvino can")
        self.threads = threads or available_threads()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        # An idle server must not burn a core: waiting threads sleep instead of spinning.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=[PROVIDER])
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise ArtifactError(f"{path}: ONNX Runtime {onnxruntime.__version__} cannot load it: {error}") from error
        self.input_names = tuple(item.name for item in self._session.get_inputs())
        self.output_names = tuple(item.name for item in self._session.get_outputs())
        self.input_shapes = {
            item.name: tuple(side if isinstance(side, int) else None for side in item.shape)
            for item in self._session.get_inputs()
        }

    def run(self, inputs: dict[str, NDArray[Any]], outputs: tuple[str, ...] | None = None) -> dict[str, NDArray[Any]]:
        """Answers the named outputs (all, if None)."""
        names = list(outputs or self.output_names)
        try:
            return dict(zip(names, self._session.run(names, inputs), strict=True))
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            reason = " ".join(str(error).split())
            raise InputError(f"ONNX Runtime {onnxruntime.__version__} cannot answer this input: {reason}") from error

    def describe(self) -> dict[str, Any]:
        """What really runs."""
        return {
            "engine": "onnxruntime",
            "version": onnxruntime.__version__,
            "execution provider": self._session.get_providers()[0],
            "computes in": "float32",
            "threads": self.threads,
        }
