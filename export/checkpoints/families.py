"""The model families that every release is checked on, and each of them without a download.

Real weights are for users who have them. What a family's graphs look like, whether they agree with PyTorch and what
they cost shows on seeded random weights too, if those leave no part without effect (see `random_weights`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

from invariclip.errors import CheckpointError
from invariclip.export.checkpoints.checkpoint import load_checkpoint
from invariclip.export.checkpoints.sources import CONFIG_FILE
from invariclip.export.checkpoints.stand_in import write_tokenizer
from invariclip.export.torchvision_ops import declare_missing_ops

if TYPE_CHECKING:
    from invariclip.export.checkpoints.checkpoint import Checkpoint
    from invariclip.export.checkpoints.stand_in import Vocabulary


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
    with TemporaryDirectory() as made:
        folder = Path(made) / name
        folder.mkdir()
        write_tokenizer(folder, one.stand_in, int(str(vocabulary)))
        if tower is None:
            loaded = load_checkpoint(name, tokenizer=folder, threads=threads, allow_random=True, seed=seed, short=short)
        else:  # the published tower's name, resolved to these files
            (folder / CONFIG_FILE).write_text(json.dumps({"model_cfg": config}))
            (folder / "config.json").write_text(json.dumps(tower))
            loaded = load_checkpoint(str(folder), threads=threads, allow_random=True, seed=seed, short=short)
    return replace(loaded, source=f"{loaded.source}, stand-in tokenizer")
