"""Rewrites of the torch encoder, before it is traced. Each returns what it did, or says why it does not apply."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from invariclip.export.checkpoints.reparameterize import foldable, reparameterized
from invariclip.export.checkpoints.surgery import container_like, find, with_replaced
from invariclip.export.graphs.rewrites.attention import TransformerBlock, bias_of
from invariclip.export.graphs.rewrites.blocks import without_value_bias, written_out
from invariclip.export.graphs.rewrites.rewrite import RewriteNotApplicableError
from invariclip.export.graphs.rewrites.text_encoder import RewrittenTextEncoder

if TYPE_CHECKING:
    import torch

    from invariclip.export.graphs.rewrites.rewrite import Subject

IMAGE_BLOCKS = ("visual.transformer.resblocks", "visual.trunk.blocks")
"""Where an image tower keeps its transformer blocks: open_clip's own, and timm's."""


def fold_branches(subject: Subject) -> str:
    """Branches that serve training alone into the convolutions beside them."""
    found = foldable(subject.encoder)
    if not found:
        raise RewriteNotApplicableError("it has no branches for training alone")
    subject.encoder = reparameterized(subject.encoder)
    left = foldable(subject.encoder)
    if left:
        raise RewriteNotApplicableError(f"timm left {left[0]} as it was")
    return f"{len(found)} parts"


def write_out_attention(subject: Subject) -> str:
    """Every block as `attention.TransformerBlock`."""
    blocks = [written_out(block) for block in _blocks(subject)]
    _put(subject, blocks)
    return f"{len(blocks)} blocks"


def fold_attention_biases(subject: Subject) -> str:
    """Value biases into the output projections; key biases away."""
    blocks = [block for block in _blocks(subject) if isinstance(block, TransformerBlock)]
    biased = [b for b in blocks if bias_of(b.attention.v) is not None or bias_of(b.attention.k) is not None]
    if not biased:
        raise RewriteNotApplicableError("its values and keys have no bias")
    _put(subject, [_with_attention(block, without_value_bias(block.attention)) for block in blocks])
    return f"{len(biased)} blocks"


def pool_last_block(subject: Subject) -> str:
    """The last block for the token that is pooled."""
    if subject.tower == "text":
        text = RewrittenTextEncoder.of(subject.encoder)
        subject.encoder = text.changed(pooled_only=True)
        return "the last block answers for the pooled token alone"
    reason = _why_not_first_token(subject.encoder.visual)
    if reason:
        raise RewriteNotApplicableError(reason)
    *earlier, last = _blocks(subject)
    first = TransformerBlock(
        last.norm_1, last.attention, last.scale_1, last.norm_2, last.mlp, last.scale_2, first_only=True
    )
    if last.attention.rope is not None and last.attention.rope.prefix < 1:
        raise RewriteNotApplicableError("its pooled token has a position")
    _put(subject, [*earlier, first.eval()])
    return "the last block answers for the class token alone"


def average_plainly(subject: Subject) -> str:
    """Average pooling to one number as a mean."""
    paths = [
        name
        for name, part in subject.encoder.named_modules()
        if type(part) is nn.AdaptiveAvgPool2d and part.output_size in (1, (1, 1))
    ]
    if not paths:
        raise RewriteNotApplicableError("it has no adaptive average pooling to one number")
    for path in paths:
        subject.encoder = with_replaced(subject.encoder, path.split("."), Mean().eval())
    return f"{len(paths)} poolings"


class Mean(nn.Module):
    """[N, C, H, W] → [N, C, 1, 1]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The mean over height and width."""
        return x.mean(dim=(2, 3), keepdim=True)


def cut_texts(subject: Subject) -> str:
    """Texts no longer than they are."""
    if masks_padding(subject.encoder):
        return "none of the padding has to be there: it is masked"
    text = RewrittenTextEncoder.of(subject.encoder)
    if text.cls_emb is not None:
        raise RewriteNotApplicableError(
            "its class token stands after the padding and has the last position's embedding"
        )
    if text.mask is None:
        raise RewriteNotApplicableError("its text tower is not causal: the padding takes part")
    if text.pool == "last":
        raise RewriteNotApplicableError("it pools the last place, which is padding")
    subject.encoder = text.changed(cut=True)
    return f"from 1 to {len(text.positional_embedding)} ids"


def masks_padding(encoder: Any) -> bool:
    """Whether a text tower neither attends to its padding nor pools it: Hugging Face's, as open_clip wraps them."""
    from open_clip.hf_model import ClsLastHiddenStatePooler, ClsPooler, HFTextEncoder, MeanPooler

    text = getattr(encoder, "text", None)
    poolers = MeanPooler | ClsPooler | ClsLastHiddenStatePooler
    return isinstance(text, HFTextEncoder) and isinstance(text.pooler, poolers)


def pick_plainly(subject: Subject) -> str:
    """The pooled token by Gather on flattened tokens."""
    text = RewrittenTextEncoder.of(subject.encoder)
    if text.pool not in ("argmax", "eos"):
        raise RewriteNotApplicableError(f"it pools the {text.pool} place, the same for every text")
    subject.encoder = text.changed(gather=True)
    return f"pooled by {text.pool}"


def _blocks(subject: Subject) -> list[Any]:
    return list(_container(subject))


def _container(subject: Subject) -> Any:
    if subject.tower == "text":
        return RewrittenTextEncoder.of(subject.encoder).blocks
    for path in IMAGE_BLOCKS:
        found = find(subject.encoder, path)
        if isinstance(found, (nn.Sequential, nn.ModuleList)) and len(found):
            return found
    raise RewriteNotApplicableError("it has no transformer blocks")


def _put(subject: Subject, blocks: list[TransformerBlock]) -> None:
    new = container_like(_container(subject), blocks).eval()
    if subject.tower == "text":
        subject.encoder = RewrittenTextEncoder.of(subject.encoder).changed(blocks=new)
        return
    path = next(path for path in IMAGE_BLOCKS if find(subject.encoder, path) is not None)
    subject.encoder = with_replaced(subject.encoder, path.split("."), new)


def _with_attention(block: TransformerBlock, attention: Any) -> TransformerBlock:
    return TransformerBlock(
        block.norm_1, attention, block.scale_1, block.norm_2, block.mlp, block.scale_2, first_only=block.first_only
    ).eval()


def _why_not_first_token(visual: Any) -> str | None:
    """Why an image tower needs more than its first token after the last block, or None."""
    trunk = getattr(visual, "trunk", None)
    if trunk is None:
        if getattr(visual, "attn_pool", None) is not None:
            return "its attention pooling reads every token"
        pool = getattr(visual, "pool_type", "none")
        return None if pool == "tok" else f"it pools by {pool}, which reads every token"
    if getattr(trunk, "attn_pool", None) is not None:
        return "its attention pooling reads every token"
    if getattr(trunk, "global_pool", "") != "token" or getattr(trunk, "cls_token", None) is None:
        return f"it pools by {getattr(trunk, 'global_pool', '') or 'its head'}, which reads every token"
    return None
