"""Rewrites of the torch encoder: the same answers, the original as it was, and the reason where one does not apply."""

from functools import cache

import numpy as np
import pytest
import torch

from invariclip.errors import ContractError, InputError
from invariclip.export.checkpoints import weights
from invariclip.export.checkpoints.families import load_family
from invariclip.export.graphs.rewrites import Subject, blocks, encoder
from invariclip.export.graphs.rewrites.blocks import Attention, TransformerBlock, linear
from invariclip.export.graphs.rewrites.encoder import RewrittenTextEncoder
from invariclip.export.graphs.rewrites.plan import NAMES, REWRITES, chosen, rewrite_encoder
from invariclip.export.graphs.trace import part_of

ENCODER = {rewrite.name: rewrite for rewrite in REWRITES if rewrite.module is not None}
# which rewrites apply to which kind (see KINDS in conftest), and the others' reasons
NOT_IMAGE = {
    "reparameterized": "it has no branches for training alone",
    "plain-mean": "it has no adaptive average pooling to one number",
}
NO_BLOCKS = {"attention-biases": "needs plain-attention", "pooled-last-block": "needs plain-attention"}
CONVOLUTIONS = {"plain-attention": "it has no transformer blocks", **NO_BLOCKS}
BRANCHES = {"reparameterized": NOT_IMAGE["reparameterized"]}
READS_ALL = "which reads every token"
BIDIRECTIONAL = "its text tower is not causal: the padding takes part"
PLANS = {
    ("clip", "image"): NOT_IMAGE,
    ("quick", "image"): NOT_IMAGE,
    ("mean", "image"): {**NOT_IMAGE, "pooled-last-block": f"it pools by avg, {READS_ALL}"},
    ("first", "image"): {**NOT_IMAGE, "pooled-last-block": "its attention pooling reads every token"},
    ("last", "image"): {
        **NOT_IMAGE,
        "plain-attention": "its blocks are of another kind (CustomResidualAttentionBlock)",
        **NO_BLOCKS,
    },
    ("resnet", "image"): {**NOT_IMAGE, **CONVOLUTIONS},
    ("stem", "image"): {**BRANCHES, **CONVOLUTIONS},
    ("mobile", "image"): CONVOLUTIONS,
    ("timm", "image"): NOT_IMAGE,
    ("timm, mean", "image"): {**NOT_IMAGE, "pooled-last-block": f"it pools by avg, {READS_ALL}"},
    ("eva", "image"): NOT_IMAGE,
    ("eva, norm", "image"): {
        **NOT_IMAGE,
        "attention-biases": "a norm stands between its values and the output projection",
    },
    ("pe", "image"): {
        **NOT_IMAGE,
        "plain-attention": "its attention is of another kind (AttentionRope)",
        **NO_BLOCKS,
    },
    ("clip", "text"): {},
    ("quick", "text"): {},
    ("mean", "text"): {
        "text-cut": BIDIRECTIONAL,
        "plain-pooling": "it pools the last place, the same for every text",
    },
    ("first", "text"): {
        "text-cut": BIDIRECTIONAL,
        "plain-pooling": "it pools the first place, the same for every text",
    },
    ("last", "text"): {
        "text-cut": "it pools the last place, which is padding",
        "plain-pooling": "it pools the last place, the same for every text",
    },
    ("coca", "text"): {
        "text-cut": "its class token stands after the padding and has the last position's embedding",
        "plain-pooling": "it pools the cls place, the same for every text",
    },
}
ALONE = ("clip", "quick", "mean", "first", "coca", "eva", "stem")
"""Whose rewrites are also tried one by one; the others would add seconds and no other code."""
# empty, one that fills the context, one with an end of text in its middle, and padding that is not zero
TEXTS = ["", "a cat", "one two three four five six seven eight nine ten eleven twelve thirteen fourteen", "two dogs"]


@cache
def probe_of(shape):
    return torch.randn((2, 3, *shape), generator=torch.Generator().manual_seed(1))


def probe(loaded, tower):
    if tower == "image":
        return probe_of(loaded.pixels.image_size)
    ids = loaded.tokenizer(TEXTS)
    twice = ids[1:2].copy()
    twice[0, 6], twice[0, 9] = 300, 49407
    return torch.from_numpy(np.concatenate([ids, twice]))


def answers(module, tower, rows):
    with torch.inference_mode():
        raw = getattr(module, f"encode_{tower}")(rows, normalize=False).double()
    return raw / raw.norm(dim=-1, keepdim=True)


