"""The command `poolformer-kernels` in this process, and processes of their own."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from poolformer_kernels.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
MODULE = ("-m", "poolformer_kernels")
ERROR = "poolformer-kernels: error: "


def run(command: str, *more: object) -> int:
    """The exit code of a command: words in one text, and more that may have spaces in them."""
    return main([*command.split(), *map(str, more)])


def printed(capsys, command: str, *more: object) -> str:
    """What the command prints, which must succeed."""
    capsys.readouterr()
    assert run(command, *more) == 0
    return capsys.readouterr().out


def refused(capsys, command: str, *more: object) -> str:
    """The line with which the command ends, less the program's name; before it there is only progress."""
    capsys.readouterr()
    code = run(command, *more)
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert [line for line in lines if line.startswith(ERROR)] == lines[-1:], captured.err
    assert "Traceback" not in captured.err
    assert (code, captured.out) == (2, "")
    return lines[-1].removeprefix(ERROR)


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """No file grows beyond ``size`` bytes: a write ends in the middle, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def python(
    *arguments: object, env: dict[str, str] | None = None, **options
) -> subprocess.CompletedProcess[str]:
    """A Python of its own, which finds this package wherever it runs."""
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path} | (env or {}),
        **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options),
    )
