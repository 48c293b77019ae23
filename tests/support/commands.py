"""The command `poolformer-kernels` in this process."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

from poolformer_kernels.cli.main import main

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


def refused(capsys, command: str, *more: object, progress: bool = False) -> str:
    """The one line that the command ends with, less the program's name; ``progress``: behind others."""
    capsys.readouterr()
    code = run(command, *more)
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    lines = err.splitlines()
    assert len(lines) == 1 or progress, err
    assert [line for line in lines if line.startswith(ERROR)] == lines[-1:], err
    assert "Traceback" not in err
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
