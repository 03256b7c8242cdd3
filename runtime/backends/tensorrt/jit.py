"""What TensorRT-RTX compiles on the GPU when a context is made, and where it is kept, so that it is done once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from invariclip.files import write_atomically

if TYPE_CHECKING:
    from pathlib import Path

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
