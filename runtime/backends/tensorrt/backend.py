"""TensorRT and TensorRT-RTX engines on a GPU, through cuda-python; PyTorch is not needed.

Nothing is built here: an engine for this graph, library and GPU lies beside the graph (`invariclip engines`), or the
backend says which one is missing. What TensorRT-RTX compiles on the GPU when a context is made is kept on disk. Another
projection or other classes can be put into a loaded engine without building it again.
"""

from __future__ import annotations

import warnings
from threading import RLock
from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.backends.tensorrt.device import Device
from invariclip.backends.tensorrt.facts import find_engine
from invariclip.backends.tensorrt.known_bad import require_sound
from invariclip.backends.tensorrt.library import Messages, logger, open_library
from invariclip.backends.tensorrt.slot import DEFAULT_SLOTS, Pool, Slot, shapes_of
from invariclip.errors import DeviceError, InputError, KernelCacheWarning
from invariclip.files import write_atomically

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.artifact.manifest import Compute
    from invariclip.backends.tensorrt.facts import EngineFacts
    from invariclip.backends.tensorrt.library import Library


MAX_CACHE = 1 << 30
"""Bytes of a kept cache that are read."""


class Kernels:
    """How an engine of TensorRT-RTX makes its contexts, with a cache of kernels in a file."""

    def __init__(self, trt: Any, engine: Any, path: Path) -> None:
        """Reads the cache, if there is one; the library refuses what another release or GPU has written.

        Args:
            trt: The library's module.
            engine: The loaded engine.
            path: The cache's file.
        """
        self._path = path
        self._config = engine.create_runtime_config()
        # kernels for the very shapes, before the first answer: with lazy ones the first answers would be slow
        strategies = trt.DynamicShapesKernelSpecializationStrategy
        self._config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        # we capture ourselves, see `slot`
        self._config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        self._cache = self._config.create_runtime_cache()
        self.loaded = self._read()
        self._config.set_runtime_cache(self._cache)
        self._kept = 0

    def context(self, engine: Any) -> Any:
        """A new execution context."""
        return engine.create_execution_context(self._config)

    def keep(self) -> None:
        """Writes the cache where it has grown.

        Raises:
            InputError: The folder cannot be written.
        """
        content = self._cache.serialize()
        if content is not None and content.nbytes > self._kept:
            self._kept = int(content.nbytes)
            write_atomically(self._path, bytes(content))

    def _read(self) -> bool:
        if not self._path.is_file() or self._path.stat().st_size > MAX_CACHE:
            return False
        return bool(self._cache.deserialize(self._path.read_bytes()))


def refit(engine: Any, facts: EngineFacts, library: Library, weights: Mapping[str, NDArray[Any]]) -> None:
    """Exchanges initializers of a loaded engine; nothing may be running in it meanwhile.

    Args:
        engine: The loaded engine.
        facts: Its sidecar, which names what may be exchanged.
        library: What loaded it.
        weights: New values by name, of the shape that the initializer had: `projection` [D, d], `class_bank` [d, K].

    Raises:
        InputError: A name cannot be exchanged, or its values are of another size or not finite.
        DeviceError: The library refuses.
    """
    unknown = [name for name in weights if name not in facts.key.refit]
    if unknown:
        raise InputError(
            f"{facts.graph}: its engine cannot exchange {', '.join(unknown)}; available: "
            f"{', '.join(facts.key.refit) or 'nothing, build it with --refit'}"
        )
    trt, messages = library.trt, Messages()
    refitter = trt.Refitter(engine, logger(trt, messages))
    held = []  # the refitter points at these until it is done
    for name, numbers in weights.items():
        prototype = refitter.get_weights_prototype(name)
        values = np.ascontiguousarray(numbers, dtype=np.dtype(trt.nptype(prototype.dtype)))
        if values.size != prototype.size or not np.isfinite(values).all():
            raise InputError(f"{name}: {prototype.size} finite values are needed, not {list(np.shape(numbers))}")
        held.append(values)
        if not refitter.set_named_weights(name, trt.Weights(values)):
            raise DeviceError(f"{facts.graph}: {library.title} does not take {name}: {messages.line()}")
    missing = list(refitter.get_missing_weights())
    if missing:
        raise InputError(f"{facts.graph}: these have to be exchanged together with it: {', '.join(missing)}")
    if not refitter.refit_cuda_engine():
        raise DeviceError(f"{facts.graph}: {library.title} cannot refit its engine: {messages.line()}")


