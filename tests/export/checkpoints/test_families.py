"""The families of the list, without a download: they load, every part of them counts, their traits get exported."""

import json
import warnings
from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from open_clip import list_models

from invariclip.errors import CheckpointError
from invariclip.export.build import export_artifact
from invariclip.export.checkpoints import construct, families, weights
from invariclip.export.checkpoints.checkpoint import load_checkpoint, shortened
from invariclip.export.checkpoints.families import FAMILIES, ROBERTA_BASE, load_family, write_tokenizer
from invariclip.export.checkpoints.surgery import foldable, reparameterized, shorten
from invariclip.export.config import ExportConfig
from invariclip.export.graphs.tower_graph import tower_graph
from invariclip.export.graphs.writing import write_graph
from invariclip.loading import load
from invariclip.preprocessing.pixels import stack

VISION = {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8}
TEXTS = ["a photo of a dog", "", "the moon, and a key: two things in one long text that does not fit", "x", "a cat"]


@cache
def short(name):
    return load_family(name, short=True)


def noise(checkpoint, count=2):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, *checkpoint.pixels.image_size, 3), dtype=np.uint8)


@pytest.fixture
def quiet():
    """Texts that are cut are meant to be."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_the_list_is_the_issues():
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == 15
    assert set(names) <= set(list_models())
    assert {family.name: family.tolerance for family in FAMILIES if family.tolerance != 1e-5} == {
        "ViT-SO400M-14-SigLIP": 1e-4
    }
    with pytest.raises(CheckpointError, match=r"ViT-B-33: not a family; available: ViT-B-32, .*, roberta-ViT-B-32"):
        load_family("ViT-B-33")


QUICK = ("ViT-B-32-quickgelu", "ViT-B-16-SigLIP", "MobileCLIP2-S0", "EVA02-B-16", "roberta-ViT-B-32")
"""One of each kind of tower and tokenizer; the dumped graphs and the parity command go over all."""


@pytest.mark.parametrize("family", [families.family(name) for name in QUICK], ids=QUICK)
def test_a_family_loads_offline_and_leaves_no_part_without_effect(family, quiet):
    loaded = load_family(family.name, short=True)
    assert loaded.source.startswith("random weights, seed 0, first and last blocks only")
    assert ("stand-in tokenizer" in loaded.source) == bool(family.stand_in)
    images = unit(loaded.encode_images(noise(loaded)))
    texts = unit(loaded.encode_texts(loaded.tokenizer(TEXTS)))
    assert images.shape == (2, loaded.embed_dim)
    assert np.isfinite(images).all()
    assert np.isfinite(texts).all()
    for rows in (images, texts):  # no two alike: the tower looks at its input
        assert (rows @ rows.T - 2 * np.eye(len(rows))).max() < 1 - 1e-6
    assert (loaded.logit_bias is not None) == ("SigLIP" in family.name)
    alike = [
        name
        for name, value in loaded.module.named_parameters()
        if value.numel() > 1 and bool((value == value.reshape(-1)[0]).all())
    ]
    assert alike == []
    assert all(bool(value.isfinite().all()) for value in loaded.module.parameters())


def test_random_weights_come_from_the_seed_alone():
    one, same, other = (load_family("MobileCLIP2-S0", seed=seed, short=True) for seed in (1, 1, 2))
    assert one.sha256 == same.sha256 != other.sha256


def test_matrices_are_left_to_whoever_fills_them():
    with construct.Unfilled():
        layer = torch.nn.Linear(8, 8)
        with torch.no_grad():
            layer.weight.fill_(7)
            layer.bias.fill_(7)
    assert (layer.bias == 7).all()
    assert not (layer.weight == 7).all()
    construct.fill(layer, 0)
    assert 0.2 < layer.weight.std() < 0.5
    assert layer.bias.std() > 0.1


def test_a_short_model_is_the_long_one_without_its_middle():
    whole = load_family("MobileCLIP2-S0")
    before = weights.digest(whole.module.state_dict())
    cut, direct = shortened(whole), short("MobileCLIP2-S0")
    kinds = [[type(part).__name__ for part in one.module.modules()] for one in (whole, cut, direct)]
    assert kinds[1] == kinds[2]
    assert len(kinds[1]) < len(kinds[0]) / 2
    assert weights.digest(whole.module.state_dict()) == before == whole.sha256 != cut.sha256
    assert cut.source.endswith("first and last blocks only")
    first, last = cut.module.text.transformer.resblocks
    blocks = whole.module.text.transformer.resblocks
    assert first.mlp.c_fc.weight.data_ptr() == blocks[0].mlp.c_fc.weight.data_ptr()
    assert last.mlp.c_fc.weight.data_ptr() == blocks[-1].mlp.c_fc.weight.data_ptr()
    assert np.isfinite(cut.encode_images(noise(cut))).all()


def test_layers_that_are_built_otherwise_stay():
    sizes = [(4, 8), (8, 6), (6, 8), (8, 8), (8, 8), (8, 8)]
    layers = [torch.nn.Linear(*size) for size in sizes]
    layers.insert(1, torch.nn.ReLU())
    model = torch.nn.Sequential(torch.nn.Sequential(*layers), torch.nn.ModuleList(layers[2:]))
    shorten(model)
    assert list(model[0]) == [*layers[:4], layers[-1]]
    assert list(model[1]) == [*layers[2:4], layers[-1]]
    assert model[1][2] is layers[-1]
    assert model[0](torch.zeros(1, 4)).shape == (1, 8)


def test_weights_from_a_file_cannot_be_shortened_beforehand(model_folder):
    with pytest.raises(CheckpointError, match="only random weights can be shortened"):
        load_checkpoint(model_folder("vit"), short=True)


def test_training_branches_are_folded_and_the_original_stays():
    loaded = short("MobileCLIP2-S0")
    assert foldable(loaded.module)
    assert foldable(short("EVA02-B-16").module) == []
    state = torch.get_rng_state()
    twin = reparameterized(loaded.module)
    assert torch.equal(torch.get_rng_state(), state)
    assert weights.digest(loaded.module.state_dict()) == loaded.sha256
    assert foldable(twin) == []
    assert {value.dtype for value in twin.parameters()} == {torch.float32}
    norms = [sum(isinstance(part, torch.nn.BatchNorm2d) for part in model.modules()) for model in (loaded.module, twin)]
    assert norms[1] < norms[0] / 2
    images = torch.from_numpy(noise(loaded, 3)).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():
        wanted, got = (model.encode_image(images, normalize=True) for model in (loaded.module, twin))
    torch.testing.assert_close(got, wanted, rtol=0, atol=5e-7)
    # what is not folded is not copied
    assert twin.text.token_embedding.weight.data_ptr() == loaded.module.text.token_embedding.weight.data_ptr()


def write_folder(folder, text, rest=None, kind=None, tower=None):
    """A folder with a config, and a tokenizer where one is asked for; no weights."""
    folder.mkdir(parents=True)
    plain = {"context_length": 16, "width": 16, "heads": 2, "layers": 2} if tower is None else {"context_length": 16}
    config = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": {**plain, **text}, **(rest or {})}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    if kind:
        write_tokenizer(folder, kind, 2000)
    if tower:
        (folder / "config.json").write_text(json.dumps(tower))
    return folder


def session(checkpoint, tower, folder):
    """A tower as this package exports it, in ONNX Runtime; and its graph's kinds of nodes."""
    path = folder / f"{tower}.onnx"
    write_graph(tower_graph(checkpoint, tower).model, path)
    run = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = run.get_inputs()[0].name
    kinds = {node.op_type for node in onnx.load(str(path)).graph.node}
    return lambda rows: run.run(None, {name: rows})[0], kinds


