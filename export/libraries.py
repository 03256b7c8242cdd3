"""Other libraries, made fit to be used: open_clip imported beside a CPU torch, and remarks on their own work silenced.

torchvision's wheel is built against CUDA. Beside a CPU build of torch its extension does not load, and
`import torchvision`, and with it `import open_clip`, dies with `operator torchvision::nms does not exist`, because it
registers fake kernels for ops that were never declared. CLIP needs none of them: declaring their schemas is enough.
Call `declare_missing_ops()` before the first import of torchvision or open_clip.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

_BOXES = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library: torch.library.Library | None = None


def declare_missing_ops() -> None:
    """Declares `torchvision::nms` and `qnms` if the real ones cannot be loaded; does nothing otherwise."""
    global _library  # the declaration lives as long as this object
    if _library is not None or _torchvision_works():
        return
    _library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        _library.define(name + _BOXES)  # type: ignore[no-untyped-call]


def _torchvision_works() -> bool:
    """Whether the compiled ops load. A failed import leaves nothing behind in sys.modules that would stay broken."""
    import importlib
    import sys

    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        return False
    return True


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, warnings and log records below error go nowhere."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
