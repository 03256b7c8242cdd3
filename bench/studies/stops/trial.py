"""One stop: a command is begun, stopped by a signal, begun again, and compared with a run that was left alone.

Every trial of a command has a folder of the same path, so that paths in results are the same. It holds the command's
working folder `work`, its TMPDIR `tmp`, its cache `cache` and its HOME `home`; the comparison is of all of it.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from invariclip.bench.studies.stops.world import COMMANDS, make_world
from invariclip.errors import InvariclipError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from invariclip.bench.studies.stops.world import StoppedCommand

CODES = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
"""Exit codes of a command that was stopped; `serve` ends in order and with 0 after the last two."""
RESUMED_FROM = 0.6
SERVED_S = 1.5
"""Seconds in which a server answers before it counts as whole."""
_POLL, _LONGEST, _ORPHANS_S = 0.002, 600.0, 60.0
_LEAST = 0.01
_MARK = "INVARICLIP_STOPPED_TRIAL"
_OLD = "notes.txt"
_LOG_FILE = re.compile(r"work/log(/key-\d+(/\w+(/\d+(/(start\.safetensors|log\.json|\d{6}\.safetensors))?)?)?)?")


@dataclass
class StopRecord:
    """What one stop did.

    Attributes:
        command: Its name.
        signal: Such as `SIGKILL`.
        moment: A share of the whole run's time, or the file at whose appearance the signal came.
        after_s: Seconds after its start.
        over: Whether the output's place held an older one.
        resumed: Whether it was stopped once before, by SIGTERM.
        left: What lay there after the stop, other than before it.
        problems: Everything that was not as it should be; empty is right.
    """

    command: str
    signal: str
    moment: str
    after_s: float = 0.0
    over: bool = False
    resumed: bool = False
    left: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def tree(folder: Path) -> dict[str, str]:
    """All names below a folder, with the digest of each file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = f"-> {os.readlink(path)}" if path.is_symlink() else "folder"
        if path.is_file() and not path.is_symlink():
            kind = hashlib.sha256(path.read_bytes()).hexdigest()
        found[path.relative_to(folder).as_posix()] = kind
    return found