def unit(rows):
    return rows / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)


SIGLIP = {
    "vocab_size": 2000, "hf_tokenizer_name": "timm/ViT-B-16-SigLIP", "tokenizer_kwargs": {"clean": "canonicalize"},
    "no_causal_mask": True, "proj_bias": True, "pool_type": "last",
}  # fmt: skip


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """A tiny SigLIP with random weights: sigmoid, padding that is seen, a vocabulary of its own."""
    folder = write_folder(
        tmp_path_factory.mktemp("siglip") / "m", SIGLIP, {"custom_text": True, "init_logit_bias": -2.5}, "unigram"
    )
    return load_checkpoint(str(folder), allow_random=True)


def test_siglips_text_tower_sees_its_padding(siglip, tmp_path, quiet):
    ask, _ = session(siglip, "text", tmp_path)
    ids = siglip.tokenizer(TEXTS)
    assert ids.shape == (5, 16)
    assert ids[1].tolist() == [1] * 16  # nothing but the end and the padding, which SigLIP writes alike
    for count in (1, 2, 5):
        np.testing.assert_allclose(ask(ids[:count]), unit(siglip.encode_texts(ids[:count])), atol=1e-6)
    wrong = np.where(ids == 1, 0, ids)
    wrong[:, 5] = 1
    assert np.abs(ask(wrong) - ask(ids)).max() > 1e-3
    np.testing.assert_allclose(ask(wrong), unit(siglip.encode_texts(wrong)), atol=1e-6)


