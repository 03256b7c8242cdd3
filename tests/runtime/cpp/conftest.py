"""The C++ runtime, built once, and processes of it that answer."""

import fcntl
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from invariclip.bench.cpp.build import build, missing

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


@dataclass(frozen=True)
class Built:
    """Where the programs are, and which engines are compiled in."""

    folder: Path
    engines: tuple[str, ...]

    @property
    def classify(self):
        return self.folder / "invariclip" / "examples" / "invariclip-classify"

    def program(self, name):
        return self.folder / name

    @contextmanager
    def answering(self, program="answer"):
        process = subprocess.Popen([self.program(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            yield Asked(process)
        finally:
            process.stdin.close()
            process.wait(timeout=60)


class Asked:
    """The tool `answer`, see answer.cpp."""

    def __init__(self, process):
        self._process = process

    def ask(self, line, data=b""):
        self._process.stdin.write(f"{line}\n".encode() + data)
        self._process.stdin.flush()
        return self.line()

    def line(self):
        return self._process.stdout.readline().decode().rstrip("\n")

    def read(self, count):
        return self._process.stdout.read(count)


@pytest.fixture(scope="session")
def built():
    """Library, command line and tools, built where nothing has been or something has changed."""
    lacks = missing()
    if lacks is not None:
        pytest.skip(f"the C++ runtime is not built: {lacks}")
    folder = ROOT / "build" / "cpp-tests"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes share the folder
        return Built(folder, build(HERE, folder))


@pytest.fixture(scope="module")
def asked(built):
    """One process of `answer`."""
    with built.answering() as process:
        yield process


@pytest.fixture(params=["onnxruntime", "openvino"])
def engine(request, built):
    """An engine that was compiled in."""
    if request.param not in built.engines:
        pytest.skip(f"{request.param}'s headers or library are not here (ONNXRUNTIME_ROOT, or pip's openvino)")
    return request.param


@pytest.fixture(scope="session")
def artifact(tmp_path_factory, tiny_checkpoint, tiny_images, tiny_projection):
    """Learned templates that were calibrated, a projection, float32 and float16 weights, both engines."""
    from invariclip.artifact.learned_prompts import LearnedPrompts
    from invariclip.export.build import export_artifact
    from invariclip.export.checkpoints.checkpoint import load_checkpoint
    from invariclip.export.config import ExportConfig

    checkpoint = load_checkpoint(str(tiny_checkpoint))
    context = (0.02 * np.random.default_rng(5).normal(size=(2, 3, 16))).astype(np.float32)
    learned = LearnedPrompts(
        context, np.array([0.2, 0.1, 0.3]), np.array([-1.0, 0.5, -3.0]), np.array([0.1, -0.2, 0.3]), ("a {}",),
        checkpoint.sha256, tiny_projection.digest, abstain_above=0.4,
    )  # fmt: skip
    out = tmp_path_factory.mktemp("cpp") / "unsure.icm"
    export_artifact(
        checkpoint,
        out,
        ExportConfig(
            classes=("cat", 'a "red" house', "猫", "tree", "dog", "sun"),
            images=[tiny_images],
            backends=("onnxruntime", "openvino"),
            variants=("float16",),
            fidelity="near",
            threads=1,
        ),
        projection=tiny_projection,
        learned_prompts=learned,
    )
    return out


@pytest.fixture(scope="session")
def image():
    """(columns, rows, channels, seed) → an image with edges and noise: another filter or a shift would show."""

    def of(columns, rows, channels=3, seed=0):
        rng = np.random.default_rng(seed)
        y, x = np.mgrid[0:rows, 0:columns]
        base = np.stack([x * 3 % 256, y * 5 % 256, (x + y) * 2 % 256, np.where(x > y, 255, 60)], axis=-1)
        noisy = np.clip(base[..., :channels] + rng.integers(-70, 70, (rows, columns, channels)), 0, 255)
        return np.ascontiguousarray(noisy.astype(np.uint8))

    return of
