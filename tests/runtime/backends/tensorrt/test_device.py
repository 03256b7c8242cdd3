"""What is missing on a machine without a GPU is said, with its version; every CUDA error is an error."""

import re
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from invariclip.backends import open_backend
from invariclip.backends.tensorrt import device
from invariclip.backends.tensorrt.device import Device, gpu_count, runtime_bindings, spelled
from invariclip.errors import ArtifactError, DeviceError, InputError, MissingExtraError


def test_a_gpu_says_what_it_is(cuda):
    gpu = Device().gpu
    assert (gpu.name, gpu.capability, gpu.driver, gpu.memory) == ("Paper GPU", (9, 0), "13.0", 8 << 30)
    assert Device().free_memory() == 6 << 30


@pytest.mark.parametrize(
    ("code", "count", "driver", "message"),
    [
        (
            35,
            0,
            0,
            r"no NVIDIA driver is loaded .* install the driver \(CUDA 13\.5 or later\), or name a backend of the",
        ),
        (
            35,
            0,
            12040,
            r"the NVIDIA driver supports CUDA 12\.4, and cuda-bindings needs 13\.5; .*'cuda-bindings==12\.\*'",
        ),
        (100, 0, 13000, r"the NVIDIA driver is there and shows this process no GPU \(CUDA_VISIBLE_DEVICES is ''\)"),
        (0, 0, 13000, "shows this process no GPU"),
        (999, 0, 13000, "the GPUs cannot be counted: error999: as the driver says it"),
    ],
)
def test_what_is_missing_is_named(cuda, monkeypatch, code, count, driver, message):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    cuda.code, cuda.count, cuda.driver = code, count, driver
    with pytest.raises(DeviceError, match=message) as caught:
        Device()
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_gpu_that_is_not_there_is_an_error(cuda):
    cuda.count = 2
    with pytest.raises(InputError, match="there is no GPU 2; available: 0, 1"):
        Device(2)


def test_memory_that_runs_out_is_an_error(cuda):
    with pytest.raises(DeviceError, match="cudaMalloc failed: error2: as the driver says it"):
        Device().allocate(1 << 50)


def test_versions_are_spelled_as_people_write_them():
    assert [spelled(version) for version in (12040, 13050, 11080)] == ["12.4", "13.5", "11.8"]


def test_without_cuda_python_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(MissingExtraError, match=r'cuda-bindings: pip install "invariclip\[tensorrt\]"'):
        runtime_bindings()


@pytest.mark.skipif(find_spec("cuda") is None, reason='cuda-bindings: pip install "invariclip[tensorrt-rtx]"')
def test_the_real_bindings_have_every_call_and_tell_the_same():
    real = runtime_bindings()
    calls = set(re.findall(r'"(cuda[A-Z]\w+)"', Path(device.__file__).read_text(encoding="utf-8")))
    assert len(calls) > 15
    for call in calls:
        assert callable(getattr(real, call)), call
    constants = (
        real.cudaHostAllocDefault, real.cudaStreamNonBlocking, real.cudaMemcpyKind.cudaMemcpyHostToDevice,
        real.cudaMemcpyKind.cudaMemcpyDeviceToHost, real.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal,
        real.cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor, real.cudaDeviceAttr.cudaDevAttrComputeCapabilityMinor,
    )  # fmt: skip
    assert all(int(constant) >= 0 for constant in constants)
    code, _ = real.cudaGetDeviceCount()
    if code == real.cudaError_t.cudaSuccess:
        assert gpu_count(real) >= 1
    else:
        with pytest.raises(DeviceError, match=r"driver|GPU"):
            gpu_count(real)


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason='pip install "invariclip[tensorrt-rtx]"')
def test_the_backend_refuses_a_machine_without_a_gpu(tmp_path):
    path = tmp_path / "image.onnx"
    path.write_bytes(b"a graph")
    # a driver, a GPU or an engine is missing; whichever comes first is an error and no fallback
    with pytest.raises((DeviceError, MissingExtraError, ArtifactError), match=r"driver|GPU|cuda-bindings|engine"):
        open_backend("tensorrt", path)
