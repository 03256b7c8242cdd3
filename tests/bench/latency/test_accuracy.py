"""Agreement with the reference: exact for itself, and it sees what is wrong."""

import numpy as np
import pytest

from invariclip.bench.latency.prepare import Reference, figures
from invariclip.errors import InputError


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def reference():
    rng = np.random.default_rng(0)
    plain = unit(rng.normal(size=(40, 16)))
    rows = np.arange(0, 40, 4)
    altered = unit(plain[rows] + rng.normal(0, 0.1, (10, 16)))
    return Reference(plain, altered, rows, unit(rng.normal(size=(7, 16))))


def test_the_reference_agrees_with_itself_whatever_the_length(reference, tmp_path):
    reference.save(tmp_path / "r.npz")
    stored = Reference.read(tmp_path / "r.npz")
    found = figures(stored, 3 * reference.plain, 3 * reference.altered)
    assert found["cosine_min"] == pytest.approx(1)
    assert found["top1_agreement"] == 1
    assert found["gap_increase"] == pytest.approx(0, abs=1e-12)
    assert found["gap"] > 0
    assert (found["images"], found["texts"], found["non_finite"]) == (40, 7, 0)


def test_a_candidate_that_is_wrong_shows_in_the_figure_that_is_about_it(reference):
    plain = reference.plain.copy()
    plain[3] = -plain[3]
    found = figures(reference, plain, reference.altered)
    assert found["cosine_min"] == pytest.approx(-1)
    assert found["cosine_mean"] == pytest.approx(38 / 40)
    assert found["top1_agreement"] == pytest.approx(39 / 40)
    moved = figures(reference, reference.plain, np.roll(reference.altered, 1, axis=0))
    assert moved["gap_increase"] > 0.5
    assert moved["cosine_min"] == pytest.approx(1)


def test_no_number_is_no_figure_and_another_shape_is_refused(reference):
    plain = reference.plain.copy()
    plain[0, 0] = np.nan
    found = figures(reference, plain, reference.altered)
    assert (found["cosine_min"], found["non_finite"]) == (None, 1)
    assert found["top1_agreement"] == pytest.approx(39 / 40)
    with pytest.raises(InputError, match="another model's or projection's"):
        figures(reference, plain[:, :8], reference.altered)
