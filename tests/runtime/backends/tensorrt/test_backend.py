"""The TensorRT backend above a GPU that is played on the host: answers, slots, captured work, threads, refusals."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from invariclip.errors import ArtifactError, DeviceError, InputError, KernelCacheWarning


def pixels(rows, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (rows, 2, 4), dtype=np.uint8)


def wanted(given, scale=1.0):
    return given.astype(np.float32).sum(axis=1) * scale


def test_it_answers_in_arrays_of_the_callers_own(loaded, graph, tools):
    tools.place(graph)
    backend, _ = loaded()
    assert (backend.input_names, backend.output_names) == (("pixels",), ("embedding",))
    assert backend.input_shapes == {"pixels": (None, 2, 4)}
    first = backend.run({"pixels": pixels(3)})["embedding"]
    again = backend.run({"pixels": pixels(3, 1)})["embedding"]
    assert np.array_equal(first, wanted(pixels(3)))
    assert np.array_equal(again, wanted(pixels(3, 1)))
    said = backend.describe()
    assert (said["engine"], said["version"], said["batches"]) == ("tensorrt", "11.4.0", [[1, 1, 1], [2, 8, 8]])
    assert said["processor"] == "Paper GPU (compute capability 9.0)"


def test_shapes_that_come_back_are_captured_and_launched(loaded, graph, tools, cuda):
    tools.place(graph)
    backend, engine = loaded()
    for seed in range(5):
        assert np.array_equal(backend.run({"pixels": pixels(2, seed)})["embedding"], wanted(pixels(2, seed)))
    # once in a free slot, once in a fixed slot to set it up, then by launches
    assert (engine.contexts, cuda.launched) == (2, 3)
    assert len(backend.time({"pixels": pixels(2)}, 4)) == 4
    plain, _ = loaded(cuda_graphs=0)
    before = cuda.launched
    for _ in range(4):
        plain.run({"pixels": pixels(2)})
    assert cuda.launched == before


def test_no_more_contexts_than_slots_and_memory_goes_back(loaded, graph, tools, cuda):
    tools.place(graph)
    backend, _ = loaded(slots=3)
    for _ in range(2):
        for rows in (1, 2, 3, 4, 5, 6, 7, 8):
            assert np.array_equal(backend.run({"pixels": pixels(rows)})["embedding"], wanted(pixels(rows)))
    assert backend._pool._made <= 3
    assert len(cuda.memory) <= 3 * 4
    backend._pool.close()
    assert not cuda.memory


@pytest.mark.parametrize("slots", [1, 4])
def test_threads_share_an_engine_and_no_answers(loaded, graph, tools, slots):
    tools.place(graph)
    backend, _ = loaded(slots=slots)

    def ask(seed):
        given = pixels(1 + seed % 8, seed)
        return np.array_equal(backend.run({"pixels": given})["embedding"], wanted(given))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(200)))


def test_more_rows_than_the_engine_takes_go_in_parts(loaded, graph, tools):
    tools.place(graph)
    backend, _ = loaded()
    assert backend.largest_batch == 8
    given = pixels(21)
    assert np.array_equal(backend.run({"pixels": given})["embedding"], wanted(given))


def test_a_slot_that_failed_is_not_used_again(loaded, graph, tools, cuda):
    tools.place(graph)
    backend, engine = loaded(slots=1)
    backend.run({"pixels": pixels(2)})
    engine.broken = True
    for _ in range(3):
        with pytest.raises(DeviceError, match="TensorRT refused"):
            backend.run({"pixels": pixels(2)})
    engine.broken = False
    assert np.array_equal(backend.run({"pixels": pixels(2)})["embedding"], wanted(pixels(2)))
    assert not cuda.capturing


def test_classes_and_projection_are_exchanged_without_a_build(loaded, graph, tools):
    tools.place(graph)
    backend, _ = loaded()
    for _ in range(3):  # so that there is captured work to let go of
        backend.run({"pixels": pixels(2)})
    backend.refit({"projection": np.array([3.0])})
    assert np.array_equal(backend.run({"pixels": pixels(2)})["embedding"], wanted(pixels(2), 3.0))
    with pytest.raises(InputError, match="cannot exchange class_bank; available: projection"):
        backend.refit({"class_bank": np.ones(1)})
    with pytest.raises(InputError, match="1 finite values are needed"):
        backend.refit({"projection": np.ones(2)})
    with pytest.raises(InputError, match="1 finite values are needed"):
        backend.refit({"projection": np.array([np.nan])})


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        (
            {"pixels": np.zeros((1, 2, 5), np.uint8)},
            None,
            r"pixels is uint8 \[1, 2, 5\]; it takes uint8 \['\?', 2, 4\]",
        ),
        ({"pixels": np.zeros((1, 2, 4), np.float32)}, None, r"pixels is float32"),
        ({"pixels": np.zeros((0, 2, 4), np.uint8)}, None, r"pixels is uint8 \[0, 2, 4\]"),
        ({"image": np.zeros((1, 2, 4), np.uint8)}, None, "its inputs are pixels"),
        ({"pixels": np.zeros((1, 2, 4), np.uint8)}, ("scores",), "its outputs embedding"),
    ],
)
def test_what_is_not_the_graphs_is_refused(loaded, graph, tools, inputs, outputs, message):
    tools.place(graph)
    backend, _ = loaded()
    with pytest.raises(InputError, match=message):
        backend.run(inputs, outputs)


def test_options_and_arithmetic_are_checked_first(loaded, graph, tools):
    from invariclip.backends.tensorrt.backend import TensorRtBackend

    tools.place(graph)
    with pytest.raises(InputError, match="no option speed; available: library, device_id, cuda_graphs, slots"):
        loaded(speed=1)
    with pytest.raises(InputError, match="slots must be a whole number, not 'many'"):
        loaded(slots="many")
    with pytest.raises(InputError, match="there is no GPU 3; available: 0"):
        loaded(device_id=3)
    with pytest.raises(InputError, match="float16 on demand; export with --variant float16-islands"):
        TensorRtBackend(graph, compute="float16")
    with pytest.raises(InputError, match="threads must be at least 1"):
        TensorRtBackend(graph, threads=0)


def test_an_engine_that_does_not_load_is_an_error_with_the_librarys_words(loaded, graph, tools):
    tools.place(graph, content=b"nonsense")
    with pytest.raises(DeviceError, match="cannot load it on Paper GPU: magic tag does not match"):
        loaded()


def test_an_engine_of_a_release_known_to_be_wrong_is_refused(monkeypatch, cuda, graph, tools):
    from invariclip.backends.tensorrt import backend as tensorrt

    tools.place(graph, library_version="10.7.0")
    library, _ = tools.library(cuda, version="10.7.0")
    monkeypatch.setattr(tensorrt, "open_library", lambda name: library)
    with pytest.raises(DeviceError, match=r"TensorRT 10\.7\.0 is refused for float32 graphs: .*4328"):
        tensorrt.TensorRtBackend(graph)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"graph_sha256": "0" * 64}, "the graph has changed since"),
        ({"library_version": "11.3.0"}, r"it was built by tensorrt 11\.3\.0, here is tensorrt 11\.4\.0"),
        ({"library": "tensorrt_rtx"}, "it was built by tensorrt_rtx"),
        ({"gpu": "Other GPU"}, "it was built for Other GPU"),
        ({"capability": "8.9"}, r"it was built for compute capability 8\.9"),
    ],
)
def test_an_engine_that_does_not_match_is_named_with_the_reason(loaded, graph, tools, change, why):
    tools.place(graph, **change)
    with pytest.raises(
        ArtifactError, match=f"has no engine for TensorRT 11.4.0 on Paper GPU.*invariclip engines.*{why}"
    ):
        loaded()


def test_a_changed_missing_or_unreadable_engine_is_refused(loaded, graph, tools):
    with pytest.raises(ArtifactError, match=r"builds one$"):
        loaded()
    path = tools.place(graph)
    path.write_bytes(b"an enginE")
    with pytest.raises(ArtifactError, match="is not the engine that was built"):
        loaded()
    path.unlink()
    with pytest.raises(ArtifactError, match="the file is missing"):
        loaded()
    path.with_name(f"{path.name}.json").write_text('{"schema_version": 99}')
    with pytest.raises(ArtifactError, match="schema_version 99 is not known"):
        loaded()


RTX = ("tensorrt_rtx", "1.7.1")


def test_kernels_that_tensorrt_rtx_compiles_are_kept_for_the_next_start(loaded, graph, tools):
    path = tools.place(graph, library=RTX[0], library_version=RTX[1], gpu="any", capability="any")
    cache = path.with_suffix(".kernels")
    backend, engine = loaded(library=RTX)
    assert not cache.exists()
    assert np.array_equal(backend.run({"pixels": pixels(2)})["embedding"], wanted(pixels(2)))
    assert cache.read_bytes() == b"k"
    assert engine.config.dynamic_shapes_kernel_specialization_strategy == "eager"
    assert engine.config.cuda_graph_strategy == "disabled"
    backend.run({"pixels": pixels(2)})
    assert cache.read_bytes() == b"kk"
    backend.run({"pixels": pixels(2)})  # no new context: nothing to keep
    assert cache.read_bytes() == b"kk"
    _, again = loaded(library=RTX)
    assert again.config.cache.content == b"kk"


def test_kernels_that_cannot_be_kept_are_a_warning_and_no_error(loaded, graph, tools, monkeypatch):
    from invariclip.backends.tensorrt import backend as jit

    def refuse(path, content):
        raise InputError(f"{path}: cannot be written (Read-only file system)")

    monkeypatch.setattr(jit, "write_atomically", refuse)
    tools.place(graph, library=RTX[0], library_version=RTX[1], gpu="any", capability="9.0,12.0")
    backend, _ = loaded(library=RTX)
    with pytest.warns(KernelCacheWarning, match="are not kept: .*Read-only file system"):
        backend.run({"pixels": pixels(2)})
