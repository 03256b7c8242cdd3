"""A site in the graphs: held against float64 on both engines, swappable classes, verify, and what is refused."""

import json
import shutil

import numpy as np
import onnx
import pytest

import invariclip
from invariclip.artifact.folder import describe_file, read_manifest
from invariclip.artifact.projection import read_projection
from invariclip.cli.main import main
from invariclip.errors import ContractError, InputError, SiteError
from invariclip.export.site import bake_site
from invariclip.export.swap import swap_classes
from invariclip.preprocessing.find import find_images
from invariclip.records import seal
from invariclip.sites.site import Site, new_site, read_site


def _run(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code, capsys.readouterr()


@pytest.fixture(scope="module")
def both(tmp_path_factory, tiny_checkpoint, tiny_images, tiny_projection):
    """An artifact that was proved on both engines, with a variant of lower precision."""
    from invariclip.export.build import export_artifact
    from invariclip.export.checkpoints.checkpoint import load_checkpoint
    from invariclip.export.config import ExportConfig

    out = tmp_path_factory.mktemp("both") / "both.icm"
    export_artifact(
        load_checkpoint(str(tiny_checkpoint)),
        out,
        ExportConfig(
            classes=("cat", "dog", "tree"),
            images=find_images([tiny_images]),
            backends=("onnxruntime", "openvino"),
            variants=("float16",),
            fidelity="near",
        ),
        projection=tiny_projection,
    )
    return out


@pytest.fixture(scope="module")
def site(both, tiny_images):
    model = invariclip.load(both)
    mean = read_projection(both / "projection.safetensors").training_mean
    # random shares stand for many kinds of things, of which a random model tells none
    rows, bank = model.embed_images(find_images([tiny_images])), np.eye(8)
    return new_site("yard", model.space_id, mean, len(bank), {}).adding(rows, bank)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, both, site, tiny_images):
    out = tmp_path_factory.mktemp("adapted") / "yard.icm"
    bake_site(both, out, site, images=find_images([tiny_images]))
    return out


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("variant", ["float32", "float16"])
def test_graphs_answer_like_float64(both, adapted, site, tiny_images, backend, variant):
    paths = find_images([tiny_images])
    assert np.linalg.norm(site.shift) > 0.01
    plain = invariclip.load(both, backend=backend, variant=variant)
    got = invariclip.load(adapted, backend=backend, variant=variant).answer(paths)
    wanted = site.exactly(plain.embed_images(paths))
    np.testing.assert_allclose(got.embeddings, wanted, atol=1e-5)
    logits = plain.manifest.model.logit_scale * got.embeddings.astype(np.float64) @ plain.class_bank().T
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(got.probabilities, shares / shares.sum(axis=1, keepdims=True), atol=1e-4)


def test_host_and_graph_agree(both, adapted, site, tiny_images):
    paths = find_images([tiny_images])
    on_host, in_graph = invariclip.load(both, site=site).answer(paths), invariclip.load(adapted).answer(paths)
    np.testing.assert_allclose(on_host.embeddings, in_graph.embeddings, atol=1e-6)
    np.testing.assert_allclose(on_host.probabilities, in_graph.probabilities, atol=1e-5)


def test_two_nodes_and_one_vector_are_added(both, adapted):
    before, after = (onnx.load(folder / "image.onnx").graph for folder in (both, adapted))
    assert len(after.node) == len(before.node) + 2
    assert len(after.initializer) == len(before.initializer) + 1
    assert [output.name for output in after.output] == [output.name for output in before.output]
    texts = [onnx.load(folder / "text.onnx").graph.SerializeToString() for folder in (both, adapted)]
    assert texts[0] == texts[1]


def test_the_manifest_says_so(both, adapted, site, capsys):
    manifest = read_manifest(adapted)
    assert manifest.site.sha256 == site.digest == read_site(adapted / "site.safetensors").digest
    assert manifest.space_id == read_manifest(both).space_id
    for record in manifest.variants["float16"].parity.values():
        assert record["site"]["embedding_diff"] <= 1e-5
    facts = {p.key: p.value for p in onnx.load(adapted / "image.onnx").metadata_props}["invariclip"]
    assert json.loads(facts)["site"]["name"] == "yard"
    code, said = _run(["inspect", adapted], capsys)
    assert code == 0
    assert "adapted to" in said.out