def subject_of(loaded, tower):
    return Subject(tower, part_of(loaded.module, tower), loaded.pixels)


@pytest.mark.parametrize(("name", "tower"), PLANS)
def test_each_rewrite_keeps_the_answers_or_says_why_not(kind, name, tower):
    loaded, reasons = kind(name), PLANS[name, tower]
    rows = probe(loaded, tower)
    digest, wanted = weights.digest(loaded.module.state_dict()), answers(loaded.module, tower, rows)
    assert (wanted[0] - wanted[1]).abs().max() > 1e-3  # the tower looks at its input
    expected = [one.name for one in ENCODER.values() if tower in one.towers]
    subject = subject_of(loaded, tower)
    steps = {step.name: step for step in rewrite_encoder(subject, rows, NAMES)}
    assert list(steps) == expected
    assert (answers(subject.encoder, tower, rows) - wanted).abs().max() <= 2e-6
    assert {step.name: step.detail for step in steps.values() if not step.applied} == reasons
    for step in steps.values():
        if not step.applied or name not in ALONE:
            continue
        # alone, with nothing but what it needs
        subject = subject_of(loaded, tower)
        again = rewrite_encoder(subject, rows, (*ENCODER[step.name].needs, step.name))
        assert subject.applied == {*ENCODER[step.name].needs, step.name}
        assert {one.detail for one in again if one.name not in subject.applied} <= {"switched off"}
        assert (answers(subject.encoder, tower, rows) - wanted).abs().max() <= 2e-6
    # the original is the reference of every figure: neither its weights nor its ways may have moved
    assert weights.digest(loaded.module.state_dict()) == digest == loaded.sha256
    assert torch.equal(answers(loaded.module, tower, rows), wanted)


def test_weights_that_do_not_change_are_shared(kind):
    loaded = kind("clip")
    subject = subject_of(loaded, "text")
    rewrite_encoder(subject, probe(loaded, "text"), NAMES)
    ours, theirs = subject.encoder.blocks[0], loaded.module.transformer.resblocks[0]
    assert ours.mlp.c_fc.weight.data_ptr() == theirs.mlp.c_fc.weight.data_ptr()
    width = theirs.attn.embed_dim
    assert ours.attention.k.weight.data_ptr() == theirs.attn.in_proj_weight[width:].data_ptr()
    assert theirs.attn.in_proj_bias.any()
    assert ours.attention.k.bias is None
    assert ours.attention.v.bias is None


def test_a_rotary_tower_keeps_the_bias_of_its_keys(kind):
    """A turned key bias is not the same for all keys of a query, so softmax does see it."""
    loaded = kind("eva")
    subject = subject_of(loaded, "image")
    rewrite_encoder(subject, probe(loaded, "image"), ("plain-attention",))
    attention = subject.encoder.visual.trunk.blocks[0].attention
    noise = torch.Generator().manual_seed(0)
    biased = linear(attention.k.weight, torch.randn(attention.k.out_features, generator=noise))
    given = Attention(attention.q, biased, attention.v, attention.out, attention.heads, attention.rope)
    x = torch.randn((2, 257, attention.q.in_features), generator=noise)
    rope = loaded.module.visual.trunk.rope.get_embed()
    with torch.inference_mode():
        wanted = given(x, rope=rope)
        got = blocks.without_value_bias(given)(x, rope=rope)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pool", ["argmax", "eos"])
def test_the_first_of_two_ends_is_pooled(kind, pool):
    loaded = kind("clip" if pool == "argmax" else "quick")
    subject = subject_of(loaded, "text")
    rows = probe(loaded, "text")
    rewrite_encoder(subject, rows, NAMES)
    assert int((rows[-1] == 49407).sum()) == 2
    other = rows.clone()
    other[-1, 9:] = 5  # behind the first end nothing counts
    got = answers(subject.encoder, "text", other)
    assert (got[-1] - answers(loaded.module, "text", rows)[-1]).abs().max() <= 2e-6


@pytest.mark.parametrize("name", ["clip", "quick"])
def test_every_length_from_the_longest_text_on_gives_the_same(kind, name):
    loaded = kind(name)
    subject = subject_of(loaded, "text")
    rows = torch.from_numpy(loaded.tokenizer(["", "a cat", "two dogs"]))
    wanted = answers(loaded.module, "text", rows)
    rewrite_encoder(subject, rows, NAMES)
    for length in range(4, rows.shape[1] + 1):
        assert (answers(subject.encoder, "text", rows[:, :length]) - wanted).abs().max() <= 2e-6
    assert (answers(subject.encoder, "text", rows[:1, :2]) - wanted[:1]).abs().max() <= 2e-6


