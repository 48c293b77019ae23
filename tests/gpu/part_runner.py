"""One part of the GPU check: a command with a time limit, in a process group of its own.

Its output goes on as it comes, to stdout and to a log. When its time is up, or the check is asked to stop,
the group gets SIGINT, on which pytest and Python report what they were doing, and after `GRACE_S` SIGKILL.
Whatever a part leaves running in its group is killed when it ends.
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["GRACE_S", "ROOT", "SKIPPED", "Outcome", "Part", "Stop", "parser_of", "run_part"]

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # for the parts' programs, where PYTHONPATH has no package
GRACE_S = 5.0
SKIPPED = 77  # the exit code of a part that this machine cannot run, as in automake and meson
_TAIL_LINES = 40


def parser_of(doc: str) -> argparse.ArgumentParser:
    """Of a part's program; ``--help`` shows its docstring as it is written."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


@dataclass(frozen=True)
class Part:
    """What is run, for how many seconds at the most."""

    name: str
    limit_s: float
    command: Sequence[str]
    dry: Sequence[str] = ()  # arguments that a dry run adds
    env: Mapping[str, str] = field(default_factory=dict)
    only_without: str = ""  # runs only where this file of the results is missing or empty
    needs: str = ""  # a module without which it is skipped


@dataclass
class Outcome:
    """How a part ended: passed, skipped, failed, late, killed, stopped or not run."""

    name: str
    limit_s: float
    result: str
    seconds: float = 0.0
    detail: str = ""
    tail: list[str] = field(default_factory=list)

    @property
    def is_bad(self) -> bool:
        return self.result not in ("passed", "skipped")


class Stop:
    """Set by SIGINT and SIGTERM: the part that runs is stopped, no other begins."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._set)

    def _set(self, number: int, frame: object) -> None:
        self.signal = signal.Signals(number)


def run_part(
    part: Part, command: Sequence[str], limit_s: float, env: Mapping[str, str], out: Path, stop: Stop
) -> Outcome:
    """Run the command in the folder ``out``; it has ``limit_s`` seconds, and then `GRACE_S` to report.

    Its output is also in ``out/logs``, in a file of the part's name.
    """
    log = out / "logs" / (re.sub(r"\W+", "-", part.name) + ".txt")
    began = time.monotonic()
    try:
        process = subprocess.Popen(
            command,
            cwd=out,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        return Outcome(part.name, limit_s, "failed", detail=f"{command[0]}: {error.strerror}")
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    reader = threading.Thread(target=_copy_output, args=(process.stdout, log, tail), daemon=True)
    reader.start()
    while process.poll() is None and stop.signal is None and time.monotonic() - began < limit_s:
        time.sleep(0.05)
    result, detail = "", ""
    if process.poll() is None:
        result = "late" if stop.signal is None else "stopped"
        detail = _interrupt(process)
    _signal_group(process, signal.SIGKILL)  # what it left behind
    reader.join(2)  # a process that left the group may keep the pipe open
    if not result:
        result, detail = _judge(process.returncode)
    return Outcome(part.name, limit_s, result, time.monotonic() - began, detail, list(tail))


def _judge(code: int) -> tuple[str, str]:
    """(result, detail) of an exit code."""
    if code < 0:
        return "killed", f"by {signal.Signals(-code).name}"
    if code == 0:
        return "passed", ""
    return ("skipped", "") if code == SKIPPED else ("failed", f"exit code {code}")


def _interrupt(process: subprocess.Popen) -> str:
    """Stop a running part; which signal it took."""
    _signal_group(process, signal.SIGINT)
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        _signal_group(process, signal.SIGKILL)
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:  # the driver holds it
            return "killed, and it did not end"
        return "killed, it ignored SIGINT"
    return "ended by SIGINT"


def _signal_group(process: subprocess.Popen, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _copy_output(pipe, log: Path, tail: deque[str]) -> None:
    with log.open("wb") as file:
        for line in iter(pipe.readline, b""):
            file.write(line)
            file.flush()
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
            tail.append(line.decode(errors="replace").rstrip("\n"))
