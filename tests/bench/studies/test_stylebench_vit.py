"""The head of `reference-vit`: a ridge regression, its temperature and its card."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from invariclip.bench.studies.stylebench import vit
from invariclip.export.reference.models import RECIPES


def test_the_ridge_finds_a_linear_map_behind_centred_features():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(500, 6)).astype(np.float32) + 3
    matrix = rng.normal(size=(6, 4)).astype(np.float32)
    head = vit.fit(features, features @ matrix + 1, 1e-9)
    assert head.matrix == pytest.approx(matrix, abs=1e-3)
    assert head.centre == pytest.approx(features.mean(axis=0), abs=1e-5)
    assert np.linalg.norm(head(features), axis=1) == pytest.approx(np.ones(500))


def test_more_ridge_is_a_smaller_matrix():
    rng = np.random.default_rng(1)
    features, targets = rng.normal(size=(100, 5)).astype(np.float32), rng.normal(size=(100, 3)).astype(np.float32)
    sizes = [np.linalg.norm(vit.fit(features, targets, ridge).matrix) for ridge in (0.01, 1.0, 100.0)]
    assert sizes == sorted(sizes, reverse=True)


def test_the_temperature_is_cold_where_answers_are_right_and_warm_where_they_are_not():
    labels = np.arange(8)
    right = np.eye(8, dtype=np.float32)
    assert vit._temperature(right, labels) > math.log(20)
    assert vit._temperature(-right, labels) == pytest.approx(0)


def test_the_committed_card_is_the_records():
    folder = RECIPES[vit.NAME].folder
    record = json.loads((folder / vit.RECORD_FILE).read_text(encoding="utf-8"))
    assert (folder / vit.CARD_FILE).read_text(encoding="utf-8") == vit.card(record)


def test_the_smoothest_ridge_within_one_standard_error_is_taken():
    scores = {0.01: 22.4, 0.1: 22.0, 0.3: 21.6, 1.0: 19.9}
    assert vit.smoothest(scores, 371) == 0.3
    assert vit.smoothest(scores, 100_000) == 0.01
    assert vit.smoothest(scores, 50) == 1.0
