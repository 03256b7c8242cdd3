"""The command `tune`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from invariclip.artifact.fidelity import LEVELS
from invariclip.autotune.tuner import DEFAULT_SECONDS, MAX_BATCH, TuneSettings, tune
from invariclip.cli.options import artifact_argument
from invariclip.console import bar, emit_json, note, say, silent, table
from invariclip.profile import BUSY, OBJECTIVES

if TYPE_CHECKING:
    from invariclip.autotune.tuner import Tuned
    from invariclip.profile import MachineProfile


@click.command("tune")
@artifact_argument
@click.option(
    "--objective", type=click.Choice(OBJECTIVES), default=OBJECTIVES[0], show_default=True,
    help="latency: time of one image. throughput: images per second.",
)  # fmt: skip
@click.option(
    "--fidelity", type=click.Choice(LEVELS), default=LEVELS[0], show_default=True,
    help="Search only what was proved at this level.",
)  # fmt: skip
@click.option(
    "--batch", "batches", multiple=True, type=click.IntRange(1, MAX_BATCH),
    help="Images per run; repeatable for throughput [default: 1; for throughput 1, 4, 16 and 64].",
)  # fmt: skip
@click.option(
    "--threads", multiple=True, type=click.IntRange(min=1),
    help="Engine threads to try; repeatable [default: all that this process may use, half and a quarter].",
)  # fmt: skip
@click.option(
    "--seconds", type=click.FloatRange(min=1), default=DEFAULT_SECONDS, show_default=True,
    help="How long to search, about.",
)  # fmt: skip
@click.option(
    "--profile", type=click.Path(path_type=Path, dir_okay=False),
    help="Write the profile to this file [default: into the artifact's folder].",
)  # fmt: skip
@click.option("--again", is_flag=True, help="Measure again even if the profile that is there still holds.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def command(
    artifact: Path, objective: str, fidelity: str, batches: tuple[int, ...], threads: tuple[int, ...], seconds: float,
    profile: Path | None, again: bool, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Find what is fastest on this machine among what was proved, and let `load` use it."""
    settings = TuneSettings(objective, fidelity, threads, batches, seconds, again, profile)
    tuned = tune(artifact, settings, progress=silent if quiet or as_json else bar)
    if as_json:
        emit_json(
            {
                "profile": str(tuned.path), "reused": tuned.reused, "changed": list(tuned.changed),
                **tuned.profile.to_json(),
            }
        )  # fmt: skip
        return
    _say(tuned)


def _say(tuned: Tuned) -> None:
    for change in tuned.changed:
        note(f"invariclip: the profile that was there no longer holds: {change}")
    profile = tuned.profile
    if not tuned.reused:
        say(profile_table(profile))
        say()
        for item in profile.left_out:
            say(f"left out: {item['candidate']}: {item['why']}")
    choice = profile.choice
    say(f"chosen: {choice.variant} on {choice.backend}, threads {choice.threads}, batch {choice.batch}")
    say(f"why: {profile.why}")
    if tuned.reused:
        say(f"profile: {tuned.path}, of {profile.date}, still holds; nothing was measured (--again measures)")
    else:
        say(f"profile: {tuned.path}, {profile.seconds:g} s")

    if profile.load is not None and profile.load > BUSY:
        note(
            f"invariclip: the machine was busy ({profile.load:.1f} processes per processor before the search); what is "
            "fastest on a quiet one may differ: run it again with --again"
        )


def profile_table(profile: MachineProfile) -> str:
    """The measurements of a profile as aligned text."""
    header = ["variant", "engine", "threads", "batch", "fidelity", "rounds", "ms", "quartiles", "images/s",
              "× default", "95 %"]  # fmt: skip
    rows = []
    for one in profile.measurements:
        ran = asdict(one.candidate)
        rows.append(
            [*(str(ran[name]) for name in ("variant", "backend", "threads", "batch")), one.fidelity, str(one.rounds),
             f"{one.median_ms:.2f}", f"{one.low_ms:.2f} to {one.high_ms:.2f}", f"{one.images_per_second:.1f}",
             f"{one.ratio:.2f}", f"{one.ratio_low:.2f} to {one.ratio_high:.2f}"]
        )  # fmt: skip
    return table(header, rows)
