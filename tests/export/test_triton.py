"""`invariclip triton`: repositories that Triton's own protobuf reads, and that say what the artifact is."""

import json
import shutil
from dataclasses import replace

import onnx
import pytest
from google.protobuf import text_format as protobuf
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2

from invariclip.artifact.folder import read_manifest, sign_artifact
from invariclip.artifact.signature import read_private_key, write_new_key
from invariclip.errors import ArtifactError, InputError
from invariclip.export import triton
from invariclip.export.triton import GraphTensor, TritonConfig, text_format, write_repository
from invariclip.files import sha256_file
from invariclip.loading import load

TYPES = {
    onnx.TensorProto.UINT8: "TYPE_UINT8", onnx.TensorProto.INT64: "TYPE_INT64", onnx.TensorProto.FLOAT: "TYPE_FP32",
}  # fmt: skip


def configured(repository, model):
    """The configuration as Triton reads it: a field that it does not know is an error."""
    text = (repository / model / "config.pbtxt").read_text(encoding="ascii")
    return protobuf.Parse(text, model_config_pb2.ModelConfig())


def tensors(listed):
    return {one.name: (model_config_pb2.DataType.Name(one.data_type), list(one.dims)) for one in listed}


def of_graph(listed):
    """Type and shape of a graph's inputs or outputs without the batch, -1 where a size is free."""
    return {
        one.name: (
            TYPES[one.type.tensor_type.elem_type],
            [size.dim_value or -1 for size in one.type.tensor_type.shape.dim][1:],
        )
        for one in listed
    }


@pytest.fixture(scope="module")
def repository(tiny_artifact, tmp_path_factory):
    out = tmp_path_factory.mktemp("repository") / "models"
    assert write_repository(tiny_artifact, out, TritonConfig(max_batch=8, max_wait=0.002, instances=2, threads=3)) == [
        "tiny", "tiny_image", "tiny_text",
    ]  # fmt: skip
    return out


@pytest.mark.parametrize("tower", ["image", "text"])
def test_graphs_are_told_as_they_are(repository, tiny_artifact, tower):
    config = configured(repository, f"tiny_{tower}")
    graph = onnx.load(tiny_artifact / f"{tower}.onnx").graph
    assert (config.name, config.backend, config.max_batch_size) == (f"tiny_{tower}", "onnxruntime", 8)
    assert tensors(config.input) == of_graph(graph.input)
    assert tensors(config.output) == of_graph(graph.output)
    assert config.dynamic_batching.max_queue_delay_microseconds == 2000
    [group] = config.instance_group
    assert (group.count, group.kind) == (2, model_config_pb2.ModelInstanceGroup.KIND_CPU)
    assert config.parameters["intra_op_thread_count"].string_value == "3"
    assert config.parameters["graph_sha256"].string_value == sha256_file(repository / config.name / "1" / "model.onnx")


def test_the_python_model_takes_and_gives_what_serve_does(repository):
    config = configured(repository, "tiny")
    assert (config.backend, config.max_batch_size) == ("python", 8)
    assert tensors(config.input) == {
        "images": ("TYPE_STRING", [1]), "pixels": ("TYPE_UINT8", [-1, -1, 3]), "texts": ("TYPE_STRING", [1]),
    }  # fmt: skip
    assert all(one.optional for one in config.input)
    assert tensors(config.output) == {
        "embedding": ("TYPE_FP32", [8]), "logits": ("TYPE_FP32", [3]), "probabilities": ("TYPE_FP32", [3]),
        "label": ("TYPE_STRING", [1]),
    }  # fmt: skip
    compile((repository / "tiny" / "1" / "model.py").read_text(), "model.py", "exec")
    assert config.parameters["threads"].string_value == "3"


def test_without_batching_shapes_are_those_of_serve(tiny_artifact, tmp_path):
    write_repository(tiny_artifact, tmp_path / "models", TritonConfig(max_batch=0))
    config = configured(tmp_path / "models", "tiny")
    assert (config.max_batch_size, config.HasField("dynamic_batching")) == (0, False)
    assert tensors(config.input) == {
        "images": ("TYPE_STRING", [-1]), "pixels": ("TYPE_UINT8", [-1, -1, -1, 3]), "texts": ("TYPE_STRING", [-1]),
    }  # fmt: skip
    assert tensors(config.output)["label"] == ("TYPE_STRING", [-1])
    assert tensors(configured(tmp_path / "models", "tiny_image").input) == {"pixels": ("TYPE_UINT8", [-1, 32, 32, 3])}


@pytest.mark.parametrize("model", ["tiny", "tiny_image", "tiny_text"])
def test_models_carry_the_facts_of_the_artifact(repository, tiny_artifact, model):
    manifest = read_manifest(tiny_artifact)
    said = {name: value.string_value for name, value in configured(repository, model).parameters.items()}
    assert said["space_id"] == manifest.space_id
    assert said["checkpoint_sha256"] == manifest.model.checkpoint_sha256
    assert said["projection_sha256"] == manifest.projection.sha256
    assert said["manifest_sha256"] == sha256_file(tiny_artifact / "manifest.json")
    assert float(said["logit_scale"]) == manifest.model.logit_scale
    assert json.loads(said["pixels"]) == json.loads(json.dumps(manifest.pixels.to_json()))
    labelled = {one.name for one in configured(repository, model).output if one.label_filename == "labels.txt"}
    assert labelled == (set() if model == "tiny_text" else {"logits", "probabilities"})
    labels = repository / model / "labels.txt"
    assert (labels.read_text().splitlines() if labels.exists() else None) == (
        None if model == "tiny_text" else list(manifest.classes)
    )


def test_the_copied_artifact_is_whole(repository):
    assert load(repository / "tiny" / "1" / "tiny.icm", threads=1).classes == ("cat", "dog", "tree")


