"""Signatures: what was signed loads, everything else is refused, in this process and in those that it starts."""

import os
import pickle
import shutil
import stat
import subprocess
import sys
from dataclasses import replace

import pytest

from invariclip import load
from invariclip.artifact.folder import read_manifest, sign_artifact, write_manifest
from invariclip.artifact.manifest import MANIFEST
from invariclip.artifact.signature import REQUIRED, SIGNATURE, read_private_key, read_public_keys, write_new_key
from invariclip.errors import InputError, SignatureError


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """A private key and its public half."""
    private = tmp_path_factory.mktemp("keys") / "own.pem"
    return private, write_new_key(private)


@pytest.fixture
def signed(tiny_artifact, tmp_path, keys):
    """A signed copy of the tiny artifact."""
    folder = shutil.copytree(tiny_artifact, tmp_path / "signed.icm")
    sign_artifact(folder, read_private_key(keys[0]))
    return folder


@pytest.fixture(autouse=True)
def nothing_required(monkeypatch):
    """Whatever the environment of the tests says."""
    monkeypatch.setenv(REQUIRED, "")


def test_what_was_signed_loads_and_keys_are_for_their_owner(signed, keys, tiny_images):
    model = load(signed, require_signature=keys[1])
    assert len(model.classify(sorted(tiny_images.glob("*.png")))) == 12
    assert stat.S_IMODE(keys[0].stat().st_mode) == 0o600
    assert b"PRIVATE" not in keys[1].read_bytes()
    with pytest.raises(InputError, match="never overwritten"):
        write_new_key(keys[0])


def test_every_file_is_covered(signed, keys):
    """Each file of the artifact, changed by a byte, is refused at load, also one that is opened late or never."""
    for path in sorted(signed.iterdir()):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(Exception, match=r"changed after|not readable|damaged|safetensors|does not fit") as refused:
            read_manifest(signed, keys[1])
        assert type(refused.value).__module__ == "invariclip.errors", path.name
        path.write_bytes(content)
    read_manifest(signed, keys[1])


def test_another_manifest_with_right_digests_is_refused(signed, keys):
    """An attacker who can write the folder can make it consistent, but not sign it."""
    manifest = read_manifest(signed)
    write_manifest(signed, replace(manifest, left_out={"int8": "forged"}))
    assert load(signed).manifest.left_out
    with pytest.raises(SignatureError, match=rf"{MANIFEST} was changed"):
        load(signed, require_signature=keys[1])


@pytest.mark.parametrize("name", ["machine-0123456789abcdef.json", "engines/tensorrt-x.engine"])
def test_what_is_added_is_refused_and_strangers_are_not_read(signed, keys, name):
    (signed / "notes.txt").write_text("ours")
    read_manifest(signed, keys[1])
    (signed / name).parent.mkdir(exist_ok=True)
    (signed / name).write_text("{}")
    with pytest.raises(SignatureError, match=f"{name} was added after the artifact was signed; sign again"):
        read_manifest(signed, keys[1])
    sign_artifact(signed, read_private_key(keys[0]))
    read_manifest(signed, keys[1])
    (signed / name).unlink()
    with pytest.raises(SignatureError, match=f"{name} was removed"):
        read_manifest(signed, keys[1])


def test_a_link_out_of_the_folder_is_not_signed(signed, keys, tmp_path):
    (tmp_path / "outside.json").write_text("{}")
    (signed / "machine-0.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(SignatureError, match="leads out of"):
        sign_artifact(signed, read_private_key(keys[0]))


def test_other_keys_and_unsigned_artifacts_are_refused(signed, keys, tiny_artifact, tmp_path):
    other = write_new_key(tmp_path / "other.pem")
    with pytest.raises(SignatureError, match=r"is signed by the key .* does not hold"):
        load(signed, require_signature=other)
    with pytest.raises(SignatureError, match="is not signed, and a signature is required"):
        load(tiny_artifact, require_signature=keys[1])
    both = tmp_path / "both.pem"
    both.write_bytes(other.read_bytes() + keys[1].read_bytes())
    assert len(read_public_keys(both)) == 2
    load(signed, require_signature=both)


def test_a_signature_of_another_list_does_not_fit(signed, keys):
    from invariclip.records import SEAL, parse_json, sealed_json

    plain = parse_json((signed / SIGNATURE).read_bytes(), "it")
    del plain[SEAL]
    plain["files"]["image.onnx"] = "0" * 64
    (signed / SIGNATURE).write_bytes(sealed_json(plain))
    with pytest.raises(SignatureError, match="does not fit"):
        read_manifest(signed, keys[1])


def test_a_model_that_goes_to_another_process_asks_again(signed, keys):
    model = load(signed, require_signature=keys[1])
    how = pickle.dumps(model)
    (signed / SIGNATURE).unlink()
    done = subprocess.run(
        [sys.executable, "-c", "import pickle, sys; pickle.load(sys.stdin.buffer)"], input=how, capture_output=True,
        check=False, env={**os.environ, REQUIRED: ""},
    )  # fmt: skip
    assert done.returncode
    assert b"SignatureError" in done.stderr


def test_the_commands(run, tiny_artifact, tiny_images, tmp_path):
    folder = shutil.copytree(tiny_artifact, tmp_path / "mine.icm")
    key, public = tmp_path / "mine.pem", tmp_path / "mine.pub.pem"
    asked = ["--require-signature", public]
    assert run("sign")[0] == 2
    code, out, _ = run("sign", "--new-key", key)
    assert (code, public.is_file()) == (0, True)
    assert "keep it" in out
    code, _, err = run("predict", folder, tiny_images / "00.png", *asked)
    assert (code, "is not signed" in err) == (2, True)
    code, out, _ = run("sign", folder, "--key", key, "--json")
    assert (code, '"files"' in out) == (0, True)
    assert run("predict", folder, tiny_images / "00.png", *asked)[0] == 0
    assert run("inspect", folder, *asked)[0] == 0
    assert os.environ[REQUIRED] == ""  # as it was before
    (folder / "machine-0.json").write_text("{}")
    code, _, err = run("embed", folder, tiny_images / "00.png", "-o", tmp_path / "e.safetensors", *asked)
    assert (code, "machine-0.json was added" in err) == (2, True)
    code, _, err = run("sign", folder, "--key", public)
    assert (code, "no private key" in err) == (2, True)


def test_an_encrypted_key_needs_its_password(tmp_path):
    write_new_key(tmp_path / "closed.pem", "secret")
    with pytest.raises(InputError, match="no private key in PEM"):
        read_private_key(tmp_path / "closed.pem")
    with pytest.raises(InputError, match="no private key in PEM"):
        read_private_key(tmp_path / "closed.pem", "wrong")
    assert read_private_key(tmp_path / "closed.pem", "secret")
