"""The C interface: Python's bits, from C, Rust and ctypes; no argument and no damaged file ends the process."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import invariclip
from invariclip.bench.cpp.build import SOURCE, build, install
from invariclip.sites.site import new_site, write_site


@pytest.fixture(scope="module")
def library(built):
    """The shared library, with an engine."""
    if not built.engines:
        pytest.skip("no engine is here")
    return built.folder / "invariclip" / "libinvariclip_c.so"


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """Where everything is installed to."""
    if not built.engines:
        pytest.skip("no engine is here")
    prefix = tmp_path_factory.mktemp("installed")
    install(built.folder, prefix)
    return prefix


def run(*words, **how):
    return subprocess.run([*map(str, words)], capture_output=True, check=False, **how)


def grey(artifact, engine):
    """What Python answers of a grey frame."""
    frame = np.full((480, 640, 3), 127, np.uint8)
    return invariclip.load(artifact, backend=engine).classify([frame])[0]


def test_a_program_in_c_answers_the_bits_of_python(built, artifact, image, engine):
    frames = [image(60, 44, seed=seed) for seed in range(7)]
    done = run(built.program("answer-c"), artifact, engine, 60, 44, input=b"".join(frame.tobytes() for frame in frames))
    assert done.returncode == 0, done.stderr.decode()
    model = invariclip.load(artifact, backend=engine, threads=1)
    wanted, predicted = model.answer(frames), model.classify(frames)
    parts = (wanted.embeddings, wanted.probabilities, wanted.logits, wanted.uncertainty, wanted.embeddings)
    np.testing.assert_array_equal(
        np.frombuffer(done.stdout, np.uint32), np.concatenate([part.ravel() for part in parts]).view(np.uint32)
    )
    said = [line.split("\t") for line in done.stderr.decode().splitlines()]
    assert said == [[one.label, *(name for name, _ in one.ranking)] for one in predicted]


def test_no_argument_ends_the_process(built, artifact, engine, tmp_path):
    site = tmp_path / "yard.safetensors"
    write_site(site, new_site("yard", "elsewhere", np.full(8, 0.05), 4, {}).adding(np.eye(8)[:6], np.eye(4, 8)))
    done = run(built.program("answer-c"), "--abuse", artifact, engine, site)
    assert done.returncode == 0, done.stderr.decode()
    calls = Path(__file__).with_name("answer.c").read_text().count("    EXPECT(")
    assert done.stdout.decode() == f"{calls} refused, 0 wrong\n"
    assert calls > 50


DAMAGED = """
import ctypes as c, random, shutil, sys
from pathlib import Path
from invariclip.records import seal

class Options(c.Structure):
    _fields_ = (
        ("size", c.c_size_t), ("engine", c.c_char_p), ("variant", c.c_char_p), ("threads", c.c_int32),
        ("unverified", c.c_int32),
    )

library, artifact, engine, folder = c.CDLL(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].encode(), Path(sys.argv[4])
library.invariclip_last_error.restype = c.c_char_p
draw = random.Random(3)
names = ("manifest.json", "image.onnx")
whole = {name: (artifact / name).read_bytes() for name in names}
copy = shutil.copytree(artifact, folder / "copy.icm")
refused = opened = 0
for round_ in range(160):
    name = names[round_ % 2]
    data = bytearray(whole[name])
    for _ in range(1 + draw.randrange(3)):
        place = draw.randrange(len(data))
        what = draw.randrange(3)
        if what == 0:
            data[place] = draw.randrange(256)
        elif what == 1:
            del data[place : place + 1 + draw.randrange(9)]
        else:
            del data[place:]
        if len(data) < 2:
            break
    if name == "manifest.json" and b"file_sha256" in data[:512]:
        try:
            data = bytearray(seal(bytes(data)))
        except Exception:
            pass
    (copy / name).write_bytes(data)
    where = copy / "image.onnx" if round_ % 4 == 3 else copy
    options, model = Options(c.sizeof(Options), engine, None, 1, round_ % 8 > 3), c.c_void_p()
    status = library.invariclip_model_load(str(where).encode(), c.byref(options), c.byref(model))
    message = library.invariclip_last_error()
    if status:
        assert status in (1, 2) and b"\\n" not in message and message, (status, message)
        assert not model.value
        refused += 1
    else:
        library.invariclip_model_free(model)
        opened += 1
    (copy / name).write_bytes(whole[name])
