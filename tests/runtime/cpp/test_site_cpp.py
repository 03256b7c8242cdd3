"""Sites in C++: the file, the shift and the embeddings are Python's to the last bit; the classes answer from them."""

import json
import shutil
import struct
import subprocess
from contextlib import suppress
from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save, save_file

import invariclip
from invariclip.artifact.folder import describe_file, read_manifest, write_manifest
from invariclip.errors import InputError, SiteError
from invariclip.export.build import export_artifact
from invariclip.export.checkpoints.checkpoint import load_checkpoint
from invariclip.export.config import ExportConfig
from invariclip.export.graphs.writing import write_facts
from invariclip.export.site import bake_site
from invariclip.export.swap import with_files
from invariclip.records import seal
from invariclip.sites.site import SITE_FILE, Site, new_site, read_site, write_site

WIDTH = 8
CLASSES = ("cat", 'a "red" house', "猫", "tree", "dog", "sun")


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def random_site(seed, width=WIDTH, classes=6, images=20, around=1.0, name="yard", space="space"):
    rng = np.random.default_rng(seed)
    rows = unit(rng.normal(size=(images, width)) + around)
    mean = rng.normal(size=width) / (4 * width)
    mean /= max(1.0, np.linalg.norm(mean))  # of unit embeddings: in one dimension it may come out longer
    empty = new_site(name, space, mean, classes, {"why": "a test"})
    return empty.adding(rows, unit(rng.normal(size=(classes, width)))) if images else empty


def site_said(asked, path, rows):
    """(images, kinds, weight, digest, shift, adapted rows) as C++ has them, or why it has none."""
    said = asked.ask(f"site {rows.shape[1]} {len(rows)} {path}", rows.astype("<f4").tobytes())
    if not said.startswith("ok "):
        return said
    images, kinds, weight, digest, count = said.split()[1:]
    numbers = np.frombuffer(asked.read(int(count)), np.float32)
    shift, adapted = numbers[: rows.shape[1]], numbers[rows.shape[1] :].reshape(rows.shape)
    return int(images), float(kinds), float(weight), digest, shift, adapted


def require_equal(asked, path, rows):
    site = read_site(path)
    images, kinds, weight, digest, shift, adapted = site_said(asked, path, rows)
    assert (images, kinds, weight, digest) == (site.images, site.kinds, site.weight, site.digest)
    np.testing.assert_array_equal(shift.view(np.uint32), site.shift.view(np.uint32))
    np.testing.assert_array_equal(adapted.view(np.uint32), site.apply(rows).view(np.uint32))


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 7, 8, 64, 129, 512, 1000]), st.sampled_from([1, 2, 5, 100, 1001]),
    st.sampled_from([0, 1, 2, 9, 40, 500]), st.sampled_from([0.0, 0.02, 0.3]),
)  # fmt: skip
def test_any_sites_shift_and_embeddings_are_those_of_python(
    asked, tmp_path_factory, seed, width, classes, images, around
):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    write_site(path, random_site(seed, width, classes, images, around))
    rows = unit(np.random.default_rng(seed + 1).normal(size=(5, width))).astype(np.float32)
    require_equal(asked, path, rows)


def test_a_name_in_any_script_and_large_provenance_are_read(asked, tmp_path):
    site = random_site(0, name='der "Hof" 猫\n')
    provenance = {"classes": [f"class {number}" for number in range(50_000)]}
    write_site(tmp_path / "s", Site(site.name, "space", 20, site.total, site.taken_for, site.training_mean, provenance))
    require_equal(asked, tmp_path / "s", unit(np.ones((1, WIDTH))).astype(np.float32))


