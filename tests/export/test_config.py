"""What an export can be asked for is checked when the question is put, without a model."""

from dataclasses import replace

import pytest

from invariclip.errors import InputError
from invariclip.export.config import ExportConfig
from invariclip.export.graphs.rewrites.plan import NAMES
from invariclip.export.verification.figures import THRESHOLDS, Thresholds


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backends": ("onnxruntime", "tpu")}, "no backend is called 'tpu'; available: onnxruntime"),
        ({"without_rewrites": ("magic",)}, "no rewrite is called 'magic'; available: reparameterized"),
        ({"pixels_in_graph": "conv"}, "form 'conv' is not known; available: resize, matmul"),
        ({"variants": ("int4",)}, "no variant is called 'int4'; available: bfloat16"),
        ({"fidelity": "close"}, "exact"),
        ({"variants": ("int8",), "pixels_in_graph": "resize"}, "leave --pixels-in-graph or --variant out"),
        ({"classes": ("cat",), "templates": ("a photo",)}, "{}"),
        ({"classes": ("cat", "cat")}, "cat"),
    ],
)
def test_mistakes_are_one_line(options, words):
    with pytest.raises(InputError) as raised:
        ExportConfig(**options)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_changed_config_is_checked_again():
    with pytest.raises(InputError, match="no variant is called 'int4'"):
        replace(ExportConfig(), variants=("int4",))


def test_every_rewrite_but_those_left_out_is_applied():
    assert ExportConfig().rewrites == NAMES
    assert ExportConfig(without_rewrites=("tidy",)).rewrites == tuple(name for name in NAMES if name != "tidy")


def test_variants_keep_their_levels_bounds_or_the_users_own():
    assert ExportConfig(fidelity="near").variant_bounds == THRESHOLDS["near"]
    assert ExportConfig(fidelity="near", variant_thresholds=Thresholds(min_top1=0.5)).variant_bounds.min_top1 == 0.5
