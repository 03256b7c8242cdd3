"""ONNX Runtime on the CPU."""

from __future__ import annotations

from threading import BoundedSemaphore
from typing import TYPE_CHECKING, Any

import onnxruntime

from invariclip.errors import ArtifactError, InputError
from invariclip.machine import this_machine
from invariclip.threads import calls_at_once, chosen_threads

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.artifact.manifest import Compute

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
        self.threads = chosen_threads(threads)
        if compute != "float32":
            raise InputError(f"onnxruntime computes float32 on the CPU, not {compute}; the backend openvino can")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        # An idle server must not burn a core: waiting threads sleep instead of spinning. On a busy machine, spinning
        # made batch 1 of ViT-B/32 1.5 to 1.7 times slower.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 4  # what goes wrong is raised; said on stderr as well it would be said twice
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
        self._turns = BoundedSemaphore(calls_at_once(self.threads))

    def run(self, inputs: dict[str, NDArray[Any]], outputs: tuple[str, ...] | None = None) -> dict[str, NDArray[Any]]:
        """Answers the named outputs (all, if None), in arrays of the caller's own; inputs are read where they lie.

        Raises:
            InputError: An input or output is not the graph's, or an input is of another shape or dtype.
        """
        names = list(outputs or self.output_names)
        try:
            with self._turns:
                return dict(zip(names, self._session.run(names, inputs), strict=True))
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            reason = " ".join(str(error).split())
            raise InputError(f"ONNX Runtime {onnxruntime.__version__} cannot answer this input: {reason}") from error

    def describe(self) -> dict[str, Any]:
        """What really runs."""
        return {
            "engine": "onnxruntime",
            "version": onnxruntime.__version__,
            "execution_provider": self._session.get_providers()[0],
            "processor": this_machine().processor,
            "computes_in": "float32",
            "threads": self.threads,
            "spinning": False,
        }
