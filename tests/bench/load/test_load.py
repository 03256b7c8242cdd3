"""The server under load: a tiny one is really asked, and the record becomes a table."""

import json

import pytest
from click.testing import CliRunner

from invariclip.bench.load.__main__ import BEGIN, END, OURS, THEIRS, LoadedServer, load, measure, started, with_tables
from invariclip.bench.load.client import request_in
from invariclip.bench.load.torch_server import server
from invariclip.errors import InputError
from invariclip.export.build import export_artifact
from invariclip.export.checkpoints.checkpoint import load_checkpoint
from invariclip.export.config import ExportConfig
from invariclip.preprocessing.find import find_images

PAGE = f"before\n{BEGIN}\nold\n{END}\nafter\n"


def turn(candidate, clients, number, per_second, **more):
    return {
        "candidate": candidate, "clients": clients, "round": number, "answers": 10, "refused": 0,
        "per_second": per_second, "p50": 10.4, "p95": 20.0, "p99": 30.0, "batch": 3.96, "cpu_ms": 21.04,
        "steal": 0.01, "others": 0.5,
        **more,
    }  # fmt: skip


@pytest.fixture
def group():
    speeds = {"batched": (30.0, 20.0, 40.0), "one at a time": (15.0, 20.0, 10.0)}
    turns = [turn(name, 4, n, speed) for name, own in speeds.items() for n, speed in enumerate(own)]
    setting = {"processor": "P", "threads": 2, "rounds": 3, "seconds": 5.0, "images": "32 images", "date": "today",
               "versions": {"onnxruntime": "1"}}  # fmt: skip
    return {"setting": setting, "turns": turns}


def test_the_table_holds_medians_and_ratios_of_the_same_round(group):
    page = with_tables(PAGE, {"Tiny": group})
    assert page.startswith(f"before\n{BEGIN}\n**Tiny** (32 images; 3 rounds of 5 s a row")
    assert page.endswith(f"{END}\nafter\n")
    assert "old" not in page
    assert "other programs took 50% of the processors' time in the median turn, 50% at most" in page
    rows = [line for line in page.splitlines() if line.startswith("| 4")]
    assert rows[0] == "| 4 | batched | 30.0 | 20.0 to 40.0 | 10 | 20 | 30 | 4.0 | 21.0 |  |"
    # 15/30, 20/20, 10/40: the median of the rounds' own ratios, not the ratio of the medians
    assert rows[1].endswith("| 0.50 [0.25, 1.00] |")
    assert with_tables(page, {"Tiny": group}) == page


def test_a_page_without_a_place_for_tables_is_refused(group):
    for page in ("nothing", f"{END}\n{BEGIN}", BEGIN):
        with pytest.raises(InputError, match="no place for the tables"):
            with_tables(page, {"Tiny": group})


def test_what_is_started():
    ours = LoadedServer("a", ("--max-batch", "1")).command("x.icm", ("--model", "m"), 2)
    assert ours[2:] == ["invariclip", "serve", "x.icm", "--port", "0", "--threads", "2", "--max-batch", "1"]
    theirs = LoadedServer("b", (), torch=True).command("x.icm", ("--model", "m"), None)
    assert theirs[2:] == ["invariclip.bench.load.torch_server", "x.icm", "--model", "m"]


def test_a_request_is_http():
    assert request_in("invariclip", b"abc", "").endswith(b"content-length: 3\r\n\r\nabc")


def test_a_server_that_does_not_start_is_told(tiny_artifact):
    command = LoadedServer("a", ("--variant", "int8")).command(tiny_artifact, (), 1)
    with pytest.raises(InputError, match=r"ended before it listened: .*no variant 'int8'"), started(command):
        pytest.fail("it cannot have started")


def test_tiny_servers_under_load(tiny_checkpoint, tiny_images, tmp_path):
    artifact = tmp_path / "plain.icm"
    export_artifact(
        load_checkpoint(str(tiny_checkpoint)),
        artifact,
        ExportConfig(classes=("cat", "dog"), images=find_images([tiny_images])),
    )
    candidates = [OURS[0], OURS[1], THEIRS[0]]
    commands = {one.name: one.command(artifact, ("--model", str(tiny_checkpoint)), 1) for one in candidates}
    turns = measure(commands, tiny_images, (4,), 2, 0.2, 0.2)
    assert [one.candidate for one in turns] == [
        "batched", "one at a time", "PyTorch, batched", "one at a time", "PyTorch, batched", "batched"
    ]  # fmt: skip
    for one in turns:
        assert one.refused == 0
        assert one.answers == pytest.approx(one.per_second * 0.2)
        assert 0 < one.p50 <= one.p95 <= one.p99
        assert 1 <= one.batch <= 4
        assert one.cpu_ms > 0
        assert one.batch == 1 or "batched" in one.candidate


def test_a_checkpoint_of_another_artifact_is_refused(tiny_artifact, tiny_checkpoint):
    """Its embeddings are projected, and the checkpoint's are not."""
    given = [str(tiny_artifact), "--model", str(tiny_checkpoint), "--threads", "1"]
    with pytest.raises(InputError, match=r"was not exported from .*embeddings differ"):
        CliRunner().invoke(server, given, catch_exceptions=False, standalone_mode=False)


def test_the_command_writes_page_and_record(tiny_artifact, tmp_path):
    out = tmp_path / "serve.md"
    out.write_text(PAGE)
    done = CliRunner().invoke(
        load,
        [str(tiny_artifact), "--title", "Tiny", "--candidate", "plain=", "--clients", "1", "--rounds", "3",
         "--warm", "0.1", "--seconds", "0.1", "--threads", "1", "--side", "64", "-o", str(out)],
        catch_exceptions=False, standalone_mode=False,
    )  # fmt: skip
    assert done.return_value == 0
    assert len(json.loads(out.with_suffix(".json").read_text())["Tiny"]["turns"]) == 3
    assert "JPEGs of 64x64" in out.read_text()
    assert "| 1 | plain |" in out.read_text()
