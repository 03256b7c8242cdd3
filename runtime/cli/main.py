"""The command line: a table of commands that load when they are asked for, and errors in one line.

With `rooms` this is the only module of the runtime that names the other rooms, and only as strings.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import tempfile
import traceback
import warnings
from contextlib import suppress
from typing import Any, NoReturn

import click

from invariclip.console import note, printable
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
    "embed": (
        "invariclip.cli.embed_command:embed",
        "",
        "Write embeddings of images or texts to parquet or safetensors.",
    ),
    "serve": ("invariclip.cli.serve_command:serve", "serve", "Answer over HTTP, in batches of many clients' requests."),
    "triton": (
        "invariclip.export.triton_command:triton",
        "",
        "Write an artifact as a model repository of Triton.",
    ),
    "sign": ("invariclip.cli.sign_command:sign", "sign", "Sign an artifact, for --require-signature."),
    "licenses": ("invariclip.cli.licenses_command:licenses", "", "Show whose work is used under which licence."),
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
    """CLIP for production, with the shift-prone part of its embedding removed.

    Any command takes --debug, which shows the traceback of an error.
    """


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0 done, 1 a check failed, 2 wrong usage or input, 70 an internal error."""
    run_command(cli, "invariclip", arguments)


def run_command(command: click.Command, prog_name: str | None = None, arguments: list[str] | None = None) -> NoReturn:
    """Runs one command and exits as every command of ours does: an error is one line, never a traceback.

    Args:
        command: The command.
        prog_name: Its name in help texts; None takes the program's own, such as `python -m invariclip.bench.load`.
        arguments: Without the program's name; None takes the process's.
    """
    warnings.showwarning = _one_line_warning
    words = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if not debug:
        sys.unraisablehook = _one_line_unraisable
    _open_standard_error()
    _heard.clear()
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, _stop)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell may have it ignored
            signal.signal(signal.SIGINT, _stop)
    try:
        code = command.main(args=words, prog_name=prog_name, standalone_mode=False)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        _end(error, words, error if debug else None)
    sys.exit(code if isinstance(code, int) else 0)


_INTERRUPTED = 130
_heard: list[int] = []
"""SIGTERM and SIGINT since the command began."""


class _Stopped(KeyboardInterrupt):
    """A class of its own: where an extension module runs Python, Python ends by SIGINT itself after the plain one."""


def _stop(number: int, _frame: Any) -> NoReturn:
    """SIGTERM ends the work as Ctrl-C does, so that what was begun is cleaned up, and what is done is saved."""
    _heard.append(number)
    raise _Stopped


def _end(error: BaseException, words: list[str], shown: BaseException | None) -> NoReturn:
    """Says in one line why a command ends before its end, and exits.

    Args:
        error: What it raised. After a stop it may be anything: an extension module whose import is interrupted raises
            an ImportError.
        words: The arguments.
        shown: The same with --debug, else None.
    """
    if _heard or isinstance(error, (click.exceptions.Abort, KeyboardInterrupt)):
        stopped = signal.SIGTERM in _heard
        how_far = isinstance(error, InvariclipError) and error.exit_code == _INTERRUPTED
        again = f"{'stopped' if stopped else 'interrupted'}; run the same command again"
        _fail(str(error) if how_far else again, 143 if stopped else _INTERRUPTED, words)
    if isinstance(error, InvariclipError):
        _fail(str(error), error.exit_code, words, shown)
    if isinstance(error, click.ClickException):
        _fail(error.format_message(), 2, words)
    if isinstance(error, BrokenPipeError):
        # The reader of our output went away (`| head`): nothing to say, and nobody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    if isinstance(error, (OSError, UnicodeError, RecursionError, MemoryError)):
        _fail(_of_the_system(error), 2, words, shown)
    _fail(f"unexpected internal error: {type(error).__name__}: {error}; {_reported(error)}", 70, words, shown)


def _fail(message: str, code: int, arguments: list[str], shown: BaseException | None = None) -> NoReturn:
    """Says why in one line and exits, also where standard output or error take nothing more."""
    line = " ".join(printable(message).split())
    if shown is not None:
        traceback.print_exception(shown)
    if "--json" in arguments:
        _echo(json.dumps({"error": line}, ensure_ascii=False))
    _echo(f"invariclip: {line}", err=True)
    for stream in (sys.stdout, sys.stderr):  # what is left in a stream that is full would fail again at the exit
        try:
            stream.flush()
        except (OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2 if stream is sys.stderr else 1)
    sys.exit(code)


def _echo(text: str, *, err: bool = False) -> None:
    with suppress(OSError, ValueError):
        click.echo(text, err=err)


def _open_standard_error() -> None:
    """Standard error may be closed (`2>&-`): what would be said there goes nowhere, and the work goes on."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as the process


def _of_the_system(error: BaseException) -> str:
    """An error of the system in one line: which file, and why."""
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename2  # of a copy, the second file is full
        name = error.filename2 if full else error.filename
        where = f"{os.fsdecode(name)}: " if isinstance(name, (str, bytes, os.PathLike)) else ""
        return f"{where}{error.strerror or error}"
    if isinstance(error, RecursionError):
        return "a file is nested too deep to be read"
    if isinstance(error, MemoryError):
        return f"there is not enough memory ({str(error) or 'no more is known'}); ask for less at once, or free some"
    return f"a text is not Unicode ({error})"


def _reported(error: BaseException) -> str:
    """Where the traceback of an internal error was written."""
    text = "".join(traceback.format_exception(error))
    facts = f"invariclip {__version__}, Python {sys.version.split()[0]}, {sys.platform}\n{' '.join(sys.argv)}\n\n"
    try:
        handle, path = tempfile.mkstemp(prefix="invariclip-error-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(facts + text)
    except OSError:
        return "run it again with --debug to see where"
    return f"please report it with {path}, or run it again with --debug"


def _one_line_unraisable(raised: Any) -> None:
    """What fails where nobody can catch it, as when an object is let go at the exit, is told in one line."""
    note(f"invariclip: warning: {raised.err_msg or 'while cleaning up'}: {_kind_and_words(raised.exc_value)}")


def _kind_and_words(error: BaseException | None) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _one_line_warning(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
    """Warnings of ours in one line; other libraries' are for developers, not for users of the command."""
    del rest, named
    if category.__module__.startswith("invariclip"):
        note(f"invariclip: warning: {' '.join(str(message).split())}")
