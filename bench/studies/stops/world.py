"""What the stopped commands work on: a tiny model, the bundled images, two artifacts; and the commands."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from invariclip.artifact.projection import Projection
from invariclip.export.reference import images_path
from invariclip.preprocessing.find import find_images

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WIDTH = 24
_MODEL = {
    "embed_dim": WIDTH,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
_PREPROCESSING = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
_STYLES = ("fluent-3d", "fluent-flat", "noto")
_CONCEPTS, _MANY = 12, 500
_FILES, _ROWS = 12, 4000


@dataclass(frozen=True)
class StoppedCommand:
    """A command that is stopped.

    Attributes:
        name: What the table calls it.
        words: Its arguments; the world is `../../world`.
        outputs: What it writes, and what is the old or the new one, whole, at every moment.
        kept: What an interrupted run keeps on purpose, until the same command goes on.
        moments: Files, as patterns below the trial's folder; it is stopped when one appears.
        same: What of an output is the same in every run; None says that all bytes are.
    """

    name: str
    words: tuple[str, ...]
    outputs: tuple[str, ...]
    kept: tuple[str, ...] = ()
    moments: tuple[str, ...] = ()
    same: Callable[[Path], object] | None = None


def profile_facts(path: Path) -> object:
    """Of a machine profile: all but what was measured, and which of the candidates was the fastest that day."""
    plain = json.loads(path.read_text(encoding="utf-8"))
    seen = [one["candidate"] for one in (*plain["measurements"], *plain["left_out"])]
    return [plain["key"], plain["basis"], plain["versions"], sorted(json.dumps(one, sort_keys=True) for one in seen)]


_CLASSES = ("--classes", "ape,bird,tree")
COMMANDS = (
    StoppedCommand(
        "collect",
        ("calibrate", "--artifact", "../../world/plain.icm", "--sources", "../../world/sources.json", "--estimator",
         "identity", "--moments", "moments.safetensors", "-o", "projection.safetensors"),
        ("projection.safetensors",),
        kept=("work/moments.safetensors",),
        moments=("work/moments.safetensors",),
    ),
    StoppedCommand(
        "embed",
        ("embed", "../../world/plain.icm", "../../world/many", "-o", "embeddings.safetensors"),
        ("embeddings.safetensors",),
    ),
    StoppedCommand(
        "export",
        ("export", "--model", "../../world/model", *_CLASSES, "--images", "../../world/images", "--variant", "int8",
         "--fast-pixels", "-o", "artifact.icm"),
        ("artifact.icm",),
        moments=("work/.artifact.icm.*", "work/.artifact.icm.*/image.onnx", "tmp/invariclip-*",
                 "work/.artifact.icm.*/image.int8.onnx", "work/.artifact.icm.*/manifest.json"),
    ),
    StoppedCommand(
        "build",
        ("build", "--model", "../../world/model", *_CLASSES, "--images", "../../world/images", "--pairs-by", "name",
         "-o", "artifact.icm"),
        ("artifact.icm",),
        kept=("work/artifact.icm.work",),
        moments=("work/artifact.icm.work/embeddings/*/*.safetensors",
                 "work/artifact.icm.work/projection-*.safetensors", "work/.artifact.icm.*",
                 "work/.artifact.icm.*/manifest.json"),
    ),
    StoppedCommand(
        "tune",
        ("tune", "../../world/plain.icm", "--seconds", "3", "--threads", "1", "--threads", "2", "--profile",
         "profile.json"),
        ("profile.json",),
        same=profile_facts,
    ),
    StoppedCommand(
        "serve",
        ("serve", "../../world/served.icm", "--port", "0", "--threads", "1", "--adapt", "--adapt-log", "log"),
        (),
        kept=("work/log",),
        moments=("work/log/*/*/*", "work/log/*/*/*/000001.safetensors"),
    ),
)  # fmt: skip


def make_world(folder: Path) -> None:
    """Writes the model, images, sources and artifacts; a world that is there is taken as it is.

    Args:
        folder: Of `COMMANDS`' `../../world`.
    """
    if (folder / "served.icm").is_dir():
        return
    shutil.rmtree(folder, ignore_errors=True)
    _write_images(folder)
    _write_sources(folder)
    checkpoint = _write_model(folder / "model")
    from invariclip.export.build import export_artifact
    from invariclip.export.checkpoints.checkpoint import load_checkpoint
    from invariclip.export.config import ExportConfig

    rng = np.random.default_rng(1)
    projection = Projection(rng.normal(size=(WIDTH, 8)), "icm", 3.0, training_mean=rng.normal(size=8) / 10)
    loaded = load_checkpoint(str(checkpoint))
    config = ExportConfig(classes=("ape", "bird", "tree"), images=find_images([folder / "images"]))
    export_artifact(loaded, folder / "plain.icm", config)
    export_artifact(loaded, folder / "served.icm", config, projection=projection)


def _write_model(folder: Path) -> Path:
    from invariclip.export.libraries import declare_missing_ops

    declare_missing_ops()
    import torch
    from open_clip import CLIP
    from safetensors.torch import save_file

    folder.mkdir()
    config = {"model_cfg": _MODEL, "preprocess_cfg": _PREPROCESSING}
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(CLIP(**_MODEL).state_dict(), str(folder / "open_clip_model.safetensors"))
    return folder


def _write_images(folder: Path) -> None:
    """Concepts in each of some styles, as style/class/file, and many more for `embed`."""
    names = sorted(path.name for path in (images_path() / _STYLES[0]).iterdir())
    for style in _STYLES:
        for name in names[:_CONCEPTS]:
            target = folder / "images" / style / f"class-{names.index(name) % 3}" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(images_path() / style / name, target)
    (folder / "many").mkdir()
    for number, file in enumerate(find_images([images_path()])[:_MANY]):
        shutil.copyfile(file, folder / "many" / f"{number:04d}.webp")


def _write_sources(folder: Path) -> None:
    """Pairs from images, with interventions, and from embeddings in many files."""
    rng = np.random.default_rng(0)
    for k in range(_FILES):
        first = rng.normal(size=(_ROWS, WIDTH)).astype(np.float32)
        np.save(folder / f"a{k:02}.npy", first)
        np.save(folder / f"b{k:02}.npy", first + rng.normal(size=first.shape).astype(np.float32))
    entries: list[dict[str, object]] = [
        {"kind": "images", "name": f"images-{seed}", "path": "images", "pairs_by": "name", "seed": seed,
         "interventions": "all"}
        for seed in range(4)
    ]  # fmt: skip
    entries.append({"kind": "embeddings", "first": "a*.npy", "second": "b*.npy", "points": "first"})
    (folder / "sources.json").write_text(json.dumps({"sources": entries}), encoding="utf-8")
