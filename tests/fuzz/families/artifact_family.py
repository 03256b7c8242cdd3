"""Files of an artifact, damaged, cut, missing or exchanged: nothing may answer from them."""

import os
import warnings
from pathlib import Path

import numpy as np

import invariclip
from fuzz import tiny
from fuzz.base import Family as Base
from fuzz.base import WrongError
from fuzz.mutate import damaged
from invariclip.artifact.folder import checked_path, read_manifest
from invariclip.artifact.learned_prompts import read_semantics
from invariclip.artifact.projection import read_projection
from invariclip.errors import ProfileWarning
from invariclip.sites.site import read_site


class Family(Base):
    """See the module."""

    count = 7_000
    what = (
        "bits flipped, bytes changed, cut off, lost, put in or exchanged in every file of three artifacts "
        "(projection; learned templates; a site in the graphs; each with a machine profile), files missing, emptied, "
        "linked to another place or exchanged with another file of this or of another artifact; then loaded, and all "
        "of it used"
    )
    reference = "refused, all of them"

    def open(self, folder):
        self.artifacts = [make(folder) for make in (tiny.plain_artifact, tiny.cdc_artifact, tiny.site_artifact)]
        self.files = [sorted(path.name for path in artifact.iterdir()) for artifact in self.artifacts]
        self.image = sorted(tiny.images(folder).iterdir())[0]
        self.place = Path(folder) / "damaged.icm"
        self.elsewhere = Path(folder) / "elsewhere"
        self.wanted = [_use(artifact, self.image) for artifact in self.artifacts]

    def draw(self, rng):
        number = rng.randrange(len(self.artifacts))
        artifact, files = self.artifacts[number], self.files[number]
        name = rng.choice(files)
        content = (artifact / name).read_bytes()
        how = rng.random()
        folder = tiny.linked(artifact, self.place)
        file = folder / name
        file.unlink()
        if how < 0.86:
            kind, changed = damaged(rng, content)
            file.write_bytes(changed)
        elif how < 0.96:
            kind = "another file's content"
            other = rng.choice([path for one in self.artifacts for path in one.iterdir()
                                if path.read_bytes() != content])  # fmt: skip
            file.write_bytes(other.read_bytes())
            if other.parent == artifact and rng.random() < 0.5:
                (folder / other.name).unlink()
                (folder / other.name).write_bytes(content)
        elif how < 0.98:
            kind = rng.choice(("empty", "a folder"))
            file.touch() if kind == "empty" else file.mkdir()
        elif how < 0.99 or name.startswith("machine-"):
            kind = "missing"
        else:
            kind = "a link out of the folder"
            if name == "manifest.json":  # read wherever it lies: every other file has to be in the folder
                kind, changed = damaged(rng, content)
                file.write_bytes(changed)
            else:
                self.elsewhere.write_bytes(content)
                file.symlink_to(self.elsewhere)
        return f"{_shown(name)}: {kind}", lambda: self._refused(folder, name, self.wanted[number])

    def _refused(self, folder, name, wanted):
        if name.startswith("machine-"):
            _without_profile(folder, self.image, wanted)
        _use(folder, self.image, name if name.startswith("machine-") else None)
        raise WrongError("everything in it was used without a word")


def _shown(name):
    return "machine profile" if name.startswith("machine-") else name


def _without_profile(folder, image, wanted):
    """A damaged profile beside the artifact: a warning, and the answers of the safe default."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        model = invariclip.load(folder)
        answer = model.answer([image]).probabilities
    if (folder / _profile(folder)).is_file() and not any(one.category is ProfileWarning for one in heard):
        raise WrongError("a damaged profile was taken, or passed over without a warning")
    if not np.array_equal(answer, wanted):
        raise WrongError("a damaged profile changes answers")


def _profile(folder):
    return next((path.name for path in folder.iterdir() if path.name.startswith("machine-")), "none")


def _use(folder, image, profile=None):
    """Loads an artifact and uses all that is in it; the probabilities of an image."""
    manifest = read_manifest(folder)
    named = profile or _profile(folder)
    model = invariclip.load(folder, threads=1, profile=folder / named)
    answer = model.answer([image]).probabilities
    model.embed_texts(["a photo of a cat."])
    model.with_classes(["sun", "moon"]).classify([image])
    read_projection(checked_path(folder, manifest.projection_file))
    if manifest.cdc_file:
        read_semantics(checked_path(folder, manifest.cdc_file))
    if manifest.site_file:
        read_site(checked_path(folder, manifest.site_file))
    for entry in manifest.files:
        if not os.path.samefile(checked_path(folder, entry), folder / entry.path):
            raise WrongError(f"{entry.path} is another file")
    return answer
