"""DomainBed's sets are found by name in their folders, and what is missing is named."""

from pathlib import Path

import pytest
from PIL import Image

from invariclip.calibrate.data.domainbed import LAYOUTS, find_layout, read_layout, words
from invariclip.errors import InputError

PACS = Path(__file__).parents[4] / "shared" / "data" / "pacs"


def build(root, layout, *, classes=None, leave_out=()):
    for environment in layout.environments:
        for name in classes or layout.classes:
            if (environment, name) not in leave_out:
                folder = root / environment / name
                folder.mkdir(parents=True)
                Image.new("RGB", (2, 2)).save(folder / "pic_001.png")
    return root


@pytest.mark.parametrize("name", ["PACS", "VLCS", "OfficeHome", "TerraIncognita"])
@pytest.mark.parametrize("inside", [False, True])
def test_every_environment_and_class_is_read(tmp_path, name, inside):
    layout = LAYOUTS[name]
    build(tmp_path / layout.folder, layout)
    images = read_layout(layout, tmp_path if inside else tmp_path / layout.folder)
    assert {p.environment for p in images} == set(layout.environments)
    assert {p.concept for p in images} == set(layout.classes)
    assert len(images) == len(layout.environments) * layout.class_count
    # equal file names in two environments are not one object
    assert all(p.name == words(p.concept) for p in images)


@pytest.mark.parametrize(("name", "classes"), [("PACS", 7), ("VLCS", 5), ("OfficeHome", 65), ("TerraIncognita", 10)])
def test_the_sets_have_their_published_sizes(name, classes):
    layout = LAYOUTS[name]
    assert (len(layout.environments), layout.class_count, len(set(layout.classes))) == (4, classes, classes)


def test_domainnet_is_checked_by_its_count(tmp_path):
    layout = LAYOUTS["DomainNet"]
    assert (len(layout.environments), layout.class_count) == (6, 345)
    names = [f"class_{index}" for index in range(345)]
    build(tmp_path / "whole", layout, classes=names)
    assert len({p.concept for p in read_layout(layout, tmp_path / "whole")}) == 345
    build(tmp_path / "lacking", layout, classes=names, leave_out={("real", "class_7")})
    with pytest.raises(InputError, match=r"real: classes of DomainNet: missing or empty class_7"):
        read_layout(layout, tmp_path / "lacking")
    build(tmp_path / "few", layout, classes=names[:5])
    with pytest.raises(InputError, match="345 classes, here are 5"):
        read_layout(layout, tmp_path / "few")


def test_what_is_missing_or_unknown_is_named(tmp_path):
    layout = LAYOUTS["PACS"]
    build(tmp_path / "a", layout, leave_out={("sketch", "dog")})
    with pytest.raises(InputError, match=r"sketch: classes of PACS: missing or empty dog; available: elephant, "):
        read_layout(layout, tmp_path / "a")
    root = build(tmp_path / "b", layout)
    (root / "photo" / "dog").rename(root / "photo" / "cat")
    with pytest.raises(InputError, match=r"missing or empty dog; unknown cat"):
        read_layout(layout, root)
    root = build(tmp_path / "c", layout)
    (root / "photo").rename(root / "photos")
    with pytest.raises(InputError, match=r"environments of PACS: missing or empty photo; unknown photos"):
        read_layout(layout, root)
    (tmp_path / "d" / "elsewhere").mkdir(parents=True)
    with pytest.raises(InputError, match=r"not PACS, .* it has: elsewhere"):
        read_layout(layout, tmp_path / "d")
    with pytest.raises(InputError, match="no such folder"):
        read_layout(layout, tmp_path / "nowhere")


def test_spellings_of_copies_are_one_name(tmp_path):
    layout = LAYOUTS["OfficeHome"]
    root = build(tmp_path, layout)
    (root / "Real World").rename(root / "RealWorld")
    (root / "Art" / "ToothBrush").rename(root / "Art" / "Toothbrush")
    images = read_layout(layout, root)
    assert {p.environment for p in images} == set(layout.environments)
    assert {p.name for p in images if "tooth" in p.name} == {"toothbrush"}


def test_names_are_forgiving_and_unknown_ones_list_what_there_is():
    assert find_layout("office_home") is find_layout("officehome") is LAYOUTS["OfficeHome"]
    assert find_layout("domain_net") is LAYOUTS["DomainNet"]
    with pytest.raises(InputError, match="no set is called 'pecs'; available: PACS, VLCS"):
        find_layout("pecs")
    assert words("Alarm_Clock") == "alarm clock"
    assert words("TV") == "TV"


@pytest.mark.skipif(not PACS.is_dir(), reason="needs the half of PACS beside the repository, ../shared/data/pacs")
def test_the_half_of_pacs_at_hand_is_whole():
    images = read_layout(LAYOUTS["PACS"], PACS)
    assert len(images) == 5064
    assert {p.concept for p in images} == set(LAYOUTS["PACS"].classes)
