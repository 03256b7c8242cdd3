"""Classes and templates as prompts: files, named sets, bounds, and the mean in float64 by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invariclip.errors import InputError
from invariclip.preprocessing import prompts

NAMES = st.lists(st.text("abcdef", min_size=1, max_size=4), min_size=1, max_size=9, unique=True)


def embed(texts):
    """Unit vectors that depend on the text alone, float32 as a tower gives them."""
    rows = np.stack([np.random.default_rng(list(text.encode())).normal(size=7) for text in texts])
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(classes=NAMES, templates=st.integers(1, 6), at_once=st.integers(1, 20))
def test_the_bank_is_the_mean_by_hand_however_it_streams(classes, templates, at_once):
    forms = [f"{'x' * index} {{}}" for index in range(templates)]
    blocks = []

    def watched(texts):
        blocks.append(len(texts))
        return embed(texts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "PROMPTS_AT_ONCE", at_once)
        bank = prompts.class_bank(watched, classes, forms)
    assert (bank.dtype, bank.shape) == (np.float64, (len(classes), 7))
    assert max(blocks) <= at_once
    assert sum(blocks) == len(classes) * templates
    for name, row in zip(classes, bank, strict=True):
        mean = np.mean([embed([form.replace("{}", name)])[0].astype(np.float64) for form in forms], axis=0)
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-14)


def test_a_class_comes_in_all_its_templates_before_the_next():
    seen = []

    def watched(texts):
        seen.extend(texts)
        return embed(texts)

    prompts.class_bank(watched, ["cat", "dog"], ["a {}.", "{}"])
    assert seen == ["a cat.", "cat", "a dog.", "dog"]


def test_the_mean_is_taken_after_the_projection():
    from invariclip.artifact.projection import Projection

    projection = Projection(np.random.default_rng(0).normal(size=(7, 3)), "icm")
    forms = ["{}", "a {}", "the {}"]
    bank = prompts.class_bank(lambda texts: projection.apply(embed(texts)), ["cat"], forms)
    texts = embed([form.replace("{}", "cat") for form in forms])
    after = projection.apply(texts).mean(axis=0)
    np.testing.assert_allclose(bank[0], after / np.linalg.norm(after), atol=1e-14)
    # the other order is another vector, so the test can tell
    before = projection.apply(texts.astype(np.float64).mean(axis=0, keepdims=True))[0]
    assert np.abs(bank[0] - before).max() > 1e-3


def test_progress_counts_blocks_of_prompts(monkeypatch):
    monkeypatch.setattr(prompts, "PROMPTS_AT_ONCE", 4)
    seen = []

    def progress(items, *, total=None, desc=""):
        seen.append((total, desc))
        return items

    prompts.class_bank(embed, ["a", "b", "c"], ["{}", "a {}", "b {}"], progress=progress)
    assert seen == [(3, "embed classes")]


@pytest.mark.parametrize("rows", [np.zeros((2, 3)), np.array([[1.0, 0, 0], [-1, 0, 0]]), np.full((2, 3), np.nan)])
def test_prompts_without_a_mean_direction_are_refused(rows):
    with pytest.raises(InputError, match="prompts of class 'cat' have no mean direction"):
        prompts.class_bank(lambda _: rows, ["cat"], ["{}", "a {}"])


@pytest.mark.parametrize(
    ("classes", "templates", "reason"),
    [
        ([], ["{}"], "at least one class"),
        (["a"], [], "at least one class and one template"),
        (["a", " "], ["{}"], r"empty or repeated: \[' '\]"),
        (["a", "b", "a"], ["{}"], r"empty or repeated: \['a'\]"),
        (["a"], ["{} {}"], "exactly one {}"),
        (["a"], ["{}", "none"], "exactly one {}.*'none'"),
        (["a"], ["{}", "a {}", "{}"], "given twice"),
        (range(100_001), ["{}"], "100,001 classes and 1 templates are too many"),
        (["a"], [f"{i} {{}}" for i in range(1001)], "too many; up to 100,000 and 1,000"),
    ],
)
def test_what_cannot_become_prompts(classes, templates, reason):
    with pytest.raises(InputError, match=reason):
        prompts.check_prompts(classes, templates)


def test_a_templates_file(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("\ufeff# of mine\n\na photo of a {}.\n  a {} drawn by hand  \n#a {}\n", encoding="utf-8")
    assert prompts.read_templates(path) == ("a photo of a {}.", "a {} drawn by hand")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"# nothing\n\n", "t.txt: holds no template; write one a line"),
        (b"a {}\nno slot\n", "t.txt: a template needs exactly one {}.*'no slot'"),
        (b"a {}\na {}\n", "t.txt: a template is given twice"),
        (b"\xff\xfe{", "t.txt: cannot be read as text"),
        (b"a {}\n" + b" " * (1 << 24), "larger than a list of templates can be"),
        (None, "t.txt: cannot be read as text"),
    ],
)
def test_wrong_templates_files(tmp_path, content, reason):
    path = tmp_path / "t.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=reason):
        prompts.read_templates(path)


def test_the_ensemble_is_a_set_of_eighty():
    templates = prompts.template_set("ensemble")
    assert len(templates) == len(set(templates)) == 80
    prompts.check_prompts(["dog"], templates)
    assert all(template == template.strip() and template.endswith(".") for template in templates)
    assert not any("{}" in template.replace("{}", "", 1) for template in templates)
    with pytest.raises(InputError, match="no set of templates is called 'ensemle'; available: ensemble"):
        prompts.template_set("ensemle")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("cat\ndog\n".encode("utf-16-le"), r"line 1 holds the character U\+0000"),
        ("cat\ndog\n".encode("utf-16-be"), r"line 1 holds the character U\+0000"),
        (
            b"cat\na\x0bb\n",
            r"line 2 holds the character U\+000B, which belongs to no list of classes; save the file as",
        ),
        ("cat\na\u2028b".encode(), r"line 2 holds the character U\+2028"),
        (b"\xef\xbb\xbf\xef\xbb\xbfcat", r"line 1 holds the character U\+FEFF"),
        (b"cat\r\r\ndog\x85", "cannot be read as text"),
        ("cat\r\r\ndog\x85b".encode(), r"line 3 holds the character U\+0085"),
    ],
)
def test_control_characters_belong_to_no_list(tmp_path, content, said):
    (tmp_path / "list").write_bytes(content)
    with pytest.raises(InputError, match=said):
        prompts.read_lines(tmp_path / "list", "classes")


def test_lines_end_as_in_any_text_file(tmp_path):
    (tmp_path / "list").write_bytes("a\tb\r\nc\rd\n\n e\u00a0f \n".encode())
    assert prompts.read_lines(tmp_path / "list", "classes") == ("a\tb", "c", "d", "e\u00a0f")