def test_classes_stay_exchangeable(adapted, tiny_images, tmp_path):
    paths = find_images([tiny_images])
    swap_classes(adapted, tmp_path / "other.icm", ("river", "moon"), images=paths)
    wanted = invariclip.load(adapted).with_classes(("river", "moon")).probabilities(paths)
    np.testing.assert_allclose(invariclip.load(tmp_path / "other.icm").probabilities(paths), wanted, atol=1e-5)


def test_verify_holds_it_against_checkpoint_and_site(both, adapted, tiny_checkpoint, tiny_images, tmp_path, capsys):
    asked = ["--model", tiny_checkpoint, "--images", tiny_images, "--quiet"]
    code, _ = _run(["verify", adapted, *asked], capsys)
    assert code == 0
    # the same manifest over graphs that were not adapted
    broken = shutil.copytree(adapted, tmp_path / "broken.icm")
    plain = onnx.load(both / "image.onnx")
    onnx.save(plain, broken / "image.onnx")
    manifest = json.loads((broken / "manifest.json").read_text())
    facts = describe_file(broken, "image.onnx")
    for variant in manifest["variants"].values():
        if variant["image"]["path"] == "image.onnx":
            variant["image"] |= {"sha256": facts.sha256, "size_bytes": facts.size_bytes}
    (broken / "manifest.json").write_bytes(seal(json.dumps(manifest).encode()))
    code, said = _run(["verify", broken, *asked], capsys)
    assert code == 1
    assert "does not answer like its checkpoint" in said.err


def test_it_is_adapted_once(adapted, site, tiny_images, tmp_path, capsys):
    with pytest.raises(InputError, match="already"):
        bake_site(adapted, tmp_path / "twice.icm", site, images=[tiny_images])
    with pytest.raises(InputError, match="already"):
        invariclip.load(adapted, site=site)
    code, said = _run(["adapt", adapted, "--images", tiny_images, "-o", tmp_path / "twice.safetensors"], capsys)
    assert code == 2
    assert "already" in said.err
    assert not (tmp_path / "twice.icm").exists()


def test_it_is_checked_on_few_images_however_many_are_given(both, site, tiny_images, tmp_path, monkeypatch):
    monkeypatch.setattr("invariclip.export.site.CHECKED", 3)
    manifest = bake_site(both, tmp_path / "few.icm", site, images=[tiny_images])
    assert {r["site"]["images"] for v in manifest.variants.values() for r in v.parity.values()} == {3}


def test_another_space_is_refused_and_nothing_written(both, site, tiny_images, tmp_path):
    other = Site("there", "0" * 32, site.images, site.total, site.taken_for, site.training_mean)
    with pytest.raises(SiteError, match="measure it again"):
        bake_site(both, tmp_path / "there.icm", other, images=[tiny_images])
    assert not (tmp_path / "there.icm").exists()


def test_an_engine_that_answers_otherwise_stops_it(both, site, tiny_images, tmp_path, monkeypatch):
    from invariclip.export import site as module

    wrong_attach = module.attach_site
    monkeypatch.setattr(module, "attach_site", lambda model, shift: wrong_attach(model, np.float32(2) * shift))
    with pytest.raises(ContractError, match="is off by"):
        bake_site(both, tmp_path / "wrong.icm", site, images=[tiny_images])
    assert not (tmp_path / "wrong.icm").exists()


def test_the_artifact_to_start_from_is_not_replaced(both, site, tiny_images, capsys):
    before = (both / "manifest.json").read_bytes()
    same = both.parent / ".." / both.parent.name / both.name
    code, said = _run(["adapt", both, "--images", tiny_images, "-o", same], capsys)
    assert code == 2
    assert "name another output" in said.err
    with pytest.raises(InputError, match="stays as it is"):
        bake_site(both, both, site, images=[tiny_images])
    assert (both / "manifest.json").read_bytes() == before


def test_adapt_writes_an_artifact(both, tiny_images, tmp_path, capsys):
    code, _ = _run(["adapt", both, "--images", tiny_images, "-o", tmp_path / "yard.icm", "--quiet"], capsys)
    assert code == 0
    code, said = _run(["adapt", both, "--images", tiny_images, "-o", tmp_path / "yard.safetensors", "--json"], capsys)
    assert json.loads(said.out)["sha256"] == read_manifest(tmp_path / "yard.icm").site.sha256
