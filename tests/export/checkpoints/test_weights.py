"""Checkpoint files: every container, every kind of damage, and nothing that is in them runs."""

import gzip
import io
import json
import os
import pickle
import zipfile
from argparse import Namespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from invariclip.errors import CheckpointError
from invariclip.export.checkpoints import sources, weights

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
    with pytest.raises(CheckpointError, match=r"refused, it holds Python objects besides|if it is a pickle") as caught:
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


def test_torch_does_not_look_at_checksums_and_we_do(tmp_path):
    path, rng = tmp_path / "weights.pt", np.random.default_rng(0)
    torch.save(TENSORS, path)
    whole, wanted = path.read_bytes(), weights.read_state_dict(path)
    begin = whole.index(TENSORS["a"].numpy().tobytes())
    for place in rng.integers(begin, begin + TENSORS["a"].nbytes, 20):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        assert torch.load(path, weights_only=True).keys() == TENSORS.keys()
        with pytest.raises(CheckpointError, match="is not what its checksum says; fetch it again"):
            weights.read_state_dict(path)
    path.write_bytes(whole)
    assert weights.read_state_dict(path).keys() == wanted.keys()


def test_a_name_that_stands_twice_in_a_header_is_refused(tmp_path):
    entry = '{"dtype": "F32", "shape": [1], "data_offsets": [%d, %d]}'
    header = f'{{"a": {entry % (0, 4)}, "a": {entry % (0, 4)}}}'.encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match="'a' stands twice in one object"):
        weights.read_state_dict(tmp_path / "a.safetensors")


def test_the_format_before_checksums_is_refused(tmp_path):
    torch.save(TENSORS, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"in which damage cannot be told, save its state_dict\(\) as"):
        weights.read_state_dict(tmp_path / "a.pt")


