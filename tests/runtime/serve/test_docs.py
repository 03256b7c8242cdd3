"""What docs/serve.md shows runs as written, against a server of a tiny model."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import invariclip
from invariclip.artifact.embeddings import read_embeddings
from invariclip.cli.serve_command import serve
from invariclip.preprocessing.pixels import MAX_RESIZED_PIXELS
from invariclip.serve import access_log, connections, incoming
from invariclip.serve.batcher import MARGIN, SHARE
from invariclip.serve.connections import LINGER_BYTES, LINGER_SECONDS, RESERVE, ConnectionLimits
from invariclip.serve.guard import ROUTES
from invariclip.serve.limits import MIB, REASONS, Limits
from invariclip.serve.models import ServedModels
from invariclip.serve.opening import named_artifacts
from invariclip.serve.record import ERROR_CHARACTERS
from invariclip.serve.repository import ModelRepository
from invariclip.serve.requests import DEFAULT_TOP, MAX_TOP
from invariclip.serve.service import Service
from invariclip.serve.sites import SiteRegistry
from invariclip.sites.live_site import CHANGED, LATEST, SAME, UNLIKE, SiteWindow
from invariclip.sites.measuring import begun, training_mean
from invariclip.sites.site_log import ROWS
from invariclip.view import TEXTS_AT_ONCE

PAGE = (Path(__file__).parents[3] / "docs" / "serve.md").read_text(encoding="utf-8")
CURLS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("curl ")
]
PYTHON = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))


@pytest.fixture(scope="module")
def desk(tmp_path_factory, tiny_images):
    folder = tmp_path_factory.mktemp("desk")
    shutil.copy(tiny_images / "00.png", folder / "cat.png")
    shutil.copy(tiny_images / "01.png", folder / "dog.png")
    return folder


@pytest.fixture(scope="module")
def ask(model, serving, tiny_artifact):
    yard = begun(model, "yard", training_mean(tiny_artifact, model.manifest), None)

    def made(name, folder):
        model = invariclip.load(folder, threads=1)
        return Service(model, sites=SiteRegistry(model, known={"yard": yard}), name=name)

    service = made("tiny", tiny_artifact)
    service.warm_up()
    models = ServedModels([service])
    repository = ModelRepository(models, made, {"tiny": tiny_artifact})
    with serving(models, repository=repository, admin_keys=("root",)) as client:
        yield client


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_curl_lines(ask, desk, model):
    assert len(CURLS) == 5
    for line in CURLS:
        here = line.replace("$ADMIN_KEY", "root").replace("/mine/", "/tiny/")
        words = shlex.split(here.replace("localhost:8000", f"127.0.0.1:{ask.port}"))
        done = subprocess.run([*words, "--silent", "--fail-with-body"], cwd=desk, capture_output=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}"
    assert read_embeddings(desk / "texts.safetensors").space_id == model.space_id


def test_lines_of_serve_are_ones_that_it_takes():
    lines = re.findall(r"^invariclip (serve .*)$", PAGE, re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        asked = serve.make_context("serve", shlex.split(line)[1:]).params
        assert next(iter(named_artifacts(asked["artifacts"]))) == "mine"


def test_python_lines(ask, desk):
    code = PYTHON.replace("localhost:8000", f"127.0.0.1:{ask.port}").replace('"mine"', '"tiny"')
    done = subprocess.run([sys.executable, "-c", code], cwd=desk, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    label, lengths, shape = done.stdout.splitlines()
    assert label in ("a cat", "a river, wide")
    assert (lengths, shape) == ("2 8", "(1, 8)")


def test_the_numbers_of_measured_sites_are_the_code_s():
    window = SiteWindow()
    for number, text in (
        (window.floor, "applied before {} images"), (window.step, "updated every {} images"),
        (LATEST, "one of the last {} "), (window.block, "dropped in blocks of {}"), (SAME, "cosine above {}"),
        (f"{UNLIKE:g}", "({} standard"), (CHANGED, "After {} outliers"),
        (f"{window.block * window.blocks:,}", "the last {} images"), (ROWS, "in order, {} to a file"),
    ):  # fmt: skip
        assert text.format(number) in " ".join(PAGE.split())


def test_every_route_and_status_is_documented():
    for route in ROUTES:
        assert re.search(rf"[ `]{re.escape(route)}[`/]", PAGE), route
    for status in (400, 401, 403, 404, 405, 408, 413, 415, 421, 422, 429, 500, 503, 504):
        assert str(status) in PAGE


def test_every_reason_of_a_refusal_is_documented():
    [text] = re.findall(r"- \*\*Reasons\*\* of refusals(.*?)\n- ", PAGE, re.DOTALL)
    assert set(re.findall(r"`([a-z_]+)`", text)) == set(REASONS)


def test_the_bounds_of_connections_are_the_code_s():
    limits, page = ConnectionLimits(), " ".join(PAGE.split())
    for text in (
        f"`--max-connections` ({limits.most:,},", f"`--idle-timeout` ({limits.idle:g} s)", f"less {RESERVE} file",
        f"`--stall-timeout` ({limits.stall:g} s)", f"dropped for {LINGER_SECONDS:g} s or {LINGER_BYTES >> 20} MiB",
        f"or {connections.PROGRESS >> 10} KiB of it", f"less than {incoming.PROGRESS >> 10} KiB came",
    ):  # fmt: skip
        assert text in page


def test_the_limits_are_the_code_s():
    text = " ".join(PAGE.split())
    for number in (
        f"{Limits().json_values:,} names and values",
        f"stands that came {SHARE:g}u seconds later",
        f"slices of {TEXTS_AT_ONCE} prompts",
        f"{MAX_RESIZED_PIXELS // 1_000_000} million pixels after the resize",
        f"from 1 to {MAX_TOP:,}, {DEFAULT_TOP} by default",
        f"up to {Limits().bodies // MIB} MiB",
        f"when {access_log.LINES:,} lines wait",
        f"{ERROR_CHARACTERS} characters of what the client was told",
    ):
        assert number in text
    assert MARGIN == 1.25  # "with a margin of a quarter"
