"""The facts of a fit, against their definitions."""

import json

import numpy as np
import pytest

from invariclip.artifact.projection import identity
from invariclip.calibrate.data.moments import of_pairs, of_points
from invariclip.calibrate.projection.diagnostics import diagnose, energies, few
from invariclip.calibrate.projection.estimators import fit


def sample(count, width=6):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(count, width)) * np.linspace(0.5, 2, width)
    return of_points(rows) + of_pairs(rows, rows + rng.normal(size=(count, width)))


def test_facts_are_what_they_say():
    moments = sample(100)
    projection = fit(moments, "icm", 3, 2.0)
    facts = json.loads(json.dumps(diagnose(projection, moments)))
    assert facts["sigma"]["condition"] == pytest.approx(np.linalg.cond(moments.sigma), rel=1e-3)
    assert facts["sigma_delta"]["condition"] == pytest.approx(np.linalg.cond(moments.sigma_delta), rel=1e-3)
    assert facts["sigma_delta"] | {"condition": 0} == {"effective": 100.0, "condition": 0, "rank": 6, "identity": 0.0}
    assert facts["spectrum"][0] == pytest.approx(projection.eigenvalues[0], rel=1e-5)
    assert facts["spectrum"][-1] == pytest.approx(projection.eigenvalues[-1], rel=1e-5)
    kept = projection.A_inv
    share = np.trace(kept.T @ moments.sigma @ kept) / np.trace(moments.sigma)
    assert facts["kept_variation"] == pytest.approx(share, abs=1e-4)
    assert not few(facts, 6)


def test_little_data_and_singular_moments():
    moments = sample(4)
    facts = diagnose(fit(moments, "generalised", 2), moments)
    assert (facts["sigma"]["condition"], facts["sigma"]["rank"]) == (None, 4)
    assert 0 < facts["sigma"]["identity"] < 1
    assert facts["mixed"] == min(facts["sigma_delta"]["identity"], 0.999) > 0
    assert diagnose(fit(moments, "shrinkage", None, 1.0), moments)["mixed"] == 0
    assert few(facts, 6)


def test_without_projection_all_is_kept():
    facts = diagnose(identity(6), sample(50))
    assert (facts["kept_variation"], facts["kept_movement"], facts["spectrum"]) == (1.0, 1.0, None)


def test_no_movement_is_no_division_by_zero():
    rows = np.eye(4)
    moments = of_points(rows) + of_pairs(rows, rows)
    assert energies(identity(4), moments) == {"kept_variation": 1.0, "kept_movement": 0.0}
    facts = diagnose(identity(4), moments)
    assert (facts["sigma_delta"]["rank"], facts["sigma_delta"]["condition"]) == (0, None)
