"""Atomic writes, the manifest's refusals, embeddings that know their space, prompts."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from invariclip.artifact.embeddings import Embeddings, read_embeddings, write_embeddings
from invariclip.artifact.folder import checked_path, describe_file, read_manifest
from invariclip.artifact.manifest import MANIFEST, SCHEMA_VERSION, FileFacts, ModelFacts, Step, space_id
from invariclip.errors import ArtifactError, InputError
from invariclip.files import (
    new_directory,
    path_kind,
    remove_left,
    require_writable,
    scratch_directory,
    user_cache,
    write_atomically,
)
from invariclip.preprocessing.pixels import PixelSpec
from invariclip.preprocessing.prompts import class_bank
from invariclip.preprocessing.tokenizer import TextSpec
from invariclip.records import sealed_json, to_record


def test_a_failed_write_leaves_the_old_folder_and_no_litter(tmp_path):
    target = tmp_path / "name.icm"
    with new_directory(target) as folder:
        (folder / "a").write_text("old")

    def half_a_write():
        with new_directory(target) as folder:
            (folder / "a").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half_a_write()
    assert (target / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["name.icm"]
    with new_directory(target) as folder:
        (folder / "b").write_text("newer")
    assert [p.name for p in target.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["name.icm"]


def test_what_is_not_ours_stays_in_a_folder_that_is_written_anew(tmp_path):
    target = tmp_path / "x"
    for names in (("a", "b"), ("a",)):
        with new_directory(target, owned=lambda _: {"a", "b"}) as folder:
            for name in names:
                (folder / name).write_text(str(names))
        (target / "notes.txt").write_text("mine")
        (target / "sub").mkdir(exist_ok=True)
        (target / "sub" / "deep").write_text("mine too")
        (target / "link").unlink(missing_ok=True)
        (target / "link").symlink_to("notes.txt")
    with new_directory(target, owned=lambda _: {"a", "b"}) as folder:
        (folder / "a").write_text("newest")
    assert {path.name for path in target.iterdir()} == {"a", "notes.txt", "sub", "link"}
    assert ((target / "notes.txt").read_text(), (target / "sub" / "deep").read_text()) == ("mine", "mine too")
    assert (target / "link").readlink() == Path("notes.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_linked_folder_stays_a_link(tmp_path):
    with new_directory(tmp_path / "real") as folder:
        (folder / "a").write_text("old")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").symlink_to(tmp_path / "real")
    with new_directory(tmp_path / "there" / "x") as folder:
        (folder / "a").write_text("new")
    assert (tmp_path / "there" / "x").is_symlink()
    assert (tmp_path / "real" / "a").read_text() == "new"
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["x"]


KILLED = """
import os, signal, sys
from pathlib import Path
from invariclip import files
target = Path(sys.argv[1])
if sys.argv[2] == "filling":
    with files.new_directory(target) as folder:
        (folder / "a").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
exchange = files._exchange
def killed(new, old):
    exchange(new, old)
    os.kill(os.getpid(), signal.SIGKILL)
files._exchange = killed
with files.new_directory(target) as folder:
    (folder / "a").write_text("new")
"""


@pytest.mark.parametrize(("moment", "content"), [("filling", "old"), ("exchanged", "new")])
def test_a_killed_run_leaves_the_old_folder_or_the_new_and_the_next_one_cleans_up(tmp_path, moment, content):
    target = tmp_path / "x"
    with new_directory(target) as folder:
        (folder / "a").write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), moment], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (target / "a").read_text() == content
    assert len(list(tmp_path.iterdir())) == 2
    with new_directory(target) as folder:
        (folder / "a").write_text("newer")
        with new_directory(tmp_path / "x2") as other:  # its name begins alike, and it lives
            (other / "b").write_text("")
    assert {path.name for path in tmp_path.iterdir()} == {"x", "x2"}


KILLED_AT_A_FILE = """
import os, signal, sys
from pathlib import Path
from invariclip import files
if sys.argv[2] == "named from the start":
    del os.O_TMPFILE
def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[3] == "written":
    files._write_all = killed
