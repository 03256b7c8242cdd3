"""NumPy on one thread: on a busy machine its threads wait for each other and take four times the processor."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from invariclip.errors import MissingExtraError


def bound_blas(threads: int = 1) -> None:
    """Bounds the threads of the BLAS that NumPy has loaded, for the rest of the process.

    Args:
        threads: How many; engines of models have their own.

    Raises:
        MissingExtraError: scikit-learn, which brings threadpoolctl, is not installed.
    """
    try:
        pools: Any = import_module("threadpoolctl")
    except ImportError:
        raise MissingExtraError('this study needs scikit-learn: pip install "invariclip[bench]"') from None
    pools.threadpool_limits(limits=threads, user_api="blas")
