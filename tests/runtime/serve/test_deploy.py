"""What docs/deploy holds: its commands are real ones, its probes are routes, and the server runs where they put it."""

import http.client
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import click
import pytest
import yaml

from invariclip.cli.main import cli
from invariclip.cli.ray_options import NOT_ON_RAY
from invariclip.cli.serve_command import serve
from invariclip.serve.app import application
from invariclip.serve.metrics import Metrics
from invariclip.serve.models import ServedModels
from invariclip.serve.origins import names_of
from invariclip.serve.service import Service

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "docs" / "deploy"
WRITABLE = "/tmp"  # noqa: S108 - of a sandbox
MOUNTED = f"{WRITABLE}/mine.icm"
MARGIN = 5
"""Seconds that a supervisor must wait beyond `--grace` before it kills."""


def containerfile():
    """The default command of the container, without the program's name."""
    [command] = re.findall(r"^CMD (\[.*\])$", (DEPLOY / "Containerfile").read_text(), re.MULTILINE)
    return json.loads(command)


def compose():
    """The service in compose.yaml."""
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["invariclip"]


def unit():
    """Keys of the systemd unit; of repeated ones the last."""
    lines = (DEPLOY / "invariclip.service").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def pod():
    """The pod of the Deployment."""
    [deployment] = [
        one for one in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()) if one["kind"] == "Deployment"
    ]
    return deployment["spec"]["template"]["spec"]


def kserve():
    """The container of the InferenceService."""
    [service] = list(yaml.safe_load_all((DEPLOY / "kserve.yaml").read_text()))
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    [container] = service["spec"]["predictor"]["containers"]
    return container


def commands():
    """Each command and the seconds that its supervisor waits after SIGTERM, less what it waits before."""
    seconds = int(compose()["stop_grace_period"].removesuffix("s"))
    before = int(re.search(r"sleep\((\d+)\)", str(pod()["containers"][0]["lifecycle"]))[1])
    return {
        "Containerfile": (containerfile(), None),
        "compose.yaml": (compose()["command"], seconds),
        "invariclip.service": (shlex.split(unit()["ExecStart"])[1:], int(unit()["TimeoutStopSec"])),
        "kserve.yaml": (kserve()["args"], None),
        "kubernetes.yaml": (pod()["containers"][0]["args"], pod()["terminationGracePeriodSeconds"] - before),
    }


@pytest.mark.parametrize("name", commands())
def test_commands_are_ones_that_serve_takes(name):
    (program, *arguments), wait = commands()[name]
    assert program == "serve"
    asked = serve.make_context("serve", list(arguments)).params
    assert asked["port"] == 8000
    if wait is not None:
        assert asked["grace"] + MARGIN <= wait


def test_the_unit_s_reload_is_what_loads_the_artifact_again():
    assert unit()["ExecReload"].split()[1:] == ["-HUP", "$MAINPID"]


def test_the_page_shows_commands_that_exist():
    page = (DEPLOY.parent / "deploy.md").read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL))
    shown = [shlex.split(line)[1:] for line in blocks.splitlines() if line.startswith("invariclip ")]
    assert [words[0] for words in shown] == ["serve", "triton"]
    for name, *arguments in shown:
        command = cli.get_command(click.Context(cli), name)
        params = command.make_context(name, arguments).params
        assert params.get("artifacts", (str(params.get("artifact")),)) == ("mine.icm",)
    [refused] = re.findall(r"^- Not there, and refused: (.*?)\.$", page, re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"`--([a-z-]+)", refused)) - {"port", "access-log"}
    of_adapt = {"max_sites", "adapt_log", "adapt_log_mib"}
    params = {opt: param.name for param in cli.get_command(click.Context(cli), "serve").params for opt in param.opts}
    assert {params[f"--{name}"] for name in named} == set(NOT_ON_RAY) - of_adapt