Path.replace = killed
files.write_atomically(Path(sys.argv[1]), "new")
"""


@pytest.mark.parametrize("moment", ["written", "renamed"])
@pytest.mark.parametrize("kind", ["nameless", "named from the start"])
def test_a_killed_write_leaves_the_old_file_and_the_next_write_cleans_up(tmp_path, kind, moment):
    target = tmp_path / ("猫" * 85)  # 255 bytes
    write_atomically(target, "old")
    for _ in range(2):
        words = [sys.executable, "-c", KILLED_AT_A_FILE, str(target), kind, moment]
        assert subprocess.run(words, check=False).returncode == -signal.SIGKILL
        assert target.read_text() == "old"
        assert len(list(tmp_path.iterdir())) == (1 if (kind, moment) == ("nameless", "written") else 2)
    write_atomically(target, "newer")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(target.name, "newer")]


def test_what_killed_writes_left_in_a_folder_is_removed_and_what_lives_is_not(tmp_path, monkeypatch):
    words = [sys.executable, "-c", KILLED_AT_A_FILE, str(tmp_path / "x"), "nameless", "renamed"]
    assert subprocess.run(words, check=False).returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".x.unfinished"]
    replace_ = Path.replace

    def meanwhile(self, target):
        remove_left(tmp_path)
        return replace_(self, target)

    monkeypatch.setattr(Path, "replace", meanwhile)
    write_atomically(tmp_path / "y", "second")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("y", "second")]


@pytest.mark.parametrize("kind", ["nameless", "named from the start"])
def test_a_write_that_lives_is_not_disturbed_by_another(tmp_path, monkeypatch, kind):
    if kind == "named from the start":
        monkeypatch.delattr("os.O_TMPFILE")
    replace_, inner = Path.replace, []

    def meanwhile(self, target):
        if not inner:
            inner.append(self.read_text())
            write_atomically(tmp_path / "x", "second")
            assert (tmp_path / "x").read_text() == "second"
        return replace_(self, target)

    monkeypatch.setattr(Path, "replace", meanwhile)
    write_atomically(tmp_path / "x", "first")
    assert inner == ["first"]
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "first")]


KILLED_IN_SCRATCH = """
import os, signal, sys
from pathlib import Path
from invariclip.files import scratch_directory
with scratch_directory(Path(sys.argv[1])) as folder:
    (folder / "large").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_scratch_folder_of_a_killed_run_is_removed_by_the_next_and_others_are_not(tmp_path, monkeypatch):
    assert subprocess.run([sys.executable, "-c", KILLED_IN_SCRATCH, str(tmp_path)], check=False).returncode == -9
    [left] = tmp_path.iterdir()
    assert (left / "large").exists()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("")
    (tmp_path / "invariclip-link.unfinished").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with scratch_directory() as folder, scratch_directory(tmp_path) as other:
        assert not left.exists()
        assert folder.is_dir()
        assert folder.parent == other.parent == tmp_path
    assert {path.name for path in tmp_path.iterdir()} == {"elsewhere", "invariclip-link.unfinished"}
    assert (tmp_path / "elsewhere" / "mine").exists()
    with pytest.raises(InputError, match="nowhere: cannot be written"), scratch_directory(tmp_path / "nowhere"):
        pass


def test_a_run_that_lives_is_not_swept(tmp_path):
    with new_directory(tmp_path / "x") as folder:
        (folder / "a").write_text("first")
        with new_directory(tmp_path / "x") as other:
            (other / "a").write_text("second")
        assert (folder / "a").read_text() == "first"
    assert (tmp_path / "x" / "a").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_where_the_system_cannot_exchange_or_write_without_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr("invariclip.files.sys.platform", "elsewhere")
    monkeypatch.delattr("os.O_TMPFILE")
    for content in ("old", "new"):
        with new_directory(tmp_path / "x") as folder:
            (folder / "a").write_text(content)
        write_atomically(tmp_path / "y", content)
    assert ((tmp_path / "x" / "a").read_text(), (tmp_path / "y").read_text()) == ("new", "new")
    assert {path.name for path in tmp_path.iterdir()} == {"x", "y"}


