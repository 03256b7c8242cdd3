"""Texts in C++: cleaned, cut into tokens and embedded as in Python, or refused."""

import html.entities
import json
import shutil
import subprocess
import unicodedata

import ftfy
import numpy as np
import pytest
from ftfy.badness import is_bad
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import invariclip
from invariclip.artifact.folder import read_manifest
from invariclip.bench.cpp.build import SOURCE
from invariclip.bench.cpp.tables import OUT, tables
from invariclip.errors import TruncatedTextWarning
from invariclip.export.build import export_artifact
from invariclip.export.checkpoints.checkpoint import load_checkpoint
from invariclip.export.config import ExportConfig
from invariclip.preprocessing.tokenizer import Tokenizer, _lower

HARD = [
    "Éclair", "naïve", "ÇA", "İstanbul", "ΣΑΣ", "ΟΔΟΣ", "ὈΔΥΣΣΕΎΣ", "日本語", "ﬁsh", "ﬆ", "'ſ", "K", "A\u030a", "각",
    "\u1100\u1161\u11a8", "e\u0301\u0323", "ＬＯＵＤ", "ｶﾞ", "\u3000", "“q”", "‘s’", "it's", "IT'S", "'LL", "\r\n", "\r",
    "\u2028", "\x1b[31m", "\x1b[٣m", "\x07", "\ufeff", "&amp;", "&amp;amp;", "&lt;", "<", "&eacute;", "&EACUTE;",
    "&notit;", "&#65;", "&#x1F600;", "&#128;", "&#0;", "&#xD800;", "&#9999999999;", "&#12ab;", "&#x;", "&#;", "&;",
    "ß", "ẞ", "☕", "👩‍👩‍👧", "\u200d", "1234", "½", "Ã©", "â€™", "مرحبا", "हिन्दी", "٣", "\x85", "\xa0", "×", "œuf",
    "Œ", "«non»", "50 €", "20°C", "№ 5", "\u0344", "\u0958", "\u2126", "\U0002f800", "\u1e9b\u0323", "Ǆ", "ᾳ",
    "\u0345Σ", "Ⴀ", "ꭰ", "<start_of_text>", "<END_OF_TEXT>", "<|endoftext|>", "_", "a_b", "!!!???", "\t", " ", "",
]  # fmt: skip
"""Pieces that a step of the cleaning or of the splitting treats in a way of its own."""
pieces = st.one_of(
    st.sampled_from(HARD),
    st.sampled_from(sorted(html.entities.html5)).map("&{}".format),
    st.text(st.characters(codec="utf-8"), max_size=6),
    st.text(st.characters(min_codepoint=1, max_codepoint=0x3FF), max_size=6),
    st.sampled_from(["a photo of a cat.", "two dogs", "street"]),
)
texts = st.lists(pieces, max_size=6).flatmap(
    lambda parts: st.sampled_from(["", " ", "\n"]).map(lambda between: between.join(parts))
)


def test_the_tables_are_those_of_python_and_ftfy():
    written = (SOURCE / OUT).read_text(encoding="utf-8")
    version = f"Unicode {unicodedata.unidata_version} and ftfy {ftfy.__version__}."
    if version not in written.splitlines()[0]:
        pytest.skip(f"the tables were written of other versions than {version}")
    assert tables() == written


def said(asked, question, text):
    data = text.encode()
    return asked.ask(f"{question} {len(data)}", data)


def refused(answer):
    """Only what ftfy would try to repair, which is guessing."""
    return answer.startswith("InputError") and "looks as if it had been decoded wrongly" in answer


@settings(max_examples=2000, deadline=None)
@given(text=texts)
def test_texts_are_cleaned_as_in_python(asked, text):
    answer = said(asked, "cleaned", text)
    if not answer.startswith("ok "):
        assert refused(answer)
        assert any(is_bad(ftfy.fix_text(piece, fix_encoding=False)) or is_bad(piece) for piece in [text, *lines(text)])
        return
    assert asked.read(int(answer.split()[1])).decode() == _lower(text)


def lines(text):
    """As ftfy looks at them, also after what it does before it looks again."""
    from ftfy.fixes import unescape_html

    each = text.split("\n")
    return [*each, *map(unescape_html, each)]