OPTIONS = {"library": None, "device_id": "0", "cuda_graphs": "1", "slots": str(DEFAULT_SLOTS)}
"""What `options` may say: `tensorrt` or `tensorrt_rtx`; the GPU; 0 to capture nothing; contexts at most."""


class TensorRtBackend:
    """One engine, deserialised once; calls that run at the same time have a context and a stream each."""

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        compute: Compute = "float32",
        options: Mapping[str, str] | None = None,
    ) -> None:
        """Finds and loads the engine of a graph.

        Args:
            path: The ONNX file; its engines lie in `engines/` beside it.
            threads: Means nothing on a GPU; must be None or at least 1.
            compute: `float32` alone: a graph's precision is its own, see the variant `float16-islands`.
            options: See `OPTIONS`.

        Raises:
            MissingExtraError: No TensorRT library or no cuda-python is installed.
            DeviceError: No driver, no GPU, a release that is known to be wrong, or the engine does not load.
            ArtifactError: No engine matches the graph, the library and the GPU.
            InputError: `threads`, `compute` or an option is out of range.
        """
        chosen = _chosen(options)
        if threads is not None and threads < 1:
            raise InputError(f"threads must be at least 1, not {threads}")
        if compute != "float32":
            raise InputError(
                f"TensorRT computes what the graph says, not {compute} on demand; export with --variant float16-islands"
            )
        self._library = open_library(chosen["library"])
        self._device = Device(_number(chosen, "device_id"))
        self._path = path
        self._engine_path, self._facts = find_engine(path, self._library, self._device.gpu)
        key = self._facts.key
        accepted = bool(self._facts.made.get("known_bad_accepted"))
        require_sound(key.library, key.library_version, key.precision, self._device.gpu.capability, accept=accepted)
        self._captures = chosen["cuda_graphs"] != "0"
        self._messages = Messages()
        self._engine = self._load()
        self._contexts, self._unkept = RLock(), False
        self._kernels: Kernels | None = None
        if self._library.name == "tensorrt_rtx":
            cache = self._engine_path.with_suffix(".kernels")
            self._kernels = Kernels(self._library.trt, self._engine, cache)
        self._pool = Pool(self._slot, _number(chosen, "slots"))
        self.input_names, self.output_names = tuple(self._facts.inputs), tuple(self._facts.outputs)
        self.input_shapes = {name: self._shape(name) for name in self.input_names}
        self.largest_batch = max(
            (three[2][0] for profile in key.profiles for three in profile.shapes.values()), default=1
        )

    def run(self, inputs: dict[str, NDArray[Any]], outputs: tuple[str, ...] | None = None) -> dict[str, NDArray[Any]]:
        """Answers the named outputs (all, if None), in arrays of the caller's own; inputs are read where they lie.

        More rows than the engine takes go in several runs.

        Raises:
            InputError: An input or output is not the graph's, or an input is of another shape or dtype.
            DeviceError: The GPU fails.
        """
        wanted = tuple(outputs or self.output_names)
        self._check(inputs, wanted)
        rows = {name: len(value) for name, value in inputs.items() if self._is_free(name)}
        most = max(rows.values(), default=0)
        if most <= self.largest_batch:
            return self._run(inputs, wanted)
        parts = []
        for start in range(0, most, self.largest_batch):
            part = {
                name: value[start : start + self.largest_batch] if name in rows else value
                for name, value in inputs.items()
            }
            parts.append(self._run(part, wanted))
        return {name: np.concatenate([part[name] for part in parts]) for name in wanted}

    def refit(self, weights: Mapping[str, NDArray[Any]]) -> None:
        """Exchanges the projection or the classes; the caller sees to it that nothing runs meanwhile.

        Args:
            weights: See `tensorrt.refit`.

        Raises:
            InputError: A name cannot be exchanged, or the values do not fit.
            DeviceError: The library refuses.
        """
        self._device.use()
        refit(self._engine, self._facts, self._library, weights)
        self._pool.close()  # captured work may hold what was exchanged

    def time(self, inputs: dict[str, NDArray[Any]], runs: int) -> list[float]:
        """Milliseconds of single runs on the GPU, by its own events and without copies."""
        self._check(inputs, self.output_names)
        with self._pool.slot(shapes_of(inputs)) as slot:
            return slot.time(inputs, runs)

    def describe(self) -> dict[str, Any]:
        """What really runs."""
        gpu = self._device.gpu
        return {
            "engine": self._library.name,
            "version": self._library.version,
            "execution_provider": "TensorRT engine",
            "processor": f"{gpu.name} (compute capability {gpu.capability[0]}.{gpu.capability[1]})",
            "driver": f"CUDA {gpu.driver}",
            "file": self._engine_path.name,
            "computes_in": self._facts.key.precision,
            "batches": [profile_batches(three) for three in self._facts.key.profiles],
            "exchangeable": list(self._facts.key.refit),
            "cuda_graphs": self._captures,
            "threads": 1,
            "spinning": False,
        }

    def _load(self) -> Any:
        trt = self._library.trt
        self._device.use()
        self._runtime = trt.Runtime(logger(trt, self._messages))
        engine = self._runtime.deserialize_cuda_engine(self._engine_path.read_bytes())
        if engine is None:
            raise DeviceError(
                f"{self._engine_path}: {self._library.title} cannot load it on {self._device.gpu.name}: "
                f"{self._messages.line()}"
            )
        return engine

    def _slot(self, fixed: bool) -> Slot:
        self._device.use()
        with self._contexts:  # contexts are made one at a time
            context = self._kernels.context(self._engine) if self._kernels else self._engine.create_execution_context()
            self._unkept = self._kernels is not None
        if context is None:
            raise DeviceError(f"{self._engine_path}: no execution context can be made: {self._messages.line()}")
        return Slot(self._device, self._engine, self._facts, context=context, captures=fixed and self._captures)

    def _run(self, inputs: dict[str, NDArray[Any]], outputs: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        shapes = shapes_of(inputs)
        if not any(profile.takes(dict(shapes)) for profile in self._facts.key.profiles):
            said = ", ".join(f"{name} {list(shape)}" for name, shape in shapes)
            ranges = "; ".join(
                f"{name} {list(low)} to {list(high)}"
                for profile in self._facts.key.profiles
                for name, (low, _, high) in profile.shapes.items()
            )
            raise InputError(f"{self._path}: its engine cannot answer this input: {said} is in no profile: {ranges}")
        with self._pool.slot(shapes) as slot:
            answers = slot.run(inputs, outputs)
        if self._unkept:
            self._keep_kernels()
        return answers

    def _keep_kernels(self) -> None:
        with self._contexts:
            self._unkept = False
            try:
                if self._kernels is not None:
                    self._kernels.keep()
            except InputError as error:  # a read-only artifact answers all the same, and compiles at every start
                warnings.warn(f"kernels that were compiled are not kept: {error}", KernelCacheWarning, stacklevel=4)

    def _check(self, inputs: dict[str, NDArray[Any]], outputs: tuple[str, ...]) -> None:
        unknown = [name for name in outputs if name not in self.output_names]
        if set(inputs) != set(self.input_names) or unknown:
            raise InputError(
                f"{self._path}: got inputs {', '.join(inputs) or 'none'} and outputs {', '.join(outputs)}; "
                f"its inputs are {', '.join(self.input_names)}, its outputs {', '.join(self.output_names)}"
            )
        for name, value in inputs.items():
            wanted, dtype = self.input_shapes[name], self._facts.inputs[name]
            fits = len(value.shape) == len(wanted) and all(
                side is None or side == given for side, given in zip(wanted, value.shape, strict=True)
            )
            if value.dtype != np.dtype(dtype) or not fits or not value.size:
                raise InputError(
                    f"{self._path}: its engine cannot answer this input: {name} is {value.dtype} {list(value.shape)}; "
                    f"it takes {dtype} {['?' if side is None else side for side in wanted]}"
                )

    def _is_free(self, name: str) -> bool:
        return bool(self.input_shapes[name]) and self.input_shapes[name][0] is None

    def _shape(self, name: str) -> tuple[int | None, ...]:
        return tuple(None if side < 0 else int(side) for side in self._engine.get_tensor_shape(name))


def profile_batches(profile: Any) -> list[int]:
    """Smallest, usual and largest batch of a profile."""
    return next(([shape[0] for shape in three] for three in profile.shapes.values()), [])


def _chosen(options: Mapping[str, str] | None) -> dict[str, Any]:
    given = dict(options or {})
    unknown = [name for name in given if name not in OPTIONS]
    if unknown:
        raise InputError(f"tensorrt has no option {', '.join(unknown)}; available: {', '.join(OPTIONS)}")
    return {**OPTIONS, **given}


def _number(chosen: Mapping[str, Any], name: str) -> int:
    if not str(chosen[name]).isdecimal():
        raise InputError(f"{name} must be a whole number, not {chosen[name]!r}")
    return int(chosen[name])
