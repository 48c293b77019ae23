"""What every command does with an error that its user can mend: one line on stderr and an exit code."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable

__all__ = ["INTERRUPTED", "CommandError", "report_errors"]

INTERRUPTED, PIPE_CLOSED = (
    130,
    141,
)  # 128 + SIGINT, 128 + SIGPIPE: what a shell reports of other programs, too
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EBADF)  # the last where standard output is closed
_NO_MEMORY = ("can't allocate memory", "not enough memory", "std::bad_alloc")  # of torch's and our C++


class CommandError(Exception):
    """What the user can mend: `main` prints it as one line and returns ``code``."""

    def __init__(self, message: str, code: int = 2) -> None:
        super().__init__(message)
        self.code = code


def report_errors(program: str, command: Callable[[], int]) -> int:
    """The command's exit code; what the user can mend becomes one line on stderr.

    Returns:
        what ``command`` returns; 2 or the error's own code; 130 after Ctrl-C; 141 where the reader of the
        output has left (``| head``), without a line.
    """
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()  # not at exit, where an error could no longer be told
    except BrokenPipeError:
        _forget_output()
        return PIPE_CLOSED
    except (Exception, KeyboardInterrupt) as error:
        found = _described(error)
        if found is None:
            raise
        with contextlib.suppress(BrokenPipeError):
            print(f"{program}: {found[0]}", file=sys.stderr)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            return found[1]
        _forget_output()
        return found[1]


def _described(error: BaseException) -> tuple[str, int] | None:
    """(the line, the exit code), or None of an error that is not the user's."""
    first = next(iter(str(error).splitlines()), "")
    if isinstance(error, CommandError):
        word = "" if error.code == INTERRUPTED else "error: "
        return word + " ".join(str(error).split()), error.code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", INTERRUPTED
    if _lacks_memory(error):
        return f"error: out of memory{': ' if first else ''}{first.rpartition('DefaultCPUAllocator: ')[2]}", 2
    if isinstance(error, OSError) and error.errno in _FULL:
        where = f" to {error.filename}" if error.filename else ""
        return f"error: cannot write{where}: {error.strerror}", 2
    return None


def _lacks_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # the latter of a GPU
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def _forget_output() -> None:
    """What stdout still holds cannot be written; Python must not try again, and complain, when it ends."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
