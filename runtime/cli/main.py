"""The command line: a table of commands that load when they are asked for, and errors in one line.

With `rooms` this is the only module of the runtime that names the other rooms, and only as strings.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import Any, NoReturn

import click

from invariclip.errors import InvariclipError
from invariclip.rooms import imported
from invariclip.version import __version__

COMMANDS: dict[str, tuple[str, str, str]] = {
    # name: (module:attribute, extra that it needs, one line of help)
    "demo": (
        "invariclip.bench.demo.command:demo",
        "bench",
        "See the whole path on the bundled images, in a few minutes.",
    ),
    "calibrate": ("invariclip.calibrate.commands:calibrate", "calibrate", "Fit the invariant projection from pairs."),
    "cdc": (
        "invariclip.calibrate.cdc_command:cdc",
        "calibrate",
        "Learn templates beside the hand-written one, and how sure answers are.",
    ),
    "moments": (
        "invariclip.calibrate.moments_command:moments",
        "calibrate",
        "Show, merge and subtract what calibration keeps of its data.",
    ),
    "export": ("invariclip.export.commands:export", "export", "Write a verified ONNX artifact of a checkpoint."),
    "build": (
        "invariclip.calibrate.commands:build",
        "calibrate",
        "calibrate, export and verify; resumes where it stopped.",
    ),
    "verify": (
        "invariclip.export.verify_command:verify",
        "export",
        "Check an artifact against its checkpoint on real images.",
    ),
    "engines": ("invariclip.export.tensorrt.commands:engines", "export", "Build TensorRT engines of an artifact."),
    "tune": (
        "invariclip.cli.tune_command:command",
        "",
        "Find what is fastest on this machine among what was proved.",
    ),
    "bench": (
        "invariclip.bench.latency.command:bench",
        "bench",
        "Time an artifact beside PyTorch, plain engines and NNCF.",
    ),
    "inspect": ("invariclip.cli.predict_command:inspect", "", "Show what an artifact is and what it was proved to do."),
    "predict": ("invariclip.cli.predict_command:predict", "", "Classify images."),
    "adapt": ("invariclip.cli.adapt_command:adapt", "", "Measure the shift of a site from a few unlabelled images."),
    "embed": ("invariclip.cli.embed_command:embed", "", "Write embeddings of images or texts to safetensors."),
    "serve": ("invariclip.cli.serve_command:serve", "serve", "Answer over HTTP, in batches of many clients' requests."),
}


class LazyGroup(click.Group):
    """Lists all commands without importing any: `--help` must not wait for torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The table's order, which is the order of the work."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports the command's module.

        Raises:
            MissingExtraError: Its optional dependencies are not installed.
        """
        del ctx
        if cmd_name not in COMMANDS:
            return None
        target, extra, _ = COMMANDS[cmd_name]
        command: click.Command = imported(cmd_name, target, extra)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Prints the table's own help lines."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, _, help_line) in COMMANDS.items()])


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="invariclip")
def cli() -> None:
    """CLIP for production, with the shift-prone part of its embedding removed."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0 done, 1 a check failed, 2 wrong usage or input."""
    run_command(cli, "invariclip", arguments)


def run_command(command: click.Command, prog_name: str | None = None, arguments: list[str] | None = None) -> NoReturn:
    """Runs one command and exits as every command of ours does: an error is one line, never a traceback.

    Args:
        command: The command.
        prog_name: Its name in help texts; None takes the program's own, such as `python -m invariclip.export.parity`.
        arguments: Without the program's name; None takes the process's.
    """
    warnings.showwarning = _one_line_warning
    given = sys.argv[1:] if arguments is None else arguments
    try:
        code = command.main(args=given, prog_name=prog_name, standalone_mode=False)
    except InvariclipError as error:
        _fail(str(error), error.exit_code, given)
    except click.exceptions.Abort:
        _fail("interrupted; run the same command again to continue", 130, given)
    except click.ClickException as error:
        _fail(error.format_message(), 2, given)
    except BrokenPipeError:
        # The reader of our output went away (`| head`): nothing to say, and nobody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int, arguments: list[str]) -> NoReturn:
    line = " ".join(message.split())
    if "--json" in arguments:
        click.echo(json.dumps({"error": line}, ensure_ascii=False))
    click.echo(f"invariclip: {line}", err=True)
    sys.exit(code)


def _one_line_warning(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
    """Warnings of ours in one line; other libraries' are for developers, not for users of the command."""
    del rest, named
    if category.__module__.startswith("invariclip"):
        click.echo(f"invariclip: warning: {' '.join(str(message).split())}", err=True)
