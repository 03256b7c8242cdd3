"""Models in transformers' layout: equal to transformers on real images and texts, or refused with the reason."""

import json
import re
import shutil
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Library
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

from invariclip.errors import CheckpointError
from invariclip.export import reference
from invariclip.export.checkpoints import hugging_face, tokenizer, vocabulary, weights
from invariclip.export.checkpoints.checkpoint import load_checkpoint
from invariclip.export.checkpoints.tokenizer import TokenizerSettings
from invariclip.preprocessing.pixels import stack

IMAGES = sorted((Path(reference.__file__).parent / "images").rglob("*.webp"))[::300]
TEXTS = [
    "a photo of a cat",
    "A PHOTO of  a DOG, on grass!",
    "hot_dog's 42-17 <b>&amp;</b>",
    "",
    "word " * 100,
    "naïve é",
]
SMALL = {"hidden_size": 32, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZE, PATCH = 48, 16


def write_clip(folder, *, eos=49407, act="quick_gelu", **processor):
    """A tiny CLIPModel with its processor and tokenizer, as transformers saves them."""
    names = {"<start_of_text></w>": "<|startoftext|>", "<end_of_text></w>": "<|endoftext|>"}
    pieces = {names.get(piece, piece): number for piece, number in vocabulary._vocabulary().items()}
    CLIPTokenizer(vocab=pieces, merges=list(vocabulary._merges())).save_pretrained(folder)
    config = CLIPConfig(
        text_config={
            **SMALL,
            "vocab_size": 49408,
            "eos_token_id": eos,
            "hidden_act": act,
            "max_position_embeddings": 20,
        },
        vision_config={**SMALL, "image_size": SIZE, "patch_size": PATCH, "hidden_act": act},
        projection_dim=24,
    )
    CLIPImageProcessorPil(**{"size": {"shortest_edge": SIZE}, "crop_size": SIZE, **processor}).save_pretrained(folder)
    return save(CLIPModel(config), folder)


def write_siglip(folder, **vision):
    """A tiny SiglipModel with its processor and Siglip2's kind of tokenizer, as transformers saves them."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [chr(code) for code in range(33, 127)]
    words = Siglip2Tokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, padding_side="right")
    words.save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<eos>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<eos>": {"id": "<eos>", "ids": [1], "tokens": ["<eos>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = SiglipConfig(
        text_config={**SMALL, "vocab_size": len(pieces), "max_position_embeddings": 20},
        vision_config={**SMALL, "image_size": SIZE, "patch_size": PATCH, **vision},
    )
    SiglipImageProcessorPil(size={"height": SIZE, "width": SIZE}, resample=2).save_pretrained(folder)
    return save(SiglipModel(config), folder)


def save(model, folder, **options):
    """Saves a model whose every weight counts; returns it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim and "logit" not in name:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.05)
    model.eval().save_pretrained(folder, **options)
    return model


