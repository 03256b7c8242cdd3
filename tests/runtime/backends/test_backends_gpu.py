"""ONNX Runtime's providers of a GPU: refused where they are not there, never replaced; bound and captured runs.

Without a GPU the CPU provider stands in for one: what is bound, kept and copied is the same.
"""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest

from invariclip import load
from invariclip.backends import (
    ALL_BACKENDS,
    BACKENDS,
    GPU_BACKENDS,
    onnxruntime_gpu,
    open_backend,
    require_backend,
)
from invariclip.backends import (
    onnxruntime_gpu as providers,
)
from invariclip.backends.onnxruntime_gpu import CPU, OnnxRuntimeGpuBackend, nodes_elsewhere, provider_options
from invariclip.errors import ArtifactError, DeviceError, InputError, MissingExtraError

PROVIDERS = {
    "onnxruntime-cuda": "CUDAExecutionProvider",
    "onnxruntime-tensorrt": "TensorrtExecutionProvider",
    "onnxruntime-tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}


class OnCpu(OnnxRuntimeGpuBackend):
    PROVIDER = CPU
    MEMORY = "cpu"


@pytest.fixture
def stand_in(monkeypatch, tiny_artifact):
    monkeypatch.setitem(providers.DEFAULTS, CPU, {})
    monkeypatch.setitem(providers.GRAPHS, CPU, "captures")

    def of(tower="image.onnx", captures="1", kind=OnCpu):
        # the CPU provider has no option of that name, so it must not see it
        monkeypatch.setattr(
            onnxruntime_gpu, "onnxruntime",
            SimpleNamespace(**{
                **vars(onnxruntime),
                "InferenceSession": lambda path, settings, providers: onnxruntime.InferenceSession(
                    path, settings, providers=[CPU]
                ),
            }),
        )  # fmt: skip
        return kind(tiny_artifact / tower, options={"captures": captures})

    return of


def pixels(rows, seed=0):
    return {"pixels": np.random.default_rng(seed).integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8)}


def test_names_are_apart_and_no_default_is_a_gpu():
    assert set(GPU_BACKENDS) == {"tensorrt", *PROVIDERS}
    assert ALL_BACKENDS == BACKENDS + GPU_BACKENDS
    for name in PROVIDERS:
        require_backend(name)


@pytest.mark.parametrize("name", PROVIDERS)
def test_a_provider_that_is_not_there_is_an_error_that_names_what_is(tiny_artifact, name):
    if PROVIDERS[name] in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has it")
    with pytest.raises(DeviceError, match=rf"has no {PROVIDERS[name]}; available: .*CPU.*invariclip\[gpu\]"):
        open_backend(name, tiny_artifact / "image.onnx")
    with pytest.warns(UserWarning, match="not on onnxruntime"), pytest.raises(DeviceError, match="available: "):
        load(tiny_artifact, backend=name)


def test_both_packages_installed_is_told(tiny_artifact, monkeypatch):
    monkeypatch.setattr(providers, "_is_installed", lambda package: True)
    with pytest.raises(DeviceError, match="uninstall onnxruntime onnxruntime-gpu, then install onnxruntime-gpu alone"):
        open_backend("onnxruntime-cuda", tiny_artifact / "image.onnx")


