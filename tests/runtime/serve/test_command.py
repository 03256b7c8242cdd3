"""The real command: where it listens, what it refuses to start with, and how it ends."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton

from invariclip.cli.serve_command import read_keys
from invariclip.errors import InputError
from invariclip.serve.opening import named_artifacts
from invariclip.serve.server import Hangups, address_of, listening
from invariclip.sites.measuring import begun, training_mean
from invariclip.sites.site import site_bytes


@pytest.fixture
def started():
    """Starts the command on a free port; returns the process, its port and the line that names it."""
    running = []

    def of(*arguments):
        process = subprocess.Popen(
            [sys.executable, "-m", "invariclip", "serve", *map(str, arguments), "--port", "0", "--threads", "1"],
            stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        running.append(process)
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"at http://127\.0\.0\.1:(\d+)(, gRPC at port \d+)?$", line.strip()):
                return process, int(found[1]), lines
        pytest.fail(f"it ended with {process.wait()}: {lines}")

    yield of
    for process in running:
        process.kill()
        process.communicate()


def asked(port, method, path, body=None, kind="image/png", **headers):
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    link.request(method, path, body, {"content-type": kind, **headers})
    answer = link.getresponse()
    told = answer.status, answer.read()
    link.close()
    return told


def test_grpc_beside_http(started, unsure_artifact, images):
    process, port, lines = started(unsure_artifact, "--grpc-port", "0")
    beside = re.search(r"gRPC at port (\d+)$", lines[-1].strip())[1]
    with triton.InferenceServerClient(f"127.0.0.1:{beside}") as client:
        given = triton.InferInput("images", [1], "BYTES")
        given.set_data_from_numpy(np.array(images[:1], dtype=object))
        assert client.infer("unsure", [given]).as_numpy("probabilities").shape == (1, 3)
        assert asked(port, "GET", "/readyz")[0] == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert process.stderr.read() == ""


def test_where_grpc_cannot_be(run, unsure_artifact, monkeypatch):
    with listening("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        code, _, err = run("serve", unsure_artifact, "--port", "0", "--grpc-port", port)
        assert (code, f"127.0.0.1:{port}: cannot listen there" in err) == (2, True)
        assert "--grpc-port 0 takes a free port" in err
    code, _, err = run("serve", unsure_artifact, "--port", port, "--grpc-port", port)
    assert (code, f"--port and --grpc-port are both {port}; give each its own" in err) == (2, True)
    monkeypatch.delitem(sys.modules, "invariclip.serve.inference_grpc", raising=False)
    monkeypatch.setitem(sys.modules, "grpc", None)
    code, _, err = run("serve", unsure_artifact, "--port", "0", "--grpc-port", "0")
    assert (code, 'pip install "invariclip[grpc]"' in err) == (2, True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_answers_and_ends_with_exit_code_0(started, unsure_artifact, images, number):
    process, port, lines = started(unsure_artifact, "--abstain-above", "calibrated", "--classes", "sun,moon")
    assert lines == [f"invariclip: {unsure_artifact} (float32 on onnxruntime) at http://127.0.0.1:{port}\n"]
    assert asked(port, "GET", "/readyz")[0] == 200
    status, body = asked(port, "POST", "/v1/classify", images[0])
    assert status == 200
    [told] = json.loads(body)["predictions"]
    assert {each["label"] for each in told["ranking"]} == {"sun", "moon"}
    assert told["abstained"]
    process.send_signal(number)
    assert process.wait(20) == 0
    assert process.stderr.read() == ""
    with pytest.raises(ConnectionRefusedError):
        asked(port, "GET", "/healthz")


def test_what_was_taken_before_the_signal_is_answered(started, tiny_artifact, images, until):
    process, port, _ = started(tiny_artifact, "--max-wait-ms", "1500", "--max-batch", "2")
    told = []
    thread = threading.Thread(target=lambda: told.append(asked(port, "POST", "/v1/classify", images[0])))
    thread.start()
    until(lambda: b'invariclip_queue_depth{kind="images"} 1.0' in asked(port, "GET", "/metrics")[1])
    process.send_signal(signal.SIGTERM)  # the image waits for company, which does not come
    thread.join(20)
    assert process.wait(20) == 0
    assert told[0][0] == 200


def told_until(process, pattern):
    """The first line of standard error that a pattern is found in, and those before it."""
    lines = []
    for line in process.stderr:
        lines.append(line)
        if re.search(pattern, line):
            return lines
    pytest.fail(f"it ended with {process.wait()}: {lines}")


def test_a_hangup_loads_the_artifact_again(
    started, tiny_artifact, other_artifact, images, model, other_model, tmp_path
):
    shutil.copytree(tiny_artifact, tmp_path / "v1.icm")
    shutil.copytree(other_artifact, tmp_path / "v2.icm")
    link, key = tmp_path / "now.icm", tmp_path / "admin"
    link.symlink_to("v1.icm")
    key.write_text("root\n")
    process, port, _ = started(link, "--admin-key-file", key)

    def space():
        status, body = asked(port, "POST", "/v1/embed?model=now", images[0])
        assert status == 200
        return json.loads(body)["space_id"]

    assert space() == model.space_id
    (tmp_path / "next").symlink_to("v2.icm")
    (tmp_path / "next").replace(link)
    process.send_signal(signal.SIGHUP)
    [line] = told_until(process, "now: ")
    assert line == f"invariclip: now: loaded again from {link} (float32 on onnxruntime)\n"
    assert space() == other_model.space_id
    (tmp_path / "v2.icm" / "manifest.json").write_text("{}")
    process.send_signal(signal.SIGHUP)
    [line] = told_until(process, "now: ")
    assert line.startswith("invariclip: now: not loaded; the one that was loaded before goes on: ")
    assert space() == other_model.space_id
    shutil.rmtree(tmp_path / "v2.icm")
    shutil.copytree(tiny_artifact, tmp_path / "v2.icm")
    status, body = asked(port, "POST", "/v2/repository/models/now/load", **{"x-api-key": "root"})
    assert (status, json.loads(body)["space_id"]) == (200, model.space_id)
    told_until(process, "loaded again")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert process.stderr.read() == ""


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals here")
def test_a_terminal_that_is_gone_ends_it(tiny_artifact):
    ours, theirs = os.openpty()
    code = "import fcntl, sys, termios; fcntl.ioctl(2, termios.TIOCSCTTY, 0); from invariclip.cli.main import main; "
    process = subprocess.Popen(
        [sys.executable, "-c", f"{code} main(sys.argv[1:])", "serve", str(tiny_artifact), "--port", "0"],
        stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    try:
        said = b""
        while b" at http://" not in said:
            said += os.read(ours, 4096)
        os.close(ours)  # the kernel sends SIGHUP
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


def test_several_artifacts(started, tiny_artifact, other_artifact, images, model, other_model, tmp_path, run):
    root = tmp_path / "root"
    shutil.copytree(other_artifact, root / "third.icm")
    keys, admins = tmp_path / "keys", tmp_path / "admins"
    keys.write_text("one\n")
    admins.write_text("root\n")
    process, port, lines = started(
        tiny_artifact, f"second={other_artifact}", "--model-root", root, "--api-key-file", keys,
        "--admin-key-file", admins,
    )  # fmt: skip
    assert f"{tiny_artifact} (float32 on onnxruntime), second={other_artifact} (float32 on onnxruntime) at" in lines[-1]
    key, root_key = {"x-api-key": "one"}, {"x-api-key": "root"}
    assert asked(port, "POST", "/v2/repository/models/third/load", **root_key)[0] == 200
    listed = json.loads(asked(port, "GET", "/v1/models", **key)[1])["data"]
    assert {one["id"]: one["space_id"] for one in listed} == {
        "tiny": model.space_id, "second": other_model.space_id, "third": other_model.space_id,
    }  # fmt: skip
    process.send_signal(signal.SIGHUP)
    lines = told_until(process, "third: loaded again")
    assert [line.split(": ")[1] for line in lines] == ["third", "tiny", "second", "third"]
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


def test_the_signal_is_left_as_it_was():
    before = signal.getsignal(signal.SIGHUP)
    hangups = Hangups()
    assert signal.getsignal(signal.SIGHUP) == hangups._note
    hangups.close()
    assert signal.getsignal(signal.SIGHUP) == before


def test_artifacts_that_cannot_be_served_together(run, tiny_artifact, other_artifact, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("one\n")
    for arguments, line in (
        ((tiny_artifact, f"tiny={other_artifact}"), "two artifacts are called 'tiny'"),
        ((tiny_artifact, other_artifact, "--site", "x"), "--site belongs to one artifact"),
        ((tiny_artifact, "--model-root", tmp_path, "--projection", "x"), "--projection belongs to one artifact"),
        ((tiny_artifact, "--model-root", tmp_path / "none"), "no such folder; --model-root names one"),
        ((tiny_artifact, other_artifact, "--max-models", "1"), "2 artifacts are more than --max-models 1"),
        ((tiny_artifact, "--api-key-file", keys, "--admin-key-file", keys), "an admin key is one of its own"),
        (("a=",), "write NAME=PATH"),
    ):
        code, _, err = run("serve", *arguments, "--port", "0", "--threads", "1")
        assert (code, len(err.splitlines())) == (2, 1), err
        assert line in err


def test_each_of_several_artifacts_has_sites_of_its_own(
    started, tiny_artifact, other_artifact, images, model, tmp_path
):
    yard = begun(model, "yard", training_mean(tiny_artifact, model.manifest), None)
    (tmp_path / "sites" / "tiny").mkdir(parents=True)
    (tmp_path / "sites" / "tiny" / "yard.safetensors").write_bytes(site_bytes(yard))
    process, port, _ = started(
        tiny_artifact, other_artifact, "--sites", tmp_path / "sites", "--adapt", "--adapt-log", tmp_path / "log"
    )
    for name, known in (("tiny", ["yard"]), ("other", [])):
        told = json.loads(asked(port, "GET", f"/v1/sites?model={name}")[1])
        assert [one["name"] for one in told["sites"]] == known
        assert asked(port, "POST", f"/v1/classify?model={name}&site=hall", images[0])[0] == 200
    text = asked(port, "GET", "/metrics")[1].decode()
    for name in ("tiny", "other"):
        assert f'invariclip_site_seen_total{{key="0",name="{name}",site="hall"}} 1.0' in text
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert sorted(path.name for path in (tmp_path / "log").iterdir()) == ["other", "tiny"]
    assert (tmp_path / "log" / "other" / "key-0" / "hall" / "0001").is_dir()


def test_how_artifacts_are_named(tmp_path):
    here = str(tmp_path / "a=b.icm")
    assert named_artifacts(["x/mine.icm", "other=x/mine.icm", here]) == {
        "mine": Path("x/mine.icm"), "other": Path("x/mine.icm"), "a=b": Path(here),
    }  # fmt: skip
    assert named_artifacts(["./a=b.icm"]) == {"a=b": Path("a=b.icm")}


WAITS = """
import os, sys, time
from invariclip.serve.service import Service
def warm_up(self, real=Service.warm_up):
    print("warming up", file=sys.stderr, flush=True)
    while not os.path.exists(sys.argv[-1]):
        time.sleep(0.01)
    real(self)