def test_siglips_bias_and_sigmoid_answer(siglip, tmp_path, tiny_images):
    paths = sorted(tiny_images.iterdir())
    export_artifact(siglip, tmp_path / "s.icm", ExportConfig(classes=("cat", "dog"), templates=("a {}",), images=paths))
    answers = load(tmp_path / "s.icm").classify(paths)
    classes = unit(siglip.encode_texts(siglip.tokenizer(["a cat", "a dog"])))
    cosines = unit(siglip.encode_images(stack(paths, siglip.pixels))) @ classes.T
    logits = siglip.logit_scale * cosines + siglip.logit_bias
    assert siglip.logit_bias == -2.5
    got = [dict(answer.ranking) for answer in answers]
    np.testing.assert_allclose([[one["cat"], one["dog"]] for one in got], 1 / (1 + np.exp(-logits)), atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_what_stands_after_the_end_of_text_counts_only_without_a_causal_mask(causal, tmp_path):
    folder = write_folder(tmp_path / "m", {"no_causal_mask": not causal}, {"custom_text": True})
    loaded = load_checkpoint(str(folder), allow_random=True)
    ask, _ = session(loaded, "text", tmp_path)
    ids = loaded.tokenizer(TEXTS[::4])
    other = ids.copy()
    other[:, -1] = 17
    assert (ids[:, -1] == 0).all()
    for rows in (ids, other):
        np.testing.assert_allclose(ask(rows), unit(loaded.encode_texts(rows)), atol=1e-6)
    change = np.abs(ask(other) - ask(ids)).max()
    assert change < 1e-6 if causal else change > 1e-3


@pytest.mark.parametrize(("name", "quick"), [("ViT-B-32-quickgelu", False), ("ViT-B-32", True)])
def test_the_activation_comes_from_the_config_and_not_from_the_name(name, quick, tmp_path):
    loaded = load_checkpoint(str(write_folder(tmp_path / name, {}, {"quick_gelu": quick})), allow_random=True)
    assert loaded.name == name
    ask, kinds = session(loaded, "image", tmp_path)
    assert ("Gelu" in kinds, "Sigmoid" in kinds) == (not quick, quick)
    images = noise(loaded)
    np.testing.assert_allclose(ask(images), unit(loaded.encode_images(images)), atol=1e-6)


TOWER = {
    **ROBERTA_BASE, "vocab_size": 2000, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 40,
}  # fmt: skip
ROBERTA = {"hf_model_name": "roberta-base", "hf_tokenizer_name": "roberta-base", "hf_pooler_type": "mean_pooler"}


def test_a_hugging_face_tower_from_local_files(tmp_path, quiet):
    folder = write_folder(tmp_path / "m", ROBERTA, {"quick_gelu": True}, "bytes", TOWER)
    loaded = load_checkpoint(str(folder), allow_random=True)
    ask, _ = session(loaded, "text", tmp_path)
    ids = loaded.tokenizer(TEXTS)
    for count in (1, 2, 5):
        np.testing.assert_allclose(ask(ids[:count]), unit(loaded.encode_texts(ids[:count])), atol=1e-6)
    longer = load_checkpoint(str(folder), allow_random=True).tokenizer
    object.__setattr__(longer, "spec", type(longer.spec)(**{**longer.spec.__dict__, "context_length": 24}))
    # the padding is masked: more of it changes nothing
    np.testing.assert_allclose(loaded.encode_texts(longer(TEXTS[:2])), loaded.encode_texts(ids[:2]), atol=1e-5)


def test_a_hugging_face_tower_in_a_folder_below(tmp_path):
    folder = write_folder(tmp_path / "m", ROBERTA, kind="bytes", tower=TOWER)
    (folder / "roberta-base").mkdir()
    (folder / "config.json").rename(folder / "roberta-base" / "config.json")
    assert load_checkpoint(str(folder), allow_random=True).tokenizer.spec.pad_token_id == 1


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        (
            None,
            r"its text tower is roberta-base, whose config.json was not found in .*; pass as --model a folder",
        ),
        ({**TOWER, "model_type": "gpt2"}, "model_type 'gpt2' is not known to open_clip; available: roberta, "),
        ({**TOWER, "auto_map": {"AutoModel": "code.py"}}, "refused, auto_map asks to run code"),
        ({**TOWER, "pad_token_id": 3}, "pads with 1, .* masks 3"),
        ({**TOWER, "hidden_act": "none"}, "open_clip cannot build it"),
        ([1], "not a model's config: must hold a JSON object, not list"),
    ],
)
def test_a_hugging_face_tower_that_cannot_be_read_is_named(tmp_path, tower, message):
    folder = write_folder(tmp_path / "m", ROBERTA, kind="bytes", tower=tower)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(str(folder), allow_random=True)
    assert "\n" not in str(caught.value)


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    import open_clip.hf_model

    monkeypatch.setattr(open_clip.hf_model, "transformers", None)
    folder = write_folder(tmp_path / "m", ROBERTA, kind="bytes", tower=TOWER)
    with pytest.raises(CheckpointError, match=r'needs transformers: pip install "invariclip\[hf\]"'):
        load_checkpoint(str(folder), allow_random=True)
    with pytest.raises(CheckpointError, match="needs transformers"):
        load_family("roberta-ViT-B-32", short=True)


def test_no_tower_is_ever_fetched(tmp_path, monkeypatch):
    import socket

    def refuse(*_, **__):
        raise AssertionError("reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    folder = write_folder(tmp_path / "m", ROBERTA, kind="bytes", tower=TOWER)
    assert load_checkpoint(str(folder), allow_random=True).embed_dim == 24
    assert construct.TOWER_FILE == "config.json"
    assert families.family("ViT-B-32").needs == ()
