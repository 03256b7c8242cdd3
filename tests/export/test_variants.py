"""Variants beside float32: made, judged, listed with what they reach, or left out with the reason."""

import json
import warnings
from dataclasses import replace

import numpy as np
import onnx
import pytest

import invariclip
from invariclip.artifact.fidelity import reached
from invariclip.artifact.folder import checked_path, read_manifest
from invariclip.artifact.manifest import METADATA_KEY
from invariclip.backends import open_backend
from invariclip.errors import FewImagesWarning, InputError, LeftOutWarning
from invariclip.export import variants
from invariclip.export.build import export_artifact
from invariclip.export.config import ExportConfig
from invariclip.export.graphs.token_schedules import TowerShape
from invariclip.export.quantization import variants as kinds
from invariclip.export.variants import spare_images
from invariclip.export.verification.figures import THRESHOLDS
from invariclip.preprocessing.find import find_images

LOOSE = replace(
    THRESHOLDS["fast"], min_top1=0.5, min_top5=0.0, min_cosine=0.9, max_abs_diff=0.5, max_invariance_gap=0.1,
    max_batch_diff=0.2,
)  # fmt: skip


@pytest.fixture(scope="module")
def export(tmp_path_factory, checkpoint, tiny_images, tiny_projection):
    """Exports the tiny checkpoint with variants; answers the artifact's folder."""

    def of(*names, bounds=LOOSE, backends=("onnxruntime", "openvino"), **options):
        out = tmp_path_factory.mktemp("variants") / "tiny.icm"
        export_artifact(
            checkpoint("vit"),
            out,
            ExportConfig(
                classes=("cat", "dog", "tree"),
                images=find_images([tiny_images]),
                backends=backends,
                threads=1,
                variants=names,
                fidelity="fast",
                variant_thresholds=bounds,
                calibration_images=find_images([tiny_images]),
                **options,
            ),
            projection=tiny_projection,
        )
        return out

    return of


@pytest.fixture(scope="module")
def everything(export):
    """An artifact with most kinds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("invariclip.export.quantization.products.MIN_WEIGHTS", 1)
        # a tower this small saves nothing by merging, if a merge costs what it does on a real one
        for method in (TowerShape.flops, TowerShape.saving):
            patch.setitem(method.__kwdefaults__, "merge", 0.0)
        return export("float16", "int8", "int8-dynamic", "tokens", "tokens-int8")


def test_what_passes_is_listed_with_what_it_reaches(everything):
    manifest = read_manifest(everything)
    assert set(manifest.variants) | set(manifest.left_out) == {
        "float32", "float16", "int8", "int8-dynamic", "tokens", "tokens-int8",
    }  # fmt: skip
    assert {"float16", "int8", "tokens-int8"} <= set(manifest.variants)
    precisions = {name: variant.precision for name, variant in manifest.variants.items()}
    assert (precisions["float32"], precisions["float16"], precisions["int8"]) == ("float32", "float16", "int8")
    for name, variant in manifest.variants.items():
        checked_path(everything, variant.image)
        for record in variant.parity.values():
            assert record["passed"] is True
            assert record["level"] == ("exact" if name == "float32" else "fast")
            assert reached(record) is not None
    graphs = {path.name for path in everything.glob("*.onnx")}
    assert graphs == {file.path for one in manifest.variants.values() for file in (one.image, one.text)}


def test_every_file_is_valid_with_one_record_of_facts(everything, tmp_path):
    """What other programs do with our files: the full check of onnx, and ONNX Runtime's own quantizer."""
    from onnxruntime.quantization import quantize_dynamic

    for path in sorted(everything.glob("*.onnx")):
        onnx.checker.check_model(str(path), full_check=True)
        proto = onnx.load(path)
        assert [item.key for item in proto.metadata_props].count(METADATA_KEY) == 1
        weights = {tensor.name for tensor in proto.graph.initializer}
        assert not weights & {value.name for value in proto.graph.value_info}
    quantize_dynamic(everything / "image.onnx", tmp_path / "q.onnx", op_types_to_quantize=["MatMul", "Gemm"])
    assert open_backend("onnxruntime", tmp_path / "q.onnx", threads=1).output_names


def test_a_quantizer_that_fails_leaves_its_variant_out(export, monkeypatch):
    def broken(*_given, **_named):
        raise ValueError("a graph of\nanother kind")

    monkeypatch.setattr("onnxruntime.quantization.quantize_dynamic", broken)
    with pytest.warns(LeftOutWarning, match="int8-dynamic is left out"):
        manifest = read_manifest(export("int8-dynamic"))
    assert manifest.left_out["int8-dynamic"] == (
        "ONNX Runtime's dynamic quantizer cannot quantize the graph (ValueError: a graph of another kind)"
    )


def test_variants_answer_almost_alike_and_not_the_same(everything, tiny_images):
    paths = find_images([tiny_images])
    manifest = read_manifest(everything)
    wanted = invariclip.load(everything, variant="float32", backend="onnxruntime").embed_images(paths)
    for name, variant in manifest.variants.items():
        for backend in variant.parity:
            model = invariclip.load(everything, variant=name, backend=backend)
            got = model.embed_images(paths)
            assert (got * wanted).sum(axis=1).min() > 0.9
            assert model.describe()["precision"] == variant.precision
            if name in ("int8", "float16"):
                assert np.abs(got - wanted).max() > 0


def test_the_manifest_tells_how_each_was_made(everything):
    made = {name: variant.made for name, variant in read_manifest(everything).variants.items()}
    assert made["float32"] == {}
    assert made["int8"]["int8_share"] == 1
    assert made["int8"]["trials"][0]["broken"] == []
    assert "tokens" in made["tokens-int8"]
    json.dumps(made)


