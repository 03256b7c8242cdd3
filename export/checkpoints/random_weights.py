"""Seeded random weights that fill quickly and leave no part of a model without effect.

Libraries start layers where training likes to start: biases and the last norm of a residual branch at zero, norms at
one, layer scales at 1e-6. A graph that dropped such a layer would answer as before, and nothing would show it. Here
every matrix is drawn once, by its fan-in, and every vector whose elements are all alike is stirred.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Sequence

_EMBEDDING_STD = 0.02
_BIAS_STD = 0.05


class Unfilled(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is active, matrices of new models keep what the allocator gave them.

    Building a model draws all its weights, only for a file's to replace them. Memory that nobody wrote is not resident
    either. Whoever builds so must fill every matrix afterwards: `fill`, or a strict `weights.fit`.
    """

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Leaves out operations that write into a matrix parameter."""
        if args and isinstance(args[0], nn.Parameter) and _is_matrix(args[0]) and _writes(func):
            return args[0]
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def fill(module: nn.Module, seed: int) -> None:
    """Fills a model with random weights, in place; scalars (temperature and bias of the logits) stay.

    Args:
        module: A model, built with or without `Unfilled`.
        seed: The same seed gives the same weights whatever was in memory before.
    """
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    for owner in module.modules():
        norm = "norm" in type(owner).__name__.lower()
        for name, parameter in owner.named_parameters(recurse=False):
            if id(parameter) in done:
                continue
            done.add(id(parameter))
            if _is_matrix(parameter):
                parameter.normal_(0, _std(parameter, name, owner), generator=generator)
            elif parameter.numel() > 1:
                _stir(parameter, generator, scale=norm and name == "weight")
        if isinstance(owner, nn.modules.batchnorm._BatchNorm):
            if owner.running_mean is not None:
                owner.running_mean.normal_(0, 0.1, generator=generator)
            if owner.running_var is not None:
                owner.running_var.uniform_(0.5, 1.5, generator=generator)


def _stir(vector: torch.Tensor, generator: torch.Generator, *, scale: bool) -> None:
    """Noise around the value that all elements share; vectors that already differ stay as they are."""
    common = float(vector.reshape(-1)[0])
    if not bool((vector == common).all()):
        return
    if common == 0 and not scale:
        vector.normal_(0, _BIAS_STD, generator=generator)
    elif common == 0:  # the last norm of a branch: it counts
        vector.uniform_(0.2, 0.5, generator=generator)
    elif abs(common) < 0.5:  # a layer scale: larger ones make deep stacks of batch norms amplify rounding
        vector.uniform_(0.05, 0.15, generator=generator)
    else:
        vector.normal_(common, 0.1 * abs(common), generator=generator)


def _std(matrix: torch.Tensor, name: str, owner: nn.Module) -> float:
    if isinstance(owner, nn.Embedding) or "pos" in name or "token" in name:
        return _EMBEDDING_STD
    return 1 / math.sqrt(matrix.numel() / matrix.shape[0])


def _is_matrix(tensor: torch.Tensor) -> bool:
    return sum(size > 1 for size in tensor.shape) > 1


def _writes(func: Any) -> bool:
    """Whether an operation is one of those that end in an underscore: `normal_`, `mul_`, `copy_`."""
    return str(func.overloadpacket.__name__).endswith("_")