def test_changed_files_are_taken_or_refused_as_in_python(asked, tmp_path):
    """Each with one byte changed, one taken out or one put in."""
    path, rng = tmp_path / "yard.safetensors", np.random.default_rng(3)
    write_site(path, random_site(3, images=30))
    whole, rows = path.read_bytes(), unit(np.ones((1, WIDTH))).astype(np.float32)
    taken = 0
    for number in range(2500):
        place = int(rng.integers(len(whole)))
        byte = bytes([rng.choice([rng.integers(256), *b'0129"{}[],: F64'])])
        content = whole[:place] + (byte, b"", byte + whole[place : place + 1])[number % 3] + whole[place + 1 :]
        if content != whole and number % 5 == 0:  # as it is, the digest tells
            path.write_bytes(content)
            with pytest.raises(SiteError):
                read_site(path)
            assert site_said(asked, path, rows).startswith("SiteError ")
        with suppress(ValueError):
            content = seal(content)
        path.write_bytes(content)
        try:
            site = read_site(path)
        except SiteError:
            assert site_said(asked, path, rows).startswith("SiteError "), path.read_bytes()
            continue
        taken += 1
        said = site_said(asked, path, rows[:, : site.width])
        assert said[3] == site.digest, (said, path.read_bytes())
    assert 100 < taken < 2000


def header_of(content):
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(content, change):
    header, data = header_of(content)
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def facts(**changes):
    """Metadata of a site with some changed, or left out where None."""
    known = {"file_sha256": "0" * 64, "schema": 3, "name": "yard", "space_id": "space", "images": 20, "provenance": {}}
    return json.dumps({key: value for key, value in (known | changes).items() if value is not None})


def sums(**changes):
    site = random_site(1)
    return {"total": site.total, "taken_for": site.taken_for, "training_mean": site.training_mean} | changes


GOOD = seal(save(sums(), {"invariclip.site": facts()}))


def stored(metadata=None, **changes):
    content = save(sums(**changes), {"invariclip.site": metadata or facts()})
    return content if metadata and "file_sha256" not in metadata else seal(content)