print(refused, opened)
"""


def test_no_damaged_file_ends_the_process(library, artifact, engine, tmp_path):
    done = run(sys.executable, "-c", DAMAGED, library, artifact, engine, tmp_path)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    refused, opened = map(int, done.stdout.split())
    assert refused + opened == 160
    assert refused > 80


def test_the_library_says_its_version_and_exports_nothing_else(library):
    header = (SOURCE / "include" / "invariclip" / "invariclip.h").read_text()
    parts = [header.partition(f"INVARICLIP_VERSION_{name} ")[2].split()[0] for name in ("MAJOR", "MINOR", "PATCH")]
    assert ".".join(parts) == invariclip.__version__.partition("+")[0]
    if shutil.which("nm") is None or shutil.which("readelf") is None:
        pytest.skip("no binutils here")
    names = [line.split()[-1] for line in run("nm", "-D", "--defined-only", library).stdout.decode().splitlines()]
    assert set(names) == set(re.findall(r"INVARICLIP_API [^;(]*?(invariclip_\w+)\(", header))
    assert "[libinvariclip_c.so.1]" in run("readelf", "-d", library).stdout.decode()


def test_rust_calls_it(library, artifact, built, tmp_path):
    if shutil.which("rustc") is None:
        pytest.skip("no rustc here")
    source = SOURCE / "examples" / "frame.rs"
    made = run(
        "rustc", "-O", source, "-o", tmp_path / "frame", "-L", library.parent,
        "-C", f"link-arg=-Wl,-rpath,{library.parent}",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr.decode()
    done = run(tmp_path / "frame", artifact)
    assert done.returncode == 0, done.stderr.decode()
    label, _, probability = done.stdout.decode().strip().rpartition(" ")
    wanted = grey(artifact, built.engines[0])
    assert (label, np.float32(probability)) == (wanted.label, np.float32(wanted.probability))
    failed = run(tmp_path / "frame", tmp_path / "absent.icm")
    assert failed.returncode == 2
    assert b"absent.icm: no such file or folder" in failed.stderr


def test_ctypes_calls_it(library, artifact, built):
    done = run(sys.executable, Path(__file__).with_name("frame.py"), library, artifact)
    assert done.returncode == 0, done.stderr.decode()
    label, _, probability = done.stdout.decode().strip().rpartition(" ")
    wanted = grey(artifact, built.engines[0])
    assert (label, np.float32(probability)) == (wanted.label, np.float32(wanted.probability))


def test_a_program_in_c_is_built_with_pkg_config(installed, artifact, built, tmp_path):
    compiler = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if compiler is None or shutil.which("pkg-config") is None:
        pytest.skip("no C compiler or no pkg-config here")
    place = next(installed.glob("lib*/**/invariclip.pc")).parent
    environment = os.environ | {"PKG_CONFIG_PATH": str(place)}
    flags = run("pkg-config", "--cflags", "--libs", "invariclip", env=environment)
    version = run("pkg-config", "--modversion", "invariclip", env=environment)
    assert version.stdout.decode().strip() == invariclip.__version__.partition("+")[0]
    strict = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic"]
    made = run(
        compiler, *strict, SOURCE / "examples" / "frame.c", "-o", tmp_path / "frame", *flags.stdout.decode().split(),
        f"-Wl,-rpath,{place.parent}", "-Wl,--unresolved-symbols=ignore-in-shared-libs",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr.decode()
    done = run(tmp_path / "frame", artifact)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().startswith(f"{grey(artifact, built.engines[0]).label} ")


def test_a_project_in_c_finds_the_package_and_no_engine(installed, artifact, built, tmp_path):
    project = Path(__file__).parent / "installed_c"
    found = build(project, tmp_path / "build", f"-DCMAKE_PREFIX_PATH={installed}", engines=False)
    assert found == built.engines  # that the library was built with
    done = run(tmp_path / "build" / "program", artifact)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().startswith(f"{grey(artifact, built.engines[0]).label} ")


def test_the_command_is_installed(installed, artifact, image, tmp_path):
    from PIL import Image

    Image.fromarray(image(50, 40)).save(tmp_path / "frame.ppm")
    done = run(installed / "bin" / "invariclip-classify", artifact, tmp_path / "frame.ppm")
    assert done.returncode == 0, done.stderr.decode()
