"""Engines built by the real TensorRT-RTX on the CPU: sidecars, cache, targets; and refusals of a played TensorRT."""

import json
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest

from invariclip.backends.tensorrt.device import Gpu
from invariclip.backends.tensorrt.facts import read_facts
from invariclip.backends.tensorrt.library import Library, open_library
from invariclip.errors import ContractError, DeviceError
from invariclip.export.tensorrt import builder
from invariclip.export.tensorrt.engines import engine_of, key_of, timings_name
from invariclip.export.tensorrt.plan import plan_engine

needs_rtx = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None,
    reason='TensorRT-RTX is not installed: pip install "invariclip[tensorrt-rtx]"',
)
H100 = Gpu("NVIDIA H100", (9, 0), "13.0", 80 << 30)
T4 = Gpu("Tesla T4", (7, 5), "13.0", 16 << 30)


@pytest.fixture
def graph(tiny_artifact, tmp_path):
    """The tiny artifact's image graph, in a folder of its own."""
    path = tmp_path / "image.onnx"
    path.write_bytes((tiny_artifact / "image.onnx").read_bytes())
    return path


@needs_rtx
def test_an_engine_is_built_once_and_found_again(graph):
    library, plan = open_library("tensorrt_rtx"), plan_engine(graph, batches=(1, 4))
    shown = []

    def progress(items, *, total=None, desc=""):
        for item in items:
            shown.append(item)
            yield item

    first = engine_of(graph, plan, library, None, progress=progress)
    assert len(shown) > 3
    assert not first.found
    facts = read_facts(first.path.with_name(f"{first.path.name}.json"))
    assert facts == first.facts
    assert (facts.key.library_version, facts.key.gpu, facts.key.precision) == (library.version, "any", "float32")
    assert (facts.inputs, set(facts.outputs)) == ({"pixels": "uint8"}, {"embedding", "logits", "probabilities"})
    assert facts.made["phases"]
    assert first.path.stat().st_size == facts.size_bytes
    again = engine_of(graph, plan, library, None)
    assert again.found
    assert again.path == first.path
    # a damaged engine is not taken, and neither is one without its sidecar
    first.path.write_bytes(first.path.read_bytes()[:-1] + b"\0")
    assert not engine_of(graph, plan, library, None).found
    first.path.with_name(f"{first.path.name}.json").unlink()
    assert not engine_of(graph, plan, library, None).found
    other = plan_engine(graph, batches=(1, 8))
    assert engine_of(graph, other, library, None).path != first.path


@needs_rtx
def test_targets_are_named_and_unknown_ones_refused(graph):
    library, plan = open_library("tensorrt_rtx"), plan_engine(graph, batches=(4,))
    built = engine_of(graph, plan, library, None, capabilities=("8.9",))
    assert built.facts.key.capability == "8.9"
    with pytest.raises(DeviceError, match=r"does not know compute capability 4\.2; available: 7\.5"):
        engine_of(graph, plan, library, None, capabilities=("4.2",))


@needs_rtx
def test_a_refit_needs_a_gpu_and_says_so(graph):
    plan = plan_engine(graph, batches=(4,), refit=True)
    with pytest.raises(DeviceError, match="there is none here"):
        engine_of(graph, plan, open_library("tensorrt_rtx"), None)
    with pytest.raises(DeviceError, match="can be refitted on a GPU alone; leave --refit out"):
        builder.build(graph, plan, open_library("tensorrt_rtx"))


@needs_rtx
def test_the_command_writes_both_towers(tiny_artifact, tmp_path, run):
    import shutil

    folder = shutil.copytree(tiny_artifact, tmp_path / "tiny.icm")
    code, out, err = run("engines", folder, "--library", "tensorrt_rtx", "--batch", 2, "--json", "--quiet")
    assert code == 0, err
    rows = json.loads(out)
    assert [row["graph"] for row in rows] == ["image.onnx", "text.onnx"]
    assert all((folder / row["engine"]).is_file() for row in rows)
    code, out, _ = run("engines", folder, "--library", "tensorrt_rtx", "--batch", 2)
    assert code == 0
    assert out.count("found") == 2


class Config:
    def __init__(self):
        self.flags, self.pools, self.given = set(), {}, []

    def set_flag(self, flag):
        self.flags.add(flag)

    def clear_flag(self, flag):
        self.flags.discard(flag)

    def set_memory_pool_limit(self, pool, size):
        self.pools[pool] = size

    def add_optimization_profile(self, profile):
        self.given.append(profile)

    def create_timing_cache(self, content):
        return SimpleNamespace(content=content)

    def set_timing_cache(self, cache, ignore):
        self.cache = cache
        return cache.content != b"of another GPU"

    def get_timing_cache(self):
        return SimpleNamespace(serialize=lambda: self.cache.content + b"+")