def spans(total=(0, 64), taken_for=(64, 112), training_mean=(112, 176)):
    """A site whose vectors are said to lie there."""

    def change(header):
        for name, span in (("total", total), ("taken_for", taken_for), ("training_mean", training_mean)):
            header[name]["data_offsets"] = list(span)

    return with_header(GOOD, change)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it ends too early"),
        (GOOD[:7], "it ends too early"),
        (GOOD[:8], "longer than the file"),
        (GOOD[:-1], "its sums take 176 bytes, and it holds 175"),
        (GOOD + b"\0", "its sums take 176 bytes, and it holds 177"),
        (b"\xff" * 8 + GOOD[8:], "its header of 18446744073709551615 bytes is longer than the file"),
        (struct.pack("<Q", 5_000_000) + b" " * 5_000_000, "longer than the file or 4194304"),
        (b"\0" * (SITE_FILE.max_bytes + 1), "larger than a site can be (16777217 bytes)"),
        (struct.pack("<Q", 2) + b"{}", "the fact '__metadata__' is missing"),
        (struct.pack("<Q", 70) + b"[" * 70, "nested deeper"),
        (save(sums()), "'__metadata__' is missing"),
        (save(sums(), {"invariclip.projection": facts()}), "the fact 'invariclip.site' is missing"),
        (stored("[" * 100), "nested deeper"),
        (stored("null"), "is not an object"),
        (stored(facts(schema=9)), "schema 9 is not known; this version reads 3: measure again"),
        (stored(facts(schema="1")), "schema is not a number"),
        (stored('{"schema": NaN}'), "is not understood as JSON"),
        *((stored(facts().replace(f'"{name}"', '"other"')), f"the fact '{name}' is missing")
          for name in ("schema", "name", "space_id", "images", "provenance")),
        (stored(facts(name=5)), "name is not a text"),
        (stored(facts(space_id=[])), "space_id is not a text"),
        (stored(facts(provenance=[])), "provenance is not an object"),
        (stored(facts(images=-1)), "images is not a whole number from 0"),
        (stored(facts(images=2.5)), "images is not a whole number from 0"),
        (stored(facts(images=True)), "images is not a number"),
        (stored(facts(images=21)), "do not add up to its images"),
        (stored(facts(images=0)), "do not add up to its images"),
        (stored(total=np.zeros(WIDTH, np.float32)), "its sums are not float64"),
        (stored(taken_for=np.zeros(6, np.int64)), "its sums are not float64"),
        (stored(total=np.zeros((2, 4))), "'total' is not one vector"),
        (stored(total=np.zeros(())), "'total' is not one vector"),
        (stored(total=np.zeros(WIDTH + 1)), "two vectors of one width, not [9] and [8]"),
        (stored(total=np.zeros(0), training_mean=np.zeros(0)), "two vectors of one width, not [0] and [0]"),
        (stored(total=np.full(WIDTH, np.nan)), "not finite"),
        (stored(training_mean=np.full(WIDTH, np.inf)), "not finite"),
        (stored(total=np.full(WIDTH, 1e3)), "longer than unit embeddings"),
        (stored(total=np.full(WIDTH, 1e300)), "longer than unit embeddings"),
        (stored(training_mean=np.full(WIDTH, 2.0)), "longer than unit embeddings"),
        (stored(taken_for=np.zeros(0)), "impossible shares"),
        (stored(taken_for=np.full(6, -1.0)), "impossible shares"),
        (stored(taken_for=np.full(6, np.nan)), "impossible shares"),
        (stored(taken_for=np.full(6, np.inf)), "do not add up"),
        (stored(taken_for=np.full(6, 1.0)), "do not add up"),
        (stored(total=20 * np.eye(WIDTH)[0], training_mean=-np.eye(WIDTH)[0], taken_for=np.full(100, 0.2)),
         "lies 1.33 from the calibrated images, and 0.95 can be taken away"),
        (spans(total=(0, 72)), "'total' does not take as many bytes as its shape says"),
        (spans(total=(64, 0)), "'total' does not take as many bytes as its shape says"),
        (spans(taken_for=(16, 64)), "overlap or leave gaps"),
        (spans(training_mean=(120, 184)), "overlap or leave gaps"),
        (spans(total=(1_000_000, 1_000_064)), "overlap or leave gaps"),
        (spans(total=(1 << 40, (1 << 40) + 64)), "data_offsets is not a whole number"),
        (with_header(GOOD, lambda header: header["total"].update(data_offsets=[0])), "'total' is not one vector"),
        (with_header(GOOD, lambda header: header["total"].update(shape=[-8])), "shape is not a whole number"),
        (with_header(GOOD, lambda header: header["total"].pop("shape")), "the fact 'shape' is missing"),
        (with_header(GOOD, lambda header: header.pop("total")), "the fact 'total' is missing"),
        (stored(other=np.zeros(1)), "it holds a tensor that no site has"),
        (GOOD[:-1] + bytes([GOOD[-1] ^ 1]), "its content is not what its own digest says"),
        (stored(facts(file_sha256=None)), "carries no digest of itself"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused_in_one_line(asked, tmp_path, content, reason):
    path = tmp_path / "yard.safetensors"
    path.write_bytes(content)
    said = site_said(asked, path, np.ones((1, WIDTH), np.float32))
    assert said.startswith(f"SiteError {path}: ")
    assert reason in said
    if reason != "it holds a tensor that no site has":  # Python's library does not mind
        with pytest.raises(SiteError):
            read_site(path)


def test_a_missing_file_and_a_folder_are_no_sites(asked, tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        said = site_said(asked, path, np.ones((1, WIDTH), np.float32))
        assert said == f"SiteError {path}: no such file; `invariclip adapt` writes a site"


def bank_said(asked, path, width, classes):
    said = asked.ask(f"bank {width} {classes} {path}")
    if not said.startswith("ok "):
        return said
    return np.frombuffer(asked.read(int(said.split()[1])), np.float32).reshape(width, classes)


def with_bank(path, tensor, *others, **options):
    graph = onnx.GraphProto(name="g", initializer=[*others, tensor])
    onnx.save(onnx.ModelProto(ir_version=10, graph=graph), path, **options)


BANK = unit(np.random.default_rng(2).normal(size=(5, 4))).T.astype(np.float32)
BEFORE = onnx.numpy_helper.from_array(np.arange(9000, dtype=np.float32), "weights")


def test_class_embeddings_are_read_from_a_graph(asked, tmp_path):
    path = tmp_path / "image.onnx"
    with_bank(path, onnx.numpy_helper.from_array(BANK, "class_bank"), BEFORE)
    np.testing.assert_array_equal(bank_said(asked, path, 4, 5), BANK)
    packed = b"\x0a\x02\x04\x05\x10\x01\x42\x0aclass_bank\x4a\x50" + BANK.tobytes()  # dims as newer writers put them
    graph = b"\x2a" + bytes([len(packed)]) + packed
    path.write_bytes(b"\x3a" + bytes([len(graph)]) + graph)
    np.testing.assert_array_equal(bank_said(asked, path, 4, 5), BANK)
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)].reshape(4, -1)
    with_bank(path, onnx.numpy_helper.from_array(every, "class_bank_float16"), BEFORE)
    np.testing.assert_array_equal(bank_said(asked, path, *every.shape), every.astype(np.float32))


