"""What `import invariclip` offers: listed, documented, and with annotations that resolve."""

import inspect
import pydoc
import typing

import pytest

import invariclip

PUBLIC = [
    "Answer", "Answers", "Embeddings", "LiveSite", "Model", "Prediction", "Projection", "QuantizedEmbeddings",
    "RankedClass", "Site", "__version__", "embed_files", "errors", "load", "open_live_site", "quantize",
    "read_embeddings", "read_projection", "read_quantized", "read_site", "search_recall", "write_embeddings",
    "write_site",
]  # fmt: skip
THINGS = [name for name in PUBLIC if name not in ("__version__", "errors")]


def test_the_public_api_is_this_and_no_more():
    assert sorted(invariclip.__all__) == dir(invariclip) == sorted(PUBLIC)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        invariclip.lode  # noqa: B018


def test_help_shows_it():
    text = pydoc.render_doc(invariclip, renderer=pydoc.plaintext)
    for name in THINGS:
        assert name in text


@pytest.mark.parametrize("name", THINGS)
def test_everything_is_documented_and_its_annotations_resolve(name):
    thing = getattr(invariclip, name)
    assert inspect.getdoc(thing)
    if not inspect.isclass(thing):
        assert "return" in typing.get_type_hints(thing)
        return
    for method_name, method in inspect.getmembers(thing, inspect.isfunction):
        if not method_name.startswith("_"):
            assert inspect.getdoc(method), method_name
            assert "return" in typing.get_type_hints(method), method_name
    for attribute, value in inspect.getmembers(thing, lambda one: isinstance(one, property)):
        assert "return" in typing.get_type_hints(value.fget), attribute