def test_probes_are_routes_of_the_port_that_is_served(model):
    with closing(Service(model)) as service:
        app, _ = application(ServedModels([service]), Metrics())
    routes = {route.path for route in app.routes}
    container = pod()["containers"][0]
    [port] = container["ports"]
    assert port["containerPort"] == 8000
    probes = [container[name]["httpGet"] for name in ("livenessProbe", "readinessProbe", "startupProbe")]
    assert {probe["path"] for probe in probes} <= routes
    assert {probe["port"] for probe in probes} == {port["name"]}
    named = {kserve()[name]["httpGet"]["path"] for name in ("livenessProbe", "readinessProbe")}
    assert named <= routes
    [path] = re.findall(r"http://127.0.0.1:8000(/\w+)", (DEPLOY / "Containerfile").read_text())
    assert path in routes


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("compose.yaml", "invariclip"),
        *(
            ("kubernetes.yaml", f"invariclip{rest}")
            for rest in ("", ".default", ".default.svc", ".a.svc.cluster.local")
        ),
    ],
)
def test_servers_know_the_names_that_clients_use(name, called):
    (_, *arguments), _ = commands()[name]
    names = names_of("0.0.0.0", serve.make_context("serve", list(arguments)).params["allowed_hosts"])  # noqa: S104
    assert called in names or any(one[:2] == "*." and called.endswith(one[1:]) for one in names)


def test_containers_may_do_little():
    for container in (pod()["containers"][0], kserve()):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
    assert pod()["securityContext"]["runAsNonRoot"] is True
    assert (compose()["read_only"], compose()["cap_drop"]) == (True, ["ALL"])
    assert re.search(r"^USER 65532:65532$", (DEPLOY / "Containerfile").read_text(), re.MULTILINE)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_the_unit_is_one_that_systemd_reads(tmp_path):
    program = f"{sys.executable} -m invariclip "
    text = (DEPLOY / "invariclip.service").read_text().replace("/opt/invariclip/bin/invariclip ", program)
    (tmp_path / "invariclip.service").write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", tmp_path / "invariclip.service"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def _closed_up(artifact):
    """A command in front of another: read-only root, another user, no capabilities, and /tmp alone to write to."""
    # what runs may itself lie below /tmp
    folders = dict.fromkeys(str(Path(one).resolve()) for one in (sys.prefix, sys.base_prefix, ROOT))
    there = [word for one in folders for word in ("--ro-bind", one, one)]
    return [
        "bwrap", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--tmpfs", WRITABLE,
        "--ro-bind", str(artifact), MOUNTED, *there, "--unshare-user", "--uid", "65532", "--gid", "65532",
        "--cap-drop", "ALL", "--chdir", "/", "--die-with-parent",
    ]  # fmt: skip


def _can_close_up(artifact):
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed"
    done = subprocess.run([*_closed_up(artifact), "true"], capture_output=True, text=True, check=False)
    return f"bubblewrap may not be used here ({done.stderr.strip()})" if done.returncode else ""


def test_the_server_needs_neither_a_home_nor_a_disk(tiny_artifact, tiny_images):
    why = _can_close_up(tiny_artifact)
    if why:
        pytest.skip(why)
    paths = {name: os.environ[name] for name in ("PYTHONPATH", "PATH") if name in os.environ}
    command = [sys.executable, "-m", "invariclip", "serve", MOUNTED, "--port", "0"]
    server = subprocess.Popen(
        [*_closed_up(tiny_artifact), *command], stderr=subprocess.PIPE, text=True,
        env={**paths, "XDG_CACHE_HOME": WRITABLE, "HOME": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    try:
        heard = []
        for line in server.stderr:
            heard.append(line)
            if found := re.search(r" at http://[\d.]+:(\d+)$", line.strip()):
                break
        else:
            pytest.fail("".join(heard))
        assert len(heard) == 1, heard  # no warning about a place that cannot be written
        link = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=30)
        link.request("POST", "/v1/classify", min(tiny_images.iterdir()).read_bytes(), {"content-type": "image/png"})
        assert json.load(link.getresponse())["predictions"][0]["label"] in ("cat", "dog", "tree")
        link.close()
    finally:
        server.terminate()
        server.wait(30)
