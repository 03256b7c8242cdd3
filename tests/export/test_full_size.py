"""Full-size architectures with random weights, on bundled pictures: exact, top-1 equal, and no node more.

Few pictures, so that the suite stays bearable; `python -m invariclip.export.parity` makes the committed table on 240.
"""

import pytest

from invariclip.export import evidence, parity
from invariclip.export.checkpoint import load_checkpoint


@pytest.fixture
def fewer(monkeypatch):
    """Twelve bundled pictures, every twelfth text, and one of the two projections."""
    projections_of = parity.projections_of
    monkeypatch.setattr(evidence, "BUNDLED_LIMIT", 12)
    monkeypatch.setattr(evidence, "TEXTS", evidence.TEXTS[::12])
    monkeypatch.setattr(
        parity, "projections_of", lambda D: {k: v for k, v in projections_of(D).items() if "full" not in k}
    )


@pytest.mark.parametrize("model", ["ViT-B-32", "RN50"])
def test_parity_of_a_full_size_model(fewer, model):
    rows, broken = parity.rows_of(parity.stirred(load_checkpoint(model, allow_random=True)), (), threads=2)
    assert broken == []
    assert len(rows) == 4
    assert sum("| folded |" in row for row in rows) == 2
    assert all("100.0% of" in row for row in rows)


def test_the_reference_checkpoint(fewer):
    loaded = load_checkpoint("reference")
    assert loaded.embed_dim >= 64
    rows, broken = parity.rows_of(loaded, (), threads=2)
    assert broken == []
    assert all(row.startswith("| reference | ") for row in rows)
    page = parity.page(rows, broken, {"torch": "x"})
    assert "Broken bounds: none." in page
    assert len({row.count("|") for row in page.splitlines() if row.startswith("|")}) == 1


def test_a_broken_bound_is_named_on_the_page():
    assert "Broken bounds: one; two." in parity.page([], ["one", "two"], {})