def test_what_fails_is_left_out_with_its_reason_and_its_file(export, monkeypatch):
    monkeypatch.setattr("invariclip.export.quantization.products.MIN_WEIGHTS", 1)
    with pytest.warns(LeftOutWarning, match="variant int8 is left out: no mix of int8 and float32 keeps the contract"):
        out = export("int8", bounds=replace(LOOSE, max_abs_diff=0.0), backends=("onnxruntime",))
    manifest = read_manifest(out)
    assert list(manifest.variants) == ["float32"]
    assert "max |Δ|" in manifest.left_out["int8"]
    assert not list(out.glob("image.int8*"))


def test_a_variant_that_fails_at_the_end_is_left_out(export):
    with pytest.warns(LeftOutWarning, match="variant float16 is left out: onnxruntime: image max"):
        out = export("float16", bounds=replace(LOOSE, max_abs_diff=1e-9), backends=("onnxruntime",))
    assert list(read_manifest(out).variants) == ["float32"]
    assert not list(out.glob("*float16*"))


def test_an_engine_that_misses_is_told_where_another_passes(export, monkeypatch):
    check = variants.check

    def one_misses(candidates, *given, **named):
        verdicts = check(candidates, *given, **named)
        broken = {key: replace(one, broken=["image max |Δ| 9 above 1"]) for key, one in verdicts.items()}
        return {key: broken[key] if key.endswith("openvino") else one for key, one in verdicts.items()}

    # the float32 artifact is judged first, by the very same function: only the variants' turn may miss
    judge = variants._judged

    def judged(*given):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(variants, "check", one_misses)
            return judge(*given)

    monkeypatch.setattr(variants, "_judged", judged)
    with pytest.warns(LeftOutWarning, match="variant float16 on openvino is left out: image max"):
        out = export("float16")
    manifest = read_manifest(out)
    assert list(manifest.variants["float16"].parity) == ["onnxruntime"]
    assert manifest.left_out == {"float16 on openvino": "image max |Δ| 9 above 1"}
    with pytest.raises(InputError, match=r"broke the contract on openvino .* it was proved on onnxruntime"):
        invariclip.load(out, variant="float16", backend="openvino")


def test_an_engine_that_lacks_the_arithmetic_is_a_reason(export):
    with pytest.warns(LeftOutWarning, match="none of onnxruntime computes in bfloat16"):
        out = export("bfloat16", backends=("onnxruntime",))
    assert "bfloat16" in read_manifest(out).left_out


def test_mistakes_show_before_any_work(export):
    with pytest.raises(InputError, match="no variant is called 'int4'"):
        export("int4")
    with pytest.raises(InputError, match="leave --pixels-in-graph or --variant out"):
        export("int8", pixels_in_graph="resize")


def test_calibration_is_on_images_that_the_contract_does_not_look_at(checkpoint):
    from invariclip.export.verification.evidence import BUNDLED_LIMIT, images_of

    judged = images_of(None, checkpoint("vit").pixels)
    spare = spare_images(ExportConfig(), judged)
    assert len(spare) == BUNDLED_LIMIT
    assert not set(spare) & set(judged.paths)


def test_every_kind_names_a_method_that_the_workshop_knows():
    assert {kind.method for kind in kinds.KINDS.values()} == {
        "none", "float16", "islands", "mixed", "symmetric", "dynamic", "static", "nncf",
    }  # fmt: skip


@pytest.fixture(scope="module")
def for_gpus(export):
    """An artifact with the variants that TensorRT takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("invariclip.export.quantization.products.MIN_WEIGHTS", 1)
        return export("float16-islands", "int8-symmetric", backends=("onnxruntime",))


@pytest.mark.parametrize(("name", "precision"), [("float16-islands", "float16"), ("int8-symmetric", "int8")])
def test_variants_for_gpus_keep_the_contract_on_the_cpu_and_are_what_tensorrt_takes(for_gpus, name, precision):
    import onnx_ir as ir

    from invariclip.export.quantization.qdq import uint8_values
    from invariclip.export.tensorrt.plan import plan_engine

    manifest = read_manifest(for_gpus)
    variant = manifest.variants[name]
    assert (variant.precision, variant.compute, list(variant.parity)) == (precision, "float32", ["onnxruntime"])
    assert plan_engine(checked_path(for_gpus, variant.image)).precision == precision
    assert not uint8_values(ir.load(for_gpus / variant.image.path))
    # both share a text graph in float16, which was judged with them
    assert variant.text.path == "text.float16-islands.onnx"
    assert plan_engine(checked_path(for_gpus, variant.text), longest=16).precision == "float16"
    plain, model = invariclip.load(for_gpus), invariclip.load(for_gpus, variant=name)
    texts = ["a photo of a cat.", "two dogs"]
    cosines = (model.embed_texts(texts) * plain.embed_texts(texts)).sum(axis=1)
    assert cosines.min() > 0.9999
    if name == "float16-islands":
        assert variant.made["islands"] == "norms, softmax and head"
        assert variant.made["halved"]["MatMul"] > 5


def test_few_images_are_said_to_promise_little(export):
    with pytest.warns(FewImagesWarning, match=r"saw \d+ images: .* may still agree .* 189 show 98\.0% \(--images"):
        export("float16", bounds=replace(LOOSE, min_top1=0.98), backends=("onnxruntime",))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FewImagesWarning)
        export("float16", bounds=LOOSE, backends=("onnxruntime",))