def test_an_archive_that_torch_does_not_write_is_refused(tmp_path):
    torch.save(TENSORS, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    with pytest.raises(CheckpointError, match="its archive is compressed"):
        weights.read_state_dict(tmp_path / "packed.pt")
    with zipfile.ZipFile(tmp_path / "twice.pt", "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr(*members[-1])
    with pytest.raises(CheckpointError, match="a name stands twice"):
        weights.read_state_dict(tmp_path / "twice.pt")


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


def test_torchs_files_with_an_index_are_one_checkpoint(tmp_path):
    names = sorted(TENSORS)
    parts = {"pytorch_model-00001-of-00002.bin": names[:2], "pytorch_model-00002-of-00002.bin": names[2:]}
    for file, held in parts.items():
        torch.save({name: TENSORS[name] for name in held}, tmp_path / file)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, held in parts.items() for name in held}}))
    assert weights.digest(weights.read_state_dict(index)) == weights.digest(TENSORS)
    assert sources._weights_in(tmp_path) == index
    torch.save({**TENSORS, "epoch": 3}, tmp_path / next(iter(parts)))
    with pytest.raises(CheckpointError, match="holds something besides tensors by name"):
        weights.read_state_dict(index)
    index.write_text(json.dumps({"weight_map": {"a": "part.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"its files must be \.bin beside it"):
        weights.read_state_dict(index)


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


def names_after(tmp_path, content, notes=None):
    """The names that are read from a file with this content; their tensors are those of TENSORS."""
    torch.save(content, tmp_path / "wrapped.pt")
    tensors = weights.read_state_dict(tmp_path / "wrapped.pt", notes)
    assert weights.digest(tensors) == weights.digest(TENSORS)
    return list(tensors)


@pytest.mark.parametrize(
    ("prefix", "note"),
    [
        ("_orig_mod.", ["names without _orig_mod"]),
        ("module._orig_mod.", ["names without _orig_mod", "names without module"]),
        ("model.", ["names without model"]),
        ("module.model.", ["names without module", "names without model"]),
        ("", []),
    ],
)
def test_what_wrappers_put_before_all_names_goes(tmp_path, prefix, note):
    notes = []
    names_after(tmp_path, {prefix + name: tensor for name, tensor in TENSORS.items()}, notes)
    assert notes == note


def test_what_compiled_parts_put_into_names_goes(tmp_path):
    names_after(tmp_path, {name.replace("b.", "b._orig_mod."): tensor for name, tensor in TENSORS.items()})
    with pytest.raises(CheckpointError, match="without _orig_mod two tensors have the same name"):
        names_after(tmp_path, {"a": TENSORS["a"], "_orig_mod.a": TENSORS["a"]})


def test_a_prefix_that_not_all_names_have_stays(tmp_path):
    content = {"model.a": TENSORS["a"], "loss.b": TENSORS["a"]}
    torch.save(content, tmp_path / "mixed.pt")
    assert list(weights.read_state_dict(tmp_path / "mixed.pt")) == list(content)


@pytest.mark.parametrize(
    ("content", "note"),
    [
        ({"model_state_dict": TENSORS, "epoch": 3}, ["its model_state_dict"]),
        ({"model": {"state_dict": TENSORS}, "optimizer": {"state": {}}}, ["its model", "its state_dict"]),
        ({"module": TENSORS}, ["its module"]),
        ({"state_dict_ema": TENSORS, "epoch": 3}, ["its state_dict_ema"]),
        ({"n_averaged": torch.tensor(5), **{f"module.{name}": one for name, one in TENSORS.items()}},
         ["names without module"]),
    ],
)  # fmt: skip
def test_weights_one_level_down_are_found_and_noted(tmp_path, content, note):
    notes = []
    names_after(tmp_path, content, notes)
    assert notes == note


def test_of_plain_and_averaged_weights_the_plain_ones_are_taken_with_a_warning(tmp_path):
    content = {"state_dict": TENSORS, "model_ema": {name: one * 0 for name, one in TENSORS.items()}}
    with pytest.warns(
        weights.CheckpointWarning, match=r"\(state_dict\) and their .* \(model_ema\); state_dict is taken"
    ):
        names_after(tmp_path, content)


def test_several_sets_of_weights_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"several sets of weights \(state_dict, model\).* save that one as"):
        names_after(tmp_path, {"model": TENSORS, "state_dict": TENSORS})


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 605143316\n"


def packed(how, content):
    """The content in an archive."""
    buffer = io.BytesIO()
    if how == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("model/config.json", content)
    return gzip.compress(content, mtime=0) if how == "gzip" else buffer.getvalue()


@pytest.mark.parametrize("ending", [".safetensors", ".pt", ".bin"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty; fetch it again"),
        (POINTER, "it is a Git LFS pointer, not the weights; fetch them with `git lfs pull`"),
        (b"\n<!DOCTYPE html><html>Access denied</html>", "it is an HTML page; fetch the file itself"),
        (b"<html>" + b"x" * 600, "it is an HTML page"),
        (b'{"error": "Repository not found"}', 'it is a text file that begins with \'{"error": "Repository'),
        ("Zugriff verweigert: häh ".encode() * 40, "it is a text file that begins with 'Zugriff verweigert"),
        (packed("gzip", b"x"), "it is a gzip archive; unpack it first"),
        (packed("zip", b"x"), r"it is a zip archive of model/config\.json; unpack it first"),
        (b"\x89HDF\r\n\x1a\n" + bytes(40), "it is an HDF5 file"),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path, ending, content, message):
    path = tmp_path / f"weights{ending}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"not a checkpoint, or damaged: {message}") as caught:
        weights.read_state_dict(path)
    assert "weights_only" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_other_containers_content_is_named(tmp_path):
    save_file(TENSORS, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"it is a safetensors file; rename it to \.safetensors"):
        weights.read_state_dict(tmp_path / "a.pt")
    torch.save(TENSORS, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"it is a torch file; rename it to \.pt"):
        weights.read_state_dict(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match=r"it is a pickle, as torch writes them; rename it to \.pt"):
        weights.read_state_dict(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "content",
    [{"a": 1}, [1, 2], {"model": Namespace(a=1)}, {"a": TENSORS["a"], "who": Namespace()}, {"a": np.zeros(3)}],
)
@pytest.mark.parametrize("save", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing, protocol=2))])
def test_torchs_advice_to_unpickle_reaches_nobody(tmp_path, content, save):
    save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as caught:
        weights.read_state_dict(tmp_path / "a.pt")
    assert "weights_only" not in str(caught.value)
    assert "Re-running" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_no_numbers_are_named(dtype):
    tensors = {"a": torch.ones(3, dtype=dtype), "b": torch.ones(2, 3, dtype=dtype), "c": torch.tensor(float("inf"))}
    weights.require_finite({"a": tensors["a"], "count": torch.tensor(3)}, "file")
    tensors["b"][1, 1:] = float("nan")
    with pytest.raises(CheckpointError, match=r"file: holds NaN .* b \(2 of 6 values\), c \(1 of 1 values\); training"):
        weights.require_finite(tensors, "file")


def test_fitting_refuses_weights_that_are_no_numbers():
    layer = torch.nn.Linear(3, 2)
    with pytest.raises(CheckpointError, match=r"bias \(1 of 2 values\)"):
        weights.fit({"weight": torch.ones(2, 3), "bias": torch.tensor([1.0, float("nan")])}, layer, "file", "model")
