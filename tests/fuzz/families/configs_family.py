"""Folders of checkpoints whose configs are changed: open_clip's, and CLIPModel and SiglipModel of transformers."""

import json
import shutil
import warnings
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError

from fuzz import tiny
from fuzz.base import Family as Base
from fuzz.base import WrongError
from fuzz.mutate import HOSTILE, damaged, restructured, written
from invariclip.export.checkpoints.checkpoint import load_checkpoint
from invariclip.export.libraries import declare_missing_ops
from invariclip.preprocessing.pixels import normalise

TEXTS = ["a photo of a cat", "two dogs"]
FILES = {
    "open_clip": ("open_clip_config.json",),
    "clip": ("config.json", "preprocessor_config.json", "tokenizer_config.json"),
    "siglip": ("config.json", "preprocessor_config.json", "tokenizer_config.json"),
}
SIZES = (0, 1, 2, 3, 7, 24, 33, 64, 1000, 2**16, 2**20, 2**24, 2**31, 2**63)


class Family(Base):
    """See the module."""

    count = 1_500
    what = (
        "open_clip_config.json, config.json and preprocessor_config.json of tiny models beside weights that are whole: "
        "sizes from 0 to 2^63, other types, values, names and activations, fields lost, more or twice, damaged "
        "bytes; the "
        "model is built, filled and asked"
    )
    reference = "open_clip's own loader and transformers' on the same folder: embeddings within 1e-4"
    memory = 2 << 30

    def open(self, folder):
        declare_missing_ops()
        self.place = Path(folder) / "configs"
        self.wholes = {"open_clip": tiny.checkpoint(folder), **_transformers(Path(folder))}
        rng = np.random.default_rng(0)
        self.noise = rng.integers(0, 256, (2, 48, 48, 3), dtype=np.uint8)
        for kind in self.wholes:
            self._load(kind, None, b"")

    def draw(self, rng):
        kind = rng.choice(list(self.wholes))
        name = rng.choice(FILES[kind])
        content, how = (self.wholes[kind] / name).read_bytes(), rng.random()
        if how < 0.15:
            what, changed = damaged(rng, content)
        elif how < 0.5:
            plain = json.loads(content)
            what = "a size"
            _other_size(rng, plain)
            changed = written(plain).encode()
        else:
            what, plain = restructured(rng, json.loads(content))
            if rng.random() < 0.2 and isinstance(plain, dict) and isinstance(plain.get("vision_config"), dict):
                plain["vision_config"][
                    rng.choice(("hidden_act", "num_channels", "layer_norm_eps", "vision_use_head"))
                ] = rng.choice((*HOSTILE, "gelu", "quick_gelu", "relu", False))
            changed = written(plain).encode("utf-8", "surrogatepass")
        return f"{kind}, {name}: {what}", lambda: self._load(kind, name, changed)

    def _load(self, kind, name, content):
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        for file in self.wholes[kind].iterdir():
            if file.name != name:
                (self.place / file.name).hardlink_to(file)
        if name:
            (self.place / name).write_bytes(content)
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            ours = load_checkpoint(str(self.place), threads=1)
            height, width = ours.pixels.image_size
            batch = (
                self.noise[:, :height, :width]
                if max(height, width) <= 48
                else np.zeros((1, height, width, 3), np.uint8)
            )
            ids = ours.tokenizer(TEXTS)
            images, texts = ours.encode_images(batch), ours.encode_texts(ids)
            inputs = torch.from_numpy(normalise(batch, ours.pixels))
            try:
                theirs = _theirs(kind, self.place, inputs, torch.from_numpy(ids))
            except StrictDataclassError:  # of a field that changes no answer: then they are those of the whole folder
                theirs = _theirs(kind, self.wholes[kind], inputs, torch.from_numpy(ids))
            except Exception as error:
                raise WrongError(f"loaded what {kind} does not ({type(error).__name__}: {error!s:.200})") from None
        for what, one, other in (("image", images, theirs[0]), ("text", texts, theirs[1])):
            if one.shape != other.shape or not np.allclose(one, other, rtol=1e-4, atol=1e-4, equal_nan=True):
                raise WrongError(f"other {what} embeddings than {kind}'s")


def _theirs(kind, folder, images, ids):
    """Embeddings by the library that the folder is of."""
    with torch.inference_mode():
        if kind == "open_clip":
            from open_clip import create_model

            module = create_model(f"local-dir:{folder}").eval()
            return module.encode_image(images).numpy(), module.encode_text(ids).numpy()
        from transformers import CLIPModel, SiglipModel

        module = {"clip": CLIPModel, "siglip": SiglipModel}[kind].from_pretrained(folder, local_files_only=True).eval()
        found = module.get_image_features(images), module.get_text_features(ids)
        return [getattr(one, "pooler_output", one).numpy() for one in found]


def _other_size(rng, plain):
    """A number somewhere becomes another size."""
    places = []

    def walk(value):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(one, dict | list):
                walk(one)
            elif isinstance(one, int) and not isinstance(one, bool):
                places.append((value, key))

    walk(plain)
    holder, key = rng.choice(places) if places else (plain, "hidden_size")
    holder[key] = rng.choice((*SIZES, holder.get(key, 1) if isinstance(holder, dict) else 1))


def _transformers(folder):
    """Tiny models of transformers with random weights."""
    small = {"hidden_size": 32, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {"vocab_size": 1700, "max_position_embeddings": 16}
    looks = {"image_size": 48, "patch_size": 16}

    def make(kind):
        def of(into):
            from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

            from invariclip.export.checkpoints.families import write_tokenizer

            write_tokenizer(into, "unigram", words["vocab_size"])
            torch.manual_seed(0)
            if kind == "clip":
                config = CLIPConfig(text_config={**small, **words, "eos_token_id": 1}, vision_config={**small, **looks},
                                    projection_dim=24)  # fmt: skip
                CLIPModel(config).save_pretrained(into)
                settings = {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}, "resample": 3}
            else:
                SiglipModel(
                    SiglipConfig(text_config={**small, **words}, vision_config={**small, **looks})
                ).save_pretrained(into)
                settings = {"size": {"height": 48, "width": 48}, "resample": 2}
            (into / "preprocessor_config.json").write_text(json.dumps(settings))

        return of

    return {kind: tiny.once(folder, f"transformers-{kind}", make(kind)) for kind in ("clip", "siglip")}
