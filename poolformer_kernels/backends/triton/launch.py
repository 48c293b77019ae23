"""How the Triton kernels are launched: a shorter way to a kernel that is compiled already.

`triton.jit`'s launcher looks at each argument anew, in Python, which takes as long as several of torch's own
launches. `kernel` keeps what was compiled by a key made in C++ (csrc/launch/launches.cpp) and calls the
driver. What decides is the same: types and alignment of the arguments, constants and options.
"""

import logging
import os
import re
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache, partial

import triton
from triton import knobs

from .. import cpp

__all__ = ["Kernel", "capture_relaxed", "hooks_set", "kernel", "launching_unavailable"]

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_log = logging.getLogger("poolformer_kernels")
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_PASSED = {"i32": "i", "i64": "l", "fp32": "f"}  # Triton's types as csrc/launch/launches.cpp names them
_BYTES = {"p": 8, "l": 8, "i": 4, "f": 4}


def kernel(function: Callable | None = None, *, do_not_specialize: tuple[str, ...] = ()) -> Callable:
    """`triton.jit` for a kernel that is launched by ``kernel[(blocks,)](*arguments, **options)``."""
    if function is None:
        return partial(kernel, do_not_specialize=do_not_specialize)
    make = triton.jit if _INTERPRETED else Kernel
    return make(function, do_not_specialize=list(do_not_specialize))


@cache
def launching_unavailable() -> str | None:
    """Why kernels are launched by Triton's own launcher here, or None; said in the log once."""
    if cpp.UNAVAILABLE is not None:
        reason = f"the C++ extension is missing: {cpp.UNAVAILABLE}"
    else:
        from ..._C import launching_unavailable as reason_of

        reason = reason_of()
    if reason is not None:
        _log.warning("Triton's own launcher is used, which costs the host more: %s", reason)
    return reason


def hooks_set() -> bool:
    """Whether something wants to see Triton's launches, as a profiler does."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


@contextmanager
def capture_relaxed():
    """Lets a kernel be loaded while a CUDA graph is captured: loading it is not part of the graph."""
    from ..._C import exchange_capture_mode

    before = exchange_capture_mode(_RELAXED)
    try:
        yield
    finally:
        if before >= 0:
            exchange_capture_mode(before)


class Kernel(triton.JITFunction):
    """A kernel of this package; everything but its launch is Triton's."""

    _launches = None

    def __getitem__(self, grid: tuple[int]) -> Callable:
        if self._launches is None or hooks_set():
            if launching_unavailable() is not None:
                return super().__getitem__(grid)
            if hooks_set():  # of a profiler, which sees Triton's launches only
                from ..._C import refuse_recording

                refuse_recording("a hook sees Triton's launches")
                return super().__getitem__(grid)
            from ..._C import Launches

            kinds = ("c" if p.is_constexpr else "n" if p.do_not_specialize else "s" for p in self.params)
            self._launches = Launches(self.__name__, "".join(kinds), self._launch_first)
        return partial(self._launches, grid)

    def _launch_first(self, grid: tuple[int], *args, **options) -> tuple | None:
        """Compiles, loads and launches by Triton; returns what the next launches need, None where unknown."""
        with capture_relaxed():
            compiled = super().__getitem__(grid)(*args, **options)
        try:
            return _prepared(compiled)
        except _UnknownFormatError as error:
            _warn_once(str(error))
            return None


class _UnknownFormatError(Exception):
    """A compiled kernel's launch is not understood."""


@cache
def _warn_once(reason: str) -> None:
    _log.warning("Triton's own launcher is used, which costs the host more: %s", reason)


def _prepared(compiled) -> tuple:
    """(function, threads, shared, [(index of an argument, how it is passed)], scratch, what to keep).

    The arguments of the machine code are those of the source without constants, then addresses of scratch
    memory, which are null for a kernel that needs none. The PTX is asked whether that is so.
    """
    metadata, version = compiled.metadata, f"Triton {triton.__version__}"
    for name in ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl"):
        if getattr(metadata, name, None):
            raise _UnknownFormatError(f"{version} compiles {metadata.name} with {name}")
    names = compiled.src.fn.arg_names
    arguments = []
    for name, kind in compiled.src.signature.items():
        if kind != "constexpr":
            passed = "p" if kind.startswith("*") else _PASSED.get(kind)
            if passed is None:
                raise _UnknownFormatError(f"{version} passes {name} as {kind}")
            arguments.append((names.index(name), passed))
    entry = re.search(r"\.entry\s+\w+\s*\((.*?)\)(.*?)\{", compiled.asm["ptx"], re.DOTALL)
    sizes = [int(bits) // 8 for bits in re.findall(r"\.param\s+\.[a-z](\d+)", entry[1])] if entry else []
    threads = 32 * metadata.num_warps
    bounds = re.search(r"\.(?:req|max)ntid\s+(\d+)", entry[2]) if entry else None
    scratch = sizes[len(arguments) :]
    if (
        sizes[: len(arguments)] != [_BYTES[passed] for _, passed in arguments]
        or set(scratch) > {8}
        or bounds is None
        or int(bounds[1]) != threads
        or getattr(metadata, "num_ctas", 1) != 1
    ):
        raise _UnknownFormatError(f"{version} compiles {metadata.name} for arguments that are not known here")
    return compiled.function, threads, metadata.shared, arguments, len(scratch), compiled