def test_a_signed_artifact_stays_signed(tiny_artifact, tmp_path):
    source = shutil.copytree(tiny_artifact, tmp_path / "tiny.icm")
    (source / "machine-0.json").write_text("{}")  # is signed too, and read by nobody here
    public = write_new_key(tmp_path / "key.pem", None)
    sign_artifact(source, read_private_key(tmp_path / "key.pem", None))
    write_repository(source, tmp_path / "models", TritonConfig(models=("python",)))
    read_manifest(tmp_path / "models" / "tiny" / "1" / "tiny.icm", public)


def test_an_output_of_one_number_an_item_keeps_its_shape_in_the_graph():
    said = triton._graph_tensor(GraphTensor("uncertainty", "tensor(float)", ("batch",)), batched=True)
    read = protobuf.Parse(text_format(said), model_config_pb2.ModelOutput())
    assert (list(read.dims), read.HasField("reshape"), list(read.reshape.shape)) == ([1], True, [])


@given(st.text())
def test_any_text_comes_back_from_the_text_format(text):
    read = protobuf.Parse(text_format({"string_value": text}), model_config_pb2.ModelParameter())
    assert read.string_value == text


def test_other_models_stay_and_ours_are_replaced(tiny_artifact, tmp_path):
    out = tmp_path / "models"
    (out / "theirs").mkdir(parents=True)
    (out / "theirs" / "config.pbtxt").write_text("mine")
    write_repository(tiny_artifact, out)
    write_repository(tiny_artifact, out, TritonConfig(name="second", models=("python",)))
    assert write_repository(tiny_artifact, out, TritonConfig(models=("python",))) == ["tiny"]
    # graphs of an earlier run would be another artifact's, should it have changed
    assert sorted(path.name for path in out.iterdir()) == ["second", "theirs", "tiny"]
    assert (out / "theirs" / "config.pbtxt").read_text() == "mine"


@pytest.mark.parametrize("theirs", ["without a record", "with another's record", "with a record that was edited"])
def test_what_is_not_ours_is_not_overwritten(tiny_artifact, tmp_path, repository, theirs):
    out = tmp_path / "models"
    (out / "tiny_text").mkdir(parents=True)
    if theirs == "with another's record":
        write_repository(tiny_artifact, out, TritonConfig(name="second"))
        (out / "tiny_text").rmdir()
        (out / "second_text").rename(out / "tiny_text")
    if theirs == "with a record that was edited":
        record = (repository / "tiny_text" / "invariclip.json").read_text()
        (out / "tiny_text" / "invariclip.json").write_text(record.replace("float32", "float16"))
    before = sorted(out.rglob("*"))
    with pytest.raises(InputError, match="tiny_text: is there, and was not written from an artifact called tiny"):
        write_repository(tiny_artifact, out)
    assert sorted(out.rglob("*")) == before


def test_a_damaged_artifact_leaves_the_repository_as_it_was(tiny_artifact, tmp_path, damaged_copy):
    out = tmp_path / "models"
    write_repository(tiny_artifact, out, TritonConfig(models=("python",)))
    before = sorted(out.rglob("*"))
    with pytest.raises(ArtifactError, match="digest differs"):
        write_repository(damaged_copy, out, TritonConfig(models=("python",)))
    assert sorted(out.rglob("*")) == before


@pytest.fixture
def damaged_copy(tiny_artifact, tmp_path):
    copy = shutil.copytree(tiny_artifact, tmp_path / "tiny.icm")
    content = bytearray((copy / "text.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (copy / "text.onnx").write_bytes(content)
    return copy


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"models": ("tensorflow",)}, "available: python, onnxruntime"),
        ({"engine": "tensorrt"}, "no engine of the CPU is called 'tensorrt'; available: onnxruntime, openvino"),
        ({"max_batch": -1}, "a batch has 0 to 1024 items"),
        ({"instances": 0}, "at least one instance"),
        ({"max_wait": float("nan")}, "an item waits 0 to 1000 s"),
        ({"name": "../up"}, "a model's name has letters"),
    ],
)
def test_what_triton_would_not_take_is_refused(given, said):
    with pytest.raises(InputError, match=said):
        TritonConfig(**given)


def test_what_was_not_proved_is_refused(tiny_artifact, tmp_path):
    manifest = read_manifest(tiny_artifact)
    with pytest.raises(InputError, match="float32 was not proved on openvino; it was on onnxruntime"):
        write_repository(tiny_artifact, tmp_path / "models", TritonConfig(engine="openvino"))
    with pytest.raises(InputError, match="no variant 'int8'; available: float32"):
        write_repository(tiny_artifact, tmp_path / "models", TritonConfig(variant="int8"))
    asked = replace(manifest.variants["float32"], compute="bfloat16")
    with pytest.raises(InputError, match="computes in bfloat16, which Triton's ONNX Runtime backend cannot be asked"):
        triton._require_plain(tiny_artifact, "float32", asked)
    with pytest.raises(InputError, match="has a line break"):
        triton._require_labels(["cat", "a\nb"])
    assert not (tmp_path / "models").exists()


def test_the_command(run, tiny_artifact, tmp_path):
    out = tmp_path / "models"
    code, said, _ = run("triton", tiny_artifact, "-o", out, "--json")
    assert (code, json.loads(said)) == (0, {"out": str(out), "models": ["tiny", "tiny_image", "tiny_text"]})
    code, _, err = run("triton", tiny_artifact, "-o", tiny_artifact / "models")
    assert (code, "lies in the artifact" in err, err.count("\n")) == (2, True, 1)
    code, _, err = run("triton", tmp_path / "none.icm", "-o", out)
    assert (code, "there is no such folder" in err) == (2, True)
