"""The model families that every release is checked on, each of them loadable without a download.

Real weights are for users who have them. What a family's graphs look like, whether they agree with PyTorch and what
they cost shows on seeded random weights too, if those leave no part without effect (see `construct.fill`). Where the
published tokenizer is not open_clip's own, one of the same shape stands in, built from our own texts. What a graph can
notice is the same: how many ids there are and how far up they reach, which one pads, what stands before and after a
text, how pieces are found. The words are not.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from invariclip.errors import CheckpointError
from invariclip.export.checkpoints.check_texts import TEXTS
from invariclip.export.checkpoints.checkpoint import load_checkpoint
from invariclip.export.checkpoints.sources import CONFIG_FILE
from invariclip.export.libraries import declare_missing_ops
from invariclip.files import scratch_directory

if TYPE_CHECKING:
    from pathlib import Path

    from invariclip.export.checkpoints.checkpoint import Checkpoint

ROBERTA_BASE = {
    "architectures": ["RobertaForMaskedLM"],
    "attention_probs_dropout_prob": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 514,
    "model_type": "roberta",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "type_vocab_size": 1,
    "vocab_size": 50265,
}
"""The published sizes of roberta-base."""
Vocabulary = Literal["unigram", "bpe", "bytes"]
"""`unigram` as SigLIP's, `bpe` with byte fallback as SigLIP 2's (Gemma), `bytes` as RoBERTa's byte-level one."""
_LEARNT = 800
"""Pieces learnt from the texts."""
_SPACE = "\u2581"


@dataclass(frozen=True)
class ModelFamily:
    """One architecture of the issue's list.

    Attributes:
        name: As open_clip calls it.
        stand_in: Kind of the tokenizer that stands in for the published one, or None for open_clip's own vocabulary.
        tolerance: Largest difference that float32 parity allows between unit embeddings.
        needs: Packages beside the extra `export`.
        note: What is special about it, in words.
    """

    name: str
    stand_in: Vocabulary | None = None
    tolerance: float = 1e-5
    needs: tuple[Literal["transformers"], ...] = ()
    note: str = ""


FAMILIES: tuple[ModelFamily, ...] = (
    ModelFamily("ViT-B-32", note="the first CLIP's architecture, with GELU"),
    ModelFamily("ViT-B-32-quickgelu", note="the same with QuickGELU, as OpenAI trained it"),
    ModelFamily("ViT-B-16"),
    ModelFamily("ViT-L-14"),
    ModelFamily("RN50", note="batch norms; attention pool with a bias"),
    ModelFamily("ViT-B-16-SigLIP", "unigram", note="sigmoid and bias; padding is seen; not causal; attention-pooled"),
    ModelFamily("ViT-B-16-SigLIP2", "bpe", note="as SigLIP, with a vocabulary of 256,000"),
    ModelFamily("convnext_base_w", note="timm trunk, linear head"),
    ModelFamily("MobileCLIP-S1", note="re-parameterised before export; text not causal"),
    ModelFamily("MobileCLIP2-S0", note="re-parameterised before export; text not causal"),
    ModelFamily("EVA02-B-16", note="rotary positions, SwiGLU"),
    ModelFamily("coca_ViT-B-32", note="attentional pooler; class token behind the text, padding masked"),
    ModelFamily("PE-Core-B-16", note="rotary positions, attention-pooled, context of 32"),
    ModelFamily("ViT-SO400M-14-SigLIP", "unigram", tolerance=1e-4, note="external data: each tower is above 1.7 GB"),
    ModelFamily("roberta-ViT-B-32", "bytes", needs=("transformers",), note="text tower from Hugging Face, mean-pooled"),
)


def family(name: str) -> ModelFamily:
    """The family of that name.

    Raises:
        CheckpointError: It is not one of `FAMILIES`.
    """
    for one in FAMILIES:
        if one.name == name:
            return one
    raise CheckpointError(f"{name}: not a family; available: {', '.join(one.name for one in FAMILIES)}")


def load_family(name: str, *, seed: int = 0, threads: int | None = None, short: bool = False) -> Checkpoint:
    """Loads a family with seeded random weights, without a network; `source` names what is not the published thing.

    Args:
        name: One of `FAMILIES`.
        seed: Of the weights.
        threads: Torch's threads for this process; None leaves them.
        short: Keep the first and last block of every stack alone (see `shorten`): a graph of the same kind, in seconds.

    Raises:
        CheckpointError: It is not one of `FAMILIES`, or a package that it needs is missing.
    """
    one = family(name)
    if one.stand_in is None:
        return load_checkpoint(name, threads=threads, allow_random=True, seed=seed, short=short)
    declare_missing_ops()
    from open_clip import get_model_config

    config = get_model_config(name)
    tower = ROBERTA_BASE if one.needs else None
    vocabulary = tower["vocab_size"] if tower else config["text_cfg"]["vocab_size"]
    with scratch_directory() as made:
        folder = made / name
        folder.mkdir()
        write_tokenizer(folder, one.stand_in, int(str(vocabulary)))
        if tower is None:
            loaded = load_checkpoint(name, tokenizer=folder, threads=threads, allow_random=True, seed=seed, short=short)
        else:  # the published tower's name, resolved to these files
            (folder / CONFIG_FILE).write_text(json.dumps({"model_cfg": config}))
            (folder / "config.json").write_text(json.dumps(tower))
            loaded = load_checkpoint(str(folder), threads=threads, allow_random=True, seed=seed, short=short)
    return replace(loaded, source=f"{loaded.source}, stand-in tokenizer")


