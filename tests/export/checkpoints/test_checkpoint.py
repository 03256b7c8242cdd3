"""Models by name, folder and file: what loads, what it then says, and what is refused in one line."""

import json
import math
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from invariclip.errors import CheckpointError
from invariclip.export.checkpoints import checkpoint as module
from invariclip.export.checkpoints.checkpoint import CheckpointWarning, load_checkpoint, warn_of_quick_gelu
from invariclip.preprocessing.pixels import stack

WEIGHTS = "open_clip_model.safetensors"


@pytest.fixture
def folder(model_folder, tmp_path):
    """A copy of the tiny ViT's folder that a test may damage."""
    return Path(shutil.copytree(model_folder("vit"), tmp_path / "vit"))


def test_it_answers_like_open_clip(model_folder, checkpoint, tiny_images):
    loaded = checkpoint("vit")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{model_folder('vit')}")
    model.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{model_folder('vit')}")
    from PIL import Image

    paths = sorted(tiny_images.iterdir())
    with torch.inference_mode():
        wanted = model.encode_image(torch.stack([transform(Image.open(path)) for path in paths])).numpy()
        wanted_texts = model.encode_text(tokenizer(["a cat", "zwei Hunde"])).numpy()
    # not bit by bit: on some processors a product's last digit follows where in memory its weights lie
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-6)
    close(loaded.encode_images(stack(paths, loaded.pixels)), wanted)
    close(loaded.encode_texts(loaded.tokenizer(["a cat", "zwei Hunde"])), wanted_texts)
    assert loaded.logit_scale == pytest.approx(model.logit_scale.exp().item(), rel=1e-6)
    assert (loaded.name, loaded.embed_dim, loaded.logit_bias, loaded.source) == ("vit", 24, None, WEIGHTS)
    assert not loaded.module.training


def test_no_rows_are_an_answer_too(checkpoint, batch):
    loaded = checkpoint("vit")
    assert loaded.encode_images(batch(loaded, 0)).shape == (0, 24)


def test_more_than_one_chunk_is_one_answer(checkpoint, batch):
    loaded = checkpoint("vit")
    images = batch(loaded, 40)
    both = loaded.encode_images(images)
    np.testing.assert_allclose(both[-8:], loaded.encode_images(images[-8:]), atol=1e-5)


def test_float16_weights_are_upcast(folder):
    before = load_checkpoint(str(folder))
    tensors = load_file(folder / WEIGHTS)
    save_file({name: value.half() for name, value in tensors.items()}, folder / WEIGHTS)
    loaded = load_checkpoint(str(folder))
    assert {value.dtype for value in loaded.module.parameters()} == {torch.float32}
    assert loaded.sha256 != before.sha256
    expected = tensors["visual.proj"].half().float()
    torch.testing.assert_close(loaded.module.visual.proj.data, expected, rtol=0, atol=0)


def test_the_container_does_not_matter(folder, tmp_path):
    torch.save({"state_dict": load_file(folder / WEIGHTS), "epoch": 1}, tmp_path / "weights.pt")
    assert load_checkpoint(str(folder), tmp_path / "weights.pt").sha256 == load_checkpoint(str(folder)).sha256


def test_safetensors_come_before_other_files(folder):
    torch.save({"a": torch.zeros(1)}, folder / "another.bin")
    assert load_checkpoint(f"local-dir:{folder}").source == WEIGHTS


def test_random_weights_only_if_asked_and_by_seed(folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="no weights; pass --checkpoint FILE"):
        load_checkpoint(str(folder))
    state = torch.get_rng_state()
    one, same, other = (load_checkpoint(str(folder), allow_random=True, seed=seed) for seed in (1, 1, 2))
    assert one.sha256 == same.sha256 != other.sha256
    assert one.source == "random weights, seed 1"
    assert torch.equal(torch.get_rng_state(), state)


