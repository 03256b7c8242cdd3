"""What commands touch beside what they were asked: no host is looked up, nothing is written elsewhere, nothing is read.

Each command runs once, watched from inside by an audit hook of Python and from outside by strace, which sees what
libraries do as well.
"""

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOOK = """
import json, os, sys

handle = os.open(os.environ["WATCHED_EVENTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
starts = ("socket.", "subprocess.", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "urllib.", "http.client.")
busy = []

def watch(event, arguments):
    if busy or not (event == "open" or event.startswith(starts)):
        return
    busy.append(event)
    plain = [os.fsdecode(each) if isinstance(each, (str, bytes, os.PathLike)) else each for each in arguments]
    if event == "open" and isinstance(plain[0], str):
        plain[0] = os.path.abspath(plain[0])
    os.write(handle, (json.dumps([event, plain], default=repr) + "\\n").encode())
    busy.clear()

sys.addaudithook(watch)
"""
CALLS = (
    "open,openat,openat2,creat,mkdir,mkdirat,link,linkat,rename,renameat2,execve,connect,bind,sendto,sendmsg,sendmmsg"
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
SYSTEM = ("/usr/", "/lib/", "/lib64/", "/sbin/", "/bin/", "/proc/", "/sys/", "/dev/", "/opt/")
"""Libraries, programs, devices, and what the kernel says of the machine."""
CONFIGURATION = re.compile(
    r"/etc/(ld\.so\.cache|ld\.so\.preload|localtime|locale\.alias|os-release|nsswitch\.conf|passwd|mime\.types|"
    r"apache2?/mime\.types|httpd/.*|fonts/.*|magic|host\.conf|ssl/.*|OpenCL/.*)"
)
"""What the C library, Python and drivers read of the system's settings; neither `hosts` nor `resolv.conf`."""
NAME_SERVICE = "/var/run/nscd/socket"
"""Of the C library, asked for the user's name; no host."""
SCRATCH_DEVICES = re.compile(r"/dev/(null|tty|shm/(sem\.|sem-)?[\w.-]+)")


@dataclass(frozen=True)
class Watched:
    """What a command did, and where it was allowed to.

    Attributes:
        events: Of the audit hook: [name, arguments].
        calls: Of strace, one line each; None where it cannot be used.
        readable, writable: Folders and files.
        home: The user's, which was empty.
        port: Where `serve` listened.
    """

    events: list
    calls: list | None
    readable: tuple
    writable: tuple
    home: Path
    port: int = 0

    def strange_to_read(self, name):
        folders = (*self.readable, *self.writable, *interpreter())
        known = name.startswith(SYSTEM) or CONFIGURATION.fullmatch(name) or any(within(name, one) for one in folders)
        return not known

    def strange_to_write(self, name):
        made = Path(name) == self.home / ".cache"  # on the way to our own
        return not (made or SCRATCH_DEVICES.fullmatch(name) or any(within(name, one) for one in self.writable))


def within(name, folder):
    return Path(name).is_relative_to(folder)


@cache
def interpreter():
    """Python, its packages, and this project's rooms, wherever links lead."""
    paths = [sys.prefix, sys.base_prefix, sys.exec_prefix, *sysconfig.get_paths().values()]
    rooms = [ROOT / "build" / "typing", *(ROOT / room for room in ("runtime", "export", "calibrate", "bench"))]
    every = [*map(Path, paths), *rooms]
    return tuple({path for one in every for path in (one, one.resolve())})


@cache
def tracer():
    """The command of strace, or why it cannot be used."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    tried = ["strace", "-f", "--seccomp-bpf", "-o", os.devnull, "true"]
    done = subprocess.run(tried, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"strace cannot trace here: {done.stderr.strip()}"


@pytest.fixture(scope="module")
def watched(tmp_path_factory, tiny_artifact, tiny_checkpoint, tiny_images):
    """Runs a command once: name to `Watched`."""
    styles = tmp_path_factory.mktemp("styles")
    for number, image in enumerate(sorted(tiny_images.iterdir())):
        for style in ("photo", "sketch"):
            target = styles / style / f"kind-{number % 3}" / f"thing-{number:02d}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(image, target)
    load = f"import invariclip; invariclip.load({str(tiny_artifact)!r})"
    model = ("--model", tiny_checkpoint, "--classes", "cat,dog", "--quiet")
    commands = {
        "load": ("-c", load),
        "predict": ("predict", tiny_artifact, tiny_images, "--classes", "sun,moon", "--quiet"),
        "embed": ("embed", tiny_artifact, tiny_images, "-o", "e.safetensors", "--quiet"),
        "adapt": ("adapt", tiny_artifact, "--images", tiny_images, "-o", "site.safetensors", "--quiet"),
        "tune": ("tune", tiny_artifact, "--seconds", "1", "--profile", "profile.json", "--quiet"),
        "serve": ("serve", tiny_artifact, "--port", "0"),
        "export": ("export", *model, "--images", tiny_images, "--variant", "int8", "-o", "a.icm"),
        "build": ("build", *model, "--images", styles, "--pairs-by", "name", "--report", "page.html", "-o", "b.icm"),
    }
    inputs = (tiny_artifact, tiny_images, tiny_checkpoint, styles)

    @cache
    def of(name):
        return watch([str(word) for word in commands[name]], tmp_path_factory.mktemp(name), inputs, image=tiny_images)

    return of


def watch(words, folder, inputs, *, image):
    folders = {"TMPDIR": "tmp", "HOME": "home"}
    for each in ("work", "hook", *folders.values()):
        (folder / each).mkdir()
    (folder / "hook" / "sitecustomize.py").write_text(HOOK)
    left_out = ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "HF_HUB_OFFLINE", "MPLCONFIGDIR")
    environment = {
        **{key: value for key, value in os.environ.items() if key not in left_out},
        **{key: str(folder / each) for key, each in folders.items()},
        "PYTHONPATH": os.pathsep.join([str(folder / "hook"), os.environ.get("PYTHONPATH", "")]),
        "PYTHONDONTWRITEBYTECODE": "1", "WATCHED_EVENTS": str(folder / "events"),
    }  # fmt: skip
    traced = ["strace", "-ff", "--seccomp-bpf", "-y", "-s", "1000", "-e", f"trace={CALLS}", "-o", str(folder / "calls")]
    run = [*([] if tracer() else traced), sys.executable, *([] if words[0] == "-c" else ["-m", "invariclip"]), *words]
    process = subprocess.Popen(run, cwd=folder / "work", env=environment, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    port = asked_once(process, min(image.iterdir())) if words[0] == "serve" else 0
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    events = [json.loads(line) for line in (folder / "events").read_text().splitlines()]
    calls = None if tracer() else [one for file in folder.glob("calls.*") for one in file.read_text().splitlines()]
    readable = (*inputs, folder / "hook")
    writable = (folder / "work", folder / "tmp", folder / "home" / ".cache" / "invariclip", folder / "events")
    return Watched(events, calls, readable, writable, folder / "home", port)


def asked_once(process, image):
    for line in process.stderr:
        if found := re.search(r"at http://127\.0\.0\.1:(\d+)$", line.strip()):
            break
    else:
        pytest.fail(f"it ended with {process.wait()}")
    link = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
    link.request("POST", "/v1/classify", image.read_bytes(), {"content-type": "image/png"})
    assert link.getresponse().status == 200
    link.close()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]) if not tracer() else process.pid, signal.SIGTERM)
    return int(found[1])


NAMES = ("load", "predict", "embed", "adapt", "tune", "serve", "export", "build")


@pytest.mark.parametrize("name", NAMES)
def test_pythons_audit_hook_sees_nothing_that_was_not_asked_for(watched, name):
    seen = watched(name)
    opened = [arguments for event, arguments in seen.events if event == "open" and isinstance(arguments[0], str)]
    assert len(opened) > 20  # or the hook saw nothing
    written = [path for path, _, flags in opened if isinstance(flags, int) and flags & WRITING]
    assert [path for path in written if seen.strange_to_write(path)] == []
    assert [path for path, _, _ in opened if seen.strange_to_read(path) and path not in written] == []
    network = [one for one in seen.events if one[0].startswith(("socket.", "urllib.", "http.client."))]
    allowed = {"socket.__new__", *(("socket.bind", "socket.getaddrinfo") if name == "serve" else ())}
    assert [one for one in network if one[0] not in allowed] == []
    for event, arguments in network:
        if event in ("socket.bind", "socket.getaddrinfo"):
            assert "127.0.0.1" in json.dumps(arguments), arguments
    programs = [one for one in seen.events if one[0] == "subprocess.Popen" or one[0].startswith("os.")]
    assert [one for one in programs if one[1][0] not in ("/sbin/ldconfig", sys.executable)] == []


@pytest.mark.parametrize("name", NAMES)
def test_strace_sees_nothing_that_was_not_asked_for(watched, name):
    if tracer():
        pytest.skip(tracer())
    seen, strange, opened = watched(name), [], 0
    for line in seen.calls:
        call, _, rest = line.partition("(")
        if call in ("connect", "bind", "sendto", "sendmsg", "sendmmsg"):
            if not is_local(call, rest, seen):
                strange.append(line)
            continue
        result = re.search(r"\) += (-?\d+)(?:<(.*)>)?", rest)
        if result is None or result[1].startswith("-"):
            continue
        if call in ("open", "openat", "openat2", "creat"):
            opened += 1
            path, flags = result[2].removesuffix(" (deleted)"), rest
            writes = call == "creat" or re.search(r"O_WRONLY|O_RDWR|O_CREAT", flags)
            if seen.strange_to_write(path) if writes else seen.strange_to_read(path):
                strange.append(line)
        elif call == "execve":
            program = re.match(r'"([^"]*)"', rest)[1]
            if program != sys.executable and seen.strange_to_read(program):
                strange.append(line)
        else:  # names that are made or changed
            names = [Path(one) if one.startswith("/") else None for one in re.findall(r'"([^"]*)"', rest)]
            strange += [line for one in names if one is not None and seen.strange_to_write(str(one))
                        and not str(one).startswith("/proc/self/fd/")]  # fmt: skip
    assert opened > 20
    assert strange == []


def is_local(call, rest, seen):
    """Whether a call for a socket reaches no other machine, nor a service of this one."""
    if call == "sendto" and re.search(r", NULL, 0\) = -?\d+", rest):
        return True  # to the other end of a pair, or of a connection, which `connect` began if this end did
    if seen.port and call == "bind":
        return 'sin_addr=inet_addr("127.0.0.1")' in rest
    return call == "connect" and f'sun_path="{NAME_SERVICE}"' in rest


@pytest.mark.parametrize("name", NAMES)
def test_the_users_home_holds_our_cache_and_nothing_else(watched, name):
    home = watched(name).home
    ours = home / ".cache" / "invariclip"
    files = [path for path in home.rglob("*") if path.is_file()]
    assert [path for path in files if not path.is_relative_to(ours)] == []
    assert list((home.parent / "tmp").iterdir()) == []
