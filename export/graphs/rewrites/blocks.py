"""Transformer blocks of open_clip and timm written out: four linear layers, two products, a softmax, an MLP.

open_clip computes attention through torch's packed multi-head attention, which exports as some thirty nodes a block,
mostly reshapes of packed tensors. These modules compute the same from the same weights in half as many, and they let a
block answer for some of its tokens only. `written_out` recognises a block and writes it so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from invariclip.export.graphs.rewrites import RewriteNotApplicableError


class Attention(nn.Module):
    """Multi-head self-attention; the softmax scale is in the query's weights."""

    def __init__(
        self,
        q: nn.Linear,
        k: nn.Linear,
        v: nn.Linear,
        out: nn.Linear,
        heads: int,
        rope: RotaryFacts | None = None,
        norm: nn.Module | None = None,
    ) -> None:
        """Takes the four layers as they are.

        Args:
            q: Query, [E, H · head_dim], already scaled.
            k: Key.
            v: Value.
            out: Output projection.
            heads: H.
            rope: How the tower turns queries and keys by their position, or None.
            norm: Between the heads' answers and the output projection (EVA-02), or None.
        """
        super().__init__()
        self.q, self.k, self.v, self.out, self.heads, self.rope = q, k, v, out, heads, rope
        self.norm = nn.Identity() if norm is None else norm

    def forward(
        self,
        x: torch.Tensor,
        *,
        queries: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        rope: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of `queries` (all tokens, if None) over all tokens.

        Args:
            x: Normalised tokens, [N, L, E].
            queries: Normalised tokens whose answers are wanted, [N, M, E].
            mask: Added to the scores, broadcast to [N, H, M, L].
            rope: Rotary embedding of the L tokens; `queries` must then be all, or the one token that has no position.

        Returns:
            [N, M, E].
        """
        q = self._heads(self.q(x if queries is None else queries)).transpose(1, 2)
        k = self._heads(self.k(x))
        if self.rope is not None and rope is not None:
            k = self.rope.turn(k.transpose(1, 2), rope).transpose(2, 3)
            q = self.rope.turn(q, rope) if queries is None else q
        else:
            k = k.permute(0, 2, 3, 1)
        scores = q @ k
        if mask is not None:
            scores = scores + mask
        answers = scores.softmax(dim=-1) @ self._heads(self.v(x)).transpose(1, 2)
        return torch.as_tensor(self.out(self.norm(answers.transpose(1, 2).flatten(2))))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(*x.shape[:-1], self.heads, x.shape[-1] // self.heads)


class RotaryFacts:
    """timm's rotary position embedding, as `EvaAttention` applies it."""

    def __init__(self, prefix: int, half: bool) -> None:
        """`prefix` tokens at the front have no position; `half` is the layout of the rotated components."""
        self.prefix, self.half = prefix, half

    def turn(self, x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        """Turns [N, H, L, head_dim] by the tokens' positions."""
        from timm.layers.pos_embed_sincos import apply_rot_embed_cat

        kept, moved = x[:, :, : self.prefix], x[:, :, self.prefix :]
        turned: torch.Tensor = apply_rot_embed_cat(moved, rope, half=self.half)
        return turned if self.prefix == 0 else torch.cat([kept, turned], dim=2)


class TransformerBlock(nn.Module):
    """x + s₁·attention(norm(x)), then x + s₂·mlp(norm(x)), for all tokens or for the first one."""

    def __init__(
        self, norm_1: nn.Module, attention: Attention, scale_1: nn.Module, norm_2: nn.Module, mlp: nn.Module,
        scale_2: nn.Module, *, first_only: bool = False,
    ) -> None:  # fmt: skip
        """Takes the parts as they are.

        Args:
            norm_1: Before attention.
            attention: See `Attention`.
            scale_1: Layer scale after attention; nn.Identity without one.
            norm_2: Before the MLP.
            mlp: The MLP.
            scale_2: Layer scale after the MLP.
            first_only: Answer for the first token alone: [N, L, E] → [N, 1, E].
        """
        super().__init__()
        self.norm_1, self.attention, self.scale_1 = norm_1, attention, scale_1
        self.norm_2, self.mlp, self.scale_2 = norm_2, mlp, scale_2
        self.first_only = first_only

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        rope: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """The block as open_clip and timm call it; `is_causal` is theirs and always False in CLIP's image towers."""
        del is_causal
        if self.first_only:
            return self.answer(x, x[:, :1], mask=attn_mask, rope=rope)
        return self.answer(x, None, mask=attn_mask, rope=rope)

    def answer(
        self,
        x: torch.Tensor,
        queries: torch.Tensor | None,
        *,
        mask: torch.Tensor | None,
        rope: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The block for the tokens `queries` [N, M, E] of x [N, L, E], or for all.

        Returns:
            [N, M, E].
        """
        normed = self.norm_1(x)
        # the norm works token by token: normalising the few again is cheaper than picking them out of `normed`
        wanted = None if queries is None else self.norm_1(queries)
        stay = x if queries is None else queries
        stay = stay + self.scale_1(self.attention(normed, queries=wanted, mask=mask, rope=rope))
        return torch.as_tensor(stay + self.scale_2(self.mlp(self.norm_2(stay))))


class Scale(nn.Module):
    """x · gamma, timm's layer scale where a block keeps gamma as a bare parameter."""

    def __init__(self, gamma: nn.Parameter) -> None:
        """`gamma` is [E]."""
        super().__init__()
        self.gamma = gamma

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, L, E] → [N, L, E]."""
        return x * self.gamma


def linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A layer that holds these tensors (not copies): y = x Wᵀ + b."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer.eval()


def bias_of(layer: nn.Linear) -> torch.Tensor | None:
    """A layer's bias, [out], or None without one."""
    bias: torch.Tensor | None = layer.bias
    return None if bias is None else bias.detach()


def scaled(weight: torch.Tensor, bias: torch.Tensor | None, factor: float) -> nn.Linear:
    """The layer times a factor, the product in float64 and rounded once (not at all where it is a power of two)."""
    return linear((weight.double() * factor).float(), None if bias is None else (bias.double() * factor).float())


def split_packed(
    weight: torch.Tensor,
    biases: tuple[torch.Tensor | None, ...],
    out: nn.Linear,
    heads: int,
    rope: RotaryFacts | None = None,
    norm: nn.Module | None = None,
) -> Attention:
    """Attention from a packed [3E, E] weight; keys and values share its memory.

    Args:
        weight: Query, key and value, one under the other.
        biases: One [E] each, or None.
        out: Output projection.
        heads: H.
        rope: See `Attention`.
        norm: See `Attention`.
    """
    q, k, v = weight.detach().chunk(3)
    factor = float(q.shape[0] // heads) ** -0.5
    return Attention(scaled(q, biases[0], factor), linear(k, biases[1]), linear(v, biases[2]), out, heads, rope, norm)


def written_out(block: nn.Module) -> TransformerBlock:
    """The same block as our own module, sharing its weights where they do not change.

    Raises:
        RewriteNotApplicableError: It is a block of another kind, or has parts that `TransformerBlock` lacks.
    """
    from open_clip.transformer import ResidualAttentionBlock
    from timm.models import eva, vision_transformer

    if isinstance(block, TransformerBlock):
        return block
    # exact types: a subclass may compute something else
    if type(block) is ResidualAttentionBlock:
        return _of_open_clip(block)
    if type(block) is vision_transformer.Block:
        return _of_timm(block)
    if type(block) is eva.EvaBlock:
        return _of_eva(block)
    raise RewriteNotApplicableError(f"its blocks are of another kind ({type(block).__name__})")


def _of_open_clip(block: Any) -> TransformerBlock:
    attn = block.attn
    if attn.in_proj_weight is None or attn.bias_k is not None or attn.add_zero_attn or hasattr(block, "ln_1_kv"):
        raise RewriteNotApplicableError("its attention has parts beyond query, key, value and output")
    biases = (None, None, None) if attn.in_proj_bias is None else attn.in_proj_bias.detach().chunk(3)
    attention = split_packed(attn.in_proj_weight, tuple(biases), attn.out_proj, attn.num_heads)
    return TransformerBlock(block.ln_1, attention, block.ls_1, block.ln_2, block.mlp, block.ls_2)


def _of_timm(block: Any) -> TransformerBlock:
    from timm.layers.attention import Attention as TimmAttention

    attn = block.attn
    _require_kind(attn, TimmAttention)
    _require_plain(attn, ("q_norm", "k_norm", "norm"))
    biases = (None, None, None) if attn.qkv.bias is None else attn.qkv.bias.detach().chunk(3)
    attention = split_packed(attn.qkv.weight, tuple(biases), attn.proj, attn.num_heads)
    return TransformerBlock(block.norm1, attention, block.ls1, block.norm2, block.mlp, block.ls2)


def _of_eva(block: Any) -> TransformerBlock:
    from timm.models.eva import EvaAttention

    attn = block.attn
    _require_kind(attn, EvaAttention)
    _require_plain(attn, ("q_norm", "k_norm"))
    rope = RotaryFacts(attn.num_prefix_tokens, bool(attn.rotate_half))
    if attn.qkv is None:
        factor = float(attn.q_proj.out_features // attn.num_heads) ** -0.5
        q = scaled(attn.q_proj.weight.detach(), bias_of(attn.q_proj), factor)
        attention = Attention(q, attn.k_proj, attn.v_proj, attn.proj, attn.num_heads, rope, attn.norm)
    else:
        biases = (_detached(attn.q_bias), None, _detached(attn.v_bias))  # the key's is a buffer of zeros
        if attn.k_bias is not None and bool(attn.k_bias.any()):
            raise RewriteNotApplicableError("its key bias is not zero")
        attention = split_packed(attn.qkv.weight, biases, attn.proj, attn.num_heads, rope, attn.norm)
    scales = [nn.Identity() if gamma is None else Scale(gamma) for gamma in (block.gamma_1, block.gamma_2)]
    return TransformerBlock(block.norm1, attention, scales[0], block.norm2, block.mlp, scales[1])


def without_value_bias(attention: Attention) -> Attention:
    """The value's bias in the output's, and no key bias.

    Softmax weights add up to one, so softmax(S)(V + 1 bᵀ) = softmax(S) V + 1 bᵀ, and W_out b is a constant that the
    output's bias takes. A key bias adds the same number to all scores of a query, which a softmax does not see; where
    keys are turned by their position it adds another to each, and stays.
    """
    out = attention.out
    if not isinstance(attention.norm, nn.Identity):
        raise RewriteNotApplicableError("a norm stands between its values and the output projection")
    value, own = bias_of(attention.v), bias_of(out)
    if value is not None:
        bias = out.weight.detach().double() @ value.double()
        out = linear(out.weight.detach(), (bias if own is None else bias + own.double()).float())
    v = linear(attention.v.weight.detach(), None)
    k = attention.k if attention.rope is not None else linear(attention.k.weight.detach(), None)
    return Attention(attention.q, k, v, out, attention.heads, attention.rope)


def _require_kind(attn: object, kind: type) -> None:
    # exact types again
    if type(attn) is not kind:
        raise RewriteNotApplicableError(f"its attention is of another kind ({type(attn).__name__})")


def _require_plain(attn: Any, norms: tuple[str, ...]) -> None:
    extra = [name for name in norms if not isinstance(getattr(attn, name), nn.Identity)]
    if extra or getattr(attn, "gate", None) is not None:
        raise RewriteNotApplicableError(f"its attention also has {', '.join(extra or ['a gate'])}")


def _detached(value: torch.Tensor | None) -> torch.Tensor | None:
    return None if value is None else value.detach()
