"""Token ids equal open_clip's, without torch."""

import json
import warnings

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from invariclip.errors import ArtifactError, InputError, TruncatedTextWarning
from invariclip.preprocessing import tokenizer as module
from invariclip.preprocessing.tokenizer import TextSpec, Tokenizer
from invariclip.records import to_record


@pytest.fixture(scope="module")
def both():
    """Ours, from the exported vocabulary, and the tokenizer of open_clip."""
    from invariclip.export.libraries import declare_missing_ops

    declare_missing_ops()
    import open_clip

    from invariclip.export.checkpoints.vocabulary import tokenizer_json

    theirs = open_clip.get_tokenizer("ViT-B-32")
    spec = TextSpec(77, start_token_ids=(theirs.sot_token_id,), end_token_ids=(theirs.eot_token_id,))
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
    assert (ids[0, -1],) == ours.spec.end_token_ids


def test_wrong_inputs_are_typed(both):
    ours, _ = both
    with pytest.raises(InputError, match="strings, not int"):
        ours(["ok", 3])
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        Tokenizer("{}", ours.spec)


@pytest.fixture(scope="module")
def letters():
    """A tokenizer whose ids are 10 for a, 11 for b, and so on."""
    vocab = {"?": 9, **{letter: 10 + place for place, letter in enumerate("abcdefghij")}}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="?"))  # noqa: S106 -- not a password
    library.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    return library.to_str()


@pytest.mark.parametrize(
    ("fields", "text", "row"),
    [
        ({}, "abc", [10, 11, 12, 0, 0, 0]),
        ({"pad_token_id": 7}, "abc", [10, 11, 12, 7, 7, 7]),
        ({"clean": "verbatim"}, "abc", [10, 11, 12, 0, 0, 0]),
        ({"pad_token_id": 7, "pad_side": "left"}, "abc", [7, 7, 7, 10, 11, 12]),
        ({"start_token_ids": (1,), "end_token_ids": (2, 3)}, "ab", [1, 10, 11, 2, 3, 0]),
        ({"start_token_ids": (1,), "end_token_ids": (2,)}, "abcdefg", [1, 10, 11, 12, 13, 2]),
        ({"start_token_ids": (1,), "cut_side": "left"}, "abcdefg", [1, 12, 13, 14, 15, 16]),
        ({"end_token_ids": (2,), "last_token_id": 5, "pad_token_id": 7}, "a", [10, 2, 7, 7, 7, 5]),
        ({"end_token_ids": (2,), "last_token_id": 5}, "abcdefg", [10, 11, 12, 13, 2, 5]),
        ({"end_token_ids": (2,), "zeroed_token_id": 2, "pad_token_id": 7}, "a", [10, 0, 7, 7, 7, 7]),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::invariclip.errors.TruncatedTextWarning")
def test_rows_are_laid_out_as_the_spec_says(letters, fields, text, row):
    assert Tokenizer(letters, TextSpec(6, **fields))(text).tolist() == [row]


@given(
    start=st.lists(st.integers(0, 8), max_size=2),
    end=st.lists(st.integers(0, 8), max_size=2),
    last=st.none() | st.integers(0, 8),
    text=st.text("abcdefghij", max_size=12),
    sides=st.tuples(st.sampled_from(["left", "right"]), st.sampled_from(["left", "right"])),
)
@settings(deadline=None)
def test_every_row_holds_the_special_ids_and_as_much_text_as_fits(letters, start, end, last, text, sides):
    spec = TextSpec(7, tuple(start), tuple(end), 99, "lower", *sides, last)
    again = to_record(TextSpec, json.loads(json.dumps(spec.to_json())), "x")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (row,) = Tokenizer(letters, again)(text).tolist()
    assert again == spec
    assert bool(caught) == (len(text) > spec.room)
    ids = [10 + "abcdefghij".index(letter) for letter in text]
    kept = ids[: spec.room] if sides[1] == "right" else ids[max(0, len(ids) - spec.room) :]
    body = row if last is None else row[:-1]
    assert [token for token in body if token != 99] == [*start, *kept, *end]
    assert last is None or row[-1] == last


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"context_length": 1}, "context_length 1 is not from 2 to 65536"),
        ({"context_length": 1 << 40}, "is not from 2 to"),
        ({"clean": "none"}, r"'none' - at `\$\.clean`; available: lower, canonicalize"),
        ({"pad_side": "both"}, r"'both' - at `\$\.pad_side`; available: right, left"),
        ({"pad_token_id": -1}, "whole numbers from 0"),
        ({"start_token_ids": [1.5]}, "Expected `int`, got `float`"),
        ({"start_token_ids": [1] * 8}, "leaves no room for text"),
        ({"context": 77}, "a field that is not known: context"),
        ({"start_token_ids": 3}, "Expected `array`, got `int`"),
    ],
)
def test_a_spec_that_cannot_be_honoured_is_refused(fields, message):
    with pytest.raises(ArtifactError, match=message):
        to_record(TextSpec, {"context_length": 8, **fields}, "x", error=ArtifactError)


