"""Image towers that merge tokens which say nearly the same, by a fixed number at each merge.

Token Merging (Bolya et al., ICLR 2023, arXiv 2210.09461): every second patch token looks for the most similar one
among the others; the most similar pairs become one token, the mean of what they stand for. Published code sorts and
scatters. Here the tokens' new places are counted, and one product with the matrix of places moves them: comparisons,
sums and matrix products, which every engine has, and ties are broken alike everywhere. `thin_tokens` puts the merges
between attention and MLP of a tower that has been rewritten.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from invariclip.errors import InputError
from invariclip.export.graphs.rewrites import RewriteNotApplicableError
from invariclip.export.graphs.rewrites.blocks import written_out
from invariclip.export.graphs.rewrites.encoder import image_blocks, with_image_blocks
from invariclip.export.graphs.token_schedules import TowerShape, written
from invariclip.export.graphs.trace import part_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from invariclip.export.checkpoints.checkpoint import Checkpoint
    from invariclip.export.graphs.rewrites import Subject
    from invariclip.export.graphs.rewrites.blocks import TransformerBlock

MERGE_NODES = "merge_"
"""What the names of those nodes and of their outputs start with."""
NEEDS = ("plain-attention", "pooled-last-block")
"""Rewrites that must be in the tower before its tokens can be merged."""
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


def thin_tokens(subject: Subject, schedule: Sequence[int]) -> str:
    """Puts merges into the tower.

    Args:
        subject: An image tower after `rewrite_encoder`; its encoder is replaced.
        schedule: Tokens left after each block but the last, see `Schedule`.

    Returns:
        What was done, in words.

    Raises:
        RewriteNotApplicableError: The tower does not fit; it stays as it was.
        InputError: It cannot have this schedule.
    """
    if subject.tower != "image":
        raise RewriteNotApplicableError("its tokens are words")
    missing = [name for name in NEEDS if name not in subject.applied]
    if missing:
        raise RewriteNotApplicableError(f"merging needs the rewrite {missing[0]}, which was not applied")
    _, blocks = image_blocks(subject.encoder)
    shape = _shape(subject.encoder, [written_out(block) for block in blocks])
    schedule = shape.require(schedule)
    merges: list[Merge | None] = []
    before = shape.tokens
    for after in schedule:
        merges.append(None if after == before else Merge(before, after, shape.prefix))
        before = after
    subject.encoder = with_image_blocks(subject.encoder, [ThinStack(blocks, merges)])
    return f"{shape.tokens} tokens before the first block, then {written(schedule)}"


def image_shape(checkpoint: Checkpoint) -> TowerShape:
    """What a checkpoint's image tower costs, and which schedules it can have.

    Raises:
        InputError: Its tokens cannot be merged.
    """
    encoder = part_of(checkpoint.module, "image")
    try:
        _, blocks = image_blocks(encoder)
        return _shape(encoder, [written_out(block) for block in blocks])
    except RewriteNotApplicableError as error:
        raise refusal("image", error) from None


def refusal(tower: str, reason: RewriteNotApplicableError) -> InputError:
    """What someone hears who asked for fewer tokens of a tower that does not fit."""
    return InputError(f"the {tower} tower cannot have fewer tokens: {reason}; export it with all")


def _shape(encoder: Any, blocks: Sequence[TransformerBlock]) -> TowerShape:
    if len(blocks) < 2:
        raise RewriteNotApplicableError("it has one block, which answers for the class token alone")
    if any(block.attention.rope is not None for block in blocks):
        raise RewriteNotApplicableError("its tokens are turned by their position, and a merged token has several")
    first = blocks[0].attention
    visual = encoder.visual
    trunk = getattr(visual, "trunk", None)
    if trunk is None:
        tokens, prefix, stem = len(visual.positional_embedding), 1, visual.conv1.weight.numel()
    else:
        prefix = int(trunk.num_prefix_tokens)
        tokens, stem = trunk.patch_embed.num_patches + prefix, trunk.patch_embed.proj.weight.numel()
    if prefix < 1:
        raise RewriteNotApplicableError("it has no class token")
    return TowerShape(
        blocks=len(blocks),
        tokens=tokens,
        prefix=prefix,
        width=first.q.in_features,
        inner=first.q.out_features,
        key_weights=_weights(first.k) + _weights(first.v),
        query_weights=_weights(first.q) + _weights(first.out),
        mlp=_weights(blocks[0].mlp),
        stem=(tokens - prefix) * stem,
    )


def _weights(part: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in part.modules() if isinstance(layer, nn.Linear))


def name_merges(model: ir.Model) -> tuple[str, ...]:
    """Names the products of every merge: `merge_0_similarity`, `merge_0_move`, `merge_1_similarity` and so on.

    Args:
        model: A tower's graph; changed in place.

    Returns:
        The names, in the graph's order.
    """
    names: list[str] = []
    merge = -1
    for node in model.graph:
        if node.op_type != "MatMul":
            continue
        if any(use.node.op_type == "ArgMax" for use in node.outputs[0].uses()):
            merge, part = merge + 1, "similarity"
        elif _is_move(node):
            part = "move"
        else:
            continue
        node.name = node.outputs[0].name = f"{MERGE_NODES}{merge}_{part}"
        names.append(node.name)
    return tuple(names)


def _is_move(node: ir.Node) -> bool:
    """Whether the left side is places divided by how many tokens go there."""
    value = node.inputs[0]
    for kinds in (("Div",), ("Mul", "Cast"), ("Cast", "Equal"), ("Equal",)):
        maker = None if value is None else value.producer()
        if maker is None or maker.op_type not in kinds:
            return False
        if maker.op_type == "Equal":
            return True
        value = maker.inputs[0]
    return False
