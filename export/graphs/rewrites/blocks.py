"""Recognises open_clip's and timm's transformer blocks and writes them as `attention.TransformerBlock`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from invariclip.export.graphs.rewrites.attention import (
    Attention,
    RotaryFacts,
    Scale,
    TransformerBlock,
    bias_of,
    linear,
    scaled,
    split_packed,
)
from invariclip.export.graphs.rewrites.rewrite import RewriteNotApplicableError

if TYPE_CHECKING:
    import torch


def written_out(block: nn.Module) -> TransformerBlock:
    """The same block as our own module, sharing its weights where they do not change.

    Raises:
        NotApplicableError: It is a block of another kind, or has parts that `TransformerBlock` lacks.
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
    value, given = bias_of(attention.v), bias_of(out)
    if value is not None:
        bias = out.weight.detach().double() @ value.double()
        out = linear(out.weight.detach(), (bias if given is None else bias + given.double()).float())
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
