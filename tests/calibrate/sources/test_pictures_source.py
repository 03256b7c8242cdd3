"""Pictures as a source: the same moments as in memory, and nothing left out without a word."""

import json
import pickle
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from invariclip.calibrate.fit import Options, tabulate
from invariclip.calibrate.pairs import Sources, fitted_moments
from invariclip.calibrate.pictures import SkippedPictureWarning, read_pictures
from invariclip.calibrate.sources import pictures as module
from invariclip.calibrate.sources.changes import Changes
from invariclip.calibrate.sources.pictures import EMPTY, SINGLE, Pictures
from invariclip.calibrate.stream import tally as reasons
from invariclip.errors import InputError
from invariclip.export.reference import __file__ as reference
from pathlib import Path

KINDS = ("greyscale", "invert", "posterize")


def in_memory(encoder, path, changes=None, sources=Sources()):
    options = Options(interventions=changes.kinds, draws=changes.draws) if changes else Options()
    table, facts = tabulate(encoder, read_pictures(path), options)
    return fitted_moments(table, sources), facts


def write_folder(root, layout, seed=0):
    """Noise pictures `environment/class/file`; the layout maps environment/class to how many."""
    rng = np.random.default_rng(seed)
    for place, count in layout.items():
        (root / place).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            array = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(array).save(root / place / f"{place.replace('/', '-')}-{index}.png")
    return root


def test_the_bundled_subset_gives_the_moments_of_the_path_in_memory(reading, tmp_path):
    folder = Path(reference).parent
    lines = (folder / "pictures.jsonl").read_text(encoding="utf-8").splitlines()[::4]
    assert len({json.loads(line)["style"] for line in lines}) > 1
    manifest = tmp_path / "subset.jsonl"
    rows = [json.loads(line) for line in lines]
    manifest.write_text("\n".join(json.dumps({**row, "file": str(folder / row["file"])}) for row in rows))
    changes = Changes(KINDS, draws=2)
    encoder = reading.Rowwise()
    options = Options(interventions=changes.kinds, draws=changes.draws)
    table, facts = tabulate(encoder, read_pictures(manifest, allow_outside=True), options)
    read = reading.read_all(Pictures("set", str(manifest), changes=changes, allow_outside=True), encoder)
    reading.assert_same(read.moments, fitted_moments(table))
    assert read.parts["natural"].pairs > 50
    assert read.parts["interventions"].pairs == 2 * len(lines)
    assert read.tally.counts[reasons.LONE] + read.tally.counts[SINGLE] == facts["unpaired_concepts"]
