"""What reads bytes of others: JSON, ONNX, images. They understand what Python understands, and never crash."""

import io
import json
import subprocess

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from invariclip.sites.site import new_site, write_site


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=30), ascii_=st.booleans())
def test_texts_are_read_as_python_reads_them(asked, text, ascii_):
    said = asked.ask(f"quoted {json.dumps(text, ensure_ascii=ascii_)}")
    assert said.startswith("ok ")
    assert json.loads(said[3:]) == text


@pytest.mark.parametrize(
    "text",
    ['"', '"\\x"', '"\\ud800"', '"\\udc00\\ud800"', "'a'", '"a" "b"', "", "nul", '"\t"', '{"a":1,"a":2}', "[1,]", "01",
     "1.", "+1", "NaN", "1e999", "[" * 100 + "]" * 100, '{"a"}', "{1:2}", "\x00"],
)  # fmt: skip
def test_what_is_no_json_is_refused(asked, text):
    assert asked.ask(f"quoted {text}").startswith("ArtifactError is not understood as JSON")


def test_damaged_utf_8_is_refused(built):
    for data in (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82"):
        done = subprocess.run(
            [built.program("answer")], input=b'quoted "' + data + b'"\n', capture_output=True, check=True
        )
        assert b"a text is not UTF-8" in done.stdout


def encoded(array, kind, **options):
    stream = io.BytesIO()
    Image.fromarray(array if array.shape[2] > 1 else array[..., 0]).save(stream, kind, **options)
    return stream.getvalue()


def decoded(asked, path):
    said = asked.ask(f"decode {path}").split()
    if said[0] != "ok":
        return " ".join(said)
    columns, rows, channels, count = map(int, said[1:])
    return np.frombuffer(asked.read(count), np.uint8).reshape(rows, columns, channels)


@pytest.mark.parametrize("size", [(64, 48), (1, 1), (33, 17), (17, 201)])
@pytest.mark.parametrize(
    ("kind", "channels", "options"),
    [
        ("PPM", 3, {}), ("PPM", 1, {}), ("PNG", 3, {}), ("PNG", 1, {}), ("PNG", 4, {}),
        ("JPEG", 3, {"quality": 90}), ("JPEG", 3, {"quality": 30, "subsampling": 0}), ("JPEG", 1, {}),
        ("JPEG", 3, {"subsampling": 1}), ("JPEG", 3, {"progressive": True}), ("JPEG", 3, {"keep_rgb": True}),
        ("WEBP", 3, {"quality": 80}), ("WEBP", 3, {"lossless": True}), ("WEBP", 1, {}),
        ("WEBP", 4, {"quality": 60}), ("WEBP", 4, {"lossless": True}), ("WEBP", 4, {"lossless": True, "exact": True}),
    ],
)  # fmt: skip
def test_files_are_decoded_as_pillow_decodes_them(asked, image, tmp_path, size, kind, channels, options):
    path = tmp_path / "image"
    path.write_bytes(encoded(image(*size, channels), kind, **options))
    got = decoded(asked, path)
    if isinstance(got, str) and kind not in got.partition("known: ")[2].upper():
        pytest.skip(f"{kind} was not compiled in")
    with Image.open(path) as opened:
        wanted = np.asarray(opened)
    np.testing.assert_array_equal(got, wanted.reshape(got.shape))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"P6 2 2 255\n" + bytes(11), "ends too early"),
        (b"P6 99999 99999 255\n", "ends too early"),
        (b"P6 0 5 255\n", "0x5 pixels are none"),
        (b"P5 2 2 65535\n" + bytes(8), "only 255 is read"),
        (b"P5 2", "lacks a number"),
        (b"P5 999999999999 1 255\n", "above 200000000"),
        (b"P3 1 1 255 0 0 0", "not an image that is read here"),
        (b"", "not an image that is read here"),
    ],
)
def test_damaged_netpbm_is_refused(asked, tmp_path, content, reason):
    (tmp_path / "image").write_bytes(content)
    said = decoded(asked, tmp_path / "image")
    assert said.startswith("InputError")
    assert reason in said


def test_what_pillow_would_treat_otherwise_is_refused(asked, image, tmp_path):
    path, opened = tmp_path / "image", Image.fromarray(image(40, 30))
    for save, kind, reason in (
        (lambda: opened.quantize(16).save(path, "PNG"), "PNG", "a palette"),
        (lambda: opened.convert("LA").save(path, "PNG"), "PNG", "grey with alpha"),
        (lambda: opened.convert("CMYK").save(path, "JPEG"), "JPEG", "CMYK"),
        (lambda: path.write_bytes(encoded(image(200, 200), "JPEG")[:3000]), "JPEG", "it ends too early"),
        (lambda: path.write_bytes(encoded(image(200, 200), "PNG")[:3000]), "PNG", "damaged PNG"),
        (lambda: path.write_bytes(encoded(image(200, 200), "WEBP")[:3000]), "WEBP", "damaged WebP (it ends too early"),
        (lambda: path.write_bytes(encoded(image(200, 200), "WEBP")[:15]), "WEBP", "damaged WebP"),
        (lambda: opened.save(path, "WEBP", save_all=True, append_images=[opened.rotate(9)]), "WEBP", "an animated"),
    ):
        save()
        said = decoded(asked, path)
        assert reason in said or ("known: " in said and kind not in said.partition("known: ")[2].upper())


def metadata(value, key="invariclip"):
    return onnx.ModelProto(metadata_props=[onnx.StringStringEntryProto(key=key, value=value)]).SerializeToString()