class Trials:
    """All trials of one command.

    Attributes:
        command: What is stopped.
        whole_s: Seconds of the run that was left alone.
    """

    def __init__(self, command: StoppedCommand, root: Path) -> None:
        """Runs the command once, without a stop.

        Args:
            command: What is stopped.
            root: Holds `world`, and a folder for this command's trials.
        """
        make_world(root / "world")
        self.command, self._world = command, root / "world"
        self._folder = root / command.name
        self._clear()
        began = time.monotonic()
        problems = self._finish()
        self.whole_s = time.monotonic() - began
        if problems:
            raise InvariclipError(f"{command.name} fails without a stop: {problems}")
        self._wanted = self._tree()
        self._new = {name: tree(self._folder / "work" / name) for name in command.outputs}

    def stop(
        self, number: signal.Signals, moment: float | str, *, over: bool = False, resumed: bool = False
    ) -> StopRecord:
        """Stops the command, looks at what is there, and lets the same command finish.

        Args:
            number: The signal.
            moment: A share of `whole_s`, or a pattern of files below the trial's folder. A share at which the command
                has ended already is made smaller.
            over: Puts an older output in the output's place, with a file that is not ours where it is a folder. A
                profile has none, because one that is there is read.
            resumed: Stops it by SIGTERM before, at `RESUMED_FROM`, so that it goes on from what that one kept.

        Raises:
            InvariclipError: The command always ended before the signal did anything.
        """
        share = moment
        over = over and any(not name.endswith(".json") for name in self.command.outputs)
        while True:
            self._clear(over=over)
            before, problems = set(tree(self._folder)), list[str]()
            if resumed:
                first = StopRecord(self.command.name, "SIGTERM", "")
                self._stopped(first, signal.SIGTERM, RESUMED_FROM)
                problems += [f"the stop before: {problem}" for problem in first.problems]
            record = StopRecord(self.command.name, number.name, str(share), over=over, resumed=resumed)
            if self._stopped(record, number, share):
                break
            if isinstance(share, str):
                share = 0.9
            share = round(0.8 * share, 3)
            if share < _LEAST:
                raise InvariclipError(f"{self.command.name}: {number.name} did not stop it at any moment")
        record.problems += problems
        record.left = sorted(tree(self._folder).keys() - before)
        self._judge_stop(record, number)
        record.problems += self._finish()
        self._judge_end(record, over=over)
        return record

    def _judge_stop(self, record: StopRecord, number: signal.Signals) -> None:
        """Outputs are old, new or not there; after a signal that can be heard nothing lies about."""
        for name in self.command.outputs:
            path = self._folder / "work" / name
            if not path.exists():
                if record.over:
                    record.problems.append(f"{name}: the old one is gone")
            elif self._content(path) not in (self._content_new(name), "old"):
                record.problems.append(f"{name}: neither the old one nor the new one")
        if number is not signal.SIGKILL:
            kept = self.command.kept
            for name in record.left:
                if name not in self._wanted and not name.startswith(kept or "\0"):
                    record.problems.append(f"{name}: left after {number.name}")
            record.problems += [f"{name}: left" for name in record.left if "unfinished" in name]

    def _judge_end(self, record: StopRecord, *, over: bool) -> None:
        wanted = dict(self._wanted)
        if over and self.command.outputs and self.command.outputs[0].endswith(".icm"):
            wanted[f"work/{self.command.outputs[0]}/{_OLD}"] = hashlib.sha256(b"mine").hexdigest()
        found = self._tree()
        record.problems += [f"{name}: left" for name in sorted(found.keys() - wanted.keys())]
        record.problems += [f"{name}: missing" for name in sorted(wanted.keys() - found.keys())]
        both = sorted(found.keys() & wanted.keys())
        record.problems += [f"{name}: other bytes" for name in both if found[name] != wanted[name]]
        living = _living(self._token, _ORPHANS_S)
        record.problems += [f"process {pid} lives" for pid in living]

    def _stopped(self, record: StopRecord, number: signal.Signals, moment: float | str) -> bool:
        """Starts the command and sends the signal; False if it ended before."""
        process, began = self._start(), time.monotonic()
        asking = Asking(process, self._image) if self.command.name == "serve" else None
        if isinstance(moment, float):
            with suppress(subprocess.TimeoutExpired):
                process.wait(moment * self.whole_s)
        else:
            while process.poll() is None and next(self._folder.glob(moment), None) is None:
                time.sleep(_POLL)
                if time.monotonic() - began > _LONGEST:
                    break
        record.after_s = round(time.monotonic() - began, 3)
        process.send_signal(number)
        said = asking.end() if asking else process.communicate(timeout=_LONGEST)[1].strip()
        code = process.returncode
        if code == 0 and asking is None:
            return False
        heard = 0 if asking else CODES[number]
        if code not in (-number, heard) or (number is signal.SIGKILL and code != -number):
            record.problems.append(f"exit code {code} after {number.name}: {said[-300:]!r}")
        lines = [line for line in said.splitlines() if line]
        own = [line for line in lines if line.startswith("invariclip: ")]  # `build` names its stages as well
        if code == heard and number is not signal.SIGKILL and (len(own) != 1 or own != lines[-1:]):
            record.problems.append(f"not one line: {said[-300:]!r}")
        return True

    def _finish(self) -> list[str]:
        """Runs the command to its end; what went wrong."""
        process = self._start()
        if self.command.name == "serve":
            return self._served(process)
        said = process.communicate(timeout=_LONGEST)[1]
        return [] if process.returncode == 0 else [f"exit code {process.returncode}: {said[-300:]!r}"]

    def _served(self, process: subprocess.Popen[str]) -> list[str]:
        """A server that is started answers as the first one did, and its site's log can be replayed."""
        asking = Asking(process, self._image)
        asking.started.wait(_LONGEST)
        time.sleep(SERVED_S)
        try:
            answer = asking.ask("/v1/classify?top=3")
        except OSError as error:
            answer = (0, str(error))
        process.terminate()
        said = asking.end()
        problems = [] if process.returncode == 0 else [f"exit code {process.returncode}: {said[-300:]!r}"]
        if not hasattr(self, "_answer"):
            self._answer = answer
        if answer != self._answer or answer[0] != 200:
            problems.append(f"it answers {answer}, not {self._answer}")
        return problems + self._replays()

    def _replays(self) -> list[str]:
        from invariclip.sites.site_log import replay

        problems = []
        for log in sorted((self._folder / "work" / "log").glob("*/*/*")):
            if not (log / "000001.safetensors").exists():
                continue  # it had begun, and nothing was written yet
            try:
                replay(log, self._bank)
            except InvariclipError as error:
                problems.append(str(error))
        return problems

    @cached_property
    def _bank(self) -> NDArray[np.float32]:
        import invariclip

        return invariclip.load(self._world / "served.icm", threads=1).class_bank()

    @cached_property
    def _image(self) -> bytes:
        return min((self._world / "many").iterdir()).read_bytes()

    def _start(self) -> subprocess.Popen[str]:
        self._token = hashlib.sha256(os.urandom(16)).hexdigest()
        folders = {"TMPDIR": "tmp", "XDG_CACHE_HOME": "cache", "HOME": "home"}
        environment = {
            **os.environ, "HF_HUB_OFFLINE": "1", _MARK: self._token, "PYTHONDONTWRITEBYTECODE": "1",
            **{name: str(self._folder / folder) for name, folder in folders.items()},
        }  # fmt: skip
        quiet = () if self.command.name == "serve" else ("--quiet",)
        return subprocess.Popen(
            [sys.executable, "-m", "invariclip", *self.command.words, *quiet], cwd=self._folder / "work",
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=_hears_interrupts,
        )  # fmt: skip

    def _clear(self, *, over: bool = False) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        for name in ("work", "tmp", "cache", "home"):
            (self._folder / name).mkdir(parents=True)
        for name in self.command.outputs if over else ():
            path = self._folder / "work" / name
            if path.suffix == ".icm":
                shutil.copytree(self._world / "served.icm", path)
                (path / _OLD).write_bytes(b"mine")
            else:
                path.write_bytes(b"old")

    def _tree(self) -> dict[str, str]:
        """What is compared: of a log only that nothing else is there, of a profile what does not change."""
        found = {name: kind for name, kind in tree(self._folder).items() if not _LOG_FILE.fullmatch(name)}
        if self.command.same is not None:
            for name in self.command.outputs:
                path = self._folder / "work" / name
                if path.exists():
                    found[f"work/{name}"] = json.dumps(self.command.same(path))
        return found

    def _content(self, path: Path) -> object:
        """`old`, or what is there."""
        if path.is_dir():
            found = tree(path)
            found.pop(_OLD, None)
            return "old" if found == tree(self._world / "served.icm") else found
        if path.read_bytes() == b"old":
            return "old"
        return json.dumps(self.command.same(path)) if self.command.same else tree_of_file(path)

    def _content_new(self, name: str) -> object:
        return self._new[name] or self._wanted[f"work/{name}"]