def write_tokenizer(folder: Path, kind: Vocabulary, vocab_size: int) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`.

    Args:
        folder: An existing folder.
        kind: Which published tokenizer it stands in for.
        vocab_size: Its ids are below this, and the highest one is used.

    Raises:
        CheckpointError: `vocab_size` is smaller than what the texts need.
    """
    if vocab_size < 2 * _LEARNT:
        raise CheckpointError(f"a stand-in tokenizer needs {2 * _LEARNT} ids or more, not {vocab_size}")
    content, settings = {"unigram": _unigram, "bpe": _bpe, "bytes": _byte_level}[kind](vocab_size)
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def _unigram(vocab_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """SigLIP's: `</s>` (1) ends a text and pads, `<unk>` is 2; a piece's score falls with its rank."""
    words = sorted({_SPACE + word for text in TEXTS for word in text.lower().split()})
    letters = sorted({letter for word in words for letter in word})
    parts = sorted({word[:end] for word in words for end in (2, 3, 4)} - set(letters) - set(words))
    learnt = [*letters, *parts, *words][: vocab_size - 3]
    unused = [f"<unused{number}>" for number in range(vocab_size - 3 - len(learnt))]
    pieces = ["<pad>", "</s>", "<unk>", *unused, *learnt]
    scores = {piece: -8.0 - 6.0 / len(piece) for piece in learnt}
    vocab = [[piece, scores.get(piece, 0.0 if place < 3 else -100.0)] for place, piece in enumerate(pieces)]
    content = _file(
        {"type": "Unigram", "unk_id": 2, "vocab": vocab, "byte_fallback": False},
        {"</s>": 1, "<unk>": 2},
        normalizer=None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [
            {"type": "WhitespaceSplit"},
            {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": "always", "split": True},
        ]},
        after={"</s>": 1},
    )  # fmt: skip
    return content, {"pad_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}


def _bpe(vocab_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """SigLIP 2's: `<pad>` 0, `<eos>` 1 after every text, `<bos>` 2 unused, unknown letters as bytes."""
    vocab, merges = _learn(
        [text.lower().replace(" ", _SPACE) for text in TEXTS], pre_tokenizers.Split(_SPACE, "merged_with_next")
    )
    special = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4}
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    ids = _spread([*fallback, *vocab], len(special), vocab_size)
    model = {
        "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
        "vocab": {**special, **ids}, "merges": merges,
    }  # fmt: skip
    content = _file(
        model,
        special,
        normalizer={"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
        pre_tokenizer={
            "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
        },
        after={"<eos>": 1},
    )  # fmt: skip
    return content, {
        "pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>",
        "add_bos_token": False, "tokenizer_class": "GemmaTokenizer", "add_eos_token": True, "padding_side": "right",
    }  # fmt: skip


def _byte_level(vocab_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """RoBERTa's: `<s>` 0, `<pad>` 1, `</s>` 2, `<unk>` 3, `<mask>` the last; every byte is a piece."""
    vocab, merges = _learn(list(TEXTS), pre_tokenizers.ByteLevel(add_prefix_space=False))
    special = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": vocab_size - 1}
    ids = _spread(vocab, 4, vocab_size - 1)
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
        "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "merges": merges,
        "vocab": {**special, **ids},
    }  # fmt: skip
    content = _file(
        model,
        special,
        normalizer=None,
        pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        after={},
    )
    content["post_processor"] = {
        "type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0], "trim_offsets": True,
        "add_prefix_space": False,
    }  # fmt: skip
    return content, {
        "pad_token": "<pad>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "cls_token": "<s>",
        "sep_token": "</s>",
    }


def _learn(texts: list[str], words: Any) -> tuple[list[str], list[list[str]]]:
    """Pieces and merges of a byte-pair model trained on the texts."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = words
    alphabet = pre_tokenizers.ByteLevel.alphabet() if isinstance(words, pre_tokenizers.ByteLevel) else []
    trainer = trainers.BpeTrainer(vocab_size=_LEARNT, show_progress=False, initial_alphabet=alphabet)
    library.train_from_iterator(texts, trainer)
    model = json.loads(library.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    return pieces, [list(merge) for merge in model["merges"]]


def _spread(pieces: list[str], first: int, end: int) -> dict[str, int]:
    """Ids from `first` up to just below `end`, with gaps: rows of the embedding from everywhere are used."""
    step = (end - first - 1) / (len(pieces) - 1)
    return {piece: first + round(place * step) for place, piece in enumerate(pieces)}


def _file(
    model: dict[str, Any], special: dict[str, int], *, normalizer: Any, pre_tokenizer: Any, after: dict[str, int]
) -> dict[str, Any]:
    """A `tokenizer.json` whose post-processor adds `after` behind every text."""
    added = [
        {"id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for token, number in sorted(special.items(), key=lambda item: item[1])
    ]  # fmt: skip
    text = [{"Sequence": {"id": "A", "type_id": 0}}]
    ends = [{"SpecialToken": {"id": token, "type_id": 0}} for token in after]
    template = {
        "type": "TemplateProcessing", "single": [*text, *ends], "pair": [*text, *ends],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]} for token, number in after.items()},
    }  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer, "post_processor": template if after else None, "decoder": None, "model": model,
    }  # fmt: skip