@pytest.mark.parametrize("provider", PROVIDERS.values())
def test_a_provider_that_does_not_start_is_refused_and_not_replaced(tiny_artifact, monkeypatch, provider):
    """ONNX Runtime warns in a log and goes on with the CPU; the session's own word is what counts."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [provider, CPU])
    real = onnxruntime.InferenceSession

    def silent(path, settings, providers):
        assert providers[0][0] == provider
        return real(path, settings, providers=[CPU])

    monkeypatch.setattr(onnxruntime, "InferenceSession", silent)
    name = next(name for name, known in PROVIDERS.items() if known == provider)
    with pytest.raises(DeviceError, match=rf"{provider} did not start, and ONNX Runtime took {CPU} instead"):
        open_backend(name, tiny_artifact / "image.onnx")


def test_work_left_to_the_cpu_is_refused_and_shape_arithmetic_is_not(tiny_artifact, monkeypatch):
    def part(provider, *operators):
        return SimpleNamespace(
            ep_name=provider, get_nodes=lambda: [SimpleNamespace(op_type=operator) for operator in operators]
        )

    parts = [part("CUDAExecutionProvider", "MatMul", "Gelu"), part(CPU, "Shape", "Gather"), part(CPU, "Concat")]

    class Session:
        def __init__(self, path, settings, providers):
            pass

        def get_providers(self):
            return ["CUDAExecutionProvider", CPU]

        def get_provider_graph_assignment_info(self):
            return parts

        def get_inputs(self):
            return []

        get_outputs = get_inputs

        def disable_fallback(self):
            pass

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    assert nodes_elsewhere(Session(0, 0, 0), "CUDAExecutionProvider") == {"Concat": 1, "Gather": 1, "Shape": 1}
    assert nodes_elsewhere(object(), "CUDAExecutionProvider") is None
    assert open_backend("onnxruntime-cuda", tiny_artifact / "image.onnx").input_names == ()
    parts.append(part(CPU, "LayerNormalization"))
    with pytest.raises(DeviceError, match="leaves LayerNormalization to the CPU"):
        open_backend("onnxruntime-cuda", tiny_artifact / "image.onnx")


@pytest.mark.parametrize("captures", ["0", "1"])
def test_bound_runs_answer_like_the_cpu_engine(stand_in, tiny_artifact, captures):
    backend = stand_in(captures=captures)
    reference = open_backend("onnxruntime", tiny_artifact / "image.onnx", threads=1)
    assert (backend.input_names, backend.input_shapes) == (reference.input_names, reference.input_shapes)
    kept = []
    for seed, rows in enumerate((1, 2, 1, 5, 2)):
        given = pixels(rows, seed)
        wanted, got = reference.run(given), backend.run(given)
        assert list(got) == list(wanted)
        for name in wanted:
            np.testing.assert_allclose(got[name], wanted[name], atol=2e-6)
        kept.append((got, {name: value.copy() for name, value in got.items()}))
    # what was answered stays, though bound memory is used again
    assert all(np.array_equal(got[name], copy[name]) for got, copy in kept for name in copy)
    assert list(backend.run(pixels(2), ("embedding",))) == ["embedding"]
    assert len(backend._bound) == (4 if captures == "1" else 0)
    said = backend.describe()
    assert (said["execution_provider"], said["cuda_graphs"]) == (CPU, captures == "1")


def test_memory_that_moves_is_never_captured_and_each_set_of_shapes_has_its_number(stand_in, monkeypatch):
    backend, numbers = stand_in(), []
    real = onnxruntime.InferenceSession.run_with_iobinding

    def spy(session, binding, options=None):
        numbers.append(int(options.get_run_config_entry("gpu_graph_id")))
        return real(session, binding, options)

    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", spy)
    for rows in (1, 1, 3, 1):
        backend.run(pixels(rows))
    assert numbers == [-1, 1, 1, -1, 2, 1]


def test_captures_are_bounded(stand_in, monkeypatch):
    monkeypatch.setattr(onnxruntime_gpu, "MAX_GRAPHS", 2)
    backend = stand_in()
    for rows in (1, 2, 3, 4, 3):
        assert backend.run(pixels(rows))["embedding"].shape == (rows, 8)
    assert len(backend._bound) == 2


def test_threads_take_turns_and_share_no_answers(stand_in):
    backend = stand_in()
    alone = {seed: backend.run(pixels(1 + seed % 3, seed))["embedding"] for seed in range(12)}
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: backend.run(pixels(1 + seed % 3, seed))["embedding"], alone))
    assert all(np.array_equal(one, other) for one, other in zip(together, alone.values(), strict=True))


def test_wrong_inputs_arithmetic_and_files_are_refused(stand_in, tmp_path):
    backend = stand_in()
    with pytest.raises(InputError, match="cannot answer this input"):
        backend.run({"pixels": np.zeros((1, 3, 3, 3), np.uint8)})
    with pytest.raises(InputError, match="bfloat16 on demand; export with --variant float16-islands"):
        OnCpu(tmp_path / "a.onnx", compute="bfloat16")
    with pytest.raises(InputError, match="threads must be at least 1"):
        OnCpu(tmp_path / "a.onnx", threads=0)
    (tmp_path / "a.onnx").write_bytes(b"nonsense")
    with pytest.raises(ArtifactError, match=r"a\.onnx: ONNX Runtime [\d.]+ cannot load it with CPU"):
        OnCpu(tmp_path / "a.onnx")


def test_options_are_the_providers_own_over_ours(tmp_path):
    graph = tmp_path / "image.onnx"
    cuda = provider_options("CUDAExecutionProvider", graph, None)
    assert (cuda["use_tf32"], cuda["enable_cuda_graph"]) == ("0", "1")
    changed = provider_options("CUDAExecutionProvider", graph, {"use_tf32": 1, "device_id": 2})
    assert (changed["use_tf32"], changed["device_id"]) == ("1", "2")
    engines = str(tmp_path / "engines")
    trt = provider_options("TensorrtExecutionProvider", graph, {"trt_cuda_graph_enable": "0"})
    assert (trt["trt_engine_cache_path"], trt["trt_timing_cache_path"]) == (engines, engines)
    assert trt["trt_cuda_graph_enable"] == "0"
    assert provider_options("NvTensorRTRTXExecutionProvider", graph, None)["nv_runtime_cache_path"] == engines
    with pytest.raises(InputError, match="'onnxruntime' has no options; a GPU's have: tensorrt, onnxruntime-cuda"):
        open_backend("onnxruntime", graph, options={"device_id": "0"})


def test_a_missing_package_names_the_extra(monkeypatch):
    import sys

    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"needs the package tensorrt or tensorrt_rtx: pip install"):
        require_backend("tensorrt")
