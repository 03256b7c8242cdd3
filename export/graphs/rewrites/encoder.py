"""Rewrites of the torch encoder, before it is traced. Each returns what it did, or says why it does not apply.

open_clip has its text tower twice, in `CLIP` and in `TextTransformer`. `RewrittenTextEncoder` is both in our own words,
so that pieces can be left out one by one: embed, add positions, blocks, norm, pick one token, project.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from invariclip.export.checkpoints.surgery import container_like, find, foldable, reparameterized, with_replaced
from invariclip.export.graphs.rewrites import RewriteNotApplicableError
from invariclip.export.graphs.rewrites.blocks import TransformerBlock, bias_of, without_value_bias, written_out

if TYPE_CHECKING:
    from collections.abc import Sequence

    from invariclip.export.graphs.rewrites import Subject

IMAGE_BLOCKS = ("visual.transformer.resblocks", "visual.trunk.blocks")
"""Where an image tower keeps its transformer blocks: open_clip's own, and timm's."""


def fold_branches(subject: Subject) -> str:
    """Branches that serve training alone into the convolutions beside them."""
    branches = foldable(subject.encoder)
    if not branches:
        raise RewriteNotApplicableError("it has no branches for training alone")
    subject.encoder = reparameterized(subject.encoder)
    left = foldable(subject.encoder)
    if left:
        raise RewriteNotApplicableError(f"timm left {left[0]} as it was")
    return f"{len(branches)} parts"


def write_out_attention(subject: Subject) -> str:
    """Every block as `blocks.TransformerBlock`."""
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


def image_blocks(encoder: nn.Module) -> tuple[str, list[Any]]:
    """Where an image tower keeps its transformer blocks, as a dotted path, and the blocks.

    Raises:
        RewriteNotApplicableError: It has none.
    """
    for path in IMAGE_BLOCKS:
        container = find(encoder, path)
        if isinstance(container, (nn.Sequential, nn.ModuleList)) and len(container):
            return path, list(container)
    raise RewriteNotApplicableError("it has no transformer blocks")


def with_image_blocks(encoder: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module:
    """A copy of an image tower with other transformer blocks, in a container of the same kind."""
    path, _ = image_blocks(encoder)
    return with_replaced(encoder, path.split("."), container_like(find(encoder, path), blocks).eval())


def _blocks(subject: Subject) -> list[Any]:
    if subject.tower == "text":
        return list(RewrittenTextEncoder.of(subject.encoder).blocks)
    return image_blocks(subject.encoder)[1]


def _put(subject: Subject, blocks: list[TransformerBlock]) -> None:
    if subject.tower == "image":
        subject.encoder = with_image_blocks(subject.encoder, blocks)
        return
    text = RewrittenTextEncoder.of(subject.encoder)
    subject.encoder = text.changed(blocks=container_like(text.blocks, blocks).eval())


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


class RewrittenTextEncoder(nn.Module):
    """int64 ids [N, L] → raw embedding [N, D].

    Attributes:
        pooled_only: The last block answers for the pooled token alone.
        cut: Texts may be shorter than the context.
        gather: Rows are picked by Gather on flattened tokens instead of GatherND.
    """

    mask: torch.Tensor | None

    def __init__(self, source: Any, *, pool: str, eos_id: int | None) -> None:
        """Takes the parts of an open_clip text tower.

        Args:
            source: `CLIP` (which holds its text tower itself) or `TextTransformer`.
            pool: `first`, `last`, `argmax`, `eos`, or `cls` (CoCa's own class token after the text).
            eos_id: For `eos`.
        """
        super().__init__()
        self.token_embedding, self.ln_final = source.token_embedding, source.ln_final
        self.positional_embedding = source.positional_embedding
        self.text_projection = source.text_projection
        self.blocks = source.transformer.resblocks
        self.register_buffer("mask", source.attn_mask, persistent=False)
        self.cls_emb = getattr(source, "cls_emb", None)
        self.pad_first = not getattr(source, "correct_cls_mask", False)
        self.pad_id = getattr(source, "pad_id", 0)
        self.pool, self.eos_id = pool, eos_id
        self.pooled_only = self.cut = self.gather = False

    @classmethod
    def of(cls, encoder: nn.Module) -> RewrittenTextEncoder:
        """The text tower of a twin that `trace.part_of` made.

        Raises:
            RewriteNotApplicableError: It is a tower of another kind.
        """
        from open_clip.model import CLIP
        from open_clip.transformer import TextTransformer

        if isinstance(encoder, RewrittenTextEncoder):
            return encoder
        if isinstance(encoder, CLIP):
            return cls(encoder, pool=encoder.text_pool_type, eos_id=getattr(encoder, "text_eos_id", None))
        text: Any = getattr(encoder, "text", None)
        if type(text) is not TextTransformer:
            raise RewriteNotApplicableError(f"its text tower is of another kind ({type(text).__name__})")
        if text.use_pad_mask:
            raise RewriteNotApplicableError("it masks the padding of a bidirectional tower")
        if text.pool_type == "none":
            raise RewriteNotApplicableError("it does not pool its tokens")
        return cls(text, pool="cls" if text.cls_emb is not None else text.pool_type, eos_id=text.eos_id)

    def changed(self, **fields: Any) -> RewrittenTextEncoder:
        """A copy with other fields, sharing all weights."""
        twin = copy.copy(self)
        twin._modules = dict(self._modules)
        for name, value in fields.items():
            if isinstance(value, nn.Module):
                twin._modules[name] = value
            else:
                setattr(twin, name, value)
        return twin

    def encode_text(self, ids: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        """Raw embeddings [N, D] of ids [N, L]; `normalize` is open_clip's and always False here."""
        del normalize
        x, mask = self._embed(ids)
        *earlier, last = self.blocks
        for block in earlier:
            x = block(x, attn_mask=mask)
        index = self._index(ids)
        if self.pooled_only and isinstance(last, TransformerBlock):
            row = self._row(mask, index)
            pooled = self.ln_final(last.answer(x, self._picked(x, index), mask=row)).squeeze(1)
        else:
            # open_clip picks before this norm in one class and after it in the other; token by token it is the same
            pooled = self.ln_final(self._picked(last(x, attn_mask=mask), index)).squeeze(1)
        if self.text_projection is None:
            return torch.as_tensor(pooled)
        if isinstance(self.text_projection, nn.Linear):
            return torch.as_tensor(self.text_projection(pooled))
        return torch.as_tensor(pooled @ self.text_projection)

    def _embed(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = self.token_embedding(ids)
        length = ids.shape[1] if self.cut else len(self.positional_embedding)
        mask = None if self.mask is None else self.mask[:length, :length]
        if self.cls_emb is not None:
            x = torch.cat([x, self.cls_emb.expand(ids.shape[0], 1, -1)], dim=1)
            # the padding is masked; in CoCa's published weights the mask stands one place too far to the right
            real = nn.functional.pad(ids != self.pad_id, (1, 0) if self.pad_first else (0, 1), value=True)
            padding = torch.zeros_like(real, dtype=x.dtype).masked_fill(~real, float("-inf"))[:, None, None, :]
            mask = padding if mask is None else mask + padding
        return x + self.positional_embedding[:length], mask

    def _index(self, ids: torch.Tensor) -> torch.Tensor | int:
        """The pooled token's place, one for each text or the same for all."""
        if self.pool == "argmax":
            return ids.argmax(dim=-1)
        if self.pool == "eos" and self.eos_id is not None:
            return ids.eq(self.eos_id).int().argmax(dim=-1)
        return 0 if self.pool == "first" else -1

    def _picked(self, x: torch.Tensor, index: torch.Tensor | int) -> torch.Tensor:
        """Row `index` of each text, [N, L, E] → [N, 1, E]."""
        if isinstance(index, int):
            return x[:, index : index + 1 or None]
        rows = torch.arange(x.shape[0], device=x.device)
        if self.gather:
            return x.flatten(0, 1).index_select(0, index + rows * x.shape[1]).unsqueeze(1)
        return x[rows, index].unsqueeze(1)

    def _row(self, mask: torch.Tensor | None, index: torch.Tensor | int) -> torch.Tensor | None:
        """What the pooled token may look at: [N or 1, 1, 1, L]."""
        if mask is None or (self.cls_emb is not None and self.mask is None):
            return mask
        if isinstance(index, int):
            return mask[..., index : index + 1 or None, :]
        return mask.index_select(0, index)[:, None, None, :]
