"""Mutated tokenizer.json files, and what lies beside them."""

import json
from pathlib import Path

import numpy as np
import tokenizers

from fuzz.base import Family as Base
from fuzz.base import WrongError
from fuzz.mutate import damaged, restructured, written
from invariclip.export.checkpoints.families import write_tokenizer
from invariclip.export.checkpoints.tokenizer import hub_tokenizer
from invariclip.preprocessing.tokenizer import TextSpec, Tokenizer

KINDS = ("unigram", "bpe", "bytes")
VOCABULARY = 1600
TEXTS = (
    "a photo of a cat",
    "",
    "Ünïcödé 木 👩‍🚀",
    "  spaces \t and\nlines ",
    "<s> </s> <pad>",
    "x" * 200,
    "3 dogs; 4 cats",
)
PARTS = (
    {"type": "Lowercase"}, {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}, {"type": "Strip"},
    {"type": "Replace", "pattern": {"Regex": "(a*)*$"}, "content": "b"}, {"type": "NFKC"}, {"type": "Precompiled"},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, {"type": "Prepend", "prepend": "x"},
    {"type": "Whitespace"},
    {"type": "Sequence", "normalizers": []}, {"type": "Sequence", "pretokenizers": []}, {"type": "BertPreTokenizer"},
    {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False}, {"type": "Metaspace"},
    {"type": "Metaspace", "replacement": "ab", "prepend_scheme": "always", "split": True}, {"type": "Digits"}, None,
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False}, {"type": "Unknown"},
    {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0]}, {"type": "BertNormalizer"},
    {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}], "pair": [],
     "special_tokens": {}},
    {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "[UNK]", "continuing_subword_prefix": "##",
     "max_input_chars_per_word": 100},
    {"type": "WordLevel", "vocab": {}, "unk_token": "<unk>"}, {"type": "Unigram", "vocab": [], "unk_id": 0},
    {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 7}, {"type": "BPE", "vocab": {}, "merges": []},
    {"type": "BPE", "vocab": {"a": 0, "b": 4294967295}, "merges": ["a b"]},
    {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]], "dropout": 0.9},
)  # fmt: skip


class Family(Base):
    """See the module."""

    count = 4_000
    what = (
        "tokenizer.json of three kinds (Unigram, BPE with byte fallback, byte-level BPE) with values, types, "
        "parts and ids "
        "changed, lost or exchanged, and damaged bytes; read by the runtime, and by export with the settings beside it"
    )
    reference = "the tokenizers library on the same file, with rows put together here, id for id"

    def open(self, folder):
        self.folder = Path(folder) / "tokenizers"
        self.wholes = {}
        for kind in KINDS:
            place = self.folder / kind
            place.mkdir(parents=True, exist_ok=True)
            write_tokenizer(place, kind, VOCABULARY)
            names = ("tokenizer.json", "tokenizer_config.json")
            self.wholes[kind] = {name: json.loads((place / name).read_text(encoding="utf-8")) for name in names}
            self._runtime(json.dumps(self.wholes[kind]["tokenizer.json"]).encode())
            self._export(kind, "tokenizer.json", json.dumps(self.wholes[kind]["tokenizer.json"]).encode())

    def draw(self, rng):
        kind = rng.choice(KINDS)
        room = rng.choice(("runtime", "runtime", "export"))
        name = "tokenizer_config.json" if room == "export" and rng.random() < 0.3 else "tokenizer.json"
        plain = json.loads(json.dumps(self.wholes[kind][name]))
        how = rng.random()
        if how < 0.35 and name == "tokenizer.json":
            what, part = "a part", rng.choice(("normalizer", "pre_tokenizer", "post_processor", "model", "decoder"))
            plain[part] = rng.choice(PARTS)
        elif how < 0.5 and name == "tokenizer.json":
            what = "the vocabulary"
            _other_vocabulary(rng, plain["model"])
        elif how < 0.8:
            vocabulary = plain.get("model", {}).pop("vocab", None)  # a change hits the thousand names of it otherwise
            what, plain = restructured(rng, plain)
            if vocabulary is not None and isinstance(plain, dict) and isinstance(plain.get("model"), dict):
                plain["model"].setdefault("vocab", vocabulary)
        else:
            what = "bytes"
        content = written(plain).encode("utf-8", "surrogatepass")
        if what == "bytes":
            what, content = damaged(rng, content)
        if room == "export":
            return f"export, {name}: {what}", lambda: self._export(kind, name, content)
        return f"runtime: {what}", lambda: self._runtime(content)

    def _runtime(self, content):
        path = self.folder / "tokenizer.json"
        path.write_bytes(content)
        spec = TextSpec(12, (1,), (2,), 0, "verbatim")
        ours = Tokenizer.from_file(path, spec)
        _require(ours(list(TEXTS)), content.decode(), spec)

    def _export(self, kind, name, content):
        place = self.folder / "export"
        place.mkdir(exist_ok=True)
        for other, plain in self.wholes[kind].items():
            (place / other).write_text(json.dumps(plain), encoding="utf-8")
        (place / name).write_bytes(content)
        text_cfg = {"context_length": 12, "vocab_size": VOCABULARY, "hf_tokenizer_name": "x",
                    "tokenizer_kwargs": {"clean": "verbatim"}}  # fmt: skip
        ours = hub_tokenizer(place / "tokenizer.json", text_cfg, "fuzzed")
        ids = ours(list(TEXTS))
        _require(ids, ours.model_json, ours.spec)
        if ids.min() < 0 or ids.max() >= VOCABULARY:
            raise WrongError(f"ids up to {ids.max()} for a tower of {VOCABULARY}")


