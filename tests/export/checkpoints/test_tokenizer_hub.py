"""Ids equal to open_clip's `HFTokenizer` on tokenizers of every kind that its models have, and what is refused."""

import json
import shutil
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from invariclip.errors import CheckpointError
from invariclip.export.checkpoints import sources, tokenizer
from invariclip.export.checkpoints.families import write_tokenizer
from invariclip.export.checkpoints.tokenizer import hub_tokenizer, tokenizer_of
from invariclip.preprocessing.tokenizer import TextSpec, Tokenizer
from invariclip.records import to_record

SIZES = {"unigram": 32000, "bpe": 256000, "bytes": 50265}
TRICKY = [
    "", " ", "a photo of a cat", "A PHOTO, of_a Cat!", "  two  spaces\t\ntabs ", "hello " * 100, "a" * 300, "</s>",
    "<pad> x <eos>", "a</s>b <s> c", "<mask>", "<unused7>", "&amp;lt;b&gt; &eacute;", "schÃ¶n ﬁne", "日本の城と桜",
    "👩‍🚀🚀 a", "\x00a", "▁a ▁", "it's the dog's; 42-17", "\u200bzero\u200d", "<0x41>", "e\u0301",
]  # fmt: skip
CONFIGS = {
    "plain": {},
    "canonicalize": {"context_length": 64, "tokenizer_kwargs": {"clean": "canonicalize"}},
    "lower, short": {"context_length": 6, "tokenizer_kwargs": {"clean": "lower"}},
    "strip_sep_token": {"context_length": 12, "tokenizer_kwargs": {"strip_sep_token": True}},
    "clips": {"context_length": 9, "tokenizer_mode": "clips"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each kind of tokenizer, as transformers reads and open_clip asks for it."""
    from transformers import PreTrainedTokenizerFast

    made = {}
    for kind, size in SIZES.items():
        made[kind] = tmp_path_factory.mktemp(kind)
        write_tokenizer(made[kind], kind, size)
        plain = json.loads((made[kind] / "tokenizer_config.json").read_text())
        plain.setdefault("bos_token", plain["eos_token"])  # what `clips` and `strip_sep_token` ask of any tokenizer
        plain.setdefault("cls_token", plain["eos_token"])
        plain.setdefault("sep_token", plain["eos_token"])
        (made[kind] / "tokenizer_config.json").write_text(
            json.dumps({**plain, "tokenizer_class": "PreTrainedTokenizerFast"})
        )
        PreTrainedTokenizerFast.from_pretrained(made[kind]).save_pretrained(made[kind])
    return made


@pytest.fixture(scope="module")
def pairs(folders):
    """Ours and open_clip's for each kind and config."""
    made = {}
    for kind, folder in folders.items():
        for label, config in CONFIGS.items():
            theirs = HFTokenizer(
                folder, config.get("context_length", 77), tokenizer_mode=config.get("tokenizer_mode"),
                **config.get("tokenizer_kwargs", {}),
            )  # fmt: skip
            made[kind, label] = ours_in(folder, **config), theirs
    return made


def ours_in(folder, **config):
    return hub_tokenizer(folder / "tokenizer.json", {"vocab_size": 256000, **config}, "any")


def same(pair, texts):
    ours, theirs = pair
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ours(texts).tolist() == theirs(texts).tolist()


@pytest.mark.parametrize("label", CONFIGS)
@pytest.mark.parametrize("kind", SIZES)
def test_tricky_texts(pairs, kind, label):
    assert [text for text in TRICKY if not same(pairs[kind, label], [text])] == []
    assert same(pairs[kind, label], TRICKY)


@pytest.mark.parametrize(
    ("kind", "published"), [("unigram", "T5Tokenizer"), ("bpe", "GemmaTokenizer"), ("bytes", "RobertaTokenizer")]
)
def test_the_classes_that_publishers_name(folders, tmp_path, kind, published):
    folder = edited(folders[kind], tmp_path, tokenizer_class=published, extra_ids=0)
    pair = ours_in(folder), HFTokenizer(folder)
    assert type(pair[1].tokenizer).__name__ == published
    assert [text for text in TRICKY if not same(pair, [text])] == []


@settings(max_examples=150, deadline=None)
@given(
    text=st.text()
    | st.text("abcdefghij .,<>/s_'")
    | st.text(st.characters(max_codepoint=0x24F, exclude_categories=["Cs"])),
    kind=st.sampled_from(sorted(SIZES)),
    label=st.sampled_from(sorted(CONFIGS)),
)
def test_any_text(pairs, text, kind, label):
    assert same(pairs[kind, label], [text])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", SIZES)
def test_sides_come_from_the_settings(folders, tmp_path, kind, side):
    folder = edited(folders[kind], tmp_path, padding_side=side, truncation_side=side)
    pair = ours_in(folder, context_length=8), HFTokenizer(folder, 8)
    assert (pair[0].spec.pad_side, pair[0].spec.cut_side) == (side, side)
    assert [text for text in TRICKY if not same(pair, [text])] == []


@pytest.mark.parametrize("bos", [True, False, None])
@pytest.mark.parametrize("eos", [True, False, None])
def test_start_and_end_tokens_come_from_the_file(folders, tmp_path, bos, eos):
    flags = {name: flag for name, flag in (("add_bos_token", bos), ("add_eos_token", eos)) if flag is not None}
    folder = edited(folders["bpe"], tmp_path, drop=("add_bos_token", "add_eos_token"), **flags)
    pair = ours_in(folder), HFTokenizer(folder)
    assert [text for text in TRICKY if not same(pair, [text])] == []
    assert (pair[0].spec.start_token_ids, pair[0].spec.end_token_ids) == ((), (1,))


@pytest.mark.parametrize("flags", [{"add_bos_token": True}, {"add_eos_token": False}])
def test_settings_that_versions_of_transformers_read_differently_are_refused(folders, tmp_path, flags):
    folder = edited(folders["bpe"], tmp_path, tokenizer_class="GemmaTokenizer", **flags)
    with pytest.raises(CheckpointError, match=f"says {next(iter(flags))} (True|False), its post_processor"):
        ours_in(folder)


def test_padding_and_truncation_inside_the_file_are_defaults(folders, tmp_path):
    folder = edited(folders["bytes"], tmp_path, drop=("pad_token", "padding_side", "truncation_side"))
    content = json.loads((folder / "tokenizer.json").read_text())
    content["padding"] = {
        "strategy": {"Fixed": 5}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 3, "pad_type_id": 0,
        "pad_token": "<unk>",
    }  # fmt: skip
    content["truncation"] = {"direction": "Left", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    pair = ours_in(folder, context_length=7), HFTokenizer(folder, 7)
    assert pair[0].spec.pad_token_id == 3
    assert [text for text in TRICKY if not same(pair, [text])] == []


def test_the_spec_and_the_file_are_all_that_serving_needs(pairs):
    ours, _ = pairs["unigram", "canonicalize"]
    served = Tokenizer(ours.model_json, to_record(TextSpec, json.loads(json.dumps(ours.spec.to_json())), "x"))
    assert served(TRICKY[:5]).tolist() == ours(TRICKY[:5]).tolist()


def test_a_cut_text_warns(pairs):
    with pytest.warns(UserWarning, match="cut to context_length 6"):
        pairs["bytes", "lower, short"][0]("one two three four five six seven")


SIGLIP = {"hf_tokenizer_name": "timm/ViT-B-16-SigLIP", "vocab_size": 32000, "context_length": 64}


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "anything"])
@pytest.mark.parametrize("way", ["folder", "given folder", "given file"])
def test_the_config_decides_whatever_the_name(folders, name, way):
    folder = folders["unigram"]
    where = {
        "folder": {"folder": folder},
        "given folder": {"given": folder},
        "given file": {"given": folder / "tokenizer.json"},
    }
    assert tokenizer_of(SIGLIP, name, **where[way])("a").shape == (1, 64)


def test_a_name_with_siglip_in_it_keeps_open_clips_vocabulary(folders):
    ours = tokenizer_of({}, "my-siglip-experiment", folder=folders["unigram"])
    assert ours("a cat").tolist() == SimpleTokenizer()("a cat").tolist()


def test_the_folders_own_tokenizer_counts_where_open_clips_cannot_fit(folders):
    assert tokenizer_of({"vocab_size": 32000}, "any", folder=folders["unigram"]).spec.pad_token_id == 1


def test_a_given_tokenizer_counts_whatever_the_config_says(folders):
    assert tokenizer_of({"vocab_size": 60000}, "any", given=folders["bytes"]).spec.start_token_ids == (0,)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SIGLIP, r"^any: no tokenizer.json in .*\(timm/ViT-B-16-SigLIP\) .*pass --tokenizer DIR.* hf-hub:timm/ViT"),
        ({"hf_model_name": "roberta-base"}, r"\(roberta-base\) is not open_clip's own; pass --tokenizer DIR"),
    ],
)
def test_a_missing_tokenizer_says_how_to_give_it(tmp_path, config, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        tokenizer_of(config, "any", folder=tmp_path)
    assert "\n" not in str(caught.value)


def test_other_formats_are_named(tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"x")
    with pytest.raises(
        CheckpointError, match=r"holds spiece.model but no tokenizer.json; write one with transformers'"
    ):
        tokenizer_of(SIGLIP, "any", folder=tmp_path)


@pytest.mark.parametrize(
    ("kind", "config", "tower", "message"),
    [
        ("bpe", SIGLIP, None, "has ids up to 255999, the text tower of any knows 32000 tokens"),
        ("bytes", {}, {"vocab_size": 50264}, "has ids up to 50264, the text tower of any knows 50264"),
        ("bytes", {"vocab_size": 60000}, {"vocab_size": 50265, "pad_token_id": 0}, "pads with 1, .* masks 0"),
        ("bytes", {"vocab_size": 60000, "embed_cls": True}, None, "pads with 1, .* masks 0"),
        ("bytes", {"vocab_size": 60000, "pool_type": "eos", "eos_id": 7}, None, r"ends a text with \[2\], .* for 7"),
        ("unigram", {**SIGLIP, "tokenizer_kwargs": {"language": "en"}}, None, "only `clips` with"),
        ("unigram", {**SIGLIP, "tokenizer_mode": "other"}, None, "tokenizer_mode 'other'"),
        ("unigram", {**SIGLIP, "tokenizer_kwargs": {"clean": "other"}}, None, "clean 'other' is not known"),
        ("unigram", {**SIGLIP, "context_length": 1}, None, "context_length 1"),
    ],
)
def test_a_tokenizer_that_does_not_suit_the_tower_is_refused(folders, kind, config, tower, message):
    with pytest.raises(CheckpointError, match=message):
        tokenizer_of(config, "any", given=folders[kind], tower=tower)


def edited(folder, tmp_path, drop=(), **changes):
    """A copy of a tokenizer's folder with other settings."""
    copied = shutil.copytree(folder, tmp_path / "edited")
    path = copied / "tokenizer_config.json"
    plain = {name: value for name, value in json.loads(path.read_text()).items() if name not in drop}
    path.write_text(json.dumps({**plain, **changes}))
    return copied


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split_special_tokens": True}, "split_special_tokens is not supported"),
        (
            {"pad_token": "<nothing>"},
            'has no pad token \\(<nothing>\\); name it in tokenizer_config.json as "pad_token"',
        ),
        ({"padding_side": "both"}, "right or left, not 'both'"),
        ({"added_tokens_decoder": {"9": {"content": "<new>"}}}, "has the token '<new>' \\(id 9\\) otherwise"),
        ({"added_tokens_decoder": {"1": {"content": "</s>", "lstrip": True}}}, "otherwise than tokenizer.json"),
    ],
)
def test_settings_that_the_library_would_not_honour_are_refused(folders, tmp_path, changes, message):
    folder = edited(folders["unigram"], tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        tokenizer_of(SIGLIP, "any", given=folder)


def test_a_post_processor_that_does_more_is_refused(folders, tmp_path):
    folder = edited(folders["unigram"], tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    twice = {"Sequence": {"id": "A", "type_id": 0}}
    content["post_processor"]["single"] = [twice, {"SpecialToken": {"id": "</s>", "type_id": 0}}, twice]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="does more than add ids before and after"):
        tokenizer_of(SIGLIP, "any", given=folder)


@pytest.mark.parametrize("nested", [False, True])
def test_a_post_processor_that_names_undefined_tokens_is_refused(folders, tmp_path, nested, capfd):
    folder = edited(folders["unigram"], tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"]["single"].append({"SpecialToken": {"id": "<x>", "type_id": 0}})
    if nested:
        content["post_processor"] = {"type": "Sequence", "processors": [content["post_processor"]]}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"its post_processor names tokens .* do not define: <x>; save it anew"):
        tokenizer_of(SIGLIP, "any", given=folder)
    assert "panicked" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("raised", [Exception("odd"), type("PanicException", (BaseException,), {})("odd\nat")])
def test_whatever_the_library_raises_is_one_line(folders, monkeypatch, raised):
    def refuse(_):
        raise raised

    monkeypatch.setattr(tokenizer.tokenizers, "Tokenizer", type("Library", (), {"from_str": staticmethod(refuse)}))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer.json that .* can use \(odd") as caught:
        tokenizer_of(SIGLIP, "any", given=folders["unigram"])
    assert "\n" not in str(caught.value)
    raised = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        tokenizer_of(SIGLIP, "any", given=folders["unigram"])


def test_a_model_that_needs_its_unknown_token_and_has_none_is_refused(folders, tmp_path):
    folder = edited(folders["unigram"], tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"] = {"type": "WordLevel", "vocab": {"</s>": 1, "<pad>": 0}, "unk_token": "nowhere"}
    content["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"not a tokenizer\.json that the tokenizers library can use"):
        tokenizer_of(SIGLIP, "any", given=folder)


@pytest.mark.parametrize(
    "changes",
    [{"added_tokens_decoder": [1]}, {"added_tokens_decoder": {"1": 5}}, {"pad_token": 5}, {"tokenizer_class": {}}],
)
def test_settings_of_other_types_are_refused(folders, tmp_path, changes):
    folder = edited(folders["unigram"], tmp_path, **changes)
    with pytest.raises(CheckpointError, match=rf"the settings beside it: Expected .*{next(iter(changes))}"):
        tokenizer_of(SIGLIP, "any", given=folder)


@pytest.mark.parametrize("changes", [{"context_length": "x"}, {"vocab_size": [1]}, {"tokenizer_kwargs": "x"}])
def test_a_text_cfg_of_other_types_is_refused(folders, changes):
    with pytest.raises(CheckpointError, match=rf"any: its text_cfg: Expected .*{next(iter(changes))}"):
        tokenizer_of({**SIGLIP, **changes}, "any", given=folders["unigram"])


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", ["{", "[1]", "\ud800"])
def test_damaged_files_are_named(folders, tmp_path, file, content):
    folder = edited(folders["unigram"], tmp_path)
    (folder / file).write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match=file) as caught:
        tokenizer_of(SIGLIP, "any", given=folder)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_from_the_hub(folders, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    def fetch(hub_id, name):
        if not (folders["unigram"] / name).is_file():
            raise EntryNotFoundError("404")
        return str(folders["unigram"] / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert sources.locate_tokenizer("hf-hub:someone/tokenizer") == folders["unigram"]


def test_an_unreachable_or_missing_tokenizer_is_one_line(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"hf-hub:someone/none: cannot be fetched .* offline, name a local folder"
    ):
        sources.locate_tokenizer("hf-hub:someone/none")
    with pytest.raises(CheckpointError, match=r"no such tokenizer; give a folder with tokenizer\.json"):
        sources.locate_tokenizer(tmp_path / "none")


def test_stand_ins_reach_to_the_end_of_the_vocabulary(folders, tmp_path):
    for kind, size in SIZES.items():
        ids = ours_in(folders[kind], vocab_size=size)
        assert max(ids._tokenizer.get_vocab().values()) == size - 1
        assert ids("a photo of a dog").max() > size // 3
    with pytest.raises(CheckpointError, match="needs 1600 ids or more, not 100"):
        write_tokenizer(tmp_path, "bpe", 100)
