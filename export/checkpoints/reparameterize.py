"""The branches that a timm trunk has only for training, folded into the convolutions that it serves with.

MobileCLIP's published scores are those of the folded form. timm folds in the precision that it finds; here that is
float64, so that the two forms differ by float32's rounding alone.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from invariclip.export.checkpoints.shorten import shared_copy

_METHODS = ("reparameterize", "fuse", "switch_to_deploy")
"""What timm calls it."""


def foldable(module: nn.Module) -> list[str]:
    """Names of the outermost parts of a model that have branches for training alone; often none."""
    found: list[str] = []
    for name, part in module.named_modules():
        inside = any(name.startswith(f"{other}.") for other in found)
        if not inside and name and _folds(part):
            found.append(name)
    return found


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
