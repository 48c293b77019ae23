"""What every command does with an error that its user can mend: one line on stderr, exit code 2."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = ["CommandError", "check_writable", "report_errors"]


class CommandError(Exception):
    """What the user can mend: `main` prints it as one line and returns 2."""


def check_writable(file: str | None, folder: str | None = None) -> None:
    """Fail before the work, not after it: both are made where they do not exist."""
    for path, parent in ((file, file and Path(file).parent), (folder, folder)):
        try:
            if parent is not None:
                Path(parent).mkdir(parents=True, exist_ok=True)
            if path is not None and path == file:
                Path(path).open("a").close()
        except OSError as error:
            raise CommandError(f"cannot write to {path}: {error.strerror}") from None


def report_errors(program: str, command: Callable[[], int]) -> int:
    """The command's exit code; what the user can mend becomes one line on stderr and exit code 2."""
    try:
        return command()
    except CommandError as error:
        message = " ".join(str(error).split())
        print(f"{program}: error: {message}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"{program}: error: out of memory: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader (`| head`) has left; nothing may be flushed at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