def test_class_embeddings_beside_a_graph_are_read(asked, tmp_path):
    path = tmp_path / "image.onnx"
    how = {"save_as_external_data": True, "size_threshold": 0}
    with_bank(path, onnx.numpy_helper.from_array(BANK, "class_bank"), BEFORE, location="image.onnx.data", **how)
    np.testing.assert_array_equal(bank_said(asked, path, 4, 5), BANK)
    with (tmp_path / "image.onnx.data").open("r+b") as data:
        data.truncate(40)
    assert "longer than what is left" in bank_said(asked, path, 4, 5)
    (tmp_path / "image.onnx.data").unlink()
    assert "its weights cannot be read" in bank_said(asked, path, 4, 5)
    with_bank(path, onnx.numpy_helper.from_array(BANK, "class_bank"), location="elsewhere", **how)
    assert "lie in another file" in bank_said(asked, path, 4, 5)


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (BEFORE, "holds no class embeddings of float32 or float16"),
        (onnx.numpy_helper.from_array(BANK.astype(np.float64), "class_bank"), "holds no class embeddings of float32"),
        (onnx.numpy_helper.from_array(BANK.T, "class_bank"), "are not [4, 5], as its facts say"),
        (onnx.numpy_helper.from_array(BANK[None], "class_bank"), "are not [4, 5], as its facts say"),
        (onnx.helper.make_tensor("class_bank", 1, BANK.shape, BANK.ravel()), "are not [4, 5], as its facts say"),
        (onnx.numpy_helper.from_array(np.full((4, 5), np.nan, np.float32), "class_bank"), "not finite"),
        (onnx.numpy_helper.from_array(np.full((4, 5), np.inf, np.float16), "class_bank_float16"), "not finite"),
    ],
)
def test_other_class_embeddings_are_refused(asked, tmp_path, tensor, reason):
    with_bank(tmp_path / "image.onnx", tensor)
    said = bank_said(asked, tmp_path / "image.onnx", 4, 5)
    assert said.startswith("ArtifactError")
    assert reason in said


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_checkpoint, tiny_images, tiny_projection):
    """(name, classes) → an artifact of a projection, no learned templates, float32 and float16 weights."""

    def of(name, classes):
        out = tmp_path_factory.mktemp(name) / f"{name}.icm"
        export_artifact(
            load_checkpoint(str(tiny_checkpoint)),
            out,
            ExportConfig(
                classes=classes,
                images=[tiny_images],
                backends=("onnxruntime", "openvino"),
                variants=("float16",),
                fidelity="near",
                threads=1,
            ),
            projection=tiny_projection,
        )
        return out

    return of


@pytest.fixture(scope="module")
def plain(exported):
    """Few classes: of float16 weights their embeddings stay float32."""
    return exported("plain", CLASSES)


@pytest.fixture(scope="module")
def many(exported):
    """So many classes that float16 weights are float16 class embeddings too."""
    return exported("many", tuple(f"thing {number}" for number in range(200)))


@pytest.fixture(scope="module")
def shown(tmp_path_factory, image):
    from PIL import Image

    folder = tmp_path_factory.mktemp("shown")
    for number in range(13):
        Image.fromarray(image(30 + 11 * number, 90 - 5 * number, seed=number)).save(folder / f"{number:02}.ppm")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def yard(tmp_path_factory, plain, shown):
    """A site of the images, with more kinds of things than a random model can tell."""
    model = invariclip.load(plain, backend="onnxruntime", threads=1)
    rows = model.embed_images(shown)
    empty = new_site("yard", model.space_id, np.full(WIDTH, 0.05), WIDTH, {})
    path = tmp_path_factory.mktemp("sites") / "yard.safetensors"
    write_site(path, empty.adding(rows, np.eye(WIDTH)))
    return path


