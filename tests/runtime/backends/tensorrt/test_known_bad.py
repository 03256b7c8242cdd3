"""Releases with a fault on record are refused by name, and others are not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from invariclip.backends.tensorrt.known_bad import EVERY, KNOWN_BAD, MINIMUM, known_faults, require_sound
from invariclip.backends.tensorrt.library import numbers
from invariclip.errors import DeviceError, InputError

VERSIONS = st.lists(st.integers(0, 30), min_size=1, max_size=4).map(lambda parts: ".".join(map(str, parts)))


@pytest.mark.parametrize(
    ("version", "precision", "capability", "source"),
    [
        ("10.0.0.6", "float16", None, "3777"),
        ("10.0.1.6", "float16", None, None),
        ("10.0.0.6", "float32", None, None),
        ("10.7.0", "float32", (8, 9), "4328"),
        ("10.7.0.23", "float16", None, "4328"),
        ("10.8", "float32", (8, 9), None),
        ("10.16.1", "float16", (12, 0), "4837"),
        ("10.16.1.4", "float16", (12, 0), "4837"),
        ("10.16.1", "float16", (9, 0), None),
        ("10.16.1", "float32", (12, 0), None),
        ("10.16.2", "float16", (12, 0), None),
        ("11.4.0.106", "float16", (12, 0), None),
    ],
)
def test_what_is_on_record(version, precision, capability, source):
    if source is None:
        require_sound("tensorrt", version, precision, capability)
        return
    with pytest.raises(
        DeviceError, match=rf"TensorRT {version} is refused for {precision} graphs: .*#{source}.*; install"
    ):
        require_sound("tensorrt", version, precision, capability)
    require_sound("tensorrt", version, precision, capability, accept=True)


@pytest.mark.parametrize(("library", "version"), [("tensorrt", "8.6.1"), ("tensorrt_rtx", "1.1.9")])
def test_what_is_too_old_is_refused_whatever_is_accepted(library, version):
    with pytest.raises(DeviceError, match=rf"{version} is too old; install {'.'.join(map(str, MINIMUM[library]))} or"):
        require_sound(library, version, "float32", None, accept=True)


@given(VERSIONS, st.sampled_from(EVERY), st.sampled_from([None, (8, 9), (9, 0), (12, 0)]))
def test_a_fault_is_told_of_its_own_range_and_precision_alone(version, precision, capability):
    for fault in known_faults("tensorrt", version, precision, capability):
        assert precision in fault.precisions
        assert fault.capability in (None, capability)
        parts = numbers(version) + (0,) * 4
        assert parts >= fault.first
        assert fault.after is None or parts < fault.after + (0,) * 4
    assert not known_faults("tensorrt_rtx", version, precision, capability)


def test_every_entry_names_its_source_and_its_mend():
    for fault in KNOWN_BAD:
        assert "#" in fault.source
        assert fault.reason
        assert fault.mend
        assert set(fault.precisions) <= set(EVERY)
        assert fault.after is None or fault.first < fault.after


def test_versions_begin_with_numbers():
    assert numbers("10.7.0.post1") == (10, 7, 0)
    assert numbers("1.7.1.116") == (1, 7, 1, 116)
    with pytest.raises(InputError, match="is not a version"):
        numbers("unknown")