def test_random_weights_saved_to_a_file_keep_their_digest(folder):
    (folder / WEIGHTS).unlink()
    random = load_checkpoint(str(folder), allow_random=True)
    save_file(random.module.state_dict(), folder / WEIGHTS)
    assert load_checkpoint(str(folder)).sha256 == random.sha256


def test_quick_gelu_follows_the_config(checkpoint, batch):
    plain, quick = checkpoint("vit"), checkpoint("vit, quick_gelu")
    kinds = {type(block.mlp.gelu).__name__ for block in quick.module.visual.transformer.resblocks}
    assert kinds == {"QuickGELU"}
    assert quick.sha256 == plain.sha256  # the weights cannot tell: only the config can
    assert np.abs(quick.encode_images(batch(quick)) - plain.encode_images(batch(plain))).max() > 1e-4


def test_sigmoid_models_carry_their_bias(checkpoint):
    loaded = checkpoint("vit, sigmoid")
    assert loaded.logit_bias == -10
    assert loaded.logit_scale == pytest.approx(math.exp(2.3), rel=1e-6)


def test_preprocessing_follows_the_config(write, vit, tmp_path):
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    loaded = load_checkpoint(write(tmp_path / "m", vit, preprocess=preprocess))
    assert loaded.pixels.image_size == (32, 32)
    assert loaded.pixels.image_mean == (0.5, 0.4, 0.3)
    assert (loaded.pixels.interpolation, loaded.pixels.resize_mode) == ("bilinear", "squash")


def test_preprocessing_that_is_not_supported_is_named(write, vit, tmp_path):
    with pytest.raises(CheckpointError, match="interpolation 'random' is not known"):
        load_checkpoint(write(tmp_path / "m", vit, preprocess={"interpolation": "random"}))


@pytest.fixture
def published(monkeypatch, vit):
    """The tiny ViT under an architecture's name, with published checkpoints as the test says."""

    def of(name, configs):
        settings = {"embed_dim": 24, "vision_cfg": vit, "text_cfg": {"width": 16, "heads": 2, "layers": 1}}
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, settings)
        monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda _: list(configs))
        monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda _, tag: configs[tag])
        return load_checkpoint(name, allow_random=True)

    return of


def test_an_architecture_takes_the_preprocessing_that_all_its_checkpoints_share(published):
    mobile = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "interpolation": "bilinear"}
    loaded = published("Tiny-Mobile", {"one": mobile, "two": {**mobile, "quick_gelu": False}})
    assert (loaded.pixels.image_std, loaded.pixels.interpolation) == ((1.0, 1.0, 1.0), "bilinear")


def test_an_architecture_whose_checkpoints_differ_warns(published):
    with pytest.warns(CheckpointWarning, match=r"Tiny-Mixed: some published checkpoints \(a, b\) want"):
        loaded = published("Tiny-Mixed", {"a": {"mean": (0.4, 0.4, 0.4)}, "b": {"mean": (0.4, 0.4, 0.4)}, "odd": {}})
    assert loaded.pixels.image_mean[0] == pytest.approx(0.48145466)


@pytest.mark.parametrize(
    ("name", "config", "twin"),
    [
        ("ViT-B-32", {}, "ViT-B-32-quickgelu"),
        ("ViT-B-32-quickgelu", {"quick_gelu": True}, None),
        ("RN50", {}, "RN50-quick"),
    ],
)
def test_the_activation_that_weights_cannot_tell_is_warned_of(name, config, twin, recwarn):
    warn_of_quick_gelu(name, config)
    if twin is None:
        assert not [warning for warning in recwarn if issubclass(warning.category, CheckpointWarning)]
    else:
        (warning,) = recwarn
        assert "openai" in str(warning.message)
        assert f"were trained with QuickGELU; for one of them pass --model {twin}" in str(warning.message)


