"""Measuring a site from many images: in parts, resumed to the same bits, and from embeddings."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

import invariclip
from invariclip.artifact.embeddings import EMBEDDINGS_FILE
from invariclip.artifact.projection import read_projection
from invariclip.cli.main import main
from invariclip.console import UnreadableImages
from invariclip.errors import InputError, SiteError
from invariclip.preprocessing.decode import IMAGE_SUFFIXES
from invariclip.preprocessing.find import find_images, walk_images
from invariclip.sites import measuring
from invariclip.sites.measuring import begun, measure, measure_embeddings
from invariclip.sites.site import read_site, write_site


@pytest.fixture(scope="module")
def model(tiny_artifact):
    return invariclip.load(tiny_artifact)


@pytest.fixture(scope="module")
def empty(model, tiny_artifact):
    return begun(model, "yard", read_projection(tiny_artifact / "projection.safetensors").training_mean, None)


@pytest.fixture(scope="module")
def many(tmp_path_factory, tiny_images):
    """Several parts of images, one of which is none."""
    folder = tmp_path_factory.mktemp("many")
    known = find_images([tiny_images])
    for number in range(23):
        path = known[number % len(known)]
        shutil.copy(path, folder / f"{number:03d}{path.suffix}")
    (folder / "011.png").unlink(missing_ok=True)
    (folder / "011.jpg").write_bytes(b"not an image")
    return folder


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(measuring, "PART", 4)
    monkeypatch.setattr(measuring, "SAVE_SECONDS", -1.0)


def _measured(model, empty, many, **how):
    return measure(model, empty, [many], batch_size=2, unreadable=how.pop("unreadable", UnreadableImages()), **how)


class _StoppedError(Exception):
    """In place of a kill: nothing cleans up after it."""


def _stopping_after(count):
    def progress(items, *, total=None, desc=""):
        for place, item in enumerate(items):
            if desc == "images" and place == count:
                raise _StoppedError
            yield item

    return progress


@pytest.mark.parametrize("count", [5, 12, 17, 22])
def test_what_was_stopped_goes_on_to_the_same_bits(count, model, empty, many, tmp_path, capsys):
    kept, seen = tmp_path / "yard.unfinished", UnreadableImages()
    whole = _measured(model, empty, many, unreadable=seen)
    with pytest.raises(_StoppedError):
        _measured(model, empty, many, unfinished=kept, progress=_stopping_after(count))
    assert read_site(kept).images >= count - count % 4 - 1
    again = UnreadableImages()
    site = _measured(model, empty, many, unfinished=kept, unreadable=again)
    np.testing.assert_array_equal(site.total, whole.total)
    np.testing.assert_array_equal(site.taken_for, whole.taken_for)
    assert site.provenance == whole.provenance
    assert (again.count, again.listed) == (seen.count, seen.listed) == (1, seen.listed)
    assert "going on after" in capsys.readouterr().err
    # what is done stays until its caller has written it
    site = _measured(model, empty, many, unfinished=kept)
    np.testing.assert_array_equal(site.total, whole.total)
    assert "going on after 23 images" in capsys.readouterr().err


def test_other_images_are_measured_from_the_start_and_it_says_so(model, empty, many, tiny_images, tmp_path, capsys):
    kept = tmp_path / "yard.unfinished"
    with pytest.raises(_StoppedError):
        _measured(model, empty, many, unfinished=kept, progress=_stopping_after(17))
    site = measure(model, empty, [tiny_images], batch_size=2, unreadable=UnreadableImages(), unfinished=kept)
    assert site.images == len(find_images([tiny_images]))
    assert "measuring from the start" in capsys.readouterr().err


def test_an_interrupt_keeps_what_was_measured(model, empty, many, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "SAVE_SECONDS", 1e9)
    kept = tmp_path / "yard.unfinished"

    def progress(items, *, total=None, desc=""):
        for place, item in enumerate(items):
            if desc == "images" and place == 9:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        _measured(model, empty, many, unfinished=kept, progress=progress)
    assert read_site(kept).images == 8


def test_adapt_counts_unreadable_images_over_a_stop(tiny_artifact, many, tmp_path, capsys):
    out = tmp_path / "yard.safetensors"
    with pytest.raises(SystemExit) as end:
        main(["adapt", str(tiny_artifact), "--images", str(many), "-o", str(out), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert end.value.code == 2
    assert told["unreadable_count"] == len(told["unreadable"]) == 1
    assert told["images"] == 22
    assert told["standard_error"] > 0
    assert not (tmp_path / "yard.safetensors.unfinished").exists()


def test_embeddings_measure_what_their_images_do(model, empty, tiny_artifact, tiny_images, tmp_path, capsys):
    kept = tmp_path / "e.safetensors"
    for arguments in (
        ["embed", str(tiny_artifact), str(tiny_images), "-o", str(kept), "--quiet"],
        ["adapt", str(tiny_artifact), "--embeddings", str(kept), "-o", str(tmp_path / "yard.safetensors")],
    ):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 0
    site = read_site(tmp_path / "yard.safetensors")
    wanted = measure(model, empty, [tiny_images], batch_size=16, unreadable=UnreadableImages())
    np.testing.assert_allclose(site.shift, wanted.shift, atol=1e-6)
    assert "± " in capsys.readouterr().out


def test_embeddings_that_are_not_of_this_space_are_refused(model, empty, tiny_artifact, tiny_images, tmp_path, capsys):
    write_site(
        tmp_path / "s.safetensors", measure(model, empty, [tiny_images], batch_size=4, unreadable=UnreadableImages())
    )
    kept = tmp_path / "e.safetensors"
    with pytest.raises(SystemExit):
        main(["embed", str(tiny_artifact), str(tiny_images), "--site", str(tmp_path / "s.safetensors"),
              "-o", str(kept), "--quiet"])  # fmt: skip
    with pytest.raises(InputError, match="adapted to a site already"):
        measure_embeddings(model, empty, [kept])
    with pytest.raises(SystemExit):
        main(["adapt", str(tiny_artifact), "-o", str(tmp_path / "x.safetensors")])
    assert "--images" in capsys.readouterr().err


def test_a_walk_is_the_sorted_list(tmp_path):
    for name in ("b/x.png", "b.png", "a/c/z.JPG", "a/b.gif", "a.txt", "a-b/q.webp", "B/y.bmp", "é/1.png", "a/.h.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing.png")
    wanted = sorted(p for p in tmp_path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    assert list(walk_images([tmp_path])) == find_images([tmp_path]) == wanted
    assert len(wanted) == 8
    with pytest.raises(InputError, match="no such file"):
        find_images([tmp_path / "none"])
    (tmp_path / "hollow").mkdir()
    with pytest.raises(InputError, match="no image in this folder"):
        find_images([tmp_path / "hollow"])


class _Stop(UnreadableImages):
    def __call__(self, place, image, error):
        super().__call__(place, image, error)
        raise KeyboardInterrupt


def test_unreadable_images_of_an_interrupted_part_count_once(model, empty, many, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "SAVE_SECONDS", 1e9)
    kept, stop, again = tmp_path / "yard.unfinished", _Stop(), UnreadableImages()
    with pytest.raises(KeyboardInterrupt):
        _measured(model, empty, many, unfinished=kept, unreadable=stop)
    assert (stop.count, read_site(kept).images) == (1, 8)
    _measured(model, empty, many, unfinished=kept, unreadable=again)
    assert again.count == len(again.listed) == 1


def _fails(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main([str(one) for one in arguments])
    line = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2
    assert line.startswith("invariclip: ")
    return line


def test_what_was_measured_is_kept_where_the_site_cannot_be_written(tiny_artifact, many, tmp_path, capsys):
    out = tmp_path / "yard.safetensors"
    (out / "in the way").mkdir(parents=True)
    assert "cannot be written" in _fails(capsys, "adapt", tiny_artifact, "--images", many, "-o", out)
    shutil.rmtree(out)
    with pytest.raises(SystemExit):
        main(["adapt", str(tiny_artifact), "--images", str(many), "-o", str(out)])
    assert "going on after 23 images" in capsys.readouterr().err
    assert read_site(out).images == 22
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_name_holds_also_for_what_was_known_before(tiny_artifact, tiny_images, tmp_path):
    for more in (["-o", "yard"], ["-o", "hall", "--add-to", str(tmp_path / "yard.safetensors"), "--name", "the hall"]):
        more[1] = str(tmp_path / f"{more[1]}.safetensors")
        with pytest.raises(SystemExit):
            main(["adapt", str(tiny_artifact), "--images", str(tiny_images), *more])
    assert [read_site(tmp_path / f"{name}.safetensors").name for name in ("yard", "hall")] == ["yard", "the hall"]


@pytest.mark.parametrize("items", [5, None, [7], "abc"])
def test_damaged_embeddings_are_one_line(items, model, tiny_artifact, tmp_path, capsys):
    path = tmp_path / "e.safetensors"
    facts = {"items": items, "space_id": model.space_id, "site_sha256": ""}
    path.write_bytes(EMBEDDINGS_FILE.to_bytes({"embeddings": np.eye(1, model.width, dtype=np.float32)}, facts))
    line = _fails(capsys, "adapt", tiny_artifact, "--embeddings", path, "-o", tmp_path / "yard.safetensors")
    assert "not embeddings" in line


@pytest.mark.parametrize("content", [b"junk", None])
def test_what_is_no_unfinished_site_is_refused_or_begun_anew(content, model, empty, many, tmp_path, capsys):
    kept = tmp_path / "yard.unfinished"
    write_site(kept, replace(empty, provenance={"unfinished": [1]}))
    if content:
        kept.write_bytes(content)
        with pytest.raises(SiteError, match="delete it"):
            _measured(model, empty, many, unfinished=kept)
    else:
        assert _measured(model, empty, many, unfinished=kept).images == 22
        assert "measuring from the start" in capsys.readouterr().err


def test_images_that_go_meanwhile_are_told(model, empty, many, tmp_path, capsys):
    folder = shutil.copytree(many, tmp_path / "many")

    def progress(items, *, total=None, desc=""):
        for place, item in enumerate(items):
            if desc == "images" and place == 7:
                (folder / "015.png").unlink()
            yield item

    assert _measured(model, empty, folder, progress=progress).images == 21
    assert "23 were listed, and 22 were there" in capsys.readouterr().err


def test_another_projection_has_no_mean_to_measure_against(model):
    other = model._but(space_id="0" * 32)  # as `with_projection` leaves it
    with pytest.raises(InputError, match="its own projection"):
        invariclip.open_live_site(other, "yard")
