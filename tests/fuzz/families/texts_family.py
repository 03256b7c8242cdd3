"""Hard texts through every kind of tokenizer: ids as open_clip has them."""

import json
import unicodedata
from pathlib import Path

import numpy as np

from fuzz.base import Family as Base
from fuzz.base import WrongError
from invariclip.errors import InputError
from invariclip.export.checkpoints.families import write_tokenizer
from invariclip.export.checkpoints.tokenizer import hub_tokenizer
from invariclip.export.checkpoints.vocabulary import bundled_tokenizer
from invariclip.export.libraries import declare_missing_ops

CONTEXT = 24
CLEANS = ("lower", "canonicalize", "whitespace")
KINDS = ("unigram", "bpe", "bytes")
PIECES = (
    "a photo of a ", "cat", "DOG", "Straße", "ﬁne", "İstanbul", "ǅ", "ß", "ſ", "K", "Å", "é", "e\u0301", "木",
    "日本の城", "ก็", "ا̷", "👩‍🚀",
    "🏳️‍🌈", "&amp;", "&amp;amp;", "&lt;b&gt;", "&#128512;", "&#xD800;", "&#0;", "&nbsp;", "&notit;", "<start_of_text>",
    "<end_of_text>", "<|endoftext|>", "</s>", "<s>", "<pad>", "<unk>", "'s", "'S", "’s", "'ll", "don't", "42-17", "½",
    "²", "٣",
    "\u200b", "\u200d", "\ufeff", "\u00ad", "\u2028", "\u0085", "\x00", "\x1b[0m", "\t", "\n", "\r\n", "  ", "\u3000",
    "\u00a0",
    "schÃ¶n", "â€™", "_", "__", "...", "!?", "\"", "\\", "{}", "%s", "ＡＢＣ", "①", "ﷺ", "a" * 300, "é" * 80,
    "\U000e0041",
    "\ud800", "\udfff", "\ue000", "\ufffd", "\U0010ffff", "ŉ", "ΐ", "ẞ", "ς", "Σ", "ΑΣ", "ﬀ", "<", ">", "<start",
    "of_text>",
)  # fmt: skip


class Family(Base):
    """See the module."""

    count = 12_000
    what = (
        "texts of any Unicode (every category, cases that change length, marks, joiners, right to left), "
        "entities, mojibake, "
        "special tokens in and around words, controls, halves of surrogate pairs, empty and long, in "
        "open_clip's vocabulary "
        "with each of its cleanings and in Unigram, BPE and byte-level vocabularies"
    )
    reference = "open_clip's SimpleTokenizer and HFTokenizer (transformers), id for id"

    def open(self, folder):
        declare_missing_ops()
        from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

        self.pairs = {}
        for clean in CLEANS:
            text_cfg = {"context_length": CONTEXT, "tokenizer_kwargs": {"clean": clean}}
            self.pairs[clean] = bundled_tokenizer(text_cfg, "x"), SimpleTokenizer(context_length=CONTEXT, clean=clean)
        for kind in KINDS:
            place = Path(folder) / "texts" / kind
            place.mkdir(parents=True, exist_ok=True)
            write_tokenizer(place, kind, 2000)
            for clean in ("whitespace", "canonicalize"):
                text_cfg = {"context_length": CONTEXT, "vocab_size": 2000, "hf_tokenizer_name": "x",
                            "tokenizer_kwargs": {"clean": clean}}  # fmt: skip
                theirs = HFTokenizer(str(place), context_length=CONTEXT, clean=clean)
                self.pairs[f"{kind}, {clean}"] = hub_tokenizer(place / "tokenizer.json", text_cfg, "x"), theirs
        for ours, theirs in self.pairs.values():
            _same(ours, theirs, ["a photo of a cat", ""])

    def draw(self, rng):
        name = rng.choice((*CLEANS, *self.pairs))
        how = rng.choice(("pieces", "pieces", "any letters", "one category", "letters of one page"))
        texts = [_text(rng, how) for _ in range(rng.choice((1, 1, 4)))]
        return f"{name}: {how}", lambda: _same(*self.pairs[name], texts)


def _same(ours, theirs, texts):
    try:
        read = ours(texts)
    except InputError as error:
        if not any("\ud800" <= letter <= "\udfff" for text in texts for letter in text):
            raise WrongError(f"refused {texts!r:.200}: {error}") from None
        raise
    wanted = theirs(texts).numpy()
    if not np.array_equal(read, wanted):
        place = next(place for place in range(len(texts)) if not np.array_equal(read[place], wanted[place]))
        raise WrongError(
            f"{json.dumps(texts[place])[:300]}: {read[place].tolist()} in place of {wanted[place].tolist()}"
        )


def _text(rng, how):
    size = rng.choice((0, 1, 2, 3, 5, 8, 20))
    if how == "pieces":
        return "".join(rng.choice(PIECES) + rng.choice(("", "", " ")) for _ in range(size))
    if how == "one category":
        return "".join(rng.choice(_CATEGORIES[rng.choice(list(_CATEGORIES))]) for _ in range(size))
    if how == "letters of one page":
        page = rng.randrange(0x1100) << 8
        return "".join(map(chr, (page + rng.randrange(256) for _ in range(size)))) + rng.choice(("", " x"))
    return "".join(chr(rng.randrange(0x110000)) for _ in range(size))


def _by_category():
    found = {}
    for code in (*range(0x3100), *range(0xA000, 0xAC00), *range(0xF900, 0x11000), *range(0x1D400, 0x1F700, 7)):
        found.setdefault(unicodedata.category(chr(code)), []).append(chr(code))
    return found


_CATEGORIES = _by_category()
