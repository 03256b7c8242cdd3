"""Trains the reference checkpoint from the built picture set, and measures it honestly on every style."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from invariclip.bench.stylebench.build import MANIFEST, digest_of
from invariclip.bench.stylebench.features import cached_features, compute_features
from invariclip.bench.stylebench.fit import Settings, fit, start_head
from invariclip.bench.stylebench.manifest import Picture, read_manifest
from invariclip.bench.stylebench.reference import (
    CONFIG,
    WEIGHTS_FILE,
    encode_texts,
    load_reference,
    preprocessing,
    save_reference,
    tokenizer,
    untrained,
)
from invariclip.bench.stylebench.score import by_style, prototypes, unit, zero_shot_hits
from invariclip.bench.stylebench.sources import PACKAGES, STYLES, TRAINING_STYLES
from invariclip.bench.stylebench.subset import MANIFEST_FILE
from invariclip.bench.stylebench.trunk import TRUNK_FILE, trunk_state
from invariclip.console import Progress, silent
from invariclip.files import sha256_file, write_atomically

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

TEMPLATE = "a picture of a {}."
RECORD_FILE = "training.json"


def train(data: Path, out: Path, settings: Settings, progress: Progress = silent) -> dict[str, Any]:
    """Trains, saves and measures the reference model.

    Features and the run's state are kept under `data`, so a second call goes on where the first one stopped.

    Args:
        data: Folder of the built picture set.
        out: Where config, weights and the record go.
        settings: The run's settings.
        progress: Progress display.

    Returns:
        The record, as written to `training.json`.
    """
    pictures = read_manifest(data / MANIFEST)
    familiar = [p for p in pictures if not STYLES[p.style].held_out]
    model = start_model(data, settings.seed)
    features = _features(model, data, familiar, range(settings.views + 1), settings.seed, progress)
    chosen = [index for index, picture in enumerate(familiar) if picture.split == "train"]
    learnt = [familiar[index] for index in chosen]
    start_head(model, features[0, chosen])
    dataset = digest_of(pictures)
    state_file = data / "runs" / _run_name(settings, dataset) / "state.pt"
    log = fit(model, tokenizer(), features[:, chosen], learnt, settings, state_file, progress)
    save_reference(model, out)
    record = {
        "settings": dataclasses.asdict(settings),
        "model": CONFIG["model_cfg"],
        "learnt_from": {
            "pictures": len(learnt),
            "concepts": len({p.concept for p in learnt}),
            "styles": TRAINING_STYLES,
        },
        "trunk": "frozen; " + PACKAGES["trunk"].author,
        "dataset_sha256": dataset,
        "weights_sha256": sha256_file(out / WEIGHTS_FILE),
        "packages": {p.name: {"version": p.version, "sha256": p.sha256} for p in PACKAGES.values()},
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "open_clip_torch", "timm", "pillow")},
        "log": log,
        # of the weights as saved, in float16, through open_clip's own loading
        "accuracy": measure(load_reference(out), data, pictures, settings.seed, progress),
        "bundled": measure_bundled(load_reference(out), out / MANIFEST_FILE),
    }
    write_atomically(out / RECORD_FILE, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return record


def start_model(data: Path, seed: int) -> Any:
    """The untrained reference model with the pretrained trunk, its weights rounded to float16 as they will be saved."""
    model = untrained(seed)
    trunk = model.visual.trunk
    state = trunk_state(data / "packages" / "trunk" / TRUNK_FILE, trunk.state_dict())
    trunk.load_state_dict({n: t.half().float() if t.is_floating_point() else t for n, t in state.items()})
    model.eval()
    return model


def measure(model: Any, data: Path, pictures: list[Picture], seed: int, progress: Progress = silent) -> dict[str, Any]:
    """Accuracies over all concepts: by the names in one plain template, and by prototypes from the training styles."""
    queries = np.array([STYLES[picture.style].held_out for picture in pictures])
    held_out = [picture for picture, chosen in zip(pictures, queries, strict=True) if chosen]
    familiar = [picture for picture, chosen in zip(pictures, queries, strict=True) if not chosen]
    features = np.empty((len(pictures), model.visual.trunk.num_features), dtype=np.float32)
    features[~queries] = _features(model, data, familiar, [0], seed, progress)[0]
    features[queries] = _features(model, data, held_out, [0], seed, progress)[0]
    with torch.no_grad():
        images = unit(model.visual.head(torch.from_numpy(features)).numpy())
    texts, codes = _named(model, pictures)
    centres = prototypes(images, pictures, codes)
    zero_shot = by_style(zero_shot_hits(images, pictures, texts, codes), pictures)
    nearest = by_style(zero_shot_hits(images[queries], held_out, centres, codes), held_out)
    return {
        "classes": len(codes),
        "template": TEMPLATE,
        "zero_shot": zero_shot,
        "prototypes": nearest,
        "held_out_mean": {
            "zero_shot": _mean(zero_shot[style]["all"] for style in nearest),
            "prototypes": _mean(row["all"] for row in nearest.values()),
        },
    }


def measure_bundled(model: Any, manifest: Path) -> dict[str, Any]:
    """Accuracy by name on the committed pictures among their own concepts: anyone can repeat it without the set.

    Args:
        model: The reference model.
        manifest: `pictures.jsonl` beside its pictures; without it there is nothing to measure.
    """
    if not manifest.is_file():
        return {}
    pictures = read_manifest(manifest)
    features = compute_features(model.visual.trunk, preprocessing(), manifest.parent, pictures, view=0, seed=0)
    with torch.no_grad():
        images = unit(model.visual.head(torch.from_numpy(features)).numpy())
        texts, codes = _named(model, pictures)
    return {"classes": len(codes), "zero_shot": by_style(zero_shot_hits(images, pictures, texts, codes), pictures)}


def _named(model: Any, pictures: list[Picture]) -> tuple[NDArray[np.float32], list[str]]:
    """Unit text embeddings [K, D] of the pictures' concepts in the plain template, and the concepts' hexcodes."""
    names = {picture.concept: picture.name for picture in pictures}
    codes = sorted(names)
    with torch.no_grad():
        texts = encode_texts(model, tokenizer()([TEMPLATE.format(names[code]) for code in codes])).numpy()
    return texts, codes


def _features(
    model: Any, data: Path, pictures: list[Picture], views: Sequence[int], seed: int, progress: Progress
) -> NDArray[np.float32]:
    return cached_features(
        model.visual.trunk, preprocessing(), data, pictures, views, seed, data / "features", progress
    )


def _mean(values: Any) -> float:
    return round(float(np.mean(list(values))), 4)


def _run_name(settings: Settings, dataset: str) -> str:
    text = json.dumps([dataclasses.asdict(settings), CONFIG, dataset], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
