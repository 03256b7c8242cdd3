"""The C++ runtime answers what the Python runtime answers, on the same engine, to the last bit."""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import invariclip
from invariclip.backends.batching import plan
from invariclip.bench.cpp.build import build, install
from invariclip.bench.cpp.compare import compare
from invariclip.console import silent
from invariclip.export.build import export_artifact
from invariclip.export.checkpoints.checkpoint import load_checkpoint
from invariclip.export.config import ExportConfig
from invariclip.export.site import bake_site
from invariclip.preprocessing.find import find_images
from invariclip.records import seal
from invariclip.sites.site import new_site
from invariclip.threads import available_threads

REFERENCE = Path(__file__).parents[3] / "export" / "reference" / "images"
SIZES = [(1, 40), (40, 1), (3, 500), (500, 3), (33, 32), (64, 200), (200, 64), (32, 32), (640, 480), (7, 7)]


@pytest.fixture(scope="module")
def shown(tmp_path_factory, image):
    """Images as PPM and PGM: real ones and odd-sized ones; 45, so that the last batch is not full."""
    folder = tmp_path_factory.mktemp("shown")
    for number, path in enumerate(find_images([REFERENCE])[:: 512 // 30][:30]):
        with Image.open(path) as opened:
            opened.convert("RGB").save(folder / f"a{number:02}.ppm")
    for number, (columns, rows) in enumerate(SIZES):
        Image.fromarray(image(columns, rows)).save(folder / f"b{number}.ppm")
    for number, (columns, rows) in enumerate(SIZES[:5]):
        Image.fromarray(image(columns, rows, 1)[..., 0]).save(folder / f"c{number}.pgm")
    found = sorted(folder.iterdir())
    assert len(found) == 45
    return found


def said_by(built, *words):
    return subprocess.run([built.classify, *map(str, words)], capture_output=True, text=True, check=False)


def answers(built, *words):
    done = said_by(built, *words, "--json")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_an_artifact_adapted_to_a_site_answers_as_in_python(
    built, tiny_checkpoint, tiny_projection, shown, engine, tmp_path
):
    artifact = tmp_path / "plain.icm"
    export_artifact(
        load_checkpoint(str(tiny_checkpoint)),
        artifact,
        ExportConfig(images=shown[:8], backends=(engine,), threads=1),
        projection=tiny_projection,
    )
    plain = invariclip.load(artifact, backend=engine, threads=1)
    rows, bank = plain.embed_images(shown[:30]), np.eye(plain.width)
    site = new_site("yard", plain.space_id, np.full(plain.width, 0.05), len(bank), {}).adding(rows, bank)
    bake_site(artifact, tmp_path / "yard.icm", site, images=shown[:8], threads=1)
    how = ["--engine", engine, "--threads", 1]
    wanted = invariclip.load(tmp_path / "yard.icm", backend=engine, threads=1).embed_images(shown)
    got = np.asarray([one["embedding"] for one in answers(built, tmp_path / "yard.icm", *shown, *how, "--embed")])
    np.testing.assert_array_equal(got.astype(np.float32), wanted)
    assert np.abs(wanted - plain.embed_images(shown)).max() > 0.01


@pytest.mark.parametrize("variant", ["float32", "float16"])
def test_the_same_answers_to_the_last_bit(built, artifact, shown, engine, variant):
    model = invariclip.load(artifact, backend=engine, variant=variant, threads=1)
    how = ["--engine", engine, "--variant", variant, "--threads", 1]
    wanted, predicted = model.answer(shown), model.classify(shown)
    got, embedded = answers(built, artifact, *shown, *how), answers(built, artifact, *shown, *how, "--embed")

    def column(rows, name):
        return np.array([row[name] for row in rows], np.float32)

    np.testing.assert_array_equal(column(embedded, "embedding"), wanted.embeddings)
    np.testing.assert_array_equal(column(got, "probabilities"), wanted.probabilities)
    np.testing.assert_array_equal(column(got, "uncertainty"), wanted.uncertainty)
    for one, other in zip(got, predicted, strict=True):
        assert (one["label"], one["abstained"]) == (other.label, False)
        assert one["index"] == model.classes.index(other.label)
        assert [each["label"] for each in one["ranking"]] == [name for name, _ in other.ranking]
        assert np.float32(one["probability"]) == np.float32(other.probability)
    assert len({row["label"] for row in got}) > 1  # an answer that never changes would be equal too


@pytest.mark.parametrize("batch", [1, 7])
def test_batches_are_those_of_python(built, artifact, shown, engine, batch):
    model = invariclip.load(artifact, backend=engine, threads=1)
    got = answers(built, artifact, *shown, "--engine", engine, "--threads", 1, "--batch-size", batch, "--embed")
    wanted = model.embed_images(shown, batch_size=batch)
    np.testing.assert_array_equal(np.array([row["embedding"] for row in got], np.float32), wanted)


def test_runs_are_those_of_python(asked):
    for rows in range(1, 300):
        assert asked.ask(f"runs {rows}") == "ok " + " ".join(f"{count}/{bucket}" for count, bucket in plan(rows))


def test_threads_are_those_of_python(built):
    allowed = os.sched_getaffinity(0)
    with built.answering() as asked:
        assert asked.ask("threads") == f"ok {available_threads()}"
    try:
        os.sched_setaffinity(0, {min(allowed)})
        with built.answering() as asked:
            assert asked.ask("threads") == "ok 1"
    finally:
        os.sched_setaffinity(0, allowed)


def test_nothing_is_looked_up_or_written_by_an_engine(built, artifact, shown, engine, tmp_path):
    """ONNX Runtime's builds keep a device id under the user's cache and look a host up, unless they are told not to."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    left_out = ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME")
    environment = {key: value for key, value in os.environ.items() if key not in left_out} | {"HOME": str(tmp_path)}
    calls = "trace=open,openat,creat,mkdir,mkdirat,socket,connect,sendto,execve"
    traced = ["strace", "-f", "--seccomp-bpf", "-o", str(tmp_path / "calls"), "-e", calls]
    words = [artifact, *shown[:2], "--engine", engine, "--threads", 1, "--json"]
    done = subprocess.run(
        [*traced, built.classify, *map(str, words)], capture_output=True, text=True, check=False, env=environment
    )
    if "PTRACE" in done.stderr or "ptrace" in done.stderr:
        pytest.skip(f"strace cannot trace here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "calls").read_text().splitlines()
    assert any("image.onnx" in line for line in lines)  # or it saw nothing
    wrote = [line for line in lines if re.search(r"O_WRONLY|O_RDWR|O_CREAT|(creat|mkdir|mkdirat)\(", line)]
    assert [line for line in wrote if "/dev/" not in line] == []
    assert [line for line in lines if re.search(r"(socket|connect|sendto)\(", line)] == []
    assert len([line for line in lines if "execve(" in line]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["calls"]


def test_one_file_alone_is_enough(built, artifact, shown, engine, tmp_path):
    shutil.copy(artifact / "image.onnx", tmp_path / "alone.onnx")
    how = ["--engine", engine, "--threads", 1]
    assert answers(built, tmp_path / "alone.onnx", *shown, *how) == answers(built, artifact, *shown, *how)


@pytest.mark.parametrize("limit", [0.0, 0.4, 1.0, "calibrated"])
def test_abstains_as_python_does(built, artifact, shown, engine, limit):
    model = invariclip.load(artifact, backend=engine, threads=1)
    got = answers(built, artifact, *shown, "--engine", engine, "--threads", 1, "--abstain-above", limit)
    wanted = model.classify(shown, abstain_above=limit)
    assert [(row["label"], row["abstained"]) for row in got] == [(one.label, one.abstained) for one in wanted]
    if limit == 0.0:
        assert any(row["abstained"] for row in got)


def test_many_callers_get_what_one_gets(built, artifact, engine):
    with built.answering() as asked:
        assert asked.ask(f"crowd {artifact} {engine} 2 8 20") == "ok"


def test_an_installed_library_is_found_and_answers(built, artifact, tmp_path):
    if not built.engines:
        pytest.skip("no engine is here")
    install(built.folder, tmp_path / "prefix")
    project = Path(__file__).parent / "installed"
    found = build(project, tmp_path / "build", f"-DCMAKE_PREFIX_PATH={tmp_path / 'prefix'}")
    assert found == built.engines
    for program in (tmp_path / "build" / "program", built.classify.with_name("invariclip-frame")):
        done = subprocess.run([program, artifact], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        grey = np.full((480, 640, 3), 127, np.uint8)
        model = invariclip.load(artifact, backend=built.engines[0])
        assert done.stdout.startswith(model.classify([grey])[0].label)


def test_the_bench_asks_both_for_the_same(built, artifact, image, engine, tmp_path):
    image(50, 40).tofile(tmp_path / "frame")
    words = [str(tmp_path / "frame"), "50", "40", "classify", str(artifact), engine, "1"]
    row = compare("50×40", built.program("ask"), words, tmp_path, rounds=3, seconds=0.01, progress=silent)
    assert row.equal
    assert np.fromfile(tmp_path / "cpp.answer", np.float32).shape == (6,)


@pytest.mark.parametrize("what", ["load", "unverified"])
def test_the_bench_loads_the_same_artifact_in_both(built, artifact, image, engine, tmp_path, what):
    image(8, 8).tofile(tmp_path / "frame")
    words = [str(tmp_path / "frame"), "8", "8", what, str(artifact), engine, "1"]
    row = compare("tiny", built.program("ask"), words, tmp_path, rounds=3, seconds=0.01, progress=silent)
    assert row.equal
    assert (tmp_path / "cpp.answer").read_text() == invariclip.load(artifact, backend=engine).space_id


def changed(artifact, folder, change):
    """A copy of an artifact whose manifest was changed."""
    copy = shutil.copytree(artifact, folder / "changed.icm")
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    (copy / "manifest.json").write_bytes(seal(json.dumps(manifest).encode()))
    return copy


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.update(schema_version=4), "schema_version 4 is not known; this version reads 3: export again"),
        (lambda m: m.pop("classes"), "'classes' is missing"),
        (lambda m: m["pixels"].update(image_size=[32, 0]), "whole number from 1 to 4096"),
        (lambda m: m["pixels"].update(resize_mode="fit"), "resize_mode 'fit' is not known"),
        (lambda m: m["pixels"].update(interpolation="box"), "interpolation 'box' is not known"),
        (lambda m: m["variants"].pop("float32"), "no variant 'float32'; available: float16"),
        (lambda m: m["variants"]["float32"]["image"].update(path="../image.onnx"), "is not the name of a file"),
        (lambda m: m["variants"]["float32"]["image"].update(path="absent.onnx"), "absent.onnx is missing"),
        (lambda m: m["variants"]["float32"]["image"].update(size_bytes=7), "is not the file that was exported"),
        (lambda m: m["variants"]["float32"]["image"].update(sha256="0" * 64), "digest differs"),
        (lambda m: m["variants"]["float32"]["image"].update(data_sha256="0" * 64), "image.onnx.data"),
        (lambda m: m["variants"]["float32"].update(compute="int4"), "compute 'int4' is not known"),
        (lambda m: m["cdc"].update(abstain_above=2), "abstain_above is not from 0 to 1"),
        (lambda m: m["pixels"].update(image_size=[64, 64]), "does not take 'pixels' as uint8 [N, 64, 64, 3]"),
        (lambda m: m["projection"].update(rank=9), "answers 'embedding' as float32 [N, 9], but it has another shape"),
        (lambda m: m["classes"].pop(), "answers 'probabilities' as float32 [N, 5], but it has another shape"),
    ],
)
def test_a_manifest_that_is_not_true_is_refused_in_one_line(built, artifact, shown, tmp_path, engine, change, reason):
    done = said_by(built, changed(artifact, tmp_path, change), shown[0], "--engine", engine)
    assert done.returncode == 2
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1
    assert not done.stdout


def test_a_link_that_leaves_the_folder_is_refused(built, artifact, shown, tmp_path):
    copy = shutil.copytree(artifact, tmp_path / "linked.icm")
    shutil.move(copy / "image.onnx", tmp_path / "elsewhere.onnx")
    (copy / "image.onnx").symlink_to(tmp_path / "elsewhere.onnx")
    assert "leaves the artifact's folder" in said_by(built, copy, shown[0]).stderr


def test_a_changed_graph_is_refused_whatever_an_engine_makes_of_it(built, artifact, shown, tmp_path, engine):
    copy = shutil.copytree(artifact, tmp_path / "damaged.icm")
    data = bytearray((copy / "image.onnx").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (copy / "image.onnx").write_bytes(data)
    assert "digest differs" in said_by(built, copy, shown[0], "--engine", engine).stderr


def test_an_engine_that_it_was_not_proved_on_is_told(built, artifact, shown, engine, tmp_path):
    copy = changed(artifact, tmp_path, lambda m: m["variants"]["float32"]["parity"].pop(engine))
    other = {"onnxruntime": "openvino", "openvino": "onnxruntime"}[engine]
    done = said_by(built, copy, shown[0], "--engine", engine)
    assert done.returncode == 0
    assert f"was proved on {other}, not on {engine}" in done.stderr


def test_an_engine_that_it_failed_on_is_refused(built, artifact, shown, engine, tmp_path):
    other = {"onnxruntime": "openvino", "openvino": "onnxruntime"}[engine]

    def missed(manifest):
        manifest["variants"]["float32"]["parity"].pop(engine)
        manifest["left_out"] = {f"float32 on {engine}": "image max 9 above 1", f"float16 on {other}": "else"}

    done = said_by(built, changed(artifact, tmp_path, missed), shown[0], "--engine", engine)
    assert done.returncode == 2
    assert f"broke the contract on {engine} when it was exported (image max 9 above 1); it was proved on" in done.stderr
    assert done.stderr.count("\n") == 1


def test_without_learned_templates_there_is_no_uncertainty(built, artifact, shown, engine, tmp_path):
    copy = changed(artifact, tmp_path, lambda m: m.update(cdc=None))
    assert answers(built, copy, shown[0], "--engine", engine)[0]["uncertainty"] is None
    done = said_by(built, copy, shown[0], "--engine", engine, "--abstain-above", "0.5")
    assert done.returncode == 2
    assert "has no learned templates" in done.stderr


def test_templates_that_were_not_calibrated_have_no_threshold(built, artifact, shown, engine, tmp_path):
    copy = changed(artifact, tmp_path, lambda m: m["cdc"].update(abstain_above=None))
    done = said_by(built, copy, shown[0], "--engine", engine, "--abstain-above", "calibrated")
    assert done.returncode == 2
    assert "were not calibrated for a risk" in done.stderr


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["absent.icm", "P"], "no such file or folder"),
        (["EMPTY", "P"], "not an artifact, it holds no manifest.json"),
        (["P", "P"], "is no ONNX file"),
        (["A/text.cdc.onnx", "P"], "does not take 'pixels'"),
        (["A/image.onnx", "P", "--variant", "float32"], "has no variants"),
        (["A", "P", "--variant", "int4"], "no variant 'int4'; available: float16, float32"),
        (["A", "P", "--engine", "abacus"], "no engine 'abacus' was compiled in; available: "),
        (["A", "P", "--abstain-above", "1.5"], "must be a number from 0 to 1"),
        (["A", "P", "--abstain-above", "nan"], "takes a number"),
        (["A", "P", "--threads", "0"], "--threads takes a whole number from 1"),
        (["A", "P", "--batch-size", "2000"], "a batch must be of 1 to 1024"),
        (["A", "absent.ppm"], "absent.ppm: no such file"),
        (["A", "A/manifest.json"], "not an image that is read here"),
        (["A", "P", "--top"], "no option is called --top"),
        (["A"], "give an artifact and at least one image"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(built, artifact, shown, tmp_path, words, reason):
    if not built.engines:
        pytest.skip("no engine is here")
    stands = {"A": artifact, "P": shown[0], "EMPTY": tmp_path}
    put = [stands.get(word.split("/")[0], word) for word in words]
    put = [f"{new}/{old.split('/')[1]}" if "/" in old else new for new, old in zip(put, words, strict=True)]
    done = said_by(built, *put)
    assert done.returncode == 2
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_model_that_was_moved_from_throws_whatever_is_asked_of_it(built, artifact):
    if not built.engines:
        pytest.skip("no engine is here")
    with built.answering() as asked:
        assert asked.ask(f"moved {artifact}") == "ok 16"


def test_digests_are_looked_at_unless_it_is_told_not_to(built, artifact, shown, engine, tmp_path):
    def other(manifest):
        manifest["variants"]["float32"]["image"].update(sha256="0" * 64)

    copy = changed(artifact, tmp_path, other)
    how = ["--engine", engine, "--threads", 1]
    assert "digest differs" in said_by(built, copy, shown[0], *how).stderr
    assert answers(built, copy, *shown, *how, "--no-verify") == answers(built, artifact, *shown, *how)


@settings(max_examples=300, deadline=None)
@given(size=st.integers(0, 300) | st.integers(0, 1 << 16), seed=st.integers(0, 2**32 - 1))
def test_digests_of_every_set_of_instructions_are_those_of_hashlib(asked, size, seed):
    data = np.random.default_rng(seed).bytes(size)
    fast, plain, instructions = asked.ask(f"digests {size}", data).split()[1:]
    assert fast == plain == hashlib.sha256(data).hexdigest()
    known = Path("/proc/cpuinfo")
    if known.is_file() and platform.machine() == "x86_64":
        assert instructions == ("sha-ni" if " sha_ni" in known.read_text() else "portable")


def test_digests(asked, tmp_path):
    for size in (0, 1, 55, 56, 63, 64, 65, 119, 1000, 1 << 20, (1 << 20) + 1):
        data = np.random.default_rng(size).bytes(size)
        (tmp_path / "data").write_bytes(data)
        assert asked.ask(f"sha256 {tmp_path / 'data'}") == f"ok {hashlib.sha256(data).hexdigest()}"
