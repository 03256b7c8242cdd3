"""Ids equal to open_clip's on everything that makes tokenizers differ."""

import random
import warnings
from functools import cache

import numpy as np
import open_clip
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invariclip.errors import CheckpointError
from invariclip.export.checkpoints import vocabulary as module
from invariclip.export.checkpoints.vocabulary import bundled_tokenizer, tokenizer_json
from invariclip.preprocessing.tokenizer import Tokenizer

TRICKY = [
    "", " ", "a photo of a cat", "A PHOTO of a Cat", "\ta\u00a0 b\n\nc\x1cd\x85e", "hello " * 200, "a" * 5000,
    "it's I'LL we'Ve THEY'RE 'S 'd'm 's't", "don''t ''s", "'ſ I'ſ", "rock'n'roll's", "1234567890 ½ ⅷ ② ٣ 三",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 👍🏽!!😀", "&amp;lt;b&gt; &eacute;&#8482;&nbsp;x", "lâ€™humanitÃ©", "schÃ¶n", "ﬁne ﬆyle",
    "日本語のテキスト、カタカナ。한국어", "Z̷̢͓a̶l̴g̵o̷", "مرحبا بالعالم", "नमस्ते", "ŉ ǅ ß İ ı Σς", "e\u0301 é",
    "\x00", "\x00a\x00 b", "zero\u200bwidth\u200d \ufeffbom \u180e", "\u0345 a\u0345b \u0558x", "\uf8ff\U000e0041",
    "<start_of_text>", "<end_of_text>", "<start_of_text><end_of_text>", "foo<start_of_text>bar", "!!<end_of_text>",
    "<START_OF_TEXT> x <End_Of_Text>", "<<start_of_text>>", "<start_of_text", "start_of_text>", "<end_of_text>!!",
    "<end_of_texts>", "_text> _of_ <start", "<|startoftext|>", "<start_of_\u017fext>", "a_b-c/d\\e", "...!!!???…",
]  # fmt: skip


@pytest.fixture(scope="module", params=["lower", "canonicalize", "whitespace"])
def pair(request):
    """The runtime's tokenizer and open_clip's, with the same cleaning."""
    ours = bundled_tokenizer({"context_length": 77, "tokenizer_kwargs": {"clean": request.param}}, "any")
    return ours, open_clip.SimpleTokenizer(clean=request.param)


def same(pair, text):
    ours, theirs = pair
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.array_equal(ours(text), theirs(text).numpy())


@pytest.mark.parametrize("text", TRICKY, ids=lambda text: ascii(text)[:30])
def test_tricky_texts(pair, text):
    assert same(pair, text)


@pytest.mark.parametrize("highest", [0x7F, 0x250, 0x3000])
def test_thousands_of_random_texts(pair, highest):
    rng = random.Random(highest)  # noqa: S311 -- texts, not secrets
    texts = ["".join(map(chr, rng.choices(range(1, highest), k=rng.randint(0, 40)))) for _ in range(4000)]
    wrong = [text for text in texts if not same(pair, text)]
    assert wrong == []


@cache
def plain_pair():
    return bundled_tokenizer({}, "any"), open_clip.get_tokenizer("ViT-B-32")


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_unicode(text):
    assert same(plain_pair(), text)


def test_every_code_point_belongs_to_the_same_kind_of_word():
    # in a row of its own between a letter and a digit, so that joining and splitting both show
    theirs = open_clip.SimpleTokenizer()
    ours = bundled_tokenizer({}, "any")._tokenizer.pre_tokenizer
    spell = theirs.byte_encoder
    for start in range(0, 0x110000, 0x400):
        points = [code for code in range(start, start + 0x400) if not 0xD800 <= code < 0xE000]
        text = "".join(f"a{chr(code)}{chr(code)}7 " for code in points)
        words = ["".join(spell[byte] for byte in word.encode()) for word in theirs.pat.findall(text)]
        assert [word for word, _ in ours.pre_tokenize_str(text)] == words, hex(start)


def test_the_context_and_the_special_ids():
    tokenizer = bundled_tokenizer({"context_length": 8}, "any")
    ids = tokenizer(["cat", ""])
    assert ids.shape == (2, 8)
    assert ids[1].tolist() == [49406, 49407, 0, 0, 0, 0, 0, 0]
    with pytest.warns(UserWarning, match="cut to context_length 8"):
        assert tokenizer("one two three four five six seven eight")[0, -1] == 49407


def test_the_file_is_reproducible_and_stands_alone():
    spec = bundled_tokenizer({}, "any").spec
    again = Tokenizer(tokenizer_json(), spec)
    assert again.model_json == tokenizer_json()
    assert np.array_equal(again("a cat"), open_clip.tokenize("a cat").numpy())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tokenizer_kwargs": {"reduction_mask": "random"}}, "only `clean`"),
        ({"tokenizer_kwargs": {"clean": "other"}}, "only `clean`"),
        ({"vocab_size": 32000}, "knows 32000 tokens, open_clip's vocabulary has 49408.*pass --tokenizer DIR"),
    ],
)
def test_other_tokenizers_are_refused(config, message):
    with pytest.raises(CheckpointError, match=message):
        bundled_tokenizer(config, "any")


def test_the_size_of_the_vocabulary():
    assert len(module._vocabulary()) == module.VOCABULARY
