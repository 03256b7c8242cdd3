"""Other classes in an artifact that exists, held against an artifact that was built with them."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir
import pytest

import invariclip
from invariclip.artifact.folder import read_manifest, write_manifest
from invariclip.errors import ArtifactError, ContractError, InputError
from invariclip.export import swap
from invariclip.export.build import export_artifact
from invariclip.export.config import ExportConfig
from invariclip.export.graphs import writing
from invariclip.export.graphs.head import body_digest
from invariclip.files import sha256_file
from invariclip.preprocessing.find import find_images

NAMES, FORMS = ("sun", "moon", "a small house", "猫"), ("{}", "a drawing of a {}.")
LARGE = "vit, weights beside the graph"


@pytest.fixture(scope="module")
def built(checkpoint, tiny_images, tiny_projection, tmp_path_factory):
    """Artifacts of a model with some classes, each built once: (name, classes, templates) → folder."""
    root, done = tmp_path_factory.mktemp("built"), {}

    def of(name, classes=(), templates=("a photo of a {}.",), projection=tiny_projection):
        key = (name, classes, templates)
        if key not in done:
            out = root / f"{len(done)}.icm"
            with pytest.MonkeyPatch.context() as patch:
                if name == LARGE:
                    patch.setattr(writing, "EXTERNAL_DATA_BYTES", 0)
                export_artifact(
                    checkpoint("vit" if name == LARGE else name),
                    out,
                    ExportConfig(classes=classes, templates=templates, images=[tiny_images], threads=1),
                    projection=projection,
                )
            done[key] = out
        return done[key]

    return of


@pytest.fixture
def swapped(tiny_images, tmp_path):
    def of(source, classes=NAMES, templates=FORMS, out=tmp_path / "new.icm", **options):
        manifest = swap.swap_classes(source, out, classes, templates, images=[tiny_images], threads=1, **options)
        return manifest, out

    return of


def bank(folder):
    graph = onnx.load(folder / "image.onnx").graph
    (weights,) = [onnx.numpy_helper.to_array(item) for item in graph.initializer if item.name == "class_bank"]
    return weights


@pytest.mark.parametrize(
    ("name", "before"), [("vit", ()), ("vit", ("cat", "dog")), ("vit, sigmoid", ()), (LARGE, ("cat", "dog"))]
)
def test_it_answers_like_a_full_rebuild(built, swapped, tiny_images, name, before):
    # where the weights lie changes no answer
    source, rebuilt = built(name, before), built("vit" if name == LARGE else name, NAMES, FORMS)
    manifest, out = swapped(source)
    assert np.abs(bank(out) - bank(rebuilt)).max() <= 1e-6
    images = find_images([tiny_images])
    new, whole, old = (invariclip.load(folder, threads=1) for folder in (out, rebuilt, source))
    assert np.abs(new.probabilities(images) - whole.probabilities(images)).max() <= 1e-5
    np.testing.assert_array_equal(new.embed_images(images), old.embed_images(images))
    assert (manifest.classes, manifest.templates) == (NAMES, FORMS)
    assert manifest == read_manifest(out)
    assert manifest.space_id == read_manifest(source).space_id == read_manifest(rebuilt).space_id


def test_every_file_says_the_new_facts_and_the_rest_is_the_same(built, swapped, facts_in):
    source = built(LARGE, ("cat", "dog"))
    before = {path.name: sha256_file(path) for path in source.iterdir()}
    manifest, out = swapped(source)
    after = {path.name: sha256_file(path) for path in out.iterdir()}
    assert before == {path.name: sha256_file(path) for path in source.iterdir()}
    changed = {name for name in before if before[name] != after[name]}
    assert (set(after), changed) == (set(before), {"manifest.json", "image.onnx", "text.onnx"})
    # onnx refuses weights in a file of two names
    assert {path.stat().st_nlink for folder in (source, out) for path in folder.iterdir()} == {1}
    for name in ("image.onnx", "text.onnx"):
        facts = facts_in(out / name)
        assert facts.pop("tower") == name
        plain = json.loads((out / "manifest.json").read_text())
        plain.pop("file_sha256")
        plain.pop("variants")
        plain.pop("left_out")
        plain.pop("fast_pixels")
        assert facts == plain
        onnx.checker.check_model(str(out / name), full_check=True)
    old, new = (onnx.load(folder / "text.onnx", load_external_data=False) for folder in (source, out))
    assert old.graph == new.graph
    assert manifest.variants["float32"].text.data_sha256 == before["text.onnx.data"]


def test_the_record_says_what_is_still_proved(built, swapped):
    source = built("vit", ("cat", "dog"))
    (was,), (now,) = (
        [record for variant in manifest.variants.values() for record in variant.parity.values()]
        for manifest in (read_manifest(source), swapped(source)[0])
    )
    gone = {key for key, value in was["image"].items() if now["image"][key] != value}
    assert {"top1_agreement", "top1_of", "probability_diff"} <= gone
    assert all(now["image"][key] is None for key in gone)
    assert not {"max_abs_diff", "cosine_min", "batch_diff", "rerun_diff", "non_finite"} & gone
    assert {key: value for key, value in now.items() if key not in ("image", "head")} == {
        key: value for key, value in was.items() if key != "image"
    }
    head = now["head"]
    assert head["body_sha256"] == body_digest(source / "image.onnx")
    assert head["images"] == 12
    assert 0 <= head["probability_diff"] <= 1e-5
    # without old classes best matches were sought among prompts, which is as true as before
    no_classes = swapped(built("vit"))[0].variants["float32"].parity["onnxruntime"]
    assert no_classes["image"]["top1_agreement"] == 1.0


def test_an_artifact_may_be_replaced_by_itself(built, swapped, tmp_path):
    copy = shutil.copytree(built("vit", ("cat", "dog")), tmp_path / "a.icm")
    swapped(copy, ("x",), ("{}",), out=copy)
    swapped(copy, ("y", "z"), None, out=copy)
    assert (read_manifest(copy).classes, read_manifest(copy).templates) == (("y", "z"), ("{}",))
    assert [path.name for path in tmp_path.iterdir()] == ["a.icm"]
    assert len(onnx.load(copy / "image.onnx").graph.output) == 3


@pytest.mark.parametrize(
    ("classes", "templates", "reason"),
    [
        ((), None, "name them with --classes or --classes-file"),
        (("a", "a"), None, "empty or repeated"),
        (("a",), ("no slot",), "exactly one {}"),
    ],
)
def test_wrong_classes_are_refused_before_any_work(built, swapped, tmp_path, classes, templates, reason):
    with pytest.raises(InputError, match=reason):
        swapped(built("vit"), classes, templates)
    assert list(tmp_path.iterdir()) == []


def test_other_folders_and_damaged_artifacts_are_refused(built, swapped, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="not an artifact; name another output"):
        swapped(built("vit"), out=tmp_path / "home")
    with pytest.raises(ArtifactError, match="not an artifact"):
        swapped(tmp_path / "home")
    copy = shutil.copytree(built(LARGE, ("cat", "dog")), tmp_path / "a.icm")
    with (copy / "image.onnx.data").open("r+b") as stream:
        stream.write(b"\x01\x02\x03\x04")
    with pytest.raises(ArtifactError, match=r"image\.onnx\.data is missing or not what was exported"):
        swapped(copy)
    assert not (tmp_path / "new.icm").exists()


def test_a_bank_that_protobuf_could_not_hold(built, swapped, monkeypatch):
    monkeypatch.setattr(swap, "MAX_GRAPH_BYTES", 1000)
    with pytest.raises(InputError, match="4 classes would make the graph larger than protobuf allows"):
        swapped(built("vit"))


def planted(monkeypatch, edit):
    """Lets `attach_head` spoil the graph after its work."""
    attach = swap.attach_head

    def spoilt(model, *arguments):
        attach(model, *arguments)
        edit(model.graph)

    monkeypatch.setattr(swap, "attach_head", spoilt)


def test_a_change_before_the_head_is_found(built, swapped, monkeypatch, tmp_path):
    def edit(graph):
        value = next(v for v in graph.initializers.values() if v.const_value.size > 100 and v.name != "class_bank")
        array = value.const_value.numpy().copy()
        array.flat[7] += 1e-6
        value.const_value = onnx_ir.tensor(array, name=value.name)

    planted(monkeypatch, edit)
    with pytest.raises(ContractError, match="changed the graph before them"):
        swapped(built("vit"))
    assert list(tmp_path.iterdir()) == []


def test_a_head_that_answers_wrongly_is_found(built, swapped, monkeypatch, tmp_path):
    def edit(graph):
        scale = graph.initializers["logit_scale"]
        scale.const_value = onnx_ir.tensor(np.float32(1.01) * scale.const_value.numpy(), name="logit_scale")

    planted(monkeypatch, edit)
    with pytest.raises(ContractError, match=r"image\.onnx on onnxruntime: a probability of the new classes is off by"):
        swapped(built("vit"))
    assert list(tmp_path.iterdir()) == []


def test_the_digest_of_the_body_sees_nodes_weights_and_order(built, tmp_path):
    model = onnx.load(built("vit") / "image.onnx")
    place = tmp_path / "x.onnx"

    def digest_of(change):
        copy = onnx.ModelProto.FromString(model.SerializeToString())
        change(copy.graph)
        place.write_bytes(copy.SerializeToString())
        return body_digest(place)

    def flip(graph):
        weight = max(graph.initializer, key=lambda item: len(item.raw_data))
        weight.raw_data = bytes([weight.raw_data[0] ^ 1]) + weight.raw_data[1:]

    def rename(graph):
        graph.node[3].op_type = "Abs"

    def unrelated(graph):
        graph.initializer.append(onnx.numpy_helper.from_array(np.ones(3, np.float32), "of_nobody"))

    same = digest_of(lambda graph: None)
    assert digest_of(unrelated) == same
    assert same == body_digest(built("vit", NAMES, FORMS) / "image.onnx")
    assert len({same, digest_of(flip), digest_of(rename)}) == 3


def test_every_variant_gets_the_classes(built, swapped, tmp_path, tiny_images):
    """Two variants, the second with files of its own; the first one's text graph embeds the classes of both."""
    copy = shutil.copytree(built("vit"), tmp_path / "two.icm")
    manifest = read_manifest(copy)
    first = manifest.variants["float32"]
    for kind in ("image", "text"):
        shutil.copy(copy / f"{kind}.onnx", copy / f"{kind}.int8.onnx")
    second = replace(
        first, precision="int8", image=replace(first.image, path="image.int8.onnx"),
        text=replace(first.text, path="text.int8.onnx"),
    )  # fmt: skip
    write_manifest(copy, replace(manifest, variants={"int8": second, "float32": first}))
    result, out = swapped(copy)
    assert [variant.parity["onnxruntime"]["head"]["bank"] for variant in result.variants.values()] == [
        "text graph of float32",
        "text graph of float32",
    ]
    images = find_images([tiny_images])
    answers = [invariclip.load(out, variant=name, threads=1).probabilities(images) for name in ("int8", "float32")]
    np.testing.assert_array_equal(*answers)


def test_neither_torch_nor_open_clip_is_needed(built, tmp_path, tiny_images):
    code = (
        "import sys; sys.modules.update(torch=None, open_clip=None, timm=None)\n"
        "from invariclip.export.swap import swap_classes\n"
        "source, out, images = sys.argv[1:]\n"
        "swap_classes(source, out, ['a', 'b'], images=[images])"
    )
    places = map(str, (built("vit"), tmp_path / "n.icm", tiny_images))
    done = subprocess.run([sys.executable, "-c", code, *places], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert read_manifest(tmp_path / "n.icm").classes == ("a", "b")
