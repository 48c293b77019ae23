"""Which backend runs a call: an explicit choice is kept or raises, ``auto`` takes the fastest that can."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Protocol

import torch

from .. import environment
from .torch_private import constant_result

__all__ = [
    "BACKENDS",
    "Backend",
    "available_backends",
    "backend_reasons",
    "explain_selection",
    "get_backend",
    "mlp_backend",
    "mlp_of_cuda",
    "register",
    "registered",
    "select_backend",
    "unavailable_reason",
    "use_backend",
]

BACKENDS = ("reference", "cpp", "triton", "cuda")
_CHOICES = ("auto", *BACKENDS)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_log = logging.getLogger("poolformer_kernels")


class Backend(Protocol):
    """What `register` takes: a module of `poolformer_kernels.backends`."""

    DEVICES: tuple[str, ...]  # torch's names of the types of devices that it runs on
    UNAVAILABLE: str | None  # why it cannot run, whatever the device

    @staticmethod
    def unavailable(device: torch.device) -> str | None:
        """Why it cannot run on a device of these types, or None."""

    @staticmethod
    def stats_tiles(shape: torch.Size, channels_last: bool, pool_size: int) -> int:
        """How many partials of a sample's statistics the token mixer returns for an output of this shape."""

    @staticmethod
    def mlp_stats_tiles(shape: torch.Size, channels_last: bool, hidden: int) -> int:
        """How many partials the MLP returns for an output of this shape."""

    @staticmethod
    def mlp_unsupported(
        channels: int, hidden: int, out: int, operand: torch.dtype, backward: bool = False
    ) -> str | None:
        """Which MLP it has no kernel for, in words, if these sizes and operands are one; else None."""

    @staticmethod
    def hidden_kept_from(operand: torch.dtype) -> float:
        """From how many channels on fc1's output is kept for the backward, if the caller leaves it open.

        ``operand`` is the dtype of the products.
        """


_registered: dict[str, Backend] = {}


def register(name: str, backend: Backend) -> None:
    """Makes a backend known under one of the names of `BACKENDS`; backends call it when they are imported."""
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; allowed: {', '.join(BACKENDS)}")
    _registered[name] = backend


def registered(name: str) -> Backend:
    """The backend of this name; ``"reference"`` is none."""
    return _registered[name]


_chosen = environment.choice("POOLFORMER_KERNELS_BACKEND", _CHOICES)
_logged: set[str] = set()


def get_backend() -> str:
    """The choice in force: the innermost `use_backend`'s, else ``POOLFORMER_KERNELS_BACKEND``'s, else "auto".

    Which backend "auto" takes depends on the call: see `poolformer_kernels.explain`.

    Example:
        >>> with use_backend("reference"):
        ...     get_backend()
        'reference'
    """
    return _chosen


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator inside the ``with`` block on one backend, forward and backward.

    Args:
        name: ``"auto"``, ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Raises:
        ValueError: at once, for an unknown name.
        RuntimeError: from the operator, if that backend cannot run the call. It never falls back. Only traces
            for TorchScript and ONNX, which have none of our operators, take the reference in any case.

    The choice is the process's, not the thread's: while one thread is in the block, calls in all threads
    follow it. Leaving the block puts back what held when it was entered, so blocks of several threads must
    not overlap: where threads compute at once, enter it around all of them. A call keeps the backend of its
    forward for its backward, wherever autograd runs that.

    Example:
        >>> with use_backend("reference"):
        ...     y = poolformer_kernels.ops.pool_mixer(torch.ones(1, 2, 3, 3), None, None)
    """
    global _chosen
    if name not in _CHOICES:
        raise ValueError(f"backend is {name!r}; allowed: {', '.join(_CHOICES)}")
    previous, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = previous


def _with_index(device: torch.device) -> torch.device:
    """The device with its index: ``cuda`` alone is the current one."""
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def unavailable_reason(backend: str, device: torch.device | None = None) -> str | None:
    """Why a backend cannot run on a device, by default on any device of this machine; None if it can.

    A CUDA device is asked at the first call, not at import: CUDA is not initialised before.
    """
    if backend == "reference":
        return None
    found = registered(backend)
    if found.UNAVAILABLE is not None:
        return found.UNAVAILABLE
    if device is None:
        if "cpu" in found.DEVICES:
            return found.unavailable(torch.device("cpu"))
        devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
        reasons = [unavailable_reason(backend, each) for each in devices] or ["no CUDA device"]
        known = dict.fromkeys(reason for reason in reasons if reason is not None)
        return None if None in reasons else "; ".join(known)
    if device.type not in found.DEVICES:
        return f"it runs on {' and '.join(found.DEVICES)} tensors, not {device.type}"
    return found.unavailable(_with_index(device))


def available_backends() -> list[str]:
    """The names of the backends that can run here, in the order of `BACKENDS`; see `backend_reasons`.

    Of several CUDA devices one that a backend can run on is enough; `poolformer_kernels.explain` asks each.

    Example:
        >>> available_backends()
        ['reference', 'cpp']
    """
    reasons = backend_reasons()
    return [name for name in BACKENDS if name not in reasons]


def backend_reasons() -> dict[str, str]:
    """Why a backend cannot run here, by name: only those that cannot, so it is empty where all can.

    Example:
        >>> backend_reasons()
        {'triton': 'triton is not installed', 'cuda': 'no CUDA device'}
    """
    reasons = {name: unavailable_reason(name) for name in BACKENDS}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _unsupported(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run a call with x on this device and of this dtype, or None."""
    reason = unavailable_reason(backend, device)
    if reason is None and backend != "reference" and dtype not in _FLOATS:
        reason = f"it computes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return reason


