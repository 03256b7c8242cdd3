"""Whatever happens to a command, its user reads one line."""

import json
import os
import signal
import subprocess
import sys
import time

import click
import pytest

from invariclip.cli.main import main, run_command
from invariclip.console import json_text, printable
from invariclip.errors import MissingExtraError, TuningInterruptedError

RUN = [sys.executable, "-m", "invariclip"]


def ended(raised, capsys, *words):
    @click.command()
    @click.option("--json", is_flag=True)
    def command(**_):
        raise raised

    with pytest.raises(SystemExit) as end:
        run_command(command, "x", list(words))
    return end.value.code, capsys.readouterr()


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (PermissionError(13, "Permission denied", "/a/b"), 2, "/a/b: Permission denied"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (OSError(28, "No space left on device", "/source", None, "/target"), 2, "/target: No space left on device"),
        (OSError(24, "Too many open files", b"caf\xe9"), 2, r"caf\xe9: Too many open files"),
        (RecursionError("maximum recursion depth exceeded"), 2, "nested too deep"),
        (MemoryError(), 2, "not enough memory"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 2, "not Unicode"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_error_of_the_system_is_one_line(raised, code, words, capsys):
    got, said = ended(raised, capsys)
    assert got == code
    assert said.err.strip().startswith("invariclip: ")  # click begins a new line after ^C
    assert words in said.err
    assert said.err.strip().count("\n") == 0
    _, said = ended(raised, capsys, "--json")
    assert words in json.loads(said.out)["error"]


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (TuningInterruptedError("x: interrupted; best so far: y"), "x: interrupted; best so far: y"),
        (ImportError("initialization failed"), None),
        (MissingExtraError("needs onnxruntime"), None),
        (OSError(4, "Interrupted system call"), None),
        (None, None),
    ],
)
@pytest.mark.parametrize(
    ("number", "code", "plain"), [(signal.SIGTERM, 143, "stopped"), (signal.SIGINT, 130, "interrupted")]
)
def test_whatever_a_stop_becomes_on_its_way_it_is_told_as_a_stop(
    capsys, monkeypatch, tmp_path, number, code, plain, raised, words
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("signal.getsignal", lambda _: signal.default_int_handler)
    handlers = {}
    monkeypatch.setattr("signal.signal", handlers.__setitem__)

    @click.command()
    def command():
        try:
            handlers[number](number, None)
        except KeyboardInterrupt:
            if raised is None:
                raise
            raise raised from None

    with pytest.raises(SystemExit) as end:
        run_command(command, "x", [])
    assert end.value.code == code
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"invariclip: {words or plain}")
    assert said.count("\n") == 0
    assert ended(ValueError("later"), capsys)[0] == 70  # a stop of an earlier command is forgotten


class Careless:
    """Fails where nobody can catch it."""

    def __del__(self):
        raise ValueError("a\nb")


def test_what_fails_when_an_object_is_let_go_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)

    @click.command()
    def command():
        Careless()

    with pytest.raises(SystemExit) as end:
        run_command(command, "x", [])
    assert end.value.code == 0
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("invariclip: warning: ")
    assert line.endswith("ValueError: a b")


def test_an_internal_error_names_a_report_with_its_traceback(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, said = ended(ZeroDivisionError("division by zero"), capsys)
    assert code == 70
    [report] = tmp_path.iterdir()
    assert f"unexpected internal error: ZeroDivisionError: division by zero; please report it with {report}" in said.err
    assert said.err.count("\n") == 1
    assert "in command" in report.read_text()
    code, said = ended(ZeroDivisionError("division by zero"), capsys, "--debug")
    assert code == 70
    assert "Traceback" in said.err
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    assert "run it again with --debug" in ended(ZeroDivisionError(), capsys)[1].err


@pytest.mark.parametrize("shell", ["2>&-", ">&- 2>&-", "2>/dev/full"])
def test_a_stream_that_is_closed_or_full_stops_no_work(tiny_artifact, tiny_images, tmp_path, shell):
    script = f"'{sys.executable}' -m invariclip embed '{tiny_artifact}' '{tiny_images}' -o '{tmp_path}/e' {shell}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "e").stat().st_size > 0


def test_results_for_a_full_disk_are_one_line(tiny_artifact, tiny_images):
    script = f"'{sys.executable}' -m invariclip predict '{tiny_artifact}' '{tiny_images}' --quiet > /dev/full"
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=False)
    assert done.returncode == 2
    assert done.stderr.decode() == "invariclip: No space left on device\n"