def test_a_program_in_c_takes_the_site_away(built, plain, yard, image, engine):
    frames = [image(60, 44, seed=seed) for seed in range(5)]
    words = [built.program("answer-c"), plain, engine, 60, 44, yard]
    done = subprocess.run(
        [*map(str, words)], input=b"".join(frame.tobytes() for frame in frames), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    wanted = invariclip.load(plain, backend=engine, threads=1, site=yard).embed_images(frames)
    got = np.frombuffer(done.stdout, np.float32)
    for part in (got[: wanted.size], got[-wanted.size :]):
        np.testing.assert_array_equal(part, wanted.ravel())


def said_by(built, *words):
    return subprocess.run([built.classify, *map(str, words)], capture_output=True, text=True, check=False)


def answers(built, *words):
    done = said_by(built, *words, "--json")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def column(rows, name):
    return np.array([row[name] for row in rows], np.float32)


@pytest.mark.parametrize("variant", ["float32", "float16"])
@pytest.mark.parametrize("batch", [1, 7, 16])
def test_embeddings_with_a_site_are_those_of_python(built, plain, yard, shown, engine, variant, batch):
    model = invariclip.load(plain, backend=engine, variant=variant, threads=1, site=yard)
    how = ["--engine", engine, "--variant", variant, "--threads", 1, "--batch-size", batch, "--site", yard]
    got = column(answers(built, plain, *shown, *how, "--embed"), "embedding")
    np.testing.assert_array_equal(got, model.embed_images(shown, batch_size=batch))
    without = column(answers(built, plain, *shown, *how[:-2], "--embed"), "embedding")
    np.testing.assert_array_equal(got, read_site(yard).apply(without))
    assert np.abs(got - without).max() > 0.01


@pytest.mark.parametrize("variant", ["float32", "float16"])
@pytest.mark.parametrize("which", ["plain", "many"])
def test_classes_with_a_site_are_answered_like_float64(request, built, yard, shown, engine, variant, which):
    artifact = request.getfixturevalue(which)
    how = ["--engine", engine, "--variant", variant, "--threads", 1, "--site", yard]
    got = answers(built, artifact, *shown, *how)
    model = invariclip.load(artifact, backend=engine, variant=variant, threads=1, site=yard)
    wanted = model.answer(shown)
    np.testing.assert_allclose(column(got, "probabilities"), wanted.probabilities, atol=1e-5)
    graph = onnx.load(artifact / model.manifest.variants[variant].image.path).graph
    held = {item.name: item for item in graph.initializer}
    bank = onnx.numpy_helper.to_array(held.get("class_bank", held.get("class_bank_float16"))).astype(np.float64)
    assert (which, variant) != ("many", "float16") or "class_bank_float16" in held
    logits = model.manifest.model.logit_scale * (wanted.embeddings.astype(np.float64) @ bank)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(column(got, "probabilities"), weights / weights.sum(axis=1, keepdims=True), rtol=1e-6)
    assert [row["label"] for row in got] == [one.label for one in model.classify(shown)]
    assert got[0]["uncertainty"] is None


def test_without_a_shift_classes_are_answered_as_the_graph_answers(built, plain, shown, engine, tmp_path):
    """The graph's own probabilities, so the class embeddings that were read are those that it multiplies by."""
    space = invariclip.load(plain, backend=engine, threads=1).space_id
    write_site(tmp_path / "nowhere", new_site("nowhere", space, np.full(WIDTH, 0.05), 3, {}))
    how = ["--engine", engine, "--threads", 1]
    moved = answers(built, plain, *shown, *how, "--site", tmp_path / "nowhere")
    wanted = answers(built, plain, *shown, *how)
    np.testing.assert_allclose(column(moved, "probabilities"), column(wanted, "probabilities"), atol=1e-5)
    assert [row["label"] for row in moved] == [row["label"] for row in wanted]
    assert np.ptp(column(moved, "probabilities"), axis=0).max() > 0.05  # they say something of the images


def with_bias(folder, bias):
    """Makes a sigmoid model's artifact of another one; its graphs then say so too."""
    manifest = read_manifest(folder)
    manifest = replace(manifest, model=replace(manifest.model, logit_bias=bias))
    for entry in manifest.files:
        if entry.path.endswith(".onnx"):
            write_facts(folder / entry.path, manifest.facts(entry.path))
    written = {entry.path: describe_file(folder, entry.path) for entry in manifest.files}
    write_manifest(folder, with_files(manifest, written))


def test_a_sigmoid_models_classes_are_answered_one_by_one(built, plain, yard, shown, engine, tmp_path):
    copy = shutil.copytree(plain, tmp_path / "sigmoid.icm")
    with_bias(copy, -3.0)
    got = column(answers(built, copy, *shown, "--engine", engine, "--threads", 1, "--site", yard), "probabilities")
    model = invariclip.load(copy, backend=engine, threads=1, site=yard)
    np.testing.assert_allclose(got, model.probabilities(shown), atol=1e-5)
    assert np.abs(got.sum(axis=1) - 1).max() > 0.01


@pytest.mark.parametrize("bias", [-150.0, 150.0])
def test_classes_whose_probabilities_round_alike_are_ranked_by_their_logits(
    built, plain, yard, shown, engine, tmp_path, bias
):
    copy = shutil.copytree(plain, tmp_path / "sigmoid.icm")
    with_bias(copy, bias)
    how = ["--engine", engine, "--threads", 1, "--site", yard]
    got = answers(built, copy, *shown, *how)
    assert set(column(got, "probabilities").ravel()) == {float(bias > 0)}
    cosines = float64_cosines(copy, column(answers(built, copy, *shown, *how, "--embed"), "embedding"))
    order = np.argsort(-cosines, axis=1)
    assert [row["label"] for row in got] == [CLASSES[best] for best in order[:, 0]]
    assert [[each["label"] for each in row["ranking"]] for row in got] == [
        [CLASSES[place] for place in row[: len(got[0]["ranking"])]] for row in order
    ]
    assert (np.diff(order[:, : len(got[0]["ranking"])], axis=1) < 0).any(axis=1).all()  # not the classes' own order


def float64_cosines(artifact, embeddings):
    """Embeddings [N, d] against the class embeddings that the float32 graph holds, in float64."""
    held = {item.name: item for item in onnx.load(artifact / "image.onnx").graph.initializer}
    return embeddings.astype(np.float64) @ onnx.numpy_helper.to_array(held["class_bank"]).astype(np.float64)


@pytest.fixture(scope="module")
def sigmoid(tmp_path_factory, tiny_checkpoint, tiny_images, tiny_projection):
    """An artifact of a sigmoid model whose every class is weak: 10 · cos - 40."""
    root = tmp_path_factory.mktemp("sigmoid")
    folder = shutil.copytree(tiny_checkpoint, root / "weak")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["init_logit_bias"] = -40.0
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    weights = load_file(folder / "open_clip_model.safetensors")
    weights["logit_bias"] = np.array(-40.0, dtype=np.float32)
    weights["logit_scale"] = np.array(np.log(10.0), dtype=np.float32)
    save_file(weights, folder / "open_clip_model.safetensors")
    how = ExportConfig(classes=CLASSES, images=[tiny_images], backends=("onnxruntime", "openvino"), threads=1)
    export_artifact(load_checkpoint(str(folder)), root / "weak.icm", how, projection=tiny_projection)
    return root / "weak.icm"


def test_a_sigmoid_models_weak_classes_keep_their_order_and_probabilities(built, sigmoid, shown, engine):
    how = ["--engine", engine, "--threads", 1]
    got = answers(built, sigmoid, *shown, *how)
    model = invariclip.load(sigmoid, backend=engine, threads=1)
    scale, bias = model.manifest.model.logit_scale, model.manifest.model.logit_bias
    logits = scale * float64_cosines(sigmoid, column(answers(built, sigmoid, *shown, *how, "--embed"), "embedding"))
    wanted = 1 / (1 + np.exp(-(logits + bias)))
    assert 0 < wanted.max() < 1e-8
    np.testing.assert_allclose(column(got, "probabilities").astype(np.float64), wanted, rtol=1e-4)
    for row, order, python in zip(got, np.argsort(-logits, axis=1), model.classify(shown), strict=True):
        ranked = [each["label"] for each in row["ranking"]]
        assert ranked == [CLASSES[place] for place in order[: len(ranked)]] == [one.label for one in python.ranking]


def test_one_file_alone_takes_a_site(built, plain, yard, shown, engine, tmp_path):
    shutil.copy(plain / "image.onnx", tmp_path / "alone.onnx")
    how = ["--engine", engine, "--threads", 1, "--site", yard]
    assert answers(built, tmp_path / "alone.onnx", *shown, *how) == answers(built, plain, *shown, *how)


def test_models_of_several_sites_share_an_engine(built, plain, yard, engine, tmp_path):
    site = read_site(yard)
    other = Site("gate", site.space_id, site.images, -site.total, site.taken_for, site.training_mean)
    write_site(tmp_path / "gate.safetensors", other)
    with built.answering() as asked:
        assert asked.ask(f"sites {plain} {engine} {yard} {tmp_path / 'gate.safetensors'}") == "ok"
        assert asked.ask(f"crowd {plain} {engine} 2 8 20 {yard}") == "ok"


def test_without_classes_a_site_still_gives_embeddings(
    built, tiny_checkpoint, tiny_projection, tiny_images, shown, engine, tmp_path
):
    artifact = tmp_path / "bare.icm"
    export_artifact(
        load_checkpoint(str(tiny_checkpoint)),
        artifact,
        ExportConfig(images=[tiny_images], backends=(engine,), threads=1),
        projection=tiny_projection,
    )
    model = invariclip.load(artifact, backend=engine, threads=1)
    empty = new_site("yard", model.space_id, np.full(WIDTH, 0.05), WIDTH, {})
    site = empty.adding(model.embed_images(shown), np.eye(WIDTH))
    write_site(tmp_path / "yard.safetensors", site)
    how = ["--engine", engine, "--threads", 1, "--site", tmp_path / "yard.safetensors"]
    got = column(answers(built, artifact, *shown, *how, "--embed"), "embedding")
    np.testing.assert_array_equal(got, model.with_site(site).embed_images(shown))
    assert "has no classes" in said_by(built, artifact, *shown, *how).stderr


def refused(built, *words):
    done = said_by(built, *words)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert not done.stdout
    return done.stderr


def test_what_takes_no_site_says_so(built, artifact, plain, yard, shown, engine, tmp_path):
    site = read_site(yard)
    how = [shown[0], "--engine", engine, "--threads", 1, "--site"]
    with pytest.raises(InputError, match="without --cdc"):
        invariclip.load(artifact, backend=engine, site=yard)
    assert "adapt an artifact without --cdc" in refused(built, artifact, *how, yard)
    bake_site(plain, tmp_path / "yard.icm", site, images=shown[:4], threads=1)
    assert 'is adapted to "yard" already; take the one' in refused(built, tmp_path / "yard.icm", *how, yard)
    write_site(tmp_path / "other", random_site(0))
    assert f'"yard" was measured in space "space", and the artifact answers in "{site.space_id}": measure it again' in (
        refused(built, plain, *how, tmp_path / "other")
    )
    write_site(tmp_path / "wide", random_site(0, width=9, space=site.space_id))
    assert "the site is of width 9, the artifact's embeddings have 8" in refused(built, plain, *how, tmp_path / "wide")
    assert "absent: no such file; `invariclip adapt` writes a site" in refused(built, plain, *how, tmp_path / "absent")
    save_file(load_file(yard), tmp_path / "damaged", {"invariclip.site": "{}"})
    assert "not a site written by `invariclip adapt`" in refused(built, plain, *how, tmp_path / "damaged")
    assert "--site needs a value" in refused(built, plain, *how)


def test_a_graph_that_keeps_no_class_embeddings_takes_no_site(built, plain, yard, shown, engine, tmp_path):
    model = onnx.load(plain / "image.onnx")
    bank = next(item for item in model.graph.initializer if item.name == "class_bank")
    bank.name = "renamed"
    for node in model.graph.node:
        node.input[:] = ["renamed" if name == "class_bank" else name for name in node.input]
    onnx.save(model, tmp_path / "alone.onnx")
    how = [shown[0], "--engine", engine, "--threads", 1]
    assert answers(built, tmp_path / "alone.onnx", *how)[0]["label"] in CLASSES
    assert "holds no class embeddings" in refused(built, tmp_path / "alone.onnx", *how, "--site", yard)
