"""What the command line sets up before anything else is imported: Ctrl-C and wrong variables are one line.

Importing PyTorch takes seconds, and the package checks its environment variables when it is imported. Neither
is inside `cli.main.main` yet, so that a traceback would be all that a user gets. In a process that is not the
command line this module changes nothing.
"""

import multiprocessing
import os
import signal
import sys
from types import TracebackType

__all__ = ["MODULE", "PROGRAM", "end_of_import", "is_command"]

PROGRAM, MODULE = "poolformer-kernels", "poolformer_kernels"
_VARIABLES = "POOLFORMER_KERNELS_"  # how a message about one of them begins


def is_command() -> bool:
    """Whether this process is ``poolformer-kernels`` or ``python -m poolformer_kernels``, not one's child."""
    if multiprocessing.parent_process() is not None:  # it has its parent's words
        return False
    if sys.argv[:1] == ["-m"]:  # Python has not looked for the module yet; its name precedes the arguments
        return sys.orig_argv[-len(sys.argv)] in (MODULE, f"-m{MODULE}")
    return bool(sys.argv) and os.path.basename(sys.argv[0]) == PROGRAM


def end_of_import() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt again: `cli.main.main` has begun."""
    if signal.getsignal(signal.SIGINT) is _interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupted(number: int, _: object) -> None:
    """Ends at once: nothing has been done yet, and modules that are half imported would hide an exception."""
    os.write(2, f"{PROGRAM}: interrupted\n".encode())
    os._exit(128 + number)


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The hook for an exception that ends the process."""
    if not (issubclass(kind, ValueError) and str(error).startswith(_VARIABLES)):
        sys.__excepthook__(kind, error, trace)
        return
    print(f"{PROGRAM}: error: {error}", file=sys.stderr)
    raise SystemExit(2)


if is_command():
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupted)
    sys.excepthook = _report