@pytest.fixture
def tags(monkeypatch, model_folder, vit):
    """The tiny ViT as an architecture with published weights, one of them trained with QuickGELU."""
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    settings = {"embed_dim": 24, "vision_cfg": vit, "text_cfg": text}
    for name in ("Tiny", "Tiny-quickgelu"):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, {**settings, "quick_gelu": "quick" in name})
    published = {"plain": {"mean": (0.1, 0.2, 0.3), "interpolation": "bilinear"}, "quick": {"quick_gelu": True}}
    monkeypatch.setattr(open_clip.pretrained, "get_pretrained_cfg", lambda _, tag: published.get(tag, {}))
    monkeypatch.setattr(open_clip.pretrained, "list_pretrained_tags_by_model", lambda _: list(published))
    file = f"{model_folder('vit')}/{WEIGHTS}"
    monkeypatch.setattr(open_clip.pretrained, "download_pretrained", lambda settings: file)


def test_published_weights_come_by_their_tag_with_their_preprocessing(tags, checkpoint):
    loaded = load_checkpoint("Tiny", "plain")
    assert loaded.sha256 == checkpoint("vit").sha256
    assert (loaded.pixels.image_mean, loaded.pixels.interpolation) == ((0.1, 0.2, 0.3), "bilinear")


def test_published_weights_of_another_activation_are_refused(tags):
    with pytest.raises(CheckpointError, match="were trained with QuickGELU; pass --model Tiny-quickgelu"):
        load_checkpoint("Tiny", "quick")
    assert load_checkpoint("Tiny-quickgelu", "quick").name == "Tiny-quickgelu"


def test_an_unknown_tag_and_a_missing_file_are_told_apart(tags):
    with pytest.raises(
        CheckpointError, match="plane: neither a file nor one of the tags of Tiny; available: plain, quick"
    ):
        load_checkpoint("Tiny", "plane")
    with pytest.raises(CheckpointError, match=r"plane\.pt: no such checkpoint file"):
        load_checkpoint("Tiny", "plane.pt")


def test_published_weights_that_cannot_be_fetched_are_one_line(tags, monkeypatch):
    def fetch(_):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(open_clip.pretrained, "download_pretrained", fetch)
    with pytest.raises(
        CheckpointError, match=r"the weights plain cannot be fetched \(no route\); offline, name a file"
    ):
        load_checkpoint("Tiny", "plain")


@pytest.mark.parametrize("shape", [[], [1]])
def test_temperature_and_bias_have_any_shape(model_folder, tmp_path, shape):
    folder = Path(shutil.copytree(model_folder("vit, sigmoid"), tmp_path / "m"))
    tensors = load_file(folder / WEIGHTS)
    save_file(
        {**tensors, **{f"logit_{name}": tensors[f"logit_{name}"].reshape(shape) for name in ("scale", "bias")}},
        folder / WEIGHTS,
    )
    loaded = load_checkpoint(str(folder))
    assert (loaded.logit_bias, loaded.logit_scale) == (-10, pytest.approx(math.exp(2.3), rel=1e-6))


def test_a_missing_bias_is_zero_and_a_missing_temperature_an_error(model_folder, tmp_path):
    folder = Path(shutil.copytree(model_folder("vit, sigmoid"), tmp_path / "m"))
    tensors = load_file(folder / WEIGHTS)
    save_file({name: value for name, value in tensors.items() if name != "logit_bias"}, folder / WEIGHTS)
    with pytest.warns(CheckpointWarning, match="holds no logit_bias; 0 is taken"):
        assert load_checkpoint(str(folder)).logit_bias == 0
    save_file({name: value for name, value in tensors.items() if name != "logit_scale"}, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match="logit_scale is missing"):
        load_checkpoint(str(folder))


def test_a_folder_with_its_weights_in_several_files(folder):
    tensors = load_file(folder / WEIGHTS)
    expected = load_checkpoint(str(folder)).sha256
    (folder / WEIGHTS).unlink()
    names, places = sorted(tensors), {}
    for number, held in enumerate((names[:5], names[5:]), 1):
        file = f"open_clip_model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in held}, folder / file)
        places.update(dict.fromkeys(held, file))
    index = folder / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    loaded = load_checkpoint(str(folder))
    assert (loaded.sha256, loaded.source) == (expected, index.name)