def test_texts_that_are_no_utf_8_are_refused(built):
    for data in (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82", b"a\x80"):
        with built.answering() as asked:
            assert "a text is not UTF-8" in asked.ask(f"cleaned {len(data)}", data)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tiny_checkpoint, tiny_images, tiny_projection):
    """No learned templates, a projection, float32."""
    out = tmp_path_factory.mktemp("texts") / "plain.icm"
    config = ExportConfig(classes=("cat", "dog"), images=[tiny_images], backends=("onnxruntime", "openvino"), threads=1)
    export_artifact(load_checkpoint(str(tiny_checkpoint)), out, config, projection=tiny_projection)
    return out


@pytest.fixture(scope="module")
def tokenizer(plain):
    manifest = read_manifest(plain)
    return Tokenizer.from_file(plain / manifest.tokenizer.path, manifest.text)


def tokens(asked, artifact, engine, text):
    """The ids and whether they were cut, or why there are none."""
    answer = said(asked, f"tokens {artifact} {engine}", text)
    if not answer.startswith("ok "):
        return answer
    width, cut = map(int, answer.split()[1:])
    return np.frombuffer(asked.read(8 * width), np.int64), bool(cut)


@settings(max_examples=2000, deadline=None)
@given(text=texts)
@pytest.mark.filterwarnings("ignore::invariclip.errors.TruncatedTextWarning")
def test_tokens_are_those_of_python(asked, built, plain, tokenizer, text):
    if not built.engines:
        pytest.skip("no engine is here")
    found = tokens(asked, plain, built.engines[0], text)
    if isinstance(found, str):
        assert refused(found)
        return
    np.testing.assert_array_equal(found[0], tokenizer(text)[0])


def test_a_long_text_is_cut_and_said_so(asked, built, plain, tokenizer):
    if not built.engines:
        pytest.skip("no engine is here")
    for count in (1, 10, 74, 75, 76, 77, 500):
        text = " ".join(["cat"] * count)
        ids, cut = tokens(asked, plain, built.engines[0], text)
        room = tokenizer.spec.room
        if len(tokenizer.lengths([text])) and cut:
            with pytest.warns(TruncatedTextWarning):
                wanted = tokenizer(text)[0]
        else:
            wanted = tokenizer(text)[0]
        np.testing.assert_array_equal(ids, wanted)
        assert cut == (count > room)
    assert "is too long" in tokens(asked, plain, built.engines[0], "a" * 1_000_001)
    one_word = "".join(chr(97 + place * place % 26) for place in range(200_000))  # no spaces: one piece
    with pytest.warns(TruncatedTextWarning):
        np.testing.assert_array_equal(tokens(asked, plain, built.engines[0], one_word)[0], tokenizer(one_word)[0])


SHOWN = ["a photo of a cat.", "Two DOGS", "", "日本語", "café &amp; tea", "a photo of a cat.", "it's <b>", "x" * 40]


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_embeddings_of_texts_are_those_of_python(asked, plain, engine, batch):
    answer = asked.ask(f"texts {plain} {engine} {batch} {len(SHOWN)}", "".join(f"{one}\n" for one in SHOWN).encode())
    assert answer.startswith("ok "), answer
    got = np.frombuffer(asked.read(int(answer.split()[1])), np.float32)
    model = invariclip.load(plain, backend=engine, threads=1, text_cache=0)
    wanted = model.embed_texts(SHOWN, batch_size=batch)
    np.testing.assert_allclose(got.reshape(wanted.shape), wanted, atol=1e-6)
    fresh = invariclip.load(plain, backend=engine, threads=1).embed_texts(SHOWN[:5], batch_size=batch)
    np.testing.assert_array_equal(got.reshape(wanted.shape)[:5] if batch != 64 else fresh, fresh)


@pytest.mark.parametrize("templates", [[], ["a photo of a {}.", "a {} in art", "{}"]])
def test_other_classes_are_answered_as_in_python(asked, plain, image, engine, templates):
    names, frame = ["red house", "猫", "Tree", "sun & sea"], image(60, 44)
    words = f"classes {plain} {engine} {len(names)} {len(templates)} 60 44"
    answer = asked.ask(words, "".join(f"{one}\n" for one in [*names, *templates]).encode() + frame.tobytes())
    assert answer.startswith("ok "), answer
    got = np.frombuffer(asked.read(int(answer.split()[1])), np.float32)
    model = invariclip.load(plain, backend=engine, threads=1).with_classes(names, templates=templates or None)
    wanted = model.answer([frame])
    np.testing.assert_allclose(got[:4], wanted.probabilities[0], atol=1e-5)
    np.testing.assert_allclose(got[4:], wanted.logits[0], rtol=1e-5, atol=1e-4)
    assert asked.line() == f"0 same {model.classify([frame])[0].label}"


