"""Another projection or other classes in a loaded engine, without building it again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from invariclip.backends.tensorrt.library import Messages, logger
from invariclip.errors import DeviceError, InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from invariclip.backends.tensorrt.facts import EngineFacts
    from invariclip.backends.tensorrt.library import Library


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