# ---------------------------------------------------------------- planted faults


def no_value_bias(attention):
    """The bias is gone and nobody took it."""
    v = linear(attention.v.weight, None)
    return Attention(attention.q, attention.k, v, attention.out, attention.heads, attention.rope, attention.norm)


def next_row(self, mask, index):
    """The pooled token looks one place too far."""
    return mask.index_select(0, (index + 1).clamp(max=len(mask) - 1))[:, None, None, :]


class LastToken(TransformerBlock):
    """Answers for the last token where the first is pooled."""

    def forward(self, x, attn_mask=None, rope=None, is_causal=False):
        return self.answer(x, x[:, -1:], mask=attn_mask, rope=rope)


def unscaled(weight, biases, out, heads, rope=None, norm=None):
    layers = [linear(part, bias) for part, bias in zip(weight.detach().chunk(3), biases, strict=True)]
    return Attention(*layers, out, heads, rope, norm)


FAULTS = {
    "the value bias is dropped": ("attention-biases", "image", (encoder, "without_value_bias", no_value_bias)),
    "the mask's row is off by one": ("pooled-last-block", "text", (RewrittenTextEncoder, "_row", next_row)),
    "another token is pooled": ("pooled-last-block", "image", (encoder, "TransformerBlock", LastToken)),
    "the scale is forgotten": ("plain-attention", "image", (blocks, "split_packed", unscaled)),
    "the end is picked one too early": (
        "plain-pooling", "text",
        (RewrittenTextEncoder, "_index", lambda self, ids: ids.argmax(dim=-1) - int(self.gather)),
    ),
    "positions are dropped with the padding": (
        "text-cut", "text",
        (RewrittenTextEncoder, "_embed", lambda self, ids: (self.token_embedding(ids), self.mask[: ids.shape[1]])),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_rewrite_is_refused(kind, monkeypatch, fault):
    name, tower, (place, attribute, wrong) = FAULTS[fault]
    loaded = kind("clip")
    monkeypatch.setattr(place, attribute, wrong)
    names = ("plain-attention", name) if tower == "image" or name == "pooled-last-block" else (name,)
    message = rf"^rewrite {name} changes the {tower} tower's answers by [\d.e-]+ \(bound 1e-05\); leave it out with "
    with pytest.raises(ContractError, match=message + f"--without {name}$"):
        rewrite_encoder(subject_of(loaded, tower), probe(loaded, tower), names)
    assert weights.digest(loaded.module.state_dict()) == loaded.sha256


def test_not_a_number_is_refused(kind):
    loaded = kind("clip")
    rows = probe(loaded, "image").clone()
    rows[0, 0, 0, 0] = torch.nan
    with pytest.raises(ContractError, match="rewrite plain-attention changes the image tower's answers by nan"):
        rewrite_encoder(subject_of(loaded, "image"), rows, NAMES)


# ---------------------------------------------------------------- what is switched off


def test_names_and_what_is_left_out():
    assert chosen(()) == NAMES == tuple(rewrite.name for rewrite in REWRITES)
    assert chosen(["tidy", "text-cut"]) == tuple(name for name in NAMES if name not in ("tidy", "text-cut"))
    with pytest.raises(InputError, match=rf"^no rewrite is called 'tydi'; available: {', '.join(NAMES)}$"):
        chosen(["tydi"])


def test_what_is_switched_off_takes_along_what_needs_it(kind):
    loaded = kind("clip")
    rows = probe(loaded, "text")
    steps = rewrite_encoder(subject_of(loaded, "text"), rows, chosen(["plain-attention"]))
    assert {step.name: step.detail for step in steps if not step.applied} == {
        "plain-attention": "switched off",
        "attention-biases": "needs plain-attention",
        "pooled-last-block": "needs plain-attention",
    }


def test_a_tower_from_hugging_face_is_of_another_kind():
    loaded = load_family("roberta-ViT-B-32", short=True)
    steps = rewrite_encoder(subject_of(loaded, "text"), torch.from_numpy(loaded.tokenizer(["a", "b c"])), NAMES)
    why = "its text tower is of another kind (HFTextEncoder)"
    assert {step.name: step.detail for step in steps} == {
        "plain-attention": why, **NO_BLOCKS, "plain-pooling": why,
        "text-cut": "none of the padding has to be there: it is masked",
    }  # fmt: skip