Service.warm_up = warm_up
from invariclip.cli.main import main
main(sys.argv[1:-1])
"""


def test_a_hangup_while_it_warms_up_is_heeded_later(tiny_artifact, tmp_path):
    gate = tmp_path / "gate"
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS, "serve", str(tiny_artifact), "--port", "0", "--threads", "1", str(gate)],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr.readline() == "warming up\n"
        process.send_signal(signal.SIGHUP)
        gate.touch()
        lines = told_until(process, "loaded again")
        assert " at http://" in lines[0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()


SLOW = """
import sys, time
from invariclip.serve.service import Service
Service.warm_up = lambda self: print("warming up", file=sys.stderr, flush=True) or time.sleep(60)
from invariclip.cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "stopped"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_while_it_warms_up_ends_it_at_once(tiny_artifact, number, code, word):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "serve", str(tiny_artifact), "--port", "0", "--threads", "1"],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr.readline() == "warming up\n"
        process.send_signal(number)
        _, said = process.communicate(timeout=30)  # it would take 60 s
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == code
    assert said == f"invariclip: {word} while it was warming up; run the same command again\n"


def test_the_access_log_is_written_to_standard_error_or_a_file(started, tiny_artifact, images, tmp_path):
    path = tmp_path / "access.jsonl"
    for where in ("-", path):
        process, port, _ = started(tiny_artifact, "--access-log", where)
        assert asked(port, "POST", "/v1/classify", images[0], **{"x-request-id": "mine"})[0] == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        said = process.stderr.read()
        [line] = (said if where == "-" else path.read_text()).splitlines()
        assert (json.loads(line)["request_id"], json.loads(line)["status"]) == ("mine", 200)


