"""open_clip's text tower in our own words, so that its pieces can be left out one by one.

open_clip has it twice, in `CLIP` and in `TextTransformer`. Here it is once: embed, add positions, blocks, norm, pick
one token, project.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from invariclip.export.graphs.rewrites.attention import TransformerBlock
from invariclip.export.graphs.rewrites.rewrite import RewriteNotApplicableError


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
        """The text tower of a twin that `towers.part_of` made.

        Raises:
            NotApplicableError: It is a tower of another kind.
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