KINDS = {
    "clip": (write_clip, CLIPImageProcessorPil),
    "siglip": (write_siglip, SiglipImageProcessorPil),
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The folder and the model of each kind."""
    made = {}
    for kind, (write, _) in KINDS.items():
        folder = tmp_path_factory.mktemp(kind)
        made[kind] = folder, write(folder)
    return made


@pytest.fixture
def folder(theirs, tmp_path):
    """A copy of the tiny CLIPModel's folder that a test may change."""
    return Path(shutil.copytree(theirs["clip"][0], tmp_path / "clip"))


def embeddings(output):
    """What transformers 5 wraps and 4 does not."""
    return getattr(output, "pooler_output", output).numpy()


def assert_equal(loaded, folder, model, processor):
    """Pixels, ids and embeddings are transformers'."""
    images = [Image.open(path).convert("RGB") for path in IMAGES]
    images.append(images[0].resize((97, 60)))
    pixels = processor.from_pretrained(folder)(images, return_tensors="pt")["pixel_values"]
    ids = AutoTokenizer.from_pretrained(folder)(
        TEXTS, padding="max_length", truncation=True, max_length=20, return_tensors="pt"
    )["input_ids"]
    np.testing.assert_array_equal(loaded.tokenizer(TEXTS), ids.numpy())
    with torch.inference_mode():
        image, text = embeddings(model.get_image_features(pixels)), embeddings(model.get_text_features(ids))
    np.testing.assert_allclose(loaded.encode_images(stack(images, loaded.pixels)), image, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(loaded.encode_texts(loaded.tokenizer(TEXTS)), text, rtol=1e-5, atol=1e-5)
    assert np.ptp(image, axis=0).min() > 1e-3
    assert loaded.logit_scale == pytest.approx(model.logit_scale.exp().item())


@pytest.mark.filterwarnings("ignore::invariclip.errors.TruncatedTextWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_it_answers_like_transformers(theirs, kind):
    folder, model = theirs[kind]
    loaded = load_checkpoint(str(folder))
    assert_equal(loaded, folder, model, KINDS[kind][1])
    assert loaded.logit_bias == (None if kind == "clip" else pytest.approx(model.logit_bias.item()))
    assert loaded.pixels.resize_mode == ("shortest" if kind == "clip" else "squash")
    assert loaded.pixels.interpolation == ("bicubic" if kind == "clip" else "bilinear")
    assert loaded.source == "model.safetensors"


@pytest.mark.filterwarnings("ignore::invariclip.errors.TruncatedTextWarning")
@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh"])
def test_early_configs_and_other_activations_are_understood(tmp_path, act):
    model = write_clip(tmp_path, eos=2, act=act, size=SIZE, resample=2, do_normalize=False)
    loaded = load_checkpoint(str(tmp_path))
    assert_equal(loaded, tmp_path, model, CLIPImageProcessorPil)
    assert loaded.pixels.image_std == (1.0, 1.0, 1.0)


def test_weights_in_several_files_are_one_model(theirs, tmp_path):
    folder, model = theirs["clip"]
    shutil.copytree(folder, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(tmp_path / "m", max_shard_size="2MB")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    assert load_checkpoint(str(tmp_path / "m")).sha256 == load_checkpoint(str(folder)).sha256


def test_weights_with_their_names_fit_open_clips_config(theirs, tmp_path):
    for kind, (folder, _) in theirs.items():
        module = load_checkpoint(str(folder)).module
        again = hugging_face.create(hugging_face.read(folder))
        weights.fit(weights.read_state_dict(folder / "model.safetensors"), again, "file", kind)
        for (name, one), other in zip(module.state_dict().items(), again.state_dict().values(), strict=True):
            assert torch.equal(one, other), name


def test_what_configs_leave_out_is_transformers_default(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{}")
    plain = {"model_type": "siglip", "text_config": {"model_type": "siglip_text_model"}, "vision_config": None}
    (tmp_path / "config.json").write_text(json.dumps(plain))
    found = hugging_face.read(tmp_path)
    assert found.model_cfg["text_cfg"]["context_length"] == SiglipConfig().text_config.max_position_embeddings
    assert found.trunk["embed_dim"] == SiglipConfig().vision_config.hidden_size
    assert found.preprocess_cfg == {
        "size": 224, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash",
    }  # fmt: skip
    plain = {"architectures": ["CLIPModel"], "text_config": {"hidden_size": 8}, "text_config_dict": {"hidden_size": 64}}
    (tmp_path / "config.json").write_text(json.dumps(plain))
    assert hugging_face.read(tmp_path).model_cfg["text_cfg"]["width"] == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "siglip2", "architectures": ["Siglip2Model"]}, "Siglip2Model is NaFlex"),
        (
            {"model_type": "blip", "architectures": ["BlipModel"]},
            r"BlipModel \(model_type 'blip'\) .* available: CLIPM",
        ),
        ({"model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"]}, "CLIPVisionModel .* not supported"),
        (
            {"vision_config": {**SMALL, "hidden_act": "relu"}},
            "hidden_act 'relu' is not supported; available: quick_gelu",
        ),
        ({"vision_config": {**SMALL, "hidden_act": "gelu"}}, r"different activations \(gelu and quick_gelu\)"),
        ({"vision_config": {"hidden_size": "x"}}, "vision_config: Expected `int`, got `str`"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "describes no tower: num_hidden_layers 1000000000"),
        ({"text_config": {"num_attention_heads": 3}}, "hidden_size 512 is no multiple of its 3 heads"),
        ({"text_config": [1]}, "text_config is no object"),
        ({"projection_dim": "wide"}, "projection_dim 'wide' is no width"),
    ],
)
def test_what_cannot_be_converted_is_refused_with_the_reason(folder, changes, message):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resample": 0}, r"resample 0 is not supported; available: 2 \(bilinear\), 3 \(bicubic\)"),
        ({"size": {"shortest_edge": 64}}, "size {'shortest_edge': 64} with crop_size .* not supported"),
        ({"do_center_crop": False}, "crop_size None does not end at the tower's 48 pixels"),
        ({"crop_size": {"height": 32, "width": 32}}, "not supported"),
        ({"do_rescale": False}, "only image processors that resize and rescale by 1/255"),
        ({"image_std": [0.2, 0.2]}, "image_std"),
        ({"image_std": [0.2, 0.2, 0.0]}, "its preprocessing is not supported"),
    ],
)
def test_preprocessing_that_no_pixel_spec_says_is_refused(folder, changes, message):
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("preprocessor_config.json", "in transformers' layout, but has no preprocessor_config.json"),
        ("tokenizer.json", "no tokenizer.json in .*; pass --tokenizer DIR"),
        ("model.safetensors", "no weights; pass --checkpoint FILE"),
    ],
)
def test_what_is_missing_is_named(folder, file, message):
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(str(folder))