def test_output_in_an_encoding_that_lacks_a_letter(tiny_artifact, tiny_images):
    script = [*RUN, "predict", str(tiny_artifact), str(min(tiny_images.iterdir())), "--classes", "日本,猫", "--quiet"]
    done = subprocess.run(script, capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": "latin-1"})
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(("after", "number", "code"), [(0.2, signal.SIGINT, 130), (0.7, signal.SIGINT, 130)])
def test_a_stop_at_any_moment_is_one_line(after, number, code):
    process = subprocess.Popen([*RUN, "export", "--model", "nowhere", "-o", "x.icm"], stderr=subprocess.PIPE)
    time.sleep(after)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    if process.returncode == 2:  # it had ended by itself
        return
    if process.returncode == -number:  # before Python itself listened
        return
    assert process.returncode == code
    assert said.strip().count(b"\n") == 0
    assert b"Traceback" not in said


def test_names_that_are_not_utf8_are_the_same_in_every_output(tiny_artifact, tiny_images, tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    with open(name, "wb") as stream:
        stream.write(min(tiny_images.iterdir()).read_bytes())
    for words in (["predict", tiny_artifact, tmp_path], ["embed", tiny_artifact, tmp_path, "-o", tmp_path / "e"]):
        for more in ([], ["--json"]):
            done = subprocess.run([*RUN, *map(str, words), *more, "--quiet"], capture_output=True, check=False)
            assert done.returncode == 0, done.stderr
            done.stdout.decode()
            if words[0] == "predict":
                assert rb"caf\xe9.png" in done.stdout.replace(b"\\\\", b"\\")
            if more:
                json.loads(done.stdout)


def test_printable():
    assert printable("a\udce9b\ud800\U0001f600") == "a\\xe9b\ufffd\U0001f600"
    assert json.loads(json_text(["a\udce9", {"\udc80": "\udbff"}])) == ["a\\xe9", {"\\x80": "\ufffd"}]


def test_an_empty_list_of_classes_is_never_the_artifacts_own(tiny_artifact, tiny_images, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n \n")
    for words in (["--classes", ""], ["--classes", " , "], ["--classes-file", str(tmp_path / "empty.txt")]):
        with pytest.raises(SystemExit) as end:
            main(["predict", str(tiny_artifact), str(tiny_images), *words])
        assert end.value.code == 2
        assert "class" in capsys.readouterr().err


def test_a_byte_order_mark_is_no_part_of_a_class(tiny_artifact, tiny_images, tmp_path, capsys):
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfsun\r\nmoon\r\n")
    with pytest.raises(SystemExit) as end:
        main(["predict", str(tiny_artifact), str(tiny_images), "--classes-file", str(tmp_path / "c.txt"), "--json"])
    assert end.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert {one["label"] for one in told["predictions"]} <= {"sun", "moon"}


STOPPED = """
import os, signal, time
import click
from invariclip.cli.main import run_command

@click.command()
def command():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)

run_command(command, "x", [])
"""


def test_a_stop_by_the_system_is_told_from_an_interruption():
    done = subprocess.run([sys.executable, "-c", STOPPED], capture_output=True, text=True, check=False)
    assert done.returncode == 143
    assert done.stderr.strip() == "invariclip: stopped; run the same command again"


def test_one_class_only_is_warned_of(tiny_artifact, tiny_images, capsys):
    with pytest.raises(SystemExit) as end:
        main(["predict", str(tiny_artifact), str(tiny_images), "--classes", "cat;dog", "--quiet"])
    assert end.value.code == 0
    assert "one class only, so every image is answered with it" in capsys.readouterr().err


def test_an_artifact_that_is_not_there_or_is_an_image(tiny_artifact, tiny_images, tmp_path, capsys):
    image = str(min(tiny_images.iterdir()))
    for wrong, words in (
        (str(tmp_path / "min.icm"), "not an artifact, there is no such folder"),
        (image, "it comes before the images"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["predict", wrong, str(tiny_artifact)])
        assert end.value.code == 2
        assert words in capsys.readouterr().err
