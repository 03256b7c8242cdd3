"""One interface over two packages: which one is taken, and one line where none is there or a stub is."""

import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest

from invariclip.backends.tensorrt import library
from invariclip.backends.tensorrt.library import Messages, installed, logger, open_library
from invariclip.errors import InputError, MissingExtraError


def stand_in(monkeypatch, name, version):
    module = ModuleType(name)
    module.__version__ = version
    module.__spec__ = SimpleNamespace(name=name)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_tensorrt_comes_before_tensorrt_rtx(monkeypatch):
    stand_in(monkeypatch, "tensorrt_rtx", "1.7.1")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert (open_library().name, open_library().title) == ("tensorrt_rtx", "TensorRT-RTX 1.7.1")
    stand_in(monkeypatch, "tensorrt", "11.4.0")
    assert (open_library().name, open_library().title) == ("tensorrt", "TensorRT 11.4.0")
    assert installed() == ("tensorrt", "tensorrt_rtx")
    assert open_library("tensorrt_rtx").version == "1.7.1"


def test_neither_is_one_line_with_both_ways(monkeypatch):
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    assert installed() == ()
    with pytest.raises(MissingExtraError) as caught:
        open_library()
    assert str(caught.value) == (
        'TensorRT engines need the package tensorrt or tensorrt_rtx: pip install "invariclip[tensorrt]" or '
        'pip install "invariclip[tensorrt-rtx]"'
    )
    with pytest.raises(
        MissingExtraError, match=r'^TensorRT engines need the package tensorrt_rtx: pip install "[^"]+"$'
    ):
        open_library("tensorrt_rtx")


def test_a_stub_whose_libraries_are_missing_says_so(monkeypatch, tmp_path):
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.11: cannot open shared object file')")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtraError, match=r"tensorrt is installed and cannot be imported \(libnvinfer\.so\.11"):
        open_library()


def test_another_name_is_refused():
    with pytest.raises(InputError, match="'tensorflow'; available: tensorrt, tensorrt_rtx"):
        open_library("tensorflow")


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason='pip install "invariclip[tensorrt-rtx]"')
def test_what_a_library_says_is_kept_and_not_printed(capfd):
    trt, messages = open_library("tensorrt_rtx").trt, Messages()
    said = logger(trt, messages)
    said.log(trt.ILogger.ERROR, "one\nerror")
    said.log(trt.ILogger.WARNING, "a warning")
    said.log(trt.ILogger.INFO, "chat")
    assert (messages.line(), messages.warnings) == ("one error", ["a warning"])
    assert Messages().line() == "no reason given"
    assert capfd.readouterr() == ("", "")


def test_messages_stay_short():
    messages = Messages()
    messages.errors.append("x" * 10_000)
    assert len(messages.line()) == 500
    assert library.NAMES == ("tensorrt", "tensorrt_rtx")
