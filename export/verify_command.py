"""The command `verify`: graphs held against the checkpoint, and what the manifest says of it."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import click
import numpy as np

from invariclip.artifact.fidelity import LEVELS, require_level
from invariclip.artifact.folder import checked_path, read_manifest
from invariclip.artifact.learned_prompts import read_semantics
from invariclip.artifact.manifest import EMBEDDING, IMAGE_INPUT, TEXT_INPUT, space_id
from invariclip.artifact.parity import parity_table
from invariclip.artifact.projection import read_projection
from invariclip.backends import ALL_BACKENDS, DEFAULT_BACKEND, open_backend, require_backend
from invariclip.cli.options import artifact_argument
from invariclip.console import bar, emit_json, note, say, silent
from invariclip.errors import ArtifactError, CheckpointError, ContractError, InputError
from invariclip.export.checkpoints import check_texts
from invariclip.export.options import bounds_of, load, shared
from invariclip.files import require_writable, scratch_directory
from invariclip.preprocessing.tokenizer import Tokenizer
from invariclip.sites.site import read_site

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from invariclip.artifact.fidelity import Fidelity
    from invariclip.artifact.learned_prompts import LearnedPrompts
    from invariclip.artifact.manifest import Manifest, Variant
    from invariclip.artifact.projection import Projection
    from invariclip.console import Progress
    from invariclip.export.checkpoints.checkpoint import Checkpoint
    from invariclip.export.graphs.rewrites import Tower
    from invariclip.export.options import Limits
    from invariclip.export.verification.bisect import Bisection
    from invariclip.export.verification.candidate import CandidateVerdict, ExportJob, VerificationCandidate
    from invariclip.export.verification.evidence import ImageBatches
    from invariclip.sites.site import Site

INPUTS = {"image": IMAGE_INPUT, "text": TEXT_INPUT}
TOWERS: tuple[Tower, ...] = ("image", "text")
OTHER: Final = "other"
"""In place of the projection: the artifact is held against another one than its own, so its facts about it are left."""


@click.command()
@artifact_argument
@click.option(
    "--model", help="The checkpoint's model [default: what the artifact names, if bundled or an architecture]."
)
@click.option("--projection", type=click.Path(path_type=Path), help="Compare with another one [default: its own].")
@click.option(
    "--backend", "backends", multiple=True, help=f"Repeatable: {', '.join(ALL_BACKENDS)} [default: {DEFAULT_BACKEND}]."
)
@click.option(
    "--bisect", "bisected", type=click.Path(path_type=Path), metavar="DIR",
    help="Compare each operator alone with a fresh export; the first wrong one goes into DIR as a graph of its own.",
)  # fmt: skip
@shared
def verify(
    artifact: Path, model: str | None, projection: Path | None, checkpoint: Path | None, random_weights: int | None,
    tokenizer: str | None, bisected: Path | None,
    images: tuple[Path, ...], backends: tuple[str, ...], limits: Limits, threads: int | None, as_json: bool,
    quiet: bool,
) -> int:  # fmt: skip
    """Check an artifact against its checkpoint on real images; exit code 1 if it fails."""
    backends = tuple(dict.fromkeys(backends)) or (DEFAULT_BACKEND,)
    for backend in backends:
        require_backend(backend)
    if bisected is not None:
        require_writable(bisected)
    manifest = read_manifest(artifact)
    own = projection is None
    learned_prompts = _own_learned_prompts(artifact, manifest, own=own)
    if own and manifest.projection_file is not None:
        projection = checked_path(artifact, manifest.projection_file)
    paths = _checked_paths(artifact, manifest)
    from invariclip.export.verification import candidate, evidence
    from invariclip.export.verification.verify import check

    loaded = load(model or _own_model(manifest.model.name, artifact), checkpoint, random_weights, threads, tokenizer)
    if loaded.sha256 != manifest.model.checkpoint_sha256:
        raise CheckpointError(
            f"{artifact}: was exported from another checkpoint (sha256 {manifest.model.checkpoint_sha256[:12]}…, "
            f"{loaded.source} has {loaded.sha256[:12]}…); name its own with --model and --checkpoint"
        )
    matrix = None if projection is None else read_projection(projection)
    if matrix is not None:
        matrix.require_width(loaded.embed_dim, loaded.name)
    wrong = disagreements(manifest, artifact, loaded, matrix if own else OTHER, learned_prompts)
    if wrong:
        raise ContractError(f"{artifact}: {'; '.join(wrong)}")
    job = candidate.prepare(loaded, matrix, manifest.classes, manifest.templates, learned_prompts)
    job = replace(job, site=_own_site(artifact, manifest, own=own))
    candidates, bounds = {}, {}
    for variant, backend in product(paths, backends):
        name, facts = f"{variant} on {backend}", manifest.variants[variant]
        # held to the level that it was listed with; an engine that it was never tried on has to reach that of others
        level = _promised(facts, backend)
        candidates[name] = candidate.VerificationCandidate.open(
            *paths[variant], job, backend=backend, level=level, compute=facts.compute,
            text_compute=facts.text_compute, threads=threads,
        )  # fmt: skip
        bounds[name] = bounds_of(limits, level)
    judged = evidence.images_of(images or None, loaded.pixels)
    judged.require_readable()
    verdicts = check(candidates, judged, bounds, progress=silent if quiet else bar)
    fast = _fast_pixels(manifest, job, judged, limits, progress=silent if quiet else bar)
    failed = {name: verdict.reason for name, verdict in verdicts.items() if verdict.broken}
    found = {} if bisected is None else located(manifest, candidates, judged, bisected, silent if quiet else bar)
    failed |= {"the fast pixel mode": "; ".join(fast)} if fast else {}
    if as_json:
        places = dict(zip(candidates, product(paths, backends), strict=True))
        told = {} if bisected is None else {"bisect": {name: one.to_json() for name, one in found.items()}}
        emit_json(
            {"artifact": str(artifact), "passed": not failed, **_as_json(verdicts, places), "fast_pixels": fast, **told}
        )
    else:
        which = "images" if images else "bundled images (--images takes your own)"
        _say(artifact, verdicts, f"{len(judged.readable)} {which}", found)
    # the table is the result and is out already, so the failure is one more line and not an exception
    if failed:
        lines = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        note(f"invariclip: {artifact} does not answer like its checkpoint: {lines}")
    return 1 if failed else 0


def _say(artifact: Path, verdicts: dict[str, CandidateVerdict], images: str, found: dict[str, Bisection]) -> None:
    for name, verdict in verdicts.items():
        say(f"{artifact}, {name}, on {images}")
        say(parity_table(verdict.parity))
    for name, one in found.items():
        say(one.lines(name))


def located(
    manifest: Manifest, candidates: dict[str, VerificationCandidate], images: ImageBatches, out: Path,
    progress: Progress,
) -> dict[str, Bisection]:  # fmt: skip
    """Where each graph first goes wrong, by candidate and tower; see `verification.bisect`.

    Args:
        manifest: The artifact's.
        candidates: Its graphs in engines, by name.
        images: Some of them are looked at.
        out: Gets a folder of each graph of which a part is wrong.
        progress: `console.bar` or `console.silent`.

    Raises:
        ContractError: A fresh export answers wrongly itself.
    """
    from invariclip.export.verification.bisect import ROWS, bisect
    from invariclip.export.verification.pixel_checks import RawImages

    job = next(iter(candidates.values())).job
    done: dict[tuple[object, ...], Bisection] = {}
    found = {}
    with scratch_directory() as folder:
        right: dict[Tower, Path] = {}
        feeds: dict[Tower, NDArray[Any]] = {}
        for tower in TOWERS:
            right[tower] = folder / f"{tower}.onnx"
            write_right_graph(job, manifest, tower, right[tower])
            if tower == "text":
                feeds[tower] = check_texts.ids_of(check_texts.TEXTS[:ROWS], job.checkpoint.tokenizer)
            elif any(variant.front != "host" for variant in manifest.variants.values()):
                feeds[tower] = next(iter(RawImages(images.readable, job.checkpoint.pixels)))[None]
            else:
                feeds[tower] = next(images.batches(ROWS))
            _require_right(job, tower, right[tower], feeds[tower])
        steps = [(name, tower) for name in candidates for tower in TOWERS]
        for name, tower in progress(steps, total=len(steps), desc="bisect"):
            one = candidates[name]
            path, compute = (one.image, one.compute) if tower == "image" else (one.text, one.text_compute)
            key = path, one.backend, compute
            if key not in done:
                done[key] = bisect(
                    path, right[tower], {INPUTS[tower]: feeds[tower]}, backend=one.backend, compute=compute,
                    threads=one.threads, out=out / f"{name} {tower}".replace(" ", "-"),
                )  # fmt: skip
            found[f"{name}, {tower} tower"] = done[key]
    return found


def write_right_graph(job: ExportJob, manifest: Manifest, tower: Tower, target: Path) -> None:
    """Exports a tower anew as the manifest says that it was: float32, with the same rewrites, projection and site."""
    from invariclip.export.graphs.front import add_front
    from invariclip.export.graphs.head import attach_head, attach_site
    from invariclip.export.graphs.rewrites.plan import NAMES
    from invariclip.export.graphs.tower_graph import tower_graph
    from invariclip.export.graphs.writing import write_graph

    applied = {step.name for step in manifest.plan[tower] if step.applied}
    facts, head, checkpoint = manifest.projection, job.head, job.checkpoint
    fold = "" if facts is None else facts.image_fold if tower == "image" else facts.text_fold
    graph = tower_graph(
        checkpoint, tower, job.projection, rewrites=[name for name in NAMES if name in applied],
        projection_as_input=fold == "input",
    ).model  # fmt: skip
    if tower == "image":
        attach_head(graph, head.bank if head else None, checkpoint.logit_scale, checkpoint.logit_bias, job.learned)
        front = next(iter(manifest.variants.values())).front
        if front != "host":
            add_front(graph, checkpoint.pixels, front)
        if job.site is not None:
            attach_site(graph, job.site.shift)
    write_graph(graph, target)


def _require_right(job: ExportJob, tower: Tower, graph: Path, rows: NDArray[Any]) -> None:
    """Holds a fresh export against PyTorch: where it is wrong as well, no operator of the artifact is to blame.

    Raises:
        ContractError: It is.
    """
    from invariclip.export.verification.answers import project
    from invariclip.export.verification.bisect import WHOLE, relative_error
    from invariclip.preprocessing.pixels import pixels

    checkpoint = job.checkpoint
    got = open_backend(DEFAULT_BACKEND, graph).run({INPUTS[tower]: rows}, (EMBEDDING,))[EMBEDDING]
    if tower == "text":
        raw = checkpoint.encode_texts(rows)
    else:
        size = checkpoint.pixels.image_size
        raw = checkpoint.encode_images(rows if rows.shape[1:3] == size else pixels(rows[0], checkpoint.pixels)[None])
    error = relative_error(got, project(raw, job.projection, job.site if tower == "image" else None))
    if not error <= WHOLE["float32"]:
        raise ContractError(
            f"{tower}: an export made just now is off by {error:.3g} of an embedding's length as well, so no operator "
            "of the artifact can be named; report it with the checkpoint's name"
        )


def _checked_paths(artifact: Path, manifest: Manifest) -> dict[str, tuple[Path, Path]]:
    """Image and text graph of each variant, after a look at every digest.

    Raises:
        ArtifactError: A file is missing or changed.
    """
    checked_path(artifact, manifest.tokenizer)
    return {
        name: (checked_path(artifact, variant.image), checked_path(artifact, variant.text))
        for name, variant in manifest.variants.items()
    }


def _own_learned_prompts(artifact: Path, manifest: Manifest, *, own: bool) -> LearnedPrompts | None:
    """The artifact's learned templates.

    Raises:
        InputError: They are in the space of its own projection, and it is to be held against another one.
    """
    if manifest.cdc_file is None:
        return None
    if not own:
        raise InputError(
            f"{artifact}: its learned templates belong to its own projection, so it cannot be held against another one"
        )
    return read_semantics(checked_path(artifact, manifest.cdc_file))


def _own_site(artifact: Path, manifest: Manifest, *, own: bool) -> Site | None:
    """The place that the artifact is adapted to, or None.

    Raises:
        InputError: It was measured in the space of its own projection, and it is to be held against another one.
        ArtifactError: The site is another one than the manifest says.
        SiteError: It is of another space.
    """
    file, facts = manifest.site_file, manifest.site
    if file is None or facts is None:
        return None
    if not own:
        raise InputError(
            f"{artifact}: its site belongs to its own projection, so it cannot be held against another one"
        )
    site = read_site(checked_path(artifact, file))
    site.require_space(manifest.space_id, str(artifact))
    if site.digest != facts.sha256:
        raise ArtifactError(f"{artifact}: its site is not the one that its manifest names; adapt it again")
    return site


def _fast_pixels(
    manifest: Manifest, job: ExportJob, images: ImageBatches, limits: Limits, *, progress: Progress
) -> list[str]:
    """What the fast pixel mode breaks of its own bounds or the user's, where the artifact promises it."""
    promised = manifest.fast_pixels
    if promised.get("passed") is not True:
        return []
    from invariclip.export.verification.pixel_checks import check_fast_pixels

    own = {name: float(promised[name]) for name in ("min_cosine", "min_top1")}
    bounds = bounds_of({**own, **{name: value for name, value in limits.items() if value is not None}}, "fast")
    return list(check_fast_pixels(job, images, bounds, progress=progress)["broken"])


