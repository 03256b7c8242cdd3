"""Sites: measured from unlabelled images, taken away from embeddings, held against float64 and against mischief."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import invariclip
from invariclip.artifact.embeddings import read_embeddings
from invariclip.artifact.folder import read_manifest
from invariclip.artifact.projection import read_projection
from invariclip.cli.main import main
from invariclip.errors import InputError, ProjectionError, SiteError
from invariclip.preprocessing.find import find_images
from invariclip.sites.site import (
    KIND_SCALE,
    LARGEST_SHIFT,
    PER_KIND,
    PRIOR,
    SITE_FILE,
    Site,
    new_site,
    read_site,
    taken_for,
    write_site,
)

WIDTH = 8


def _unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def _rows(count, seed=0, width=WIDTH, around=0.0):
    return _unit(np.random.default_rng(seed).normal(size=(count, width)) + around).astype(np.float32)


def _site(count=20, *, classes=6, seed=0, around=1.0):
    empty = new_site("yard", "space", np.full(WIDTH, 0.05), classes, {"why": "a test"})
    return empty.adding(_rows(count, seed, around=around), _rows(classes, 99))


def _run(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code, capsys.readouterr()


def test_the_shift_is_the_formula_in_float64():
    rows, bank, mean = _rows(20, around=1.0).astype(np.float64), _rows(6, 99).astype(np.float64), np.full(WIDTH, 0.05)
    logits = KIND_SCALE * rows @ bank.T
    shares = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).mean(axis=0)
    kinds = np.exp(-(shares * np.log(shares)).sum())
    counted = min(20, PER_KIND * (kinds - 1))
    wanted = counted / (counted + PRIOR) * (rows.mean(axis=0) - mean)
    site = _site()
    assert site.kinds == pytest.approx(kinds, abs=1e-6)
    np.testing.assert_allclose(site.shift, wanted, atol=1e-6)
    other = _rows(5, 3)
    np.testing.assert_allclose(site.apply(other), _unit(other.astype(np.float64) - wanted), atol=1e-6)


def test_no_image_moves_nothing():
    site = new_site("yard", "space", np.full(WIDTH, 0.05), 3, {})
    rows = _rows(4)
    assert site.weight == 0
    np.testing.assert_allclose(site.apply(rows), rows, atol=1e-7)


def test_images_of_one_kind_move_next_to_nothing_however_many():
    bank = np.eye(WIDTH)
    rows = np.tile(_unit(np.eye(WIDTH)[0] + 0.05), (1000, 1))
    site = new_site("yard", "space", np.zeros(WIDTH), WIDTH, {}).adding(rows, bank)
    assert site.kinds == pytest.approx(1, abs=1e-3)
    assert site.limited
    assert np.linalg.norm(site.shift) < 1e-3
    varied = new_site("yard", "space", np.zeros(WIDTH), WIDTH, {}).adding(np.tile(np.eye(WIDTH), (100, 1)), bank)
    assert varied.kinds == pytest.approx(WIDTH, rel=1e-6)
    assert not varied.limited
    assert varied.weight == pytest.approx(PER_KIND * (WIDTH - 1) / (PER_KIND * (WIDTH - 1) + PRIOR))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(0, 10))
@settings(max_examples=25, deadline=None)
def test_parts_add_up_to_the_whole_in_any_order(sizes, seed):
    rows, bank = _rows(sum(sizes), seed, around=0.7), _rows(6, 99)
    empty = new_site("yard", "space", np.full(WIDTH, 0.05), 6, {})
    whole = empty.adding(rows, bank)
    parts = np.split(rows, np.cumsum(sizes)[:-1])
    for order in (parts, parts[::-1]):
        site = empty
        for part in order:
            site = site.adding(part, bank)
        assert site.images == whole.images
        np.testing.assert_allclose(site.shift, whole.shift, atol=1e-6)


def test_the_standard_error_is_what_a_bootstrap_says():
    rng, rows = np.random.default_rng(5), _rows(400, 3, around=0.6)
    site = _site(0).adding(rows, _rows(6, 99))
    means = np.stack([rows[rng.integers(0, len(rows), len(rows))].mean(axis=0) for _ in range(400)])
    off = np.linalg.norm(means - rows.mean(axis=0), axis=1)
    assert site.standard_error == pytest.approx(np.sqrt((off**2).mean()), rel=0.05)
    assert np.isinf(_site(1).standard_error)


def test_a_site_says_how_many_images_it_wants():
    few, many = _site(5, around=0.6), _site(4000, around=0.6)
    assert few.wanted is not None
    assert many.wanted is not None
    # with as many as wanted, the error is about a third of the shift
    moved = np.linalg.norm(many.mean - many.training_mean)
    assert np.sqrt((1 - many.mean @ many.mean) / (many.wanted - 1)) == pytest.approx(moved / 3, rel=0.1)
    rows = _rows(4, 1)
    unmoved = new_site("yard", "space", rows.mean(axis=0).astype(np.float64), 6, {}).adding(rows, _rows(6, 99))
    assert unmoved.wanted is None


@given(st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_what_is_adapted_is_of_unit_length(seed):
    adapted = _site(seed=seed, around=1.0).apply(_rows(16, seed + 1))
    assert adapted.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(adapted.astype(np.float64), axis=1), 1, atol=1e-6)


def test_taken_for_are_shares_even_of_opposite_vectors():
    rows = np.concatenate([_rows(4), -_rows(4)])
    shares = taken_for(rows, np.concatenate([_rows(4), -_rows(4)]))
    assert np.isfinite(shares).all()
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"total": np.full(WIDTH, np.nan)}, "not finite"),
        ({"total": np.full(WIDTH, 1e3)}, "longer than unit embeddings"),
        ({"total": np.zeros(WIDTH + 1)}, "one width"),
        ({"images": -1}, "whole number"),
        ({"images": 2.0}, "whole number"),
        ({"training_mean": np.full(WIDTH, 2.0)}, "longer than unit embeddings"),
        ({"taken_for": np.full(6, -1.0)}, "impossible shares"),
        ({"taken_for": np.full(6, np.nan)}, "impossible shares"),
        ({"taken_for": np.full(6, 1.0)}, "do not add up"),
    ],
)
def test_impossible_sums_are_refused(change, said):
    site = _site()
    kept = {name: getattr(site, name) for name in ("total", "taken_for", "training_mean", "images")}
    with pytest.raises(SiteError, match=said):
        Site("yard", "space", **(kept | change))


def test_a_site_that_leaves_nothing_of_an_embedding_is_refused():
    bank = np.eye(WIDTH)
    empty = new_site("yard", "space", -_unit(np.ones(WIDTH)), WIDTH, {})
    with pytest.raises(SiteError, match=f"{LARGEST_SHIFT} can be taken away"):
        empty.adding(np.tile(np.eye(WIDTH), (100, 1)), bank)


@pytest.mark.parametrize("rows", [_rows(3, width=WIDTH + 1), 2 * _rows(3), np.full((3, WIDTH), np.nan), _rows(1)[0]])
def test_what_is_no_unit_embedding_is_not_added(rows):
    with pytest.raises(SiteError):
        _site().adding(rows, _rows(6, 99))


def test_a_file_gives_the_site_back(tmp_path):
    site = _site()
    write_site(tmp_path / "yard.safetensors", site)
    again = read_site(tmp_path / "yard.safetensors")
    assert again.digest == site.digest
    assert (again.name, again.images, again.provenance) == ("yard", 20, {"why": "a test"})
    assert (tmp_path / "yard.safetensors").stat().st_size < 2000


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "yard.safetensors"
    with pytest.raises(SiteError, match="no such file; `invariclip adapt` writes a site"):
        read_site(path)
    write_site(path, _site())
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place])
        with pytest.raises(SiteError):
            read_site(path)
    save_file({"total": np.zeros(WIDTH)}, path)
    with pytest.raises(SiteError, match="not a site"):
        read_site(path)


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", "[]", "null", '{"schema": 1}', '{"schema": NaN}'])
def test_metadata_that_are_none_of_ours_are_refused(text, tmp_path):
    path = tmp_path / "yard.safetensors"
    write_site(path, _site())
    save_file(load_file(path), path, {"invariclip.site": text})
    with pytest.raises(SiteError):
        read_site(path)
    save_file({"A_inv": np.eye(3), "eigenvalues": np.empty(0), "training_mean": np.empty(0)}, path,
              {"invariclip.projection": text})  # fmt: skip
    with pytest.raises(ProjectionError):
        read_projection(path)


def test_a_count_that_no_float_holds_is_refused(tmp_path):
    path = tmp_path / "yard.safetensors"
    write_site(path, _site())
    facts = {"name": "", "space_id": "", "images": 10**400, "provenance": {}}
    path.write_bytes(SITE_FILE.to_bytes(load_file(path), facts))
    with pytest.raises(SiteError, match="not a site"):
        read_site(path)


def test_a_file_of_another_schema_is_refused(tmp_path):
    path = tmp_path / "yard.safetensors"
    write_site(path, _site())
    facts = {"schema": 9, "name": "yard", "space_id": "space", "images": 20, "provenance": {}}
    save_file(load_file(path), path, {"invariclip.site": json.dumps(facts)})
    with pytest.raises(SiteError, match="schema 9 is not known"):
        read_site(path)


@pytest.fixture(scope="module")
def here(tmp_path_factory, tiny_artifact, tiny_images):
    """A site of the tiny images, measured with the tiny artifact."""
    model = invariclip.load(tiny_artifact)
    mean = read_projection(tiny_artifact / "projection.safetensors").training_mean
    rows = model.embed_images(find_images([tiny_images]))
    empty = new_site("here", model.space_id, mean, len(model.classes), {})
    # as if there were more kinds of things than three classes of a random model can tell
    site = empty.adding(rows, model.class_bank())
    path = tmp_path_factory.mktemp("sites") / "here.safetensors"
    write_site(path, site)
    return path


def test_an_adapted_model_answers_like_float64(tiny_artifact, tiny_images, here):
    plain, site, paths = invariclip.load(tiny_artifact), read_site(here), find_images([tiny_images])
    adapted = plain.with_site(site)
    wanted = _unit(plain.embed_images(paths).astype(np.float64) - site.shift.astype(np.float64))
    got = adapted.answer(paths)
    np.testing.assert_allclose(got.embeddings, wanted, atol=1e-6)
    logits = plain.manifest.model.logit_scale * wanted @ plain.class_bank().astype(np.float64).T
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(got.probabilities, shares / shares.sum(axis=1, keepdims=True), atol=1e-5)
    streamed = np.stack([answer.embedding for answer in adapted.stream(paths)])
    np.testing.assert_allclose(streamed, wanted, atol=1e-6)
    # the plain model is as it was, texts too
    assert plain.site is None
    np.testing.assert_array_equal(adapted.embed_texts(["a cat"]), plain.embed_texts(["a cat"]))
    assert adapted.space_id == plain.space_id


def test_classes_can_be_swapped_before_and_after(tiny_artifact, tiny_images, here):
    paths = find_images([tiny_images])
    first = invariclip.load(tiny_artifact, site=here).with_classes(("river", "moon"))
    second = invariclip.load(tiny_artifact).with_classes(("river", "moon")).with_site(read_site(here))
    np.testing.assert_array_equal(first.probabilities(paths), second.probabilities(paths))
    assert first.describe()["site"] == "here"


def test_a_site_of_another_space_is_refused(tiny_artifact, here):
    site = read_site(here)
    other = Site("there", "0" * 32, site.images, site.total, site.taken_for, site.training_mean)
    with pytest.raises(SiteError, match="measure it again"):
        invariclip.load(tiny_artifact).with_site(other)


def test_adapt_writes_what_the_library_measures(tiny_artifact, tiny_images, here, tmp_path, capsys):
    out = tmp_path / "here.safetensors"
    code, said = _run(["adapt", tiny_artifact, "--images", tiny_images, "-o", out, "--json"], capsys)
    told = json.loads(said.out)
    assert code == 0
    assert told["sha256"] == read_site(out).digest == read_site(here).digest
    assert told["images"] == len(find_images([tiny_images]))
    # again, on top of what is known: twice as many images, the same mean
    code, said = _run(["adapt", tiny_artifact, "--images", tiny_images, "--add-to", out, "-o", out, "--quiet"], capsys)
    assert code == 0
    assert read_site(out).images == 2 * told["images"]
    np.testing.assert_allclose(read_site(out).mean, read_site(here).mean, atol=1e-6)


def test_adapt_warns_of_too_few_kinds_of_things(tiny_artifact, tiny_images, tmp_path, capsys):
    one = sorted(find_images([tiny_images]))[0]
    for number in range(12):
        shutil.copy(one, tmp_path / f"{number}{one.suffix}")
    out = tmp_path / "one.safetensors"
    code, said = _run(["adapt", tiny_artifact, "--images", tmp_path, "--classes", "cat", "-o", out, "--quiet"], capsys)
    assert code == 0
    assert "warning: 12 images show about 1.0 kinds of things" in said.err


def test_adapt_names_what_is_missing(tiny_artifact, tiny_images, here, tmp_path, capsys):
    out = tmp_path / "here.safetensors"
    for arguments, said in [
        (["--images", tiny_images, "-o", tmp_path / "here.txt"], "NAME.safetensors"),
        (["--images", tmp_path, "-o", out], ""),
        (["--images", tiny_images, "--classes", "a,b", "--add-to", here, "-o", out], "other classes"),
        (
            ["--images", tiny_images, "--add-to", tmp_path / "none", "-o", out],
            "no such file; `invariclip adapt` writes a site",
        ),
    ]:
        code, told = _run(["adapt", tiny_artifact, *arguments, "--quiet"], capsys)
        assert code == 2
        assert said in told.err
        assert len(told.err.strip().splitlines()) == 1
        assert not out.exists()


def test_an_artifact_without_a_training_mean_says_what_to_do(tiny_checkpoint, tiny_images, tmp_path, capsys):
    from invariclip.export.build import export_artifact
    from invariclip.export.checkpoints.checkpoint import load_checkpoint
    from invariclip.export.config import ExportConfig

    out = tmp_path / "plain.icm"
    export_artifact(
        load_checkpoint(str(tiny_checkpoint)), out, ExportConfig(classes=("cat",), images=find_images([tiny_images]))
    )
    assert read_manifest(out).projection is None
    code, said = _run(["adapt", out, "--images", tiny_images, "-o", tmp_path / "s.safetensors"], capsys)
    assert code == 2
    assert "calibrate with --images" in said.err


def test_predict_and_embed_take_a_site(tiny_artifact, tiny_images, here, tmp_path, capsys):
    paths, adapted = find_images([tiny_images]), invariclip.load(tiny_artifact, site=here)
    code, said = _run(["predict", tiny_artifact, tiny_images, "--site", here, "--json"], capsys)
    told = json.loads(said.out)
    assert code == 0
    assert told["engine"]["site"] == "here"
    wanted = [prediction.label for prediction in adapted.classify(paths)]
    assert [one["label"] for one in told["predictions"]] == wanted
    code, _ = _run(["embed", tiny_artifact, tiny_images, "--site", here, "-o", tmp_path / "e.safetensors", "--quiet"],
                   capsys)  # fmt: skip
    kept = read_embeddings(tmp_path / "e.safetensors")
    assert code == 0
    assert kept.site_sha256 == read_site(here).digest
    assert kept.space_id == adapted.space_id
    np.testing.assert_allclose(kept.vectors, adapted.embed_images(paths), atol=1e-6)
    code, said = _run(["embed", tiny_artifact, "--text", "a", "--site", here, "-o", tmp_path / "t.safetensors"], capsys)
    assert code == 2
    assert "images' embeddings alone" in said.err


def test_learned_templates_are_not_adapted(tiny_artifact, here):
    model = invariclip.load(tiny_artifact)
    model = model._but(opened=replace(model._view.opened, manifest=type("M", (), {"cdc": object()})()))
    with pytest.raises(InputError, match="without --cdc"):
        model.with_site(read_site(here))
