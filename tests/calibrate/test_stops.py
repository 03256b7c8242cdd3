"""Commands that are stopped while they work: no leftovers, and the same results from the same command afterwards."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

COMMANDS = {
    "embed": ["embed", "ARTIFACT", "IMAGES", "-o", "out.safetensors", "--batch-size", "1"],
    "calibrate": ["calibrate", "--artifact", "ARTIFACT", "--sources", "../sources.json", "--estimator", "identity",
                  "--moments", "moments.safetensors", "-o", "projection.safetensors"],
}  # fmt: skip
STOPS = ((signal.SIGTERM, 0.5), (signal.SIGKILL, 0.8))
"""Signals, and when they come, as a share of the time that the whole command takes."""


def start(words, folder):
    folder.mkdir(exist_ok=True)
    how = {**os.environ, "XDG_CACHE_HOME": str(folder.parent / f"{folder.name}-cache")}
    return subprocess.Popen([sys.executable, "-m", "invariclip", *words, "--quiet"], cwd=folder, env=how,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip


def finish(words, folder):
    process = start(words, folder)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0, said
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_stopped_command_leaves_nothing_and_gives_the_same_afterwards(command, tiny_artifact, tiny_images, tmp_path):
    rng = np.random.default_rng(0)
    for k in range(30):
        first = rng.normal(size=(4000, 32)).astype(np.float32)
        np.save(tmp_path / f"a{k:02}.npy", first)
        np.save(tmp_path / f"b{k:02}.npy", first + rng.normal(size=first.shape).astype(np.float32))
    entry = {"kind": "embeddings", "first": "a*.npy", "second": "b*.npy"}
    (tmp_path / "sources.json").write_text(json.dumps({"sources": [entry]}))
    words = [{"ARTIFACT": str(tiny_artifact), "IMAGES": str(tiny_images)}.get(word, word) for word in COMMANDS[command]]
    started = time.perf_counter()
    wanted = finish(words, tmp_path / "whole")
    whole = time.perf_counter() - started
    for place, (number, share) in enumerate(STOPS):
        folder = tmp_path / f"stopped-{place}"
        process = start(words, folder)
        time.sleep(share * whole)
        process.send_signal(number)
        said = process.communicate(timeout=120)[1].strip()
        assert process.returncode in (0, -number, 143), said  # it may have ended, or not begun to listen
        if process.returncode == 143:
            assert said == b"invariclip: stopped; run the same command again"
        assert {file.name for file in folder.iterdir()} <= set(wanted)
        assert finish(words, folder) == wanted
