"""Projection and learned templates in one artifact: exported, verified, served, its classes exchanged."""

import json
from dataclasses import replace

import numpy as np
import pytest

import invariclip
from invariclip.artifact.folder import read_manifest
from invariclip.artifact.learned_prompts import (
    LEARNED_TEXT,
    LearnedPrompts,
    context_ids,
    read_semantics,
    write_semantics,
)
from invariclip.errors import ContractError, InputError, SemanticsError
from invariclip.export.build import export_artifact
from invariclip.export.checkpoints.learned_contexts import with_semantics
from invariclip.export.config import ExportConfig
from invariclip.export.swap import swap_classes
from invariclip.export.verification.class_head import earned, pairwise
from invariclip.preprocessing.find import find_images
from invariclip.preprocessing.pixels import stack

CLASSES, OTHERS = ("cat", "dog", "tree", "a red house"), ("sun", "moon", "猫")
PROMPTS = ("a photo of a {}.", "a drawing of a {}")
LEARNED, TOKENS, WIDTH = 2, 3, 16


@pytest.fixture(scope="module")
def semantics(checkpoint, tiny_projection):
    rng = np.random.default_rng(5)
    return LearnedPrompts(
        (0.02 * rng.normal(size=(LEARNED, TOKENS, WIDTH))).astype(np.float32),
        np.array([0.2, 0.1, 0.3]), np.array([-1.0, 0.5, -3.0]), np.array([0.1, -0.2, 0.3]), PROMPTS,
        checkpoint("vit").sha256, tiny_projection.digest, abstain_above=0.3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def artifact(checkpoint, semantics, tiny_projection, tiny_images, tmp_path_factory):
    out = tmp_path_factory.mktemp("cdc") / "cdc.icm"
    export_artifact(
        checkpoint("vit"),
        out,
        ExportConfig(
            classes=CLASSES,
            images=[tiny_images],
            backends=("onnxruntime", "openvino"),
            variants=("float16",),
            fidelity="near",
            threads=1,
        ),
        projection=tiny_projection,
        learned_prompts=semantics,
    )
    return out


@pytest.fixture(scope="module")
def model(artifact):
    return invariclip.load(artifact, threads=1)


@pytest.fixture(scope="module")
def wanted(checkpoint, semantics, tiny_projection, tiny_images):
    """Classes → probabilities and uncertainty by PyTorch, A_inv and Dempster's rule in float64."""
    loaded = checkpoint("vit")
    reader = replace(loaded, module=with_semantics(loaded.module, semantics))
    images = tiny_projection.apply(loaded.encode_images(stack(find_images([tiny_images]), loaded.pixels)))

    def texts(given, before=()):
        return tiny_projection.apply(reader.encode_texts(reader.tokenizer(given, prefix=before)))

    def of(classes):
        banks = [np.stack([texts([prompt.format(name) for prompt in PROMPTS]).sum(0) for name in classes])]
        for template in range(1, LEARNED + 1):
            names = [LEARNED_TEXT.format(name) for name in classes]
            banks.append(texts(names, context_ids(template, TOKENS)))
        banks = [bank / np.linalg.norm(bank, axis=1, keepdims=True) for bank in banks]
        cosines = np.einsum("nd,mkd->nmk", images, np.stack(banks))
        slopes = loaded.logit_scale * semantics.evidence_scale
        numbers = semantics.evidence_bias, slopes * semantics.background
        belief, unsure = pairwise(np.stack([earned(own * slopes[:, None], *numbers) for own in cosines]))
        powers = np.exp(slopes[0] * cosines[:, 0])
        return belief + unsure[:, None] * powers / powers.sum(axis=1, keepdims=True), unsure

    return of


def test_it_keeps_the_contract(artifact):
    manifest = read_manifest(artifact)
    assert set(manifest.variants) == {"float32", "float16"}
    for variant in manifest.variants.values():
        assert set(variant.parity) == {"onnxruntime", "openvino"}
        for record in variant.parity.values():
            assert record["passed"]
            assert record["image"]["uncertainty_diff"] <= record["thresholds"]["max_uncertainty_diff"]
            assert record["image"]["probability_diff"] <= record["thresholds"]["max_probability_diff"]
    for record in manifest.variants["float32"].parity.values():
        assert record["image"]["uncertainty_diff"] <= 1e-5
    # eight things behind the vectors of each learned template, beside the ordinary texts
    assert record["text"]["items"] == 231 + 8 * LEARNED


def test_its_files_say_what_it_is(artifact, semantics, facts_in, run):
    manifest = read_manifest(artifact)
    assert {path.name for path in artifact.iterdir()} == {
        "manifest.json", "image.onnx", "image.float16.onnx", "text.cdc.onnx", "tokenizer.json",
        "projection.safetensors", "cdc.safetensors",
    }  # fmt: skip
    assert manifest.cdc == semantics.facts
    assert manifest.templates == PROMPTS
    assert read_semantics(artifact / manifest.cdc_file.path).digest == semantics.digest
    assert manifest.plan["text"][0].name == "learned-templates"
    assert "text-cut" in {step.name for step in manifest.plan["text"] if step.applied}
    facts = facts_in(artifact / "image.onnx")
    assert facts["cdc"] == json.loads(json.dumps(manifest.to_json()["cdc"]))
    code, out, _ = run("inspect", artifact)
    assert code == 0
    assert "2 of 3 vectors" in out
    assert "calibrated to 0.3" in out
    assert "uncertainty max |Δ|" in out
    assert json.loads(run("inspect", artifact, "--json")[1])["cdc"]["learned"] == 2


def test_ordinary_texts_and_images_are_embedded_as_before(
    artifact, model, checkpoint, tiny_projection, tiny_images, tmp_path
):
    plain = tmp_path / "plain.icm"
    export_artifact(checkpoint("vit"), plain, ExportConfig(images=[tiny_images], threads=1), projection=tiny_projection)
    other = invariclip.load(plain, threads=1)
    assert other.space_id == model.space_id
    texts = ["a cat", "", "two dogs & a tree"]
    np.testing.assert_array_equal(model.embed_texts(texts), other.embed_texts(texts))
    np.testing.assert_array_equal(
        model.embed_images([tiny_images / "00.png"]), other.embed_images([tiny_images / "00.png"])
    )


def test_baked_classes_and_others_answer_like_the_reference(model, wanted, tiny_images):
    images = find_images([tiny_images])
    for classes, served in (
        (CLASSES, model),
        (CLASSES, model.with_classes(CLASSES)),
        (OTHERS, model.with_classes(OTHERS)),
    ):
        probabilities, uncertainty = wanted(classes)
        answers = served.answer(images, batch_size=5)
        np.testing.assert_allclose(answers.probabilities, probabilities, atol=1e-5)
        np.testing.assert_allclose(answers.uncertainty, uncertainty, atol=1e-5)
        for answer, unsure in zip(served.stream(images), uncertainty, strict=True):
            assert answer.uncertainty == pytest.approx(unsure, abs=1e-5)
    empty = model.answer([])
    assert (empty.probabilities.shape, empty.uncertainty.shape) == ((0, 4), (0,))


def test_abstaining(model, tiny_images):
    images = find_images([tiny_images])
    unsure = model.answer(images).uncertainty
    limit = float(np.median(unsure))
    said = model.classify(images, abstain_above=limit)
    assert [one.abstained for one in said] == (unsure > limit).tolist()
    assert 0 < sum(one.abstained for one in said) < len(said)
    for one, plain in zip(said, model.classify(images), strict=True):
        assert plain.label == plain.ranking[0][0]  # the calibrated threshold is not applied unasked
        assert not plain.abstained
        assert (one.label is None) == one.abstained
        assert (one.ranking, one.probability, one.uncertainty) == (plain.ranking, plain.probability, plain.uncertainty)
    calibrated = model.classify(images, abstain_above="calibrated")
    assert [one.abstained for one in calibrated] == (unsure > 0.3).tolist()
    assert [answer.prediction(abstain_above=limit).abstained for answer in model.stream(images)] == [
        one.abstained for one in said
    ]
    for wrong in (-0.1, 1.1, float("nan"), "often", True):
        with pytest.raises(InputError, match="must be a number from 0 to 1 or 'calibrated'"):
            model.classify(images, abstain_above=wrong)


def test_what_does_not_belong_to_its_templates_is_refused(model, tiny_projection):
    with pytest.raises(InputError, match="trained beside the prompts a photo"):
        model.with_classes(OTHERS, ["a sketch of a {}"])
    with pytest.raises(InputError, match="that one cannot be exchanged"):
        model.with_projection(tiny_projection)


def test_without_learned_templates_there_is_the_energy_alone(tiny_artifact, tiny_images, run):
    plain = invariclip.load(tiny_artifact, threads=1)
    images = find_images([tiny_images])
    energies = plain.answer(images).uncertainty
    said = plain.classify(images, abstain_above=(limit := float(np.median(energies))))
    assert {one.uncertainty_kind for one in said} == {"energy"}
    assert [one.abstained for one in said] == (energies > limit).tolist()
    with pytest.raises(InputError, match=r"`invariclip cdc` and export again with --cdc FILE"):
        plain.classify(images, uncertainty="evidence")
    with pytest.raises(InputError, match="energy is not; give a number"):
        plain.classify(images, abstain_above="calibrated")
    with pytest.raises(InputError, match="'doubt'; available: evidence, energy"):
        plain.classify(images, uncertainty="doubt")
    code, out, _ = run("predict", tiny_artifact, tiny_images, "--abstain-above", limit, "--json")
    told = json.loads(out)["predictions"]
    assert (code, {one["uncertainty_kind"] for one in told}) == (0, {"energy"})
    assert [one["abstained"] for one in told] == (energies > limit).tolist()
    code, _, err = run("predict", tiny_artifact, tiny_images, "--uncertainty", "evidence", "--quiet")
    assert (code, err.count("\n")) == (2, 1)
    assert "--cdc FILE" in err


def test_learned_templates_can_be_asked_for_the_energy(model, tiny_images, artifact, run):
    """The hand-written template's, in the graph and on the host."""
    images = find_images([tiny_images])
    answers = model.answer(images)
    assert list(answers.uncertainties) == ["evidence", "energy"]
    np.testing.assert_array_equal(answers.uncertainty, answers.uncertainties["evidence"])
    hosted = model.with_classes(OTHERS)
    same = hosted.with_classes(model.classes).answer(images)
    np.testing.assert_allclose(same.uncertainties["energy"], answers.uncertainties["energy"], atol=1e-6)
    for one in (model, hosted):
        energies = one.answer(images).uncertainties["energy"]
        said = one.classify(images, uncertainty="energy", abstain_above=0.5)
        np.testing.assert_allclose([each.uncertainty for each in said], energies, atol=1e-6)
        assert {each.uncertainty_kind for each in said} == {"energy"}
    assert {one.uncertainty_kind for one in model.classify(images)} == {"evidence"}
    with pytest.raises(InputError, match="energy is not; give a number"):
        model.classify(images, uncertainty="energy", abstain_above="calibrated")
    out = run("predict", artifact, tiny_images, "--uncertainty", "energy", "--quiet")[1]
    assert out.count("  energy 0.") == len(images)


def test_the_command_says_who_is_not_sure(artifact, model, tiny_images, run):
    unsure = model.answer(find_images([tiny_images])).uncertainty
    limit = float(np.median(unsure))
    code, out, _ = run("predict", artifact, tiny_images, "--abstain-above", limit, "--quiet")
    assert code == 0
    assert out.count("not sure: ") == int((unsure > limit).sum())
    assert out.count("unsure ") == len(unsure)
    said = json.loads(run("predict", artifact, tiny_images, "--abstain-above", "calibrated", "--json")[1])
    assert [one["abstained"] for one in said["predictions"]] == (unsure > 0.3).tolist()
    assert [one["label"] is None for one in said["predictions"]] == (unsure > 0.3).tolist()
    np.testing.assert_allclose([one["uncertainty"] for one in said["predictions"]], unsure, atol=1e-6)
    code, _, err = run("predict", artifact, tiny_images, "--abstain-above", "often", "--quiet")
    assert (code, err.count("\n")) == (2, 1)


def test_classes_are_swapped_in_all_templates(artifact, wanted, tiny_images, tmp_path, run):
    out = tmp_path / "other.icm"
    manifest = swap_classes(artifact, out, OTHERS, images=[tiny_images], threads=1)
    for variant in manifest.variants.values():
        for record in variant.parity.values():
            assert record["head"]["uncertainty_diff"] <= 1e-4
            assert record["image"]["uncertainty_diff"] is None
    answers = invariclip.load(out, threads=1).answer(find_images([tiny_images]))
    probabilities, uncertainty = wanted(OTHERS)
    np.testing.assert_allclose(answers.probabilities, probabilities, atol=1e-5)
    np.testing.assert_allclose(answers.uncertainty, uncertainty, atol=1e-5)
    assert manifest.cdc == read_manifest(artifact).cdc
    assert run("inspect", out)[0] == 0
    with pytest.raises(InputError, match="trained beside the prompts"):
        swap_classes(artifact, out, OTHERS, ["a sketch of a {}"], images=[tiny_images], threads=1)


def test_the_command_line_exports_and_verifies_it(
    model_folder, semantics, artifact, tiny_images, tiny_projection, tmp_path, run
):
    from invariclip.artifact.projection import write_projection

    write_semantics(tmp_path / "cdc.safetensors", semantics)
    write_projection(tmp_path / "p.safetensors", tiny_projection)
    folder, out = model_folder("vit"), tmp_path / "a.icm"
    code, said, err = run(
        "export", "--model", folder, "--projection", tmp_path / "p.safetensors", "--cdc", tmp_path / "cdc.safetensors",
        "--classes", "cat,dog", "--images", tiny_images, "-o", out, "--threads", 1, "--quiet",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "2 learned templates" in said
    checks = "--model", folder, "--images", tiny_images, "--threads", 1, "--quiet"
    code, said, _ = run("verify", out, *checks)
    assert code == 0
    assert "uncertainty max |Δ|" in said
    code, _, err = run("verify", out, "--projection", tmp_path / "p.safetensors", *checks)
    assert code == 2
    assert "belong to its own projection" in err


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"projection": None}, SemanticsError, "in the space of projection"),
        ({"templates": ("a {}",)}, InputError, "trained beside the prompts"),
        ({"projection_as_input": True}, InputError, "cannot stay exchangeable"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    checkpoint, semantics, tiny_projection, tiny_images, tmp_path, changes, error, reason
):
    options = {"classes": CLASSES, "images": [tiny_images], **changes}
    projection = options.pop("projection", tiny_projection)
    with pytest.raises(error, match=reason):
        export_artifact(
            checkpoint("vit"), tmp_path / "x.icm", ExportConfig(**options), projection=projection,
            learned_prompts=semantics,
        )  # fmt: skip
    assert not (tmp_path / "x.icm").exists()


def test_a_graph_whose_evidence_is_wrong_fails(
    checkpoint, semantics, tiny_projection, tiny_images, tmp_path, monkeypatch
):
    from invariclip.export import graph_files

    attach = graph_files.attach_head

    def louder(model, bank, scale, bias, learned):
        louder_facts = replace(learned, evidence_bias=tuple(value + 0.01 for value in learned.evidence_bias))
        attach(model, bank, scale, bias, louder_facts)

    monkeypatch.setattr(graph_files, "attach_head", louder)
    with pytest.raises(ContractError, match=r"image uncertainty, max \|Δ\| .* is above 0.0001"):
        export_artifact(
            checkpoint("vit"),
            tmp_path / "x.icm",
            ExportConfig(classes=CLASSES, images=[tiny_images], threads=1),
            projection=tiny_projection,
            learned_prompts=semantics,
        )