def test_keys_come_from_a_file(started, tiny_artifact, tmp_path, images):
    keys = tmp_path / "keys.txt"
    keys.write_text("# ours\nsesame\n\n  other  \n")
    assert read_keys(keys) == ("sesame", "other")
    _, port, _ = started(tiny_artifact, "--api-key-file", keys)
    assert asked(port, "POST", "/v1/classify", images[0])[0] == 401
    assert asked(port, "POST", "/v1/classify", images[0], authorization="Bearer other")[0] == 200
    assert asked(port, "GET", "/healthz")[0] == 200


def test_files_without_keys_are_refused(tmp_path):
    keys = tmp_path / "keys.txt"
    for content in (b"", b"# none\n", b"\xff\xfe"):
        keys.write_bytes(content)
        with pytest.raises(InputError, match=r"keys\.txt: (holds no key|cannot be read)"):
            read_keys(keys)
    with pytest.raises(InputError, match="cannot be read"):
        read_keys(tmp_path / "absent.txt")


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--abstain-above", "calibrated"], "energy is not; give a number"),
        (["--uncertainty", "evidence"], "no learned templates"),
        (["--variant", "int8"], "no variant 'int8'; available: float32"),
        (["--max-images", "300"], "raise --queue or lower --max-images"),
        (["--template", "no slot"], "exactly one"),
        (["--api-key-file", "absent.txt"], "absent.txt: cannot be read"),
        (["--host", "no.such.host.invalid"], "cannot listen there"),
        (["--allowed-host", "https://clip.example.org"], "give a name without scheme and port"),
        (["--cors-origin", "example.org"], "give scheme, host and port"),
        (["--max-connections", "1000000000"], "lower --max-connections"),
        (["--access-log", "."], "the access log cannot be written there"),
    ],
)
def test_it_does_not_start_with_what_cannot_be_had(run, tiny_artifact, more, reason):
    code, _, err = run("serve", tiny_artifact, "--port", "0", *more)
    assert code == 2
    assert reason in err
    assert err.count("\n") == 1


def test_a_port_in_use_is_named(run, tiny_artifact):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = run("serve", tiny_artifact, "--port", port)
    assert code == 2
    assert f"127.0.0.1:{port}: cannot listen there" in err
    assert "--port 0" in err


def test_addresses_are_urls():
    with listening("127.0.0.1", 0) as sock:
        assert address_of(sock) == f"http://127.0.0.1:{sock.getsockname()[1]}"
    if socket.has_ipv6:
        try:
            with listening("::1", 0) as sock:
                assert address_of(sock) == f"http://[::1]:{sock.getsockname()[1]}"
        except InputError:  # a machine without IPv6
            pass