_SELECTED: dict[tuple[str, torch.device | str, torch.dtype], tuple[str, str]] = {}
_PREFERENCE = {"cpu": ("cpp",), "cuda": ("triton", "cuda")}  # what ``auto`` tries, the fastest first


def select_backend(device: torch.device | str, dtype: torch.dtype) -> str:
    """The backend that runs a call with x on this device and of this dtype."""
    if torch.onnx.is_in_onnx_export() if torch.compiler.is_compiling() else torch.jit.is_tracing():
        return "reference"  # whatever was asked for: neither ONNX nor what reads a trace has our operators
    return _selected(_chosen, device, dtype)


@constant_result  # the compiler guards on the arguments, so on the choice, too
def _selected(chosen: str, device: torch.device | str, dtype: torch.dtype) -> str:
    try:
        return _SELECTED[chosen, device, dtype][0]
    except KeyError:
        backend, reason = _decide(chosen, device, dtype)
    if torch.device(device) == _with_index(torch.device(device)):  # `cuda` alone follows the current device
        _SELECTED[chosen, device, dtype] = backend, reason
    if backend == "reference" and chosen == "auto" and torch.device(device).type != "meta":
        _log_reference(reason)  # of meta tensors nothing is computed, however it is done
    return backend


def _log_reference(reason: str) -> None:
    if reason not in _logged:
        _logged.add(reason)
        _log.warning("running the reference implementation: %s", reason)


def _decide(chosen: str, device: torch.device | str, dtype: torch.dtype) -> tuple[str, str]:
    device = torch.device(device)
    if chosen != "auto":
        reason = _unsupported(chosen, device, dtype)
        if reason is not None:
            raise RuntimeError(f"backend {chosen!r} was asked for and cannot run this call: {reason}")
        return chosen, "asked for"
    preferred = _PREFERENCE.get(device.type)
    if preferred is None:
        return "reference", f"no kernel backend runs on {device.type} tensors"
    reasons: list[str] = []
    for backend in preferred:
        reason = _unsupported(backend, device, dtype)
        if reason is None:
            return backend, f"instead of {'; '.join(reasons)}" if reasons else f"the fastest on {device.type}"
        reasons.append(f"{backend}: {reason}")
    return "reference", "; ".join(reasons)


@constant_result
def mlp_backend(
    selected: str,
    device: torch.device,
    sizes: tuple[int, int, int],
    operand: torch.dtype,
    backward: bool = False,
) -> tuple[str, str | None]:
    """(the backend that runs an MLP of ``sizes`` (C, hidden, out), why it is not the one selected or None).

    The CUDA C++ kernels cover narrow streams of halves; the other MLPs stay with Triton, and where Triton
    cannot run on the device, with the reference.
    """
    if selected == "reference":
        return selected, None
    reason = registered(selected).mlp_unsupported(*sizes, operand, backward)
    if reason is None:
        return selected, None
    missing = unavailable_reason("triton", device)
    if missing is None:
        return "triton", reason
    return "reference", f"{reason}; triton: {missing}"


@constant_result  # the compiler guards on the arguments, so on the choice, too
def _mlp_in_reference(chosen: str, why: str) -> None:
    if chosen != "auto":
        raise RuntimeError(f"backend {chosen!r} was asked for and has no kernel for this call: {why}")
    _log_reference(f"cuda: no kernel for {why}")


def mlp_of_cuda(
    device: torch.device, sizes: tuple[int, int, int], operand: torch.dtype, training: bool
) -> str:
    """The backend that runs an MLP for which CUDA C++ was selected; see `mlp_backend`.

    Args:
        training: gradients will be asked for, so that there must be a kernel for them, too.

    Raises:
        RuntimeError: CUDA C++ was asked for, and no kernel that can run here covers the call.
    """
    backend, why = mlp_backend("cuda", device, sizes, operand)
    if backend == "cuda" and training:
        other, reason = mlp_backend("cuda", device, sizes, operand, backward=True)
        if other == "reference":
            backend, why = other, f"the backward of {reason}"
    if backend == "reference":
        _mlp_in_reference(_chosen, why)
    return backend


def explain_selection(device: torch.device | str, dtype: torch.dtype) -> tuple[str, str]:
    """(backend, reason) for a call; the backend is ``"none"`` where an explicit choice cannot be met."""
    try:
        return _decide(_chosen, device, dtype)
    except RuntimeError as error:
        return "none", str(error)
