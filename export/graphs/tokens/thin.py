"""Puts a schedule of merges into an image tower that has been rewritten."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from invariclip.errors import InputError
from invariclip.export.checkpoints.surgery import container_like, find, with_replaced
from invariclip.export.graphs.rewrites.blocks import written_out
from invariclip.export.graphs.rewrites.encoder import IMAGE_BLOCKS
from invariclip.export.graphs.rewrites.rewrite import RewriteNotApplicableError
from invariclip.export.graphs.tokens.merge import Merge
from invariclip.export.graphs.tokens.schedule import TowerShape, written
from invariclip.export.graphs.tokens.stack import ThinStack
from invariclip.export.graphs.towers import part_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from invariclip.export.checkpoints.checkpoint import Checkpoint
    from invariclip.export.graphs.rewrites.attention import TransformerBlock
    from invariclip.export.graphs.rewrites.rewrite import Subject

NEEDS = ("plain-attention", "pooled-last-block")
"""Rewrites that must be in the tower before its tokens can be merged."""


def thin_tokens(subject: Subject, schedule: Sequence[int]) -> str:
    """Puts merges into the tower.

    Args:
        subject: An image tower after `rewrite_encoder`; its encoder is replaced.
        schedule: Tokens left after each block but the last, see `Schedule`.

    Returns:
        What was done, in words.

    Raises:
        NotApplicableError: The tower does not fit; it stays as it was.
        InputError: It cannot have this schedule.
    """
    if subject.tower != "image":
        raise RewriteNotApplicableError("its tokens are words")
    missing = [name for name in NEEDS if name not in subject.applied]
    if missing:
        raise RewriteNotApplicableError(f"merging needs the rewrite {missing[0]}, which was not applied")
    path, blocks = _blocks(subject.encoder)
    shape = _shape(subject.encoder, [written_out(block) for block in blocks])
    schedule = shape.require(schedule)
    merges: list[Merge | None] = []
    before = shape.tokens
    for after in schedule:
        merges.append(None if after == before else Merge(before, after, shape.prefix))
        before = after
    stack = ThinStack(blocks, merges)
    container = container_like(find(subject.encoder, path), [stack]).eval()
    subject.encoder = with_replaced(subject.encoder, path.split("."), container)
    return f"{shape.tokens} tokens before the first block, then {written(schedule)}"


def image_shape(checkpoint: Checkpoint) -> TowerShape:
    """What a checkpoint's image tower costs, and which schedules it can have.

    Raises:
        InputError: Its tokens cannot be merged.
    """
    encoder = part_of(checkpoint.module, "image")
    try:
        _, blocks = _blocks(encoder)
        return _shape(encoder, [written_out(block) for block in blocks])
    except RewriteNotApplicableError as error:
        raise refusal("image", error) from None


def refusal(tower: str, reason: RewriteNotApplicableError) -> InputError:
    """What someone hears who asked for fewer tokens of a tower that does not fit."""
    return InputError(f"the {tower} tower cannot have fewer tokens: {reason}; export it with all")


def _blocks(encoder: nn.Module) -> tuple[str, list[Any]]:
    for path in IMAGE_BLOCKS:
        found = find(encoder, path)
        if isinstance(found, (nn.Sequential, nn.ModuleList)) and len(found):
            return path, list(found)
    raise RewriteNotApplicableError("it has no transformer blocks")


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
        keyed=_weights(first.k) + _weights(first.v),
        asked=_weights(first.q) + _weights(first.out),
        mlp=_weights(blocks[0].mlp),
        stem=(tokens - prefix) * stem,
    )


def _weights(part: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in part.modules() if isinstance(layer, nn.Linear))