def test_the_processor_may_lie_in_transformers_5s_file(folder):
    before = load_checkpoint(str(folder)).pixels
    plain = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": plain}))
    assert load_checkpoint(str(folder)).pixels == before


def test_one_towers_weights_are_not_enough(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({name: one for name, one in tensors.items() if "vision" in name}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"belongs to another model than clip.* is missing"):
        load_checkpoint(str(folder))
    save_file({name: one for name, one in tensors.items() if "k_proj" not in name}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"belongs to another model than clip.*k_proj"):
        load_checkpoint(str(folder))


def test_siglips_own_cleaning_becomes_part_of_the_tokenizer(theirs, tmp_path):
    shutil.copy(theirs["siglip"][0] / "tokenizer.json", tmp_path)
    text = tokenizer._content_of(
        tmp_path / "tokenizer.json", TokenizerSettings(tokenizer_class="SiglipTokenizer"), as_transformers=True
    )
    normalizer = Library.from_str(text).normalizer
    for one in (*TEXTS, f"{string.punctuation} x", "  a \t\n b "):
        # SiglipTokenizer.canonicalize_text of transformers, which needs sentencepiece
        canonical = re.sub(r"\s+", " ", one.lower().translate(str.maketrans("", "", string.punctuation))).strip()
        assert normalizer.normalize_str(one).replace("▁", " ") == canonical


def test_the_hub_goes_the_way_of_a_folder(theirs, monkeypatch):
    import huggingface_hub
    import open_clip
    from huggingface_hub.errors import EntryNotFoundError

    def fetch(hub_id, filename=None):
        try:
            raise EntryNotFoundError("404")
        except EntryNotFoundError:
            raise FileNotFoundError(f"Failed to download file ({filename}) for {hub_id}")  # noqa: B904 - as open_clip

    monkeypatch.setattr(open_clip.pretrained, "download_pretrained_from_hf", fetch)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda hub_id, allow_patterns: str(theirs["clip"][0]))
    loaded = load_checkpoint("hf-hub:someone/clip")
    assert (loaded.name, loaded.source) == ("hf-hub:someone/clip", "model.safetensors")


def test_what_a_trainer_leaves_beside_the_weights_is_not_taken_for_them(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    torch.save({"state": {}}, folder / "optimizer.pt")
    assert load_checkpoint(str(folder)).source == "pytorch_model.bin"


@pytest.mark.parametrize("size", [{"num_hidden_layers": 2**24}, {"hidden_size": 2**24}, {"intermediate_size": 2**24}])
@pytest.mark.parametrize("tower", ["text_config", "vision_config"])
def test_a_config_asks_for_no_more_than_its_weights_explain(folder, tower, size):
    plain = json.loads((folder / "config.json").read_text())
    plain[tower] |= size
    (folder / "config.json").write_text(json.dumps(plain))
    with pytest.raises(CheckpointError, match="its config describes a larger model than the weights are of"):
        load_checkpoint(str(folder))


@pytest.mark.parametrize("changed", [{"model_type": ["clip"]}, {"architectures": "CLIPModel"}, {"model_type": 3}])
def test_kinds_of_another_type_are_refused(folder, changed):
    plain = json.loads((folder / "config.json").read_text()) | changed
    (folder / "config.json").write_text(json.dumps(plain))
    with pytest.raises(CheckpointError, match="model_type must be a text, and architectures a list of them"):
        load_checkpoint(str(folder))


@pytest.mark.parametrize("eps", [0, 1, -1e-5, 2**31])
def test_an_epsilon_that_is_none_is_refused(folder, eps):
    plain = json.loads((folder / "config.json").read_text())
    plain["text_config"]["layer_norm_eps"] = eps
    (folder / "config.json").write_text(json.dumps(plain))
    with pytest.raises(CheckpointError, match="text_config describes no tower: layer_norm_eps"):
        load_checkpoint(str(folder))