def test_a_folder_whose_name_has_siglip_in_it_keeps_its_own_vocabulary(model_folder, tmp_path):
    folder = shutil.copytree(model_folder("vit"), tmp_path / "my-siglip-run")
    assert load_checkpoint(str(folder)).tokenizer.spec.start_token_ids == (49406,)


@pytest.mark.parametrize(("model", "near"), [("ViT-B32", "ViT-B-32"), ("RN-50", "RN50"), ("refrence", "reference")])
def test_an_unknown_model_gets_the_nearest_names(model, near):
    with pytest.raises(CheckpointError, match=f"{model}: neither an open_clip architecture nor a folder; .*{near}"):
        load_checkpoint(model)


def test_a_checkpoint_of_another_model_is_named(model_folder, folder, write, vit, tmp_path):
    foreign = Path(model_folder("timm, linear head")) / WEIGHTS
    with pytest.raises(CheckpointError, match=r"belongs to another model than vit: visual\S+ is missing") as caught:
        load_checkpoint(str(folder), foreign)
    assert "\n" not in str(caught.value)
    wider = Path(write(tmp_path / "wide", {**vit, "width": 128})) / WEIGHTS
    with pytest.raises(CheckpointError, match=r"is \[128\], not \[64\]; .* more\)"):
        load_checkpoint(str(folder), wider)
    # open_clip would stretch the positional embedding and say nothing
    larger = Path(write(tmp_path / "large", {**vit, "image_size": 64})) / WEIGHTS
    with pytest.raises(CheckpointError, match=r"visual.positional_embedding is \[65, 64\], not \[17, 64\]"):
        load_checkpoint(str(folder), larger)


def test_a_tower_with_the_old_names_loads(model_folder, checkpoint):
    custom = "text tower of its own"
    loaded = load_checkpoint(model_folder(custom), Path(model_folder("vit")) / WEIGHTS)
    torch.testing.assert_close(loaded.module.text.text_projection, checkpoint("vit").module.text_projection)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "holds no open_clip_config.json"),
        (lambda path: path.write_text("{"), "not readable as JSON"),
        (lambda path: path.write_text("[1]"), "open_clip_config.json"),
        (lambda path: path.write_text('{"model_cfg": {"embed_dim": 3}}'), "lacks embed_dim, vision_cfg or text_cfg"),
    ],
)
def test_a_damaged_config_is_named(folder, damage, message):
    damage(folder / "open_clip_config.json")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(str(folder))


def test_a_config_that_open_clip_cannot_build_is_named(folder):
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["vision_cfg"]["patch_siez"] = 4
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"open_clip cannot build it .*patch_siez"):
        load_checkpoint(str(folder))


def test_the_hub_goes_the_way_of_a_folder(folder, monkeypatch):
    def fetch(hub_id, filename=None):
        assert hub_id == "someone/tiny"
        return str(folder / (filename or WEIGHTS))

    monkeypatch.setattr(open_clip.pretrained, "download_pretrained_from_hf", fetch)
    loaded = load_checkpoint("hf-hub:someone/tiny")
    assert (loaded.name, loaded.source) == ("hf-hub:someone/tiny", WEIGHTS)


def test_an_unreachable_hub_is_one_line(monkeypatch):
    def fetch(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(open_clip.pretrained, "download_pretrained_from_hf", fetch)
    with pytest.raises(CheckpointError, match=r"cannot be fetched from the Hugging Face hub \(no route\); offline"):
        load_checkpoint("hf-hub:someone/tiny")


@pytest.mark.parametrize(("model", "owner"), [("ViT-B-16-SigLIP", "timm/ViT-B-16-SigLIP"), ("roberta-ViT-B-32", "")])
def test_a_missing_tokenizer_says_how_to_give_it(model, owner):
    hint = (
        "pass --tokenizer DIR, .* or --tokenizer hf-hub:" if owner else "pass as --model a folder with open_clip_config"
    )
    with pytest.raises(CheckpointError, match=f"^{model}: .*{hint}{owner}"):
        load_checkpoint(model, allow_random=True)


def test_threads_are_set(model_folder):
    before = torch.get_num_threads()
    load_checkpoint(model_folder("vit"), threads=1)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)