def test_a_program_in_c_asks_the_same(built, plain, engine):
    words = [built.program("answer-c"), "--texts", plain, engine, "Two DOGS &amp; 猫", "red house", "猫"]
    done = subprocess.run([*map(str, words)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    got = np.frombuffer(done.stdout, np.float32)
    model = invariclip.load(plain, backend=engine, threads=1)
    np.testing.assert_array_equal(got[:-2], model.embed_texts(["Two DOGS &amp; 猫"])[0])
    other = model.with_classes(["red house", "猫"], templates=["a photo of a {}.", "{} in art"])
    np.testing.assert_allclose(
        got[-2:], other.answer([np.full((40, 50, 3), 127, np.uint8)]).probabilities[0], atol=1e-5
    )


def test_the_command_line_takes_other_classes(built, plain, image, engine, tmp_path):
    Image.fromarray(image(50, 40)).save(tmp_path / "frame.ppm")
    how = ["--class", "red house", "--class", "猫", "--template", "{} in art", "--engine", engine, "--json"]
    done = subprocess.run(
        [*map(str, [built.classify, plain, tmp_path / "frame.ppm", *how])], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    model = invariclip.load(plain, backend=engine).with_classes(["red house", "猫"], templates=["{} in art"])
    wanted = model.answer([tmp_path / "frame.ppm"]).probabilities[0]
    np.testing.assert_allclose(json.loads(done.stdout)["probabilities"], wanted, atol=1e-5)
    words = [built.classify, plain, tmp_path / "frame.ppm", "--template", "{}"]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--template is of other classes" in done.stderr


@pytest.mark.parametrize(
    ("names", "templates", "reason"),
    [
        ([" "], [], "class names must not be empty"),
        (["a", "a"], [], 'class names must not be repeated: "a"'),
        (["a"], ["a photo"], 'a template needs exactly one {} for the class name: "a photo"'),
        (["a"], ["{} {}"], "a template needs exactly one {}"),
        (["a"], ["{}", "{}"], "a template is given twice"),
        ([], [], "give at least one class"),
        (["Ã©Ã©"], [], "looks as if it had been decoded wrongly"),
    ],
)
def test_impossible_classes_are_refused(asked, built, plain, image, names, templates, reason):
    if not built.engines:
        pytest.skip("no engine is here")
    words = f"classes {plain} {built.engines[0]} {len(names)} {len(templates)} 8 8"
    answer = asked.ask(words, "".join(f"{one}\n" for one in [*names, *templates]).encode() + image(8, 8).tobytes())
    assert answer.startswith("InputError")
    assert reason in answer


def test_learned_templates_take_no_other_classes(asked, built, artifact, image):
    if not built.engines:
        pytest.skip("no engine is here")
    answer = asked.ask(f"classes {artifact} {built.engines[0]} 1 0 8 8", b"cat\n" + image(8, 8).tobytes())
    assert answer.startswith("InputError the artifact has learned templates")


def test_a_folder_without_its_text_files_serves_images_and_says_what_lacks(built, plain, tmp_path, image):
    if not built.engines:
        pytest.skip("no engine is here")
    engine = built.engines[0]
    for name, change, reason in (
        ("absent", lambda path: path.unlink(), "tokenizer.json is missing"),
        ("cut", lambda path: path.write_bytes(path.read_bytes()[:-1]), "tokenizer.json is not the file"),
        ("changed", lambda path: path.write_bytes(path.read_bytes()[:-1] + b" "), "digest differs"),
    ):
        copy = shutil.copytree(plain, tmp_path / name)
        change(copy / "tokenizer.json")
        with built.answering() as asked:
            assert reason in asked.ask(f"texts {copy} {engine} 1 1", b"cat\n")
            assert asked.ask(f"crowd {copy} {engine} 1 1 1") == "ok"
    shutil.copy(plain / "image.onnx", tmp_path / "alone.onnx")
    with built.answering() as asked:
        assert "is one graph alone and has no text tower" in asked.ask(
            f"texts {tmp_path / 'alone.onnx'} {engine} 1 1", b"a\n"
        )
