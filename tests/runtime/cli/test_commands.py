"""The commands as a person runs them: results on standard output, one line of error, exit codes."""

import json
import shutil
import subprocess
import sys

import pytest

from invariclip import load
from invariclip.artifact.embeddings import read_embeddings
from invariclip.artifact.manifest import MANIFEST
from invariclip.cli.predict_command import inspect
from invariclip.errors import InvariclipError
from invariclip.records import SEAL, sealed_json


def invariclip(*arguments):
    """Runs the command line in its own process."""
    return subprocess.run(
        [sys.executable, "-m", "invariclip", *map(str, arguments)], capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def broken(tmp_path_factory, tiny_images):
    """A folder with one good image, a truncated one and one that is none."""
    folder = tmp_path_factory.mktemp("broken")
    good = (tiny_images / "00.png").read_bytes()
    (folder / "good.png").write_bytes(good)
    (folder / "cut.png").write_bytes(good[: len(good) // 2])
    (folder / "text.jpg").write_text("not an image")
    return folder


def test_predict_prints_a_line_an_image_and_json(tiny_artifact, tiny_images):
    plain = invariclip("predict", tiny_artifact, tiny_images, "--quiet")
    assert (plain.returncode, plain.stderr) == (0, "")
    assert len(plain.stdout.splitlines()) == 12
    done = invariclip("predict", tiny_artifact, tiny_images / "00.png", "--json", "--classes", "sun,moon", "--top-k", 1)
    answer = json.loads(done.stdout)
    assert answer["predictions"][0]["label"] in ("sun", "moon")
    assert answer["engine"]["execution_provider"] == "CPUExecutionProvider"
    assert answer["unreadable"] == []


def test_unreadable_images_are_named_and_the_others_answered(tiny_artifact, broken):
    done = invariclip("predict", tiny_artifact, broken, "--quiet")
    assert done.returncode == 2
    assert len(done.stdout.splitlines()) == 1
    assert "cut.png" in done.stderr
    assert "text.jpg" in done.stderr
    assert "Traceback" not in done.stderr
    found = json.loads(invariclip("predict", tiny_artifact, broken, "--json").stdout)
    assert [len(found["predictions"]), len(found["unreadable"])] == [1, 2]


def test_the_fast_pixel_mode_can_be_asked_for(promising, tiny_images):
    done = json.loads(invariclip("predict", promising, tiny_images, "--json", "--pixel-mode", "fast").stdout)
    assert done["engine"]["pixel_mode"] == "fast"
    assert len(done["predictions"]) == 12


def test_embed_images_and_texts(tiny_artifact, tiny_images, tmp_path):
    done = invariclip("embed", tiny_artifact, tiny_images, "-o", tmp_path / "i.safetensors", "--json")
    assert json.loads(done.stdout)["count"] == 12
    invariclip("embed", tiny_artifact, "--text", "a cat", "--text", "a dog", "-o", tmp_path / "t.safetensors")
    images, texts = read_embeddings(tmp_path / "i.safetensors"), read_embeddings(tmp_path / "t.safetensors")
    assert images.similarity(texts).shape == (12, 2)
    assert texts.items == ("a cat", "a dog")


def test_inspect_shows_the_facts(tiny_artifact):
    done = invariclip("inspect", tiny_artifact)
    assert done.returncode == 0
    assert "24 → 8" in done.stdout
    assert json.loads(invariclip("inspect", tiny_artifact, "--json").stdout)["classes"] == ["cat", "dog", "tree"]


def edited(artifact, folder, *path, to):
    """A copy whose manifest says something else, with the digest of what it says."""
    shutil.copytree(artifact, folder)
    plain = json.loads((folder / MANIFEST).read_text())
    del plain[SEAL]
    *above, last = path
    place = plain
    for name in above:
        place = place[name]
    place[last] = to
    (folder / MANIFEST).write_bytes(sealed_json(plain))
    return folder


PARITY = ("variants", "float32", "parity", "onnxruntime")


@pytest.mark.parametrize(
    ("path", "to"),
    [
        (("classes",), [1, 2, 3]),
        (("producer",), []),
        (("left_out",), None),
        (("left_out",), []),
        (("model", "name"), None),
        (("space_id",), 5),
        (("text", "start_token_ids"), [{}]),
        (("variants",), {}),
        (PARITY, {}),
        (PARITY, 5),
        ((*PARITY, "image"), None),
        ((*PARITY, "image", "items"), [{}]),
        ((*PARITY, "thresholds"), {}),
    ],
)
def test_a_manifest_of_other_types_is_a_typed_error(path, to, tiny_artifact, tmp_path):
    folder = edited(tiny_artifact, tmp_path / "a.icm", *path, to=to)
    with pytest.raises(InvariclipError) as said:
        inspect.main([str(folder)], standalone_mode=False)
    assert "\n" not in str(said.value)
    if path[0] != "variants" or to == 5:
        with pytest.raises(InvariclipError):
            load(folder)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["predict", "ARTIFACT", "absent.png"], "no such file"),
        (["predict", "ARTIFACT", "EMPTY"], "no image in this folder"),
        (["predict", "absent.icm", "x.png"], "not an artifact"),
        (["predict", "ARTIFACT"], "Missing argument"),
        (["predict", "ARTIFACT", "IMAGES", "--classes", "a", "--classes-file", "b"], "not both"),
        (["predict", "ARTIFACT", "IMAGES", "--classes-file", "absent.txt"], "absent.txt"),
        (["predict", "ARTIFACT", "IMAGES", "--template", "no slot"], "exactly one"),
        (["predict", "ARTIFACT", "IMAGES", "--threads", "0"], "threads"),
        (["embed", "ARTIFACT", "-o", "x"], "give images, or --text"),
        (["embed", "ARTIFACT", "IMAGES", "-o", "/proc/nowhere/x"], "cannot be written"),
        (["inspect", "EMPTY"], "not an artifact"),
        (["nonsense"], "No such command"),
        (["predict", "ARTIFACT", "IMAGES", "--surprise"], "No such option"),
    ],
)
def test_every_mistake_is_one_line_and_exit_2(arguments, reason, tiny_artifact, tiny_images, tmp_path):
    (tmp_path / "empty").mkdir()
    places = {"ARTIFACT": tiny_artifact, "IMAGES": tiny_images, "EMPTY": tmp_path / "empty"}
    done = invariclip(*[places.get(word, word) for word in arguments])
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert reason.lower() in done.stderr.lower()


def test_errors_are_json_where_json_was_asked_for(tmp_path):
    done = invariclip("inspect", tmp_path, "--json")
    assert done.returncode == 2
    assert "not an artifact" in json.loads(done.stdout)["error"]


def test_help_lists_all_commands():
    done = invariclip("--help")
    for name in ("demo", "calibrate", "export", "build", "verify", "inspect", "predict", "embed"):
        assert name in done.stdout
