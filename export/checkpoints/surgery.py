"""Torch models changed in a copy that shares weights: a part replaced, stacks shortened, training branches folded.

- `with_replaced` puts another part at a dotted path.
- `shorten` drops the middle of every stack. What a graph looks like is decided by the first block, the last block and
  what stands around them; the blocks between them repeat.
- `reparameterized` folds the branches that a timm trunk has for training alone into the convolutions that it serves
  with. MobileCLIP's published scores are those of the folded form. timm folds in the precision that it finds; here
  that is float64, so that the two forms differ by float32's rounding alone.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence

_METHODS = ("reparameterize", "fuse", "switch_to_deploy")
"""What timm calls it."""


def find(module: nn.Module, path: str) -> Any:
    """The thing at a dotted path, or None."""
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part, None)
    return value


def with_replaced(module: nn.Module, path: Sequence[str], new: nn.Module | nn.Parameter) -> nn.Module:
    """A shallow copy of `module` in which the thing at `path` is `new`; everything beside the path is shared."""
    head, *rest = path
    twin = copy.copy(module)
    # copy.copy shares these tables; the original must not see what is put into them
    twin._modules = dict(module._modules)
    twin._parameters = dict(module._parameters)
    if rest:
        twin._modules[head] = with_replaced(getattr(module, head), rest, new)
    elif isinstance(new, nn.Parameter):
        twin._parameters[head] = new
    else:
        twin._modules[head] = new
    return twin


def container_like(original: nn.Module, parts: Sequence[nn.Module]) -> nn.Module:
    """A list of modules of the same kind: timm keeps blocks in a `Sequential`, open_clip in a `ModuleList`."""
    return nn.Sequential(*parts) if isinstance(original, nn.Sequential) else nn.ModuleList(parts)


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


def foldable(module: nn.Module) -> list[str]:
    """Names of the outermost parts of a model that have branches for training alone; often none."""
    names: list[str] = []
    for name, part in module.named_modules():
        inside = any(name.startswith(f"{other}.") for other in names)
        if not inside and name and _folds(part):
            names.append(name)
    return names


def reparameterized(module: nn.Module) -> nn.Module:
    """A model that computes the same with those branches folded; it shares every other weight with the original.

    Args:
        module: An open_clip model in evaluation mode; left as it was.

    Returns:
        A copy in float32. One part at a time is held twice, and in float64, while it is folded.
    """
    from timm.models import reparameterize_model

    twin = shared_copy(module)
    with torch.random.fork_rng(devices=[]), torch.no_grad():  # timm draws weights for the layers that it then fills
        for name in foldable(twin):
            parent_name, _, child = name.rpartition(".")
            parent = twin.get_submodule(parent_name)
            holder = nn.Sequential(copy.deepcopy(parent.get_submodule(child)).double())
            reparameterize_model(holder, inplace=True)
            setattr(parent, child, holder[0].float().eval().requires_grad_(False))
    for part in twin.modules():
        part.__dict__.pop("id_tensor", None)  # timm's helper, in float64 and of no more use
    return twin


def _folds(part: nn.Module) -> bool:
    """Whether timm would fold a part that is not folded yet."""
    if not type(part).__module__.startswith("timm.") or getattr(part, "reparam_conv", None) is not None:
        return False
    return any(hasattr(part, method) for method in _METHODS)
