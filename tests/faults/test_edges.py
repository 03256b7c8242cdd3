"""A full disk, no free descriptor, a place that cannot be written: one line, exit 2, nothing lost, nothing left."""

import os
import re
import resource
import subprocess
import sys

import pytest

from invariclip.bench.studies.stops.trial import tree

COMMANDS = {
    "embed": ("embed", "ARTIFACT", "IMAGES", "-o", "OUT.safetensors"),
    "adapt": ("adapt", "ARTIFACT", "--images", "IMAGES", "--name", "yard", "-o", "OUT.safetensors"),
    "tune": ("tune", "ARTIFACT", "--seconds", "1", "--threads", "1", "--profile", "OUT.json"),
    "calibrate": ("calibrate", "--model", "MODEL", "--images", "STYLES", "--estimator", "icm", "--interventions",
                  "greyscale", "--pairs-by", "name", "-o", "OUT.safetensors"),
    "export": ("export", "--model", "MODEL", "--images", "IMAGES", "-o", "OUT.icm"),
    "build": ("build", "--model", "MODEL", "--images", "STYLES", "--estimator", "icm", "--interventions", "greyscale",
              "--pairs-by", "name", "-o", "OUT.icm"),
}  # fmt: skip
QUICK = ("embed", "adapt", "tune")


@pytest.fixture(scope="module")
def styles(tmp_path_factory, tiny_images):
    """The images in two styles."""
    folder = tmp_path_factory.mktemp("styles")
    for number, image in enumerate(sorted(tiny_images.iterdir())):
        for style in ("photo", "sketch"):
            target = folder / style / f"kind-{number % 3}" / f"thing-{number:02d}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(image.read_bytes())
    return folder


@pytest.fixture
def command(tiny_artifact, tiny_checkpoint, tiny_images, styles, tmp_path):
    """Runs a command under limits in a folder of its own: exit code, lines said, what lies there afterwards."""
    for each in ("work", "tmp", "cache"):
        (tmp_path / each).mkdir()
    (tmp_path / "file").write_text("")
    names = {"ARTIFACT": tiny_artifact, "IMAGES": tiny_images, "MODEL": tiny_checkpoint, "STYLES": styles}

    def of(name, out="work/out", **limits):
        words = [str(names.get(word, word)).replace("OUT", str(out)) for word in COMMANDS[name]]
        environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), "XDG_CACHE_HOME": str(tmp_path / "cache")}

        def limit():
            for kind, value in limits.items():
                resource.setrlimit(getattr(resource, kind), (value, value))

        done = subprocess.run(
            [sys.executable, "-B", "-m", "invariclip", *words, "--quiet"], cwd=tmp_path, env=environment,
            capture_output=True, text=True, check=False, preexec_fn=limit,
        )  # fmt: skip
        said = [line for line in done.stderr.splitlines() if line.startswith("invariclip: ")]
        assert "Traceback" not in done.stderr
        return done.returncode, said, tree(tmp_path)

    return of


def refused(told, before, reason):
    code, said, after = told
    assert code == 2, said
    assert re.search(reason, said[-1]), said
    assert [line for line in said[:-1] if "warning" not in line] == []
    assert after == before


@pytest.mark.parametrize("name", COMMANDS)
def test_a_place_that_cannot_be_written_is_said_before_the_work(command, tmp_path, name):
    (tmp_path / "work" / "kept").write_text("")
    before = tree(tmp_path)
    for out in ("file/out", "/proc/out"):
        refused(command(name, out), before, rf"{out}[\w.]*: cannot be written \(.*\)")


@pytest.mark.parametrize("name", [*QUICK, "export"])
def test_a_full_disk_keeps_the_old_output_and_leaves_no_part_of_the_new(command, tmp_path, tiny_artifact, name):
    out = tmp_path / "work" / {"export": "out.icm", "tune": "out.json"}.get(name, "out.safetensors")
    if name == "export":
        assert subprocess.run(["cp", "-r", tiny_artifact, out], check=True).returncode == 0
    elif name != "tune":  # which reads the one that is there
        out.write_text("old")
    before = tree(tmp_path)
    refused(command(name, RLIMIT_FSIZE=300), before, rf"{out.name}[\w.]*: cannot be written \(File too large\)")


def test_a_full_disk_keeps_the_finished_stage_of_a_build(command, tmp_path):
    """The projection fits into the limit, the tokenizer does not; the next run goes on from the projection."""
    code, said, after = command("build", RLIMIT_FSIZE=200_000)
    assert (code, said) == (2, ["invariclip: work/out.icm: cannot be written (File too large)"])
    kept = [name for name in after if name.startswith("work/out.icm.work/projection-")]
    assert len(kept) == 1
    strange = [name for name in after if not re.match(r"(work|tmp|cache|file)$|work/out\.icm\.work(/|$)", name)]
    assert strange == []
    code, said, whole = command("build")
    assert code == 0, said
    assert {name: whole[name] for name in kept} == {name: after[name] for name in kept}
    assert whole["work/out.icm"] == "folder"


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("files", [6, 10, 64])
def test_few_descriptors_give_the_same_results_or_one_line(command, tmp_path, name, files):
    before = tree(tmp_path)
    told = command(name, RLIMIT_NOFILE=files)
    if told[0] == 2:
        refused(told, before, "Too many open files|the process of .* stopped")
        return
    assert told[0] == 0, told[1]
    few = told[2]
    whole = command(name, "work/again")[2]
    if name != "tune":  # whose measurements differ
        assert few["work/out.safetensors"] == whole["work/again.safetensors"]


def test_export_needs_few_descriptors(command):
    code, said, left = command("export", RLIMIT_NOFILE=64)
    assert code == 0, said
    assert {"work/out.icm/manifest.json", "work/out.icm/image.onnx", "work/out.icm/text.onnx"} <= set(left)


@pytest.mark.parametrize("words", [("--sites", "file"), ("--sites", "nowhere"), ("--adapt", "--adapt-log", "file/log"),
                                   ("--adapt", "--adapt-log", "/proc/log")])  # fmt: skip
def test_serve_refuses_places_for_sites_in_one_line(run, tiny_artifact, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    before = tree(tmp_path)
    code, _, err = run("serve", tiny_artifact, "--port", "0", *words)
    assert code == 2
    assert err.count("\n") == 1
    assert words[-1] in err
    assert tree(tmp_path) == before
