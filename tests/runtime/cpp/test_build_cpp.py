"""How the C++ runtime is built: with an engine or not at all, also for another processor, and under sanitizers."""

import os
import shutil
import subprocess

import pytest

from invariclip.bench.cpp.build import SOURCE, BuildError, cmake, missing

TOOLCHAIN = """
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_FIND_ROOT_PATH {root})
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)
"""
"""As the NDK, Yocto and Buildroot write theirs."""
PIXELS = """
#include <invariclip/invariclip.hpp>
#include "sha256.hpp"
#include <cstdio>
int main() {
    invariclip::Pixels pixels{invariclip::PixelSpec{}};
    std::vector<unsigned char> frame(90 * 70 * 3), out(pixels.spec().bytes());
    for (std::size_t at = 0; at < frame.size(); ++at) frame[at] = static_cast<unsigned char>(at * at >> 5);
    pixels.fit({frame.data(), 90, 70}, out.data());
    const std::string_view bytes(reinterpret_cast<const char*>(out.data()), out.size());
    if (invariclip::sha256_of(bytes) != invariclip::sha256_portable(bytes)) return 1;
    std::printf("%s %s\\n", invariclip::sha256_of(bytes).c_str(), invariclip::sha256_instructions());
}
"""


@pytest.fixture
def configured(tmp_path, monkeypatch):
    """Configures the C++ runtime without an engine of this machine, and says what CMake said."""
    lacks = missing()
    if lacks is not None:
        pytest.skip(f"the C++ runtime is not built: {lacks}")
    monkeypatch.delenv("ONNXRUNTIME_ROOT", raising=False)

    def of(*options):
        hidden = ("-DINVARICLIP_OPENVINO=OFF", f"-DCMAKE_PREFIX_PATH={tmp_path / 'nothing'}")
        return cmake("-S", str(SOURCE), "-B", str(tmp_path / "build"), *hidden, *options)

    return of


def engine_at(folder):
    """What CMake looks for of ONNX Runtime; it is not compiled here."""
    for name in ("include/onnxruntime_cxx_api.h", "lib/libonnxruntime.so"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_a_build_without_an_engine_is_refused_unless_it_is_asked_for(configured):
    with pytest.raises(BuildError, match="no engine was found, so no model could be opened: name one by OpenVINO_DIR"):
        configured("-DINVARICLIP_ONNXRUNTIME=OFF")
    assert "invariclip: engines: \n" in configured("-DINVARICLIP_ONNXRUNTIME=OFF", "-DINVARICLIP_WITHOUT_ENGINE=ON")


def test_an_engine_that_was_named_and_is_not_there_is_never_left_out(configured, tmp_path):
    with pytest.raises(BuildError, match=r"ONNXRuntime is not in .*nowhere, which was named for it"):
        configured(f"-DONNXRUNTIME_ROOT={tmp_path / 'nowhere'}", "-DINVARICLIP_WITHOUT_ENGINE=ON")


def test_a_cross_build_finds_the_engine_that_it_is_given(configured, tmp_path):
    if shutil.which("aarch64-linux-gnu-g++") is None or shutil.which("aarch64-linux-gnu-gcc") is None:
        pytest.skip("no aarch64-linux-gnu-g++ and -gcc here")
    (tmp_path / "toolchain.cmake").write_text(TOOLCHAIN.format(root=tmp_path / "sysroot"))
    said = configured(
        f"-DCMAKE_TOOLCHAIN_FILE={tmp_path / 'toolchain.cmake'}", f"-DONNXRUNTIME_ROOT={engine_at(tmp_path / 'engine')}"
    )
    assert "invariclip: engines: onnxruntime" in said


def test_cmake_says_which_images_are_read(configured):
    said = configured("-DINVARICLIP_ONNXRUNTIME=OFF", "-DINVARICLIP_WITHOUT_ENGINE=ON")
    line = next(line for line in said.splitlines() if "images that the command line reads: PPM, PGM" in line)
    assert all(name in line for name in ("JPEG", "PNG", "WebP"))
    without = "-DCMAKE_DISABLE_FIND_PACKAGE_PNG=ON", "-DCMAKE_DISABLE_FIND_PACKAGE_WebP=ON"
    said = configured("-DINVARICLIP_ONNXRUNTIME=OFF", "-DINVARICLIP_WITHOUT_ENGINE=ON", *without)
    assert "; not PNG, WebP, whose library or headers were not found" in said.replace("not JPEG, ", "not ")


def compiled(tmp_path, *command):
    (tmp_path / "main.cpp").write_text(PIXELS)
    sources = [SOURCE / "src" / f"{name}.cpp" for name in ("passes", "pixels", "plan", "sha256", "sha256_blocks")]
    includes = [f"-I{SOURCE / 'include'}", f"-I{SOURCE / 'src'}"]
    program = tmp_path / "main"
    words = [*command, "-std=c++17", "-O1", *includes, *sources, tmp_path / "main.cpp", "-o", program]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    return program, done


@pytest.fixture
def plain(tmp_path):
    """The digest of some pixels, as this machine computes them."""
    compiler = os.environ.get("CXX") or next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if compiler is None:
        pytest.skip("no C++ compiler here")
    folder = tmp_path / "plain"
    folder.mkdir()
    program, done = compiled(folder, compiler)
    assert done.returncode == 0, done.stderr
    return compiler, subprocess.check_output([program], text=True).split()


@pytest.mark.parametrize("sanitizer", ["thread", "address", "undefined"])
def test_programs_under_sanitizers_start_and_compute_the_same(plain, tmp_path, sanitizer):
    compiler, wanted = plain
    program, done = compiled(tmp_path, compiler, f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all")
    if done.returncode:
        pytest.skip(f"the compiler has no sanitizer '{sanitizer}' here: {done.stderr.strip().splitlines()[-1]}")
    ran = subprocess.run([program], capture_output=True, text=True, check=False)
    if "unexpected memory mapping" in ran.stderr:
        pytest.skip("this kernel lays memory out otherwise than the thread sanitizer knows")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == wanted


def test_another_processor_computes_the_same(plain, tmp_path):
    for name in ("aarch64-linux-gnu-g++", "qemu-aarch64"):
        if shutil.which(name) is None:
            pytest.skip(f"no {name} here")
    program, done = compiled(tmp_path, "aarch64-linux-gnu-g++", "-static")
    assert done.returncode == 0, done.stderr
    digest, instructions = subprocess.check_output(["qemu-aarch64", program], text=True).split()
    assert digest == plain[1][0]
    assert instructions == "armv8"
