"""The bench of the C++ runtime: both sides answer the same bytes, take turns, and the page says what was measured."""

import numpy as np
import pytest

from invariclip.bench.cpp.__main__ import page
from invariclip.bench.cpp.compare import compare
from invariclip.console import silent
from invariclip.measure.worker import WorkerError

HOW = {"rounds": 3, "seconds": 0.01, "progress": silent}


@pytest.fixture
def words(tmp_path, image):
    """Frame, columns and rows."""
    image(50, 40).tofile(tmp_path / "frame")
    return [str(tmp_path / "frame"), "50", "40"]


def test_pixels(built, words, tmp_path):
    row = compare("50×40", built.program("ask"), [*words, "pixels", "24"], tmp_path, **HOW)
    assert row.equal
    assert np.fromfile(tmp_path / "cpp.answer", np.uint8).shape == (24 * 24 * 3,)
    assert row.python_ms >= row.python_best_ms > 0
    assert row.cpp_ms >= row.cpp_best_ms > 0
    assert row.low <= row.faster <= row.high


def test_a_process_that_stops_is_named(built, tmp_path):
    words = [str(tmp_path / "absent"), "50", "40", "pixels", "24"]
    with pytest.raises(WorkerError, match="'python, gone' stopped: FileNotFoundError"):
        compare("gone", built.program("ask"), words, tmp_path, **HOW)


def test_the_page_says_what_was_measured():
    row = {
        "name": "50×40", "python_ms": 2.5, "cpp_ms": 0.5, "python_best_ms": 2.0, "cpp_best_ms": 0.4,
        "python_spread": 0.1, "cpp_spread": 0.2,
        "faster": 5.0, "low": 4.5, "high": 5.5, "equal": True,
    }  # fmt: skip
    found = {
        "model": "reference", "classes": 3, "rounds": 3, "threads": 1, "side": 24,
        "rows": {"pixels": [row], "openvino": [row]},
        "loading": {"model": "large", "bytes": 351448764, "rounds": 5, "load": [0.4, 2.0],
                    "rows": [row | {"name": "openvino, alone"}]},
        "processor": "a processor", "processors": 2, "load": [0.5, 1.25], "versions": {"pillow": "12.3.0"},
    }  # fmt: skip
    text = page(found)
    assert text.count("| 50×40 | 2.50 (+10%) | 0.50 (+20%) | 5.00 × [4.50, 5.50] | 2.00, 0.40 |") == 2
    assert "load average 0.5 before and 1.2 after, of 2 processors" in text
    assert "batch 1, in openvino" in text
    assert "Loading an image graph of 351 MB (large), 5 rounds" in text
    assert "| openvino, alone | 2.50 (+10%)" in text
    assert text.startswith("# In C++\n")
