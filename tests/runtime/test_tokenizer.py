"""Token ids equal open_clip's, without torch."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invariclip.errors import ArtifactError, InputError, TruncatedTextWarning
from invariclip.tokenizer import TextSpec, Tokenizer


@pytest.fixture(scope="module")
def both():
    """Ours, from the exported vocabulary, and the tokenizer of open_clip."""
    from invariclip.export.torchvision_ops import declare_missing_ops

    declare_missing_ops()
    import open_clip

    from invariclip.export.tokenizer_json import tokenizer_json

    theirs = open_clip.get_tokenizer("ViT-B-32")
    spec = TextSpec(77, sot_token_id=theirs.sot_token_id, eot_token_id=theirs.eot_token_id)
    return Tokenizer(tokenizer_json(), spec), theirs


TRICKY = [
    "a photo of a cat.", "A Photo Of A CAT", "", " ", "don't we'll I'm they've he's she'd you're", "naïve café",
    "&amp;lt;b&amp;gt; &quot;quoted&quot;", "schÃ¶n", "日本語のテキスト", "🍍 pineapple 👩‍🚀",
    "a\tb\nc\u00a0d", "x" * 300,
    "1234567890 3.14", "hello<end_of_text>world", "<start_of_text>", "ﬁne ligature", "Z̷̡a̸l̴g̶o̵", "…—“”", "\x00null",
    "e\u0301 combining", "ǅ title case", "İstanbul", "ß ẞ", "a_b_c", "http://x.y/z?q=1&r=2", "C++ & C#",
]  # fmt: skip


@pytest.mark.parametrize("text", TRICKY)
def test_tricky_texts_equal_open_clip(both, text):
    ours, theirs = both
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncatedTextWarning)
        np.testing.assert_array_equal(ours(text), theirs(text).numpy())


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(max_codepoint=0x24F, exclude_categories=["Cs"]), max_size=60))
def test_random_latin_texts_equal_open_clip(both, text):
    ours, theirs = both
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncatedTextWarning)
        np.testing.assert_array_equal(ours([text]), theirs([text]).numpy())


def test_cut_text_is_warned_about_and_ends_in_end_of_text(both):
    ours, _ = both
    with pytest.warns(TruncatedTextWarning, match="context_length 77"):
        ids = ours("word " * 200)
    assert ids.shape == (1, 77)
    assert ids[0, -1] == ours.spec.eot_token_id


def test_wrong_inputs_are_typed(both):
    ours, _ = both
    with pytest.raises(InputError, match="strings, not int"):
        ours(["ok", 3])
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        Tokenizer("{}", ours.spec)
    with pytest.raises(ArtifactError, match="context_length"):
        TextSpec(1, None, 0)
    with pytest.raises(ArtifactError, match="not understood"):
        TextSpec.from_json({"context": 77})