def tree_of_file(path: Path) -> str:
    """The digest of a file, as in `tree`."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Asking:
    """Asks a server one question after the other, from the moment at which it listens until it is gone."""

    def __init__(self, process: subprocess.Popen[str], image: bytes) -> None:
        self.started = threading.Event()
        self._process, self._image, self._said, self._port = process, image, [""], 0
        self._threads = [threading.Thread(target=self._read), threading.Thread(target=self._ask_on)]
        for thread in self._threads:
            thread.start()

    def ask(self, path: str) -> tuple[int, str]:
        """Status and body of the answer.

        Raises:
            OSError: There is none.
        """
        link = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        try:
            link.request("POST", path, self._image, {"content-type": "image/webp"})
            answer = link.getresponse()
            return answer.status, answer.read().decode()
        except http.client.HTTPException as error:
            raise ConnectionError(str(error)) from error
        finally:
            link.close()

    def end(self) -> str:
        """Waits until the process has ended; what it said."""
        self._process.wait(_LONGEST)
        for thread in self._threads:
            thread.join(_LONGEST)
        return "".join(self._said)

    def _read(self) -> None:
        for line in self._process.stderr or ():
            self._said.append(line)
            if found := re.search(r"at http://127\.0\.0\.1:(\d+)$", line.strip()):
                self._port = int(found[1])
                self.started.set()
        self.started.set()

    def _ask_on(self) -> None:
        self.started.wait(_LONGEST)
        while self._port and self._process.poll() is None:
            with suppress(OSError):
                self.ask("/v1/classify?site=yard")


def _hears_interrupts() -> None:
    """A shell lets what it starts in the background ignore Ctrl-C, and that is inherited."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _living(token: str, seconds: float) -> list[int]:
    """Processes that a trial started and that still live after so long."""
    until = time.monotonic() + seconds
    while True:
        found = list(_marked(token))
        if not found or time.monotonic() > until:
            return found
        time.sleep(0.05)


def _marked(token: str) -> Iterator[int]:
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"{_MARK}={token}".encode() in (process / "environ").read_bytes():
                yield int(process.name)


def command_named(name: str) -> StoppedCommand:
    """One of `COMMANDS`."""
    return next(command for command in COMMANDS if command.name == name)
