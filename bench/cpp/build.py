"""The C++ runtime built by CMake, with the engines that are at hand."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import invariclip
from invariclip.errors import InvariclipError, MissingExtraError

SOURCE = Path(invariclip.__file__).parent / "cpp"
"""The C++ runtime's folder."""
ONNXRUNTIME_ROOT = "ONNXRUNTIME_ROOT"
"""The environment variable that names an ONNX Runtime release: its wheel brings the library, but not the headers."""


class BuildError(InvariclipError):
    """CMake or the compiler failed."""

    exit_code = 1


def missing() -> str | None:
    """What a build needs and this machine lacks, in words; None where all is there."""
    if _cmake() is None:
        return "no CMake here: pip install cmake"
    named = os.environ.get("CXX")
    if not any(name and shutil.which(name) for name in (named, "c++", "g++", "clang++")):
        return "no C++ compiler here; install one, or name it in CXX"
    return None


def build(project: Path, folder: Path, *options: str, engines: bool = True) -> tuple[str, ...]:
    """Configures and builds a CMake project that takes in the C++ runtime; what did not change is not built again.

    Args:
        project: The folder of its CMakeLists.txt.
        folder: Where it is built.
        options: Further options of CMake's first call.
        engines: Say where OpenVINO is; without it the project must need no engine.

    Returns:
        The engines that were compiled in.

    Raises:
        MissingExtraError: There is no CMake or no compiler.
        BuildError: One of them failed; the message ends with what it said last.
    """
    lacks = missing()
    if lacks is not None:
        raise MissingExtraError(lacks)
    # -U: an ONNX Runtime that was found last time may be gone, or another
    found = ("-U", "ONNXR*")
    said = cmake(
        "-S",
        str(project),
        "-B",
        str(folder),
        *found,
        "-DCMAKE_BUILD_TYPE=Release",
        *options,
        *(_openvino() if engines else ()),
    )
    cmake("--build", str(folder), "--parallel", "2")
    line = next(line for line in said.splitlines() if "invariclip: engines:" in line)
    return tuple(name for name in line.rpartition(":")[2].strip().split(";") if name)


def install(folder: Path, prefix: Path) -> None:
    """Installs what was built.

    Raises:
        BuildError: CMake failed.
    """
    cmake("--install", str(folder), "--prefix", str(prefix))


def cmake(*arguments: str) -> str:
    """Runs CMake and returns what it said.

    Raises:
        BuildError: It failed; the message ends with what it said last.
    """
    done = subprocess.run([_cmake() or "cmake", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        last = " ".join((done.stdout + done.stderr)[-2000:].split())
        raise BuildError(f"CMake failed ({' '.join(arguments[:2])}): {last}")
    return done.stdout


def _cmake() -> str | None:
    """CMake beside this interpreter, where pip puts it, or on the path."""
    beside = Path(sys.executable).with_name("cmake")
    return str(beside) if beside.is_file() else shutil.which("cmake")


def _openvino() -> tuple[str, ...]:
    """Where the installed wheel of OpenVINO keeps its CMake package."""
    spec = find_spec("openvino")
    places = [] if spec is None else spec.submodule_search_locations or []
    return tuple(f"-DOpenVINO_DIR={Path(place) / 'cmake'}" for place in places[:1])