GRAPH = onnx.ModelProto(
    ir_version=10, producer_name="x" * 300, graph=onnx.GraphProto(name="y" * 70000), functions=[onnx.FunctionProto()]
).SerializeToString()


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (GRAPH + metadata("here"), "ok here"),
        (metadata("here") + GRAPH, "ok here"),
        (metadata("old") + GRAPH + metadata("new"), "ok new"),
        (metadata("here") + metadata("other", "another"), "ok here"),
        (GRAPH + b"\x79" + bytes(8) + b"\x7d" + bytes(4) + metadata("here"), "ok here"),  # fields that nobody knows
        (GRAPH, "carries no facts"),
        (b"", "carries no facts"),
        (metadata("here")[:-1], "a field is longer than what is left of it"),
        (metadata("here") + b"\x7d" + bytes(3), "a field is longer than what is left of it"),
        (metadata("here") + b"\x7a\x05" + bytes(4), "a field is longer than what is left of it"),
        (b"\x72\x03\x12\x02a", "a field is longer than what is left of it"),
        (metadata("here") + b"\x72\xff", "it ends inside a number"),
        (b"\xff" * 11, "a number has more than ten bytes"),
        (metadata("here") + b"\x0b", "a field is of an unknown kind"),
        (b"\x72\xff\xff\xff\x7f", "larger than any facts"),
    ],
)
def test_metadata_is_read_as_protobuf_reads_it(asked, tmp_path, content, wanted):
    (tmp_path / "model.onnx").write_bytes(content)
    said = asked.ask(f"metadata {tmp_path / 'model.onnx'}")
    assert said == wanted or (not wanted.startswith("ok") and said.startswith("ArtifactError") and wanted in said)


@pytest.fixture(scope="session")
def facts():
    """What a reader needs of a manifest, and no more, so that most changes meet what matters."""
    spec = {"image_size": [32, 32], "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0}
    graph = {"path": "image.onnx", "sha256": "0" * 64, "size_bytes": 9, "data_sha256": None}
    return {
        "schema_version": 3, "space_id": "5", "pixels": spec, "classes": ["cat", "猫"], "projection": {"rank": 8},
        "model": {"embed_dim": 24, "logit_scale": 100.0, "logit_bias": None}, "cdc": {"abstain_above": 0.5},
        "variants": {"float32": {"image": graph, "parity": {"openvino": {}}, "front": "host", "compute": "float32"}},
    }  # fmt: skip


def tiny_tokenizer():
    """Every byte, alone and at a word's end, and few merges."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = [*map(chr, printable), *(chr(256 + place) for place in range(256 - len(printable)))]
    pieces = [*names, *(f"{name}</w>" for name in names), "do", "dog", "dogs</w>", "te"]
    pattern = r"(?i:<start_of_text>|'s)|[\x{41}-\x{5A}\x{61}-\x{7A}\x{E0}-\x{FF}]+|[\x{30}-\x{39}]|[\x{21}-\x{2F}]+"
    return {
        "normalizer": None, "added_tokens": [],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>", "fuse_unk": False,
            "vocab": {name: place for place, name in enumerate(pieces)},
            "merges": [["d", "o"], ["do", "g"], ["dog", "s</w>"], ["t", "e"]],
        },
    }  # fmt: skip


def test_no_bytes_crash_a_reader(built, image, facts, tmp_path):
    """The readers once more, with sanitizers, on noise and on files that were changed."""
    text = json.dumps(facts, ensure_ascii=False)
    model = onnx.ModelProto(ir_version=10, metadata_props=[onnx.StringStringEntryProto(key="invariclip", value=text)])
    onnx.save(model, tmp_path / "facts.onnx")
    (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
    bank = onnx.numpy_helper.from_array(np.eye(8, 2, dtype=np.float32), "class_bank")
    onnx.save(onnx.ModelProto(ir_version=10, graph=onnx.GraphProto(initializer=[bank])), tmp_path / "bank.onnx")
    empty = new_site("yard", "5", np.full(8, 0.05), 4, {"why": "a test"})
    write_site(tmp_path / "yard.safetensors", empty.adding(np.eye(8)[:6], np.eye(4, 8)))
    names = ("facts.onnx", "manifest.json", "bank.onnx", "yard.safetensors")
    seeds = [tmp_path / name for name in names]
    seeds += [tmp_path / "texts", tmp_path / "tokenizer.json"]
    seeds[-2].write_text(
        "caf\u00e9 &amp; <b> \u00c3\u00a9 &#x41; \u03a3\u0391\u03a3 e\u0301 \u201cq\u201d\n\x1b[3m \ufb01sh",
        encoding="utf-8",
    )
    seeds[-1].write_text(json.dumps(tiny_tokenizer()), encoding="utf-8")
    for kind in ("PPM", "PNG", "JPEG", "WEBP"):
        seeds.append(tmp_path / f"image.{kind}")
        seeds[-1].write_bytes(encoded(image(30, 20), kind))
    done = subprocess.run([built.program("mutate"), "1", "6000", *seeds], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    understood = dict(line.split() for line in done.stdout.splitlines())
    assert set(understood) == {
        "json", "facts", "onnx", "banks", "sites", "texts", "tokenizers", "images", "frames"
    }  # fmt: skip
    assert all(0 < int(times) <= 6000 for times in understood.values()), understood  # it is not all refused at once
    assert understood["frames"] == "6000"