@pytest.fixture
def paper():
    """A TensorRT that builds nothing, and keeps what it was told."""
    config, network = Config(), SimpleNamespace(marked=[])
    network.mark_weights_refittable = lambda name: network.marked.append(name) or name != "missing"

    class Logger:
        ERROR, INTERNAL_ERROR, WARNING = 2, 3, 1

    class Monitor:
        pass

    class Builder:
        answer = b"engine"

        def __init__(self, logger):
            pass

        def create_network(self, flags):
            assert flags == 1 << 5
            return network

        def create_builder_config(self):
            return config

        def create_optimization_profile(self):
            shapes = {}
            return SimpleNamespace(shapes=shapes, set_shape=lambda name, *three: shapes.update({name: three}))

        def build_serialized_network(self, network, config):
            for _ in range(3):
                config.progress_monitor.phase_start("timing", None, 3)
                config.progress_monitor.step_complete("timing", 0)
            return self.answer

    trt = SimpleNamespace(
        Builder=Builder, ILogger=Logger, IProgressMonitor=Monitor,
        OnnxParser=lambda network, logger: SimpleNamespace(parse_from_file=lambda path: True),
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=5),
        BuilderFlag=SimpleNamespace(TF32="tf32", REFIT_INDIVIDUAL="refit"),
        MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"), ProfilingVerbosity=SimpleNamespace(DETAILED=1),
        DataType=SimpleNamespace(FLOAT=0),
    )  # fmt: skip
    return Library("tensorrt", "11.4.0", trt), config, network


class Card:
    def __init__(self, gpu=H100):
        self.gpu = gpu

    def free_memory(self):
        return 1000


def test_a_tensorrt_build_is_told_everything_that_was_planned(graph, paper):
    library, config, network = paper
    config.flags.add("tf32")  # its default
    plan = plan_engine(graph, batches=(1, 8), refit=True, level=4)
    built = engine_of(graph, plan, library, Card())
    assert config.flags == {"refit"}
    assert network.marked == ["class_bank"]
    assert config.pools == {"workspace": 800}
    assert config.builder_optimization_level == 4
    assert [next(iter(profile.shapes.values()))[2][0] for profile in config.given] == [1, 8]
    key = built.facts.key
    assert (key.gpu, key.capability, key.refit, key.tf32) == ("NVIDIA H100", "9.0", ("class_bank",), False)
    assert (built.path.read_bytes(), built.facts.made["driver"]) == (b"engine", "13.0")
    timings = built.path.parent / timings_name(library, H100)
    assert timings.read_bytes() == b"+"
    engine_of(graph, plan_engine(graph, batches=(2,)), library, Card())
    assert timings.read_bytes() == b"++"  # the next build began with it
    timings.write_bytes(b"of another GPU")
    engine_of(graph, plan_engine(graph, batches=(4,)), library, Card())
    assert timings.read_bytes() == b"+"


def test_what_tensorrt_cannot_do_here_is_refused_before_it_is_tried(graph, paper):
    library, _, _ = paper
    plan = plan_engine(graph, batches=(4,))
    with pytest.raises(DeviceError, match="builds this engine for the GPU that it sees, and there is none here"):
        engine_of(graph, plan, library, None)
    with pytest.raises(DeviceError, match="TensorRT-RTX, which needs no GPU to build"):
        builder.build(graph, plan, library)
    with pytest.raises(DeviceError, match="builds for the GPU of this machine; leave the compute capabilities out"):
        engine_of(graph, plan, library, Card(), capabilities=("8.9",))
    with pytest.raises(DeviceError, match=r"TensorRT 10\.7\.0 is refused"):
        engine_of(graph, plan, replace(library, version="10.7.0"), Card())
    assert engine_of(graph, plan, replace(library, version="10.7.0"), Card(), accept_known_bad=True).facts.made[
        "known_bad_accepted"
    ]
    eight = replace(plan, precision="fp8")
    with pytest.raises(DeviceError, match=r"Tesla T4 has no fp8 \(compute capability 8\.9 or later\)"):
        engine_of(graph, eight, library, Card(T4))
    with pytest.raises(DeviceError, match=r"TensorRT 11\.4\.0 has no fp8"):
        engine_of(graph, eight, library, Card())
    with pytest.raises(ContractError, match="knows no weights called missing"):
        engine_of(graph, replace(plan, refit=("missing",)), library, Card())
    library.trt.Builder.answer = None
    with pytest.raises(ContractError, match=r"TensorRT 11\.4\.0 cannot build it: no reason given"):
        engine_of(graph, plan_engine(graph, batches=(16,)), library, Card())


def test_keys_of_the_two_libraries_say_how_far_an_engine_goes(graph, paper):
    library, _, _ = paper
    rtx = replace(library, name="tensorrt_rtx", version="1.7.1")
    plan = plan_engine(graph, batches=(4,))
    assert (key_of(plan, rtx, None).gpu, key_of(plan, rtx, H100).capability) == ("any", "any")
    assert key_of(plan, rtx, None, ("8.9", "12.0")).capability == "8.9,12.0"
    assert key_of(plan, library, H100).gpu == "NVIDIA H100"
    assert key_of(plan, library, H100).digest != key_of(plan, library, T4).digest
    assert np.unique([timings_name(one, gpu) for one in (library, rtx) for gpu in (H100, T4)]).size == 4