def _own_model(name: str, artifact: Path) -> str:
    """The model that an artifact names, where following a file's word reaches for nothing.

    Raises:
        CheckpointError: It is a hub's, or a folder's.
    """
    from invariclip.export.checkpoints.sources import comes_along

    if comes_along(name):
        return name
    raise CheckpointError(
        f"{artifact}: was exported from {name!r}, and a manifest is followed to `reference` and open_clip's "
        "architectures alone; say where the model is with --model"
    )


def _promised(variant: Variant, backend: str) -> Fidelity:
    """The fidelity that the manifest promises of a variant on an engine, or on the others."""
    records = [variant.parity[backend]] if backend in variant.parity else list(variant.parity.values())
    levels = [require_level(record["level"]) for record in records]
    return max(levels, key=LEVELS.index, default=LEVELS[0])


def _as_json(verdicts: dict[str, CandidateVerdict], places: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """Every failure in words, and the records as a manifest has them: variant, then backend."""
    variants: dict[str, dict[str, Any]] = {}
    for name, (variant, backend) in places.items():
        variants.setdefault(variant, {})[backend] = verdicts[name].parity
    broken = [f"{name}: {line}" for name, verdict in verdicts.items() for line in verdict.broken]
    return {"failures": broken, "variants": variants}


def disagreements(
    manifest: Manifest,
    artifact: Path,
    checkpoint: Checkpoint,
    projection: Projection | Literal["other"] | None,
    learned_prompts: LearnedPrompts | None = None,
) -> list[str]:
    """Every fact of a manifest that is not the checkpoint's, in words; empty if they agree.

    A graph may be right and its answers wrong all the same, when images or texts are prepared as the manifest says
    and the manifest says something else than the checkpoint.

    Args:
        manifest: The artifact's.
        artifact: Its folder.
        checkpoint: The original model.
        projection: What the artifact is said to hold, or `OTHER`.
        learned_prompts: Learned templates that lie in it, or None.

    Raises:
        ArtifactError: The tokenizer is missing, changed, or not one.
    """
    pairs: dict[str, tuple[object, object]] = {
        "pixels": (manifest.pixels.to_json(), checkpoint.pixels.to_json()),
        "text": (manifest.text.to_json(), checkpoint.tokenizer.spec.to_json()),
        "embed_dim": (manifest.model.embed_dim, checkpoint.embed_dim),
        "logit_scale": (manifest.model.logit_scale, checkpoint.logit_scale),
        "logit_bias": (manifest.model.logit_bias, checkpoint.logit_bias),
    }
    if learned_prompts is not None or manifest.cdc is not None:
        pairs["cdc"] = manifest.cdc, learned_prompts.facts if learned_prompts else None
        pairs["templates"] = manifest.templates, learned_prompts.templates if learned_prompts else None
    if projection != OTHER:
        digest = projection.digest if projection else None
        space = space_id(checkpoint.sha256, digest, checkpoint.pixels, checkpoint.tokenizer.spec)
        pairs["projection"] = manifest.projection.sha256 if manifest.projection else None, digest
        pairs["space_id"] = manifest.space_id, space
    differences = [
        f"the manifest says {name} {said}, the checkpoint {wanted}"
        for name, (said, wanted) in pairs.items()
        if said != wanted
    ]
    tokenizer = Tokenizer.from_file(checked_path(artifact, manifest.tokenizer), manifest.text)
    ours, theirs = (check_texts.ids_of(check_texts.TEXTS, one) for one in (tokenizer, checkpoint.tokenizer))
    if ours.shape != theirs.shape or not np.array_equal(ours, theirs):
        differences.append("tokenizer.json makes other ids of the texts than the checkpoint's tokenizer")
    return differences