def test_a_folder_that_cannot_take_its_name_leaves_the_old_one(tmp_path, monkeypatch):
    monkeypatch.setattr("invariclip.files.sys.platform", "elsewhere")
    with new_directory(tmp_path / "x") as folder:
        (folder / "a").write_text("old")
    replace_ = Path.replace

    def refused(self, target):
        if self.name.endswith(".unfinished"):
            raise OSError(13, "Permission denied")
        return replace_(self, target)

    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(OSError, match="Permission denied"), new_directory(tmp_path / "x") as folder:
        (folder / "a").write_text("new")
    assert (tmp_path / "x" / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_where_a_nameless_file_gets_no_name_it_is_written_with_one(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise OSError(2, "No such file or directory")

    monkeypatch.setattr(os, "link", refused)
    write_atomically(tmp_path / "y", "z")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("y", "z")]


def test_a_file_that_is_written_has_the_usual_rights_and_leaves_nothing_beside(tmp_path):
    for content in (b"a", b"b"):
        write_atomically(tmp_path / ("n" * 250), content)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"b"]
    assert next(tmp_path.iterdir()).stat().st_mode & 0o777 == 0o644
    with pytest.raises(InputError, match="cannot be written"):
        write_atomically(tmp_path / ("n" * 300), b"")