def test_a_file_that_is_missing_or_too_large_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ArtifactError, match="cannot be read"):
        Tokenizer.from_file(tmp_path / "none.json", TextSpec(8))
    monkeypatch.setattr(module, "_MAX_FILE", 3)
    (tmp_path / "tokenizer.json").write_text("{  }")
    with pytest.raises(ArtifactError, match="4 bytes are too many"):
        Tokenizer.from_file(tmp_path / "tokenizer.json", TextSpec(8))


def test_ids_before_a_text_stand_behind_the_special_tokens_and_are_never_cut(tiny_checkpoint):
    from invariclip.export.checkpoints.checkpoint import load_checkpoint

    tokenizer = load_checkpoint(str(tiny_checkpoint)).tokenizer
    plain, behind = tokenizer("a cat"), tokenizer("a cat", prefix=(-1, -2, -3))
    start = len(tokenizer.spec.start_token_ids)
    np.testing.assert_array_equal(behind[0, start : start + 3], [-1, -2, -3])
    np.testing.assert_array_equal(behind[0, start + 3 :], plain[0, start:-3])
    np.testing.assert_array_equal(tokenizer("a cat", prefix=()), plain)
    room = tokenizer.spec.room
    before = tuple(range(-1, -room, -1))  # one id of the text is left
    with pytest.warns(TruncatedTextWarning):
        full = tokenizer("a cat on a mat", prefix=before)
    np.testing.assert_array_equal(full[0, start : start + room - 1], before)
    assert full[0, start + room - 1] == plain[0, start]
    assert full[0, -1] == tokenizer.spec.end_token_ids[0]
    with pytest.raises(InputError, match="leave it no room"):
        tokenizer("a cat", prefix=(*before, -99))


def bpe(**changes):
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
             "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"], **changes}  # fmt: skip
    return json.dumps({"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
                       "pre_tokenizer": None, "post_processor": None, "decoder": None, "model": model})  # fmt: skip


SPEC = TextSpec(8, (5,), (6,), 0, "verbatim")


@pytest.mark.parametrize(
    "content",
    [
        bpe(continuing_subword_prefix="longer than any piece"),  # the library panics: no Exception
        bpe(vocab={"a": 0}),
        "{",
    ],
)
def test_what_the_library_cannot_use_is_typed_also_where_it_panics(content):
    with pytest.raises(ArtifactError, match=r"not a tokenizer.json that the tokenizers library can use") as refused:
        Tokenizer(content, SPEC)
    assert len(str(refused.value).splitlines()) == 1


def test_a_tokenizer_that_is_wrong_only_in_use_is_typed():
    content = json.loads(bpe())
    content["model"] = {"type": "WordLevel", "vocab": {}, "unk_token": "<unk>"}
    with pytest.raises(ArtifactError, match=r"can use \(WordLevel error: Missing"):
        Tokenizer(json.dumps(content), SPEC)(["a"])


def test_a_tokenizer_that_answers_by_chance_is_refused():
    np.testing.assert_array_equal(Tokenizer(bpe(), SPEC)("ab"), [[5, 2, 6, 0, 0, 0, 0, 0]])
    with pytest.raises(ArtifactError, match="by chance"):
        Tokenizer(bpe(dropout=0.5), SPEC)


def test_half_a_character_is_no_text():
    with pytest.raises(InputError, match=r"must be Unicode: 'a\\ud800' holds half a character"):
        Tokenizer(bpe(), SPEC)(["ab", "a\ud800"])
