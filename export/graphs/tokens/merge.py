"""Merging tokens that say nearly the same: bipartite soft matching with a fixed number of tokens before and after.

Token Merging (Bolya et al., ICLR 2023, arXiv 2210.09461): every second patch token looks for the most similar one
among the others; the most similar pairs become one token, the mean of what they stand for. Published code sorts and
scatters. Here the tokens' new places are counted, and one product with the matrix of places moves them: comparisons,
sums and matrix products, which every engine has, and ties are broken alike everywhere.
"""

from __future__ import annotations

import torch
from torch import nn

NORM_FLOOR = 1e-6
"""Smallest length that a token is divided by: one of zeros is similar to none."""


class Merge(nn.Module):
    """[N, L, E] → [N, K, E]: L - K patch tokens go into the one that is most similar to each.

    Sources are every second patch token from the first on, targets the others. The order afterwards: prefix, sources
    that stay (most similar first), targets.
    """

    outside: torch.Tensor
    earlier: torch.Tensor
    is_source: torch.Tensor
    fixed: torch.Tensor
    places: torch.Tensor

    def __init__(self, before: int, after: int, prefix: int = 1) -> None:
        """Fixes the numbers of tokens.

        Args:
            before: L.
            after: K, below L; `TowerShape.fewest` says how few one merge can leave.
            prefix: Tokens at the front that are never merged: the class token, and registers.
        """
        super().__init__()
        place = torch.arange(before, dtype=torch.int32)
        source = (place >= prefix) & ((place - prefix) % 2 == 0)
        self.prefix, self.gone = prefix, before - after
        # a bfloat16 product over an odd number of rows takes four times as long: then the prefix goes past it
        self.past = prefix if before % 2 and not (before - prefix) % 2 else 0
        self.targets_at = prefix + int(source.sum()) - self.gone
        target_place = self.targets_at + torch.div(place - prefix, 2, rounding_mode="floor").to(torch.int32)
        # below any cosine, so that what is no source is the last to go
        self.register_buffer("outside", torch.where(source, 0.0, -4.0)[None], persistent=False)
        self.register_buffer("earlier", place[:, None] < place[None, :], persistent=False)
        self.register_buffer("is_source", source[None], persistent=False)
        self.register_buffer("fixed", torch.where(place < prefix, place, target_place)[None], persistent=False)
        self.register_buffer("places", torch.arange(self.past, after, dtype=torch.int32)[:, None], persistent=False)

    def forward(
        self, x: torch.Tensor, size: torch.Tensor | None, metric: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Merges.

        Args:
            x: Tokens, [N, L, E].
            size: How many patches each token stands for, [N, 1, L]; None where it is one each.
            metric: What is compared by its cosine, [N, L, C].

        Returns:
            Tokens, [N, K, E], and how many patches each stands for, [N, 1, K].
        """
        slots = self.slots(metric)
        moved = (self.places == slots[..., self.past :]).to(x.dtype)
        if size is not None:
            moved = moved * size[..., self.past :]
        together = moved.sum(dim=-1, keepdim=True)
        tokens, sizes = (moved / together) @ x[:, self.past :], together.transpose(1, 2)
        if self.past:
            # ones for as many images as there are, where no sizes are given
            alone = (slots >= 0).to(x.dtype) if size is None else size
            tokens = torch.cat([x[:, : self.past], tokens], dim=1)
            sizes = torch.cat([alone[..., : self.past], sizes], dim=2)
        return tokens, sizes

    def slots(self, metric: torch.Tensor) -> torch.Tensor:
        """Where each token goes, int32 [N, 1, L] of 0 … K-1, from the metric [N, L, C]."""
        unit = metric / torch.linalg.vector_norm(metric, dim=-1, keepdim=True).clamp_min(NORM_FLOOR)
        best, partner = (unit[:, self.prefix + 1 :: 2] @ unit.transpose(1, 2)).max(dim=1, keepdim=True)
        best = best + self.outside
        # a token's rank is how many are better, or as good and earlier; counted in integers, exact in any precision
        others = best.transpose(1, 2)
        ahead = (others > best) | ((others == best) & self.earlier)
        rank = ahead.to(torch.int32).sum(dim=1, keepdim=True, dtype=torch.int32)
        stays = torch.where(self.is_source, rank + (self.prefix - self.gone), self.fixed)
        return torch.where(rank < self.gone, partner.to(torch.int32) + self.targets_at, stays)