def test_a_file_where_a_folder_should_be_is_refused(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(InputError, match="is a file"), new_directory(tmp_path / "x"):
        pass
    with pytest.raises(InputError, match="cannot be written"):
        write_atomically(tmp_path / "x" / "y", "z")


def test_what_stands_at_a_path(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    found = {name: path_kind(tmp_path / name) for name in (".", "file", "link", "none", "file/below")}
    assert found == {".": "folder", "file": "file", "link": "folder", "none": "", "file/below": ""}
    for name in ("x" * 300, "a\0b"):
        with pytest.raises(InputError, match=r"cannot be read \(") as refused:
            path_kind(tmp_path / name)
        assert len(str(refused.value).splitlines()) == 1


def test_an_error_is_one_line_of_bounded_length():
    error = ArtifactError("begin\u2028" + "x\n" * 5000 + "end")
    assert len(str(error).splitlines()) == 1
    assert len(str(error)) < 1700
    assert str(error).startswith("begin x")
    assert str(error).endswith("end")
    assert str(ArtifactError("as it is")) == "as it is"


def test_files_outside_changed_or_missing_are_refused(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret").write_bytes(b"s")
    secret = describe_file(tmp_path, "secret")
    (tmp_path / "inside" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(ArtifactError, match="leaves the artifact"):
        checked_path(tmp_path / "inside", FileFacts("link", secret.sha256, secret.size_bytes))
    with pytest.raises(ArtifactError, match="missing"):
        checked_path(tmp_path, FileFacts("absent", secret.sha256, 1))
    (tmp_path / "secret").write_bytes(b"t")
    with pytest.raises(ArtifactError, match="digest differs"):
        checked_path(tmp_path, secret)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "holds no manifest"),
        ("{", "not readable as JSON"),
        ("[]", "JSON object"),
        ('{"schema_version": 99}', "schema_version 99"),
        ('{"schema_version": 1}', "schema_version 1 is not known.*: export again"),
        (json.dumps({"schema_version": SCHEMA_VERSION}), "carries no digest of itself"),
        (sealed_json({"schema_version": SCHEMA_VERSION}).decode(), "missing required field"),
        (
            sealed_json({"schema_version": SCHEMA_VERSION, "model": 3}).decode(),
            r"Expected `object`, got `int` - at `\$.model`",
        ),
    ],
)
def test_damaged_manifests_are_one_typed_line(tmp_path, content, reason):
    if content is not None:
        (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(ArtifactError, match=reason) as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value)


def test_space_id_names_checkpoint_projection_and_preparation():
    pixels = PixelSpec((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    text = TextSpec(context_length=16)
    same = space_id("a", "b", pixels, text)
    assert same == space_id("a", "b", pixels, text)
    others = [
        space_id("a", None, pixels, text),
        space_id("b", "b", pixels, text),
        space_id("a", "b", replace(pixels, image_mean=(0.4, 0.5, 0.5)), text),
        space_id("a", "b", replace(pixels, interpolation="bilinear"), text),
        space_id("a", "b", pixels, replace(text, clean="whitespace")),
    ]
    assert len({same, *others}) == 6


@pytest.mark.parametrize("path", ["", ".", "..", "a/b.onnx", "/a.onnx", "../a.onnx", "a\\b", "a\0b", "manifest.json"])
def test_a_file_of_an_artifact_is_a_bare_name(path):
    with pytest.raises(ArtifactError, match="is not the name of a file in the artifact's folder"):
        FileFacts(path, "0" * 64, 3)


MODEL = {"name": "a", "checkpoint_sha256": "0" * 64, "embed_dim": 8, "logit_scale": 1.0}


@pytest.mark.parametrize(
    "build",
    [
        lambda: to_record(FileFacts, {"path": "a", "sha256": "0" * 64, "size_bytes": 3.5}, "x", error=ArtifactError),
        lambda: to_record(Step, {"name": "a", "applied": "no", "detail": "b"}, "x", error=ArtifactError),
        lambda: to_record(ModelFacts, {**MODEL, "logit_scale": "abc"}, "x", error=ArtifactError),
        lambda: to_record(ModelFacts, {**MODEL, "embed_dim": 8.5}, "x", error=ArtifactError),
        lambda: to_record(ModelFacts, {**MODEL, "width": 8}, "x", error=ArtifactError),
        lambda: ModelFacts("a", "0" * 64, 8, float("nan")),
        lambda: ModelFacts("a", "0" * 64, 0, 1.0),
        lambda: TextSpec(context_length=77.0),
        lambda: TextSpec(context_length=77, end_token_ids=(2**70,)),
        lambda: PixelSpec((224.0, 224.0), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    ],
)
def test_facts_of_another_type_are_refused(build):
    with pytest.raises(ArtifactError):
        build()


def test_embeddings_round_trip_and_refuse_another_space(tmp_path):
    rng = np.random.default_rng(0)
    one = Embeddings(rng.normal(size=(3, 4)).astype(np.float32), ("a.png", "ü.png", "c"), "space-1")
    write_embeddings(tmp_path / "e.safetensors", one)
    read = read_embeddings(tmp_path / "e.safetensors")
    np.testing.assert_array_equal(read.vectors, one.vectors)
    assert (read.items, read.space_id) == (one.items, one.space_id)
    np.testing.assert_allclose(one.similarity(read), one.vectors @ one.vectors.T)
    with pytest.raises(InputError, match=r"space-1.*space-2"):
        one.similarity(Embeddings(one.vectors, one.items, "space-2"))
    (tmp_path / "bad").write_bytes(b"1234567890")
    for path in (tmp_path / "absent", tmp_path / "bad"):
        with pytest.raises(InputError):
            read_embeddings(path)


def test_an_output_is_tried_before_the_work_and_the_trial_leaves_nothing(tmp_path):
    require_writable(tmp_path / "a" / "b" / "x.icm")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "x", tmp_path / "file" / "deep" / "x", Path("/proc/nowhere/x")):
        with pytest.raises(InputError, match=r"x: cannot be written \(.*\); name another"):
            require_writable(path, "; name another")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_bank_is_the_unit_mean_of_unit_prompts():
    vectors = np.eye(4)[[0, 1, 2, 2]]
    bank = class_bank(lambda texts: vectors[: len(texts)], ["x", "y"], ["{}", "a {}"])
    np.testing.assert_allclose(bank, [[0.5**0.5, 0.5**0.5, 0, 0], [0, 0, 1, 0]])


def test_the_cache_of_a_user_without_a_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert user_cache() == tmp_path / ".cache" / "invariclip"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert user_cache() == tmp_path / "x" / "invariclip"
    monkeypatch.delenv("XDG_CACHE_HOME")

    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(InputError, match="no home folder for a cache: set XDG_CACHE_HOME, or give --cache"):
        user_cache()


def test_a_full_disk_is_told_of_the_folder_that_was_asked_for(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.write_text("content")

    def full(_source, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(source), None, str(target))

    monkeypatch.setattr(shutil, "copyfile", full)
    with (
        pytest.raises(InputError, match=r"x\.icm: cannot be written \(No space left on device\)") as said,
        new_directory(tmp_path / "x.icm") as folder,
    ):
        shutil.copyfile(source, folder / "copy")
    assert "source" not in str(said.value)

    def full_inside(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("invariclip.files._write_all", full_inside)
    with (
        pytest.raises(InputError, match=r"x\.icm: cannot be written \(No space left on device\)") as said,
        new_directory(tmp_path / "x.icm") as folder,
    ):
        write_atomically(folder / "tokenizer.json", "content")
    assert "tokenizer" not in str(said.value)
    with pytest.raises(OSError, match="elsewhere"), new_directory(tmp_path / "x.icm"):
        raise OSError(errno.ENOSPC, "No space left on device", "/elsewhere")
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]
