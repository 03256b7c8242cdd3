"""Replacing a part of a torch model without changing the model: what is not on the way to the part stays shared."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence


def find(module: nn.Module, path: str) -> Any:
    """The thing at a dotted path, or None."""
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


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