def _require(ids, text, spec):
    """That ids are those of the library, between those around them."""
    library = tokenizers.Tokenizer.from_str(text)
    library.no_truncation()
    library.no_padding()
    if json.loads(text).get("model", {}).get("dropout"):
        raise WrongError("accepted a tokenizer that leaves merges out by chance")
    rows = []
    for one in TEXTS:
        inner = library.encode(one, add_special_tokens=False).ids
        inner = inner[: spec.room] if spec.cut_side == "right" else inner[-spec.room :]
        row = [*spec.start_token_ids, *inner, *spec.end_token_ids]
        fill = [spec.pad_token_id] * (spec.context_length - len(row))
        rows.append([*row, *fill] if spec.pad_side == "right" else [*fill, *row])
    if not np.array_equal(ids, np.asarray(rows)):
        raise WrongError("other ids than the library's")


def _other_vocabulary(rng, model):
    """Ids and pieces that do not go together."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        place = rng.randrange(len(vocabulary))
        vocabulary[place] = rng.choice((["", 0.0], [vocabulary[0][0], 0.0], ["x", "y"], ["x"], ["\0", -1e308], None,
                                        [vocabulary[place][0], 1e400]))  # fmt: skip
        return
    piece = rng.choice(list(vocabulary))
    how = rng.randrange(6)
    if how == 0:
        del vocabulary[piece]
    elif how == 1:
        vocabulary[piece] = rng.choice((-1, 2**32 - 1, 2**32, 2**64, 1.5, "1", None, 0, VOCABULARY, 2**31))
    elif how == 2:
        vocabulary[rng.choice(("", "\0", "new", "é" * 300))] = rng.choice((5, VOCABULARY + 1, 2**31))
    elif how == 3:
        model["merges"].append(rng.choice(("a b", "x", "a b c", ["q", "zz"], ["", ""], 3, ["a"], "")))
    elif how == 4 and model["merges"]:
        model["merges"].insert(0, model["merges"].pop())
    else:
        model[rng.choice(("unk_token", "continuing_subword_prefix", "end_of_word_suffix"))] = rng.choice(
            (None, "", "none", 3, "</w>", "é")
        )
