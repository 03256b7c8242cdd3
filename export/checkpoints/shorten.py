"""A model without the middle of its stacks: the same kinds of layers in the same places, and far fewer of them.

What a graph looks like is decided by the first block, the last block and what stands around them; the blocks between
them repeat.
"""

from __future__ import annotations

import copy

import torch
from torch import nn


def shorten(module: nn.Module) -> None:
    """Drops the middle of every stack of a model, in place: transformers, stages, timm's and Hugging Face's blocks."""
    for stack in [part for part in module.modules() if isinstance(part, nn.ModuleList | nn.Sequential)]:
        _shorten(stack)


def shared_copy(module: nn.Module) -> nn.Module:
    """A deep copy whose parameters and buffers are the original's own: structure may change, weights are not doubled.

    Args:
        module: Left as it was. Whoever writes into a parameter of the copy writes into the original.
    """
    tensors: list[torch.Tensor] = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def _shorten(stack: nn.ModuleList | nn.Sequential) -> None:
    """Drops children between the first and the last that are built like the last.

    Of two neighbours that are built alike, the second takes what the first gives, so either may go. A child that is
    built otherwise (another width, a projection, no parameters at all) has its place and stays.
    """
    children = list(stack.named_children())
    if len(children) < 3:
        return
    last = _build_of(children[-1][1])
    if not last[1]:
        return
    dropped = [name for name, child in children[1:-1] if _build_of(child) == last]
    for name in dropped:
        del stack._modules[name]
    # forward loops go over the values, but a ModuleList is indexed by place
    stack._modules = {
        str(place) if isinstance(stack, nn.ModuleList) else name: child
        for place, (name, child) in enumerate(stack._modules.items())
    }


def _build_of(module: nn.Module) -> tuple[str, tuple[tuple[str, torch.Size], ...]]:
    shapes = tuple((name, tensor.shape) for name, tensor in (*module.named_parameters(), *module.named_buffers()))
    kinds = ",".join(type(part).__name__ for part in module.modules())
    return kinds, shapes
