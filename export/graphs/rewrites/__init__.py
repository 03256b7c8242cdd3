"""Exact savings as data: a rewrite has a name, says where it applies, what it does, and what must hold afterwards.

`plan` is the list of them all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir
    from torch import nn

    from invariclip.preprocessing.pixels import PixelSpec

Tower: TypeAlias = Literal["image", "text"]


class RewriteNotApplicableError(Exception):
    """A rewrite does not apply to a tower; the message is the reason, and the tower stays as it was."""


@dataclass
class Subject:
    """A tower on its way through the rewrites.

    Attributes:
        tower: Which one.
        encoder: Its torch encoder, see `trace.part_of`. A rewrite puts a changed copy here; the model it came from is
            never touched.
        pixels: How images become its input.
        applied: Names of the rewrites that have been applied.
    """

    tower: Tower
    encoder: nn.Module
    pixels: PixelSpec
    applied: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Rewrite:
    """One exact saving.

    Attributes:
        name: How it is switched off and named in the plan.
        towers: Where it could apply.
        saves: What it saves, and why that is exact, in words.
        module: Changes the subject's encoder before tracing and says what it did; raises RewriteNotApplicableError.
        graph: Changes the traced graph and says what it did; raises RewriteNotApplicableError.
        holds: Post-condition: looks at the finished graph and returns what is wrong with it, or None.
        needs: Rewrites that must have been applied before.
    """

    name: str
    towers: tuple[Tower, ...]
    saves: str
    module: Callable[[Subject], str] | None = None
    graph: Callable[[ir.Model, Subject], str] | None = None
    holds: Callable[[ir.Model], str | None] = lambda model: None
    needs: tuple[str, ...] = ()
