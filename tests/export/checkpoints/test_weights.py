"""Checkpoint files: every container, every kind of damage, and nothing that is in them runs."""

import json
import os
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from invariclip.errors import CheckpointError
from invariclip.export.checkpoints import weights

TENSORS = {
    "b.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a": torch.tensor(2.5),
    "half": torch.ones(4, dtype=torch.bfloat16),
    "count": torch.tensor(3, dtype=torch.int64),
}


def test_the_digest_is_the_same_in_every_container(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors")
    torch.save(TENSORS, tmp_path / "b.pt")
    torch.save({"state_dict": dict(reversed(TENSORS.items())), "epoch": 3}, tmp_path / "c.bin")
    torch.save({f"module.{name}": tensor for name, tensor in TENSORS.items()}, tmp_path / "d.pth")
    digests = {weights.digest(weights.read_state_dict(path)) for path in tmp_path.iterdir()}
    assert len(digests) == 1
    assert len(digests.pop()) == 64


def test_the_digest_is_pinned():
    # stored artifacts name their checkpoint by it: changing the definition orphans them
    assert weights.digest(TENSORS) == "e6b308f35000a0fbbee9d5729a15a7db7d5f9bb96cc6e148230d5026a43475d8"


@pytest.mark.parametrize(
    "change",
    [
        {"a": torch.tensor(2.5000002)},
        {"half": torch.ones(4, dtype=torch.float16)},
        {"b.weight": TENSORS["b.weight"].reshape(3, 2)},
        {"c": torch.zeros(0)},
    ],
)
def test_the_digest_sees_value_dtype_shape_and_name(change):
    assert weights.digest({**TENSORS, **change}) != weights.digest(TENSORS)


def test_memory_layout_does_not_change_the_digest():
    turned = TENSORS["b.weight"].T.contiguous().T
    assert not turned.is_contiguous()
    assert weights.digest({**TENSORS, "b.weight": turned}) == weights.digest(TENSORS)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("ending", [".pt", ".bin", ".pth"])
@pytest.mark.parametrize("save", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing, protocol=2))])
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path, ending, save):
    trace = tmp_path / "executed"
    path = tmp_path / f"evil{ending}"
    save({"weight": torch.zeros(2), "evil": Bomb(trace)}, path)
    with pytest.raises(CheckpointError, match="refused, it holds Python objects besides tensors") as caught:
        weights.read_state_dict(path)
    assert "\n" not in str(caught.value)
    assert not trace.exists()


def test_a_torchscript_archive_is_named(tmp_path):
    path = tmp_path / "jit.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(CheckpointError, match="TorchScript archive"):
        weights.read_state_dict(path)


@pytest.mark.parametrize("ending", weights.CHECKPOINT_SUFFIXES)
@pytest.mark.parametrize("kind", ["garbage", "empty", "truncated"])
def test_a_damaged_file_is_named(tmp_path, ending, kind):
    path = tmp_path / f"weights{ending}"
    (save_file if ending == ".safetensors" else torch.save)(TENSORS, path)
    whole = path.read_bytes()
    path.write_bytes({"garbage": b"\x93 no checkpoint \x00" * 40, "empty": b"", "truncated": whole[:-50]}[kind])
    with pytest.raises(CheckpointError, match=r"weights.*not a checkpoint, or damaged"):
        weights.read_state_dict(path)


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint file"):
        weights.read_state_dict(tmp_path / "none.pt")
    (tmp_path / "weights.npz").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"known endings: \.safetensors \.pt \.pth \.bin"):
        weights.read_state_dict(tmp_path / "weights.npz")


@pytest.mark.parametrize("content", [[torch.zeros(2)], {"epoch": 3}, torch.zeros(2), {"state_dict": 4}])
def test_a_file_without_named_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match="holds no tensors by name"):
        weights.read_state_dict(tmp_path / "odd.pt")


def test_tensors_are_independent_of_their_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(TENSORS, path)
    tensors = weights.read_state_dict(path)
    with path.open("r+b") as file:
        file.truncate(0)  # a mapping of it would crash the process
    assert weights.digest(tensors) == weights.digest(TENSORS)


def test_a_file_is_read_a_little_at_a_time(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(weights, "safe_open", lambda *args, **named: opened.append(args) or safe_open(*args, **named))
    monkeypatch.setattr(weights, "_AT_A_TIME", 8)
    save_file(TENSORS, tmp_path / "weights.safetensors")
    assert weights.digest(weights.read_state_dict(tmp_path / "weights.safetensors")) == weights.digest(TENSORS)
    assert len(opened) > 3


def write_shards(folder, **changes):
    """TENSORS in two files and an index; returns the index."""
    names = sorted(TENSORS)
    parts = {"m-00001-of-00002.safetensors": names[:2], "m-00002-of-00002.safetensors": names[2:]}
    for file, held in parts.items():
        save_file({name: TENSORS[name] for name in held}, folder / file)
    places = {name: file for file, held in parts.items() for name in held}
    index = folder / "m.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": {**places, **changes}}))
    return index


def test_weights_in_several_files_are_one_checkpoint(tmp_path):
    assert weights.digest(weights.read_state_dict(write_shards(tmp_path))) == weights.digest(TENSORS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": "../secret.safetensors"}, "names '../secret.safetensors'; its files must be .safetensors beside it"),
        ({"a": "m.bin"}, "names 'm.bin'"),
        ({"a": ""}, "names ''"),
        ({"a": "m-00003-of-00003.safetensors"}, "m-00003-of-00003.safetensors: no such file, but m.safetensors.index"),
        ({"more": "m-00001-of-00002.safetensors"}, "does not say what its files hold: more"),
    ],
)
def test_an_index_that_leads_astray_is_refused(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        weights.read_state_dict(write_shards(tmp_path, **changes))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", r"index\.json: not readable as JSON \("),
        ("[" * 100_000, r"index\.json: not readable as JSON \("),
        ("[1]", "not an index of weights: must hold a JSON object, not list"),
        ('{"weight_map": 3}', "not an index of weights, it has no readable weight_map"),
        ("{}", "not an index of weights, it has no readable weight_map"),
    ],
)
def test_a_damaged_index_is_named(tmp_path, content, reason):
    (tmp_path / "m.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=reason):
        weights.read_state_dict(tmp_path / "m.safetensors.index.json")


def test_a_huge_index_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "_MAX_INDEX", 10)
    with pytest.raises(CheckpointError, match="larger than an index of weights can be"):
        weights.read_state_dict(write_shards(tmp_path))


def test_fitting_takes_the_tensors_themselves_and_empties_the_rest():
    layer = torch.nn.Linear(3, 2)
    layer.extra = torch.nn.Parameter(torch.zeros(2))
    given = {"weight": torch.ones(2, 3), "bias": torch.ones(2).half(), "extra": torch.ones(2, 2)[:, 0]}
    place = given["weight"].data_ptr()
    weights.fit(given, layer, "file", "model")
    assert given == {}
    assert layer.weight.data_ptr() == place
    assert layer.bias.dtype == torch.float32
    assert layer.extra.is_contiguous()