def test_the_name_of_the_bundled_model():
    assert module.REFERENCE == "reference"


@pytest.mark.parametrize(
    ("prefix", "entry", "source"),
    [
        ("module._orig_mod.", None, "weights.pt, names without _orig_mod, names without module"),
        ("model.", "state_dict_ema", "weights.pt, its state_dict_ema, names without model"),
    ],
)
def test_wrapped_weights_load_and_say_what_was_taken(folder, tmp_path, prefix, entry, source):
    named = {prefix + name: value for name, value in load_file(folder / WEIGHTS).items()}
    torch.save(named if entry is None else {entry: named, "epoch": 3}, tmp_path / "weights.pt")
    loaded = load_checkpoint(str(folder), tmp_path / "weights.pt")
    assert (loaded.sha256, loaded.source) == (load_checkpoint(str(folder)).sha256, source)


def test_weights_that_are_no_numbers_are_refused(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors["visual.proj"][0, :3] = float("nan")
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"holds NaN or infinite weights in visual\.proj \(3 of 1,536 values\)"):
        load_checkpoint(str(folder))


def test_a_temperature_beyond_all_bounds_is_refused(folder):
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, "logit_scale": torch.tensor(1000.0)}, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match="its logit_scale is 1000"):
        load_checkpoint(str(folder))


def test_checkpoints_that_say_what_is_usual_do_not_differ(published, recwarn):
    usual = {"mean": (0.48145466, 0.4578275, 0.40821073), "interpolation": "bicubic", "resize_mode": "shortest"}
    published("Tiny-Usual", {"a": {}, "b": usual, "c": {"mean": None}})
    assert not [one for one in recwarn if issubclass(one.category, CheckpointWarning)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "not readable as JSON"),
        ("9" * 5000, "not readable as JSON"),
        ('{"model_cfg": {"embed_dim": 1e999}}', "beyond what a number can hold"),
        ("[1]", "must hold a JSON object, not list"),
        ({"text_cfg": [1, 2]}, "text_cfg of its open_clip_config.json: Expected `object`, got `array`"),
        ({"text_cfg": {"vocab_size": [1]}}, r"Expected `int`, got `array` - at `\$\.vocab_size`"),
        ({"text_cfg": {"tokenizer_kwargs": "x"}}, r"at `\$\.tokenizer_kwargs`"),
        ({"vision_cfg": 3}, "needs a number as embed_dim and an object as vision_cfg"),
        ({"embed_dim": "wide"}, "needs a number as embed_dim and an object as vision_cfg"),
        ({"vision_cfg": {"layers": "x"}}, "open_clip cannot build it"),
        ({"preprocess": '"std": [0.2, 0.2, NaN]'}, "NaN is no number in JSON"),
        ({"preprocess": '"std": [0.2, 0.2, "x"]'}, "its preprocessing is not supported"),
        ({"preprocess": '"std": [0.2, 0.2, 1' + "0" * 400 + "]"}, "its preprocessing is not supported"),
    ],
)
def test_a_config_of_other_types_is_refused_in_one_line(folder, content, message):
    file = folder / "open_clip_config.json"
    if isinstance(content, dict):
        plain = json.loads(file.read_text())
        extra = content.pop("preprocess", "")
        plain["model_cfg"].update(content)
        content = json.dumps(plain).replace('"preprocess_cfg": {}', f'"preprocess_cfg": {{{extra}}}')
    file.write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(str(folder))
    assert "\n" not in str(caught.value)
