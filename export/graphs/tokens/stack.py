"""An image tower's blocks with merges between attention and MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from invariclip.export.graphs.rewrites.attention import TransformerBlock
    from invariclip.export.graphs.tokens.merge import Merge


class ThinStack(nn.Module):
    """All blocks of a tower as one; tokens [N, L, E] → the class token [N, 1, E] on fewer tokens from block to block.

    A merged token stands for several patches. Attention goes by how many they are (ToMe's proportional attention): the
    logarithm of their number is added to the scores of a key, which weighs it like that many equal keys. Without it a
    background of forty merged patches would count as one.
    """

    def __init__(self, blocks: Sequence[TransformerBlock], merges: Sequence[Merge | None]) -> None:
        """Takes the blocks as they are.

        Args:
            blocks: All of them; the last one answers for the first token alone.
            merges: What follows each block's attention, or None; one for every block but the last.
        """
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.merges = nn.ModuleList([merge or nn.Identity() for merge in (*merges, None)])

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        rope: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """All blocks, called as open_clip and timm call one; image towers have no mask and no causality."""
        del attn_mask, rope, is_causal
        size: torch.Tensor | None = None
        for module, merge in zip(self.blocks, self.merges, strict=True):
            block = cast("TransformerBlock", module)
            mask = None if size is None else size.log()[:, None]
            if isinstance(merge, nn.Identity):
                x = block(x, attn_mask=mask)
                continue
            normed = block.norm_1(x)
            x = x + block.scale_1(block.attention(normed, mask=mask))
            # the keys of all heads: what the others see of a token (the graph has them already, `tidy` joins the two)
            x, size = merge(x, size, block.attention.k(normed))
            x = x + block.scale_2(block.mlp(block.norm_2(x)))
        return x
