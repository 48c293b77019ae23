"""Which backend runs a call: an explicit choice is kept or raises, ``auto`` takes the fastest that can."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from importlib import import_module

import torch

__all__ = [
    "BACKENDS",
    "available_backends",
    "constant_result",
    "explain_selection",
    "mlp_backend",
    "select_backend",
    "unavailable_reason",
    "use_backend",
]

BACKENDS = ("reference", "cpp", "triton", "cuda")
_CHOICES = ("auto", *BACKENDS)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_log = logging.getLogger("poolformer_kernels")


def constant_result(function: Callable) -> Callable:
    """`torch.compiler.assume_constant_result`, which would import the whole compiler: 1.5 s of our import."""
    function._dynamo_marked_constant = True
    return function


def _checked(name: str, origin: str) -> str:
    if name not in _CHOICES:
        raise ValueError(f"{origin} is {name!r}; allowed: {', '.join(_CHOICES)}")
    return name


_chosen = _checked(os.environ.get("POOLFORMER_KERNELS_BACKEND", "auto"), "POOLFORMER_KERNELS_BACKEND")
_logged: set[str] = set()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator inside the ``with`` block on one backend, forward and backward.

    Args:
        name: ``"auto"``, ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Raises:
        ValueError: at once, for an unknown name.
        RuntimeError: from the operator, if that backend cannot run the call. It never falls back.

    The choice is per process, not per thread; a call keeps the backend of its forward for its backward.
    """
    global _chosen
    previous, _chosen = _chosen, _checked(name, "backend")
    try:
        yield
    finally:
        _chosen = previous


def unavailable_reason(backend: str) -> str | None:
    """Why a backend cannot run on this machine at all, or None if it can."""
    if backend == "reference":
        return None
    return import_module(f"..backends.{backend}", __package__).UNAVAILABLE


def available_backends() -> dict[str, str | None]:
    """Every backend by name, with None where it can run here and the reason where it cannot."""
    return {name: unavailable_reason(name) for name in BACKENDS}


def _unsupported(backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run a call on this device type and dtype, or None."""
    if backend == "reference":
        return None
    reason = unavailable_reason(backend)
    if reason is not None:
        return reason
    devices = import_module(f"..backends.{backend}", __package__).DEVICES
    if device not in devices:
        return f"it runs on {' and '.join(devices)} tensors, not {device}"
    if dtype not in _FLOATS:
        return f"it computes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return None


_SELECTED: dict[tuple[str, str, torch.dtype], tuple[str, str]] = {}


def select_backend(device: str, dtype: torch.dtype) -> str:
    """The backend that runs a call with x on this device type and of this dtype."""
    if torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export():
        return "reference"  # ONNX knows no operators of ours, whatever was asked for
    return _selected(_chosen, device, dtype)


@constant_result  # for these arguments; the choice itself is guarded on
def _selected(chosen: str, device: str, dtype: torch.dtype) -> str:
    try:
        return _SELECTED[chosen, device, dtype][0]
    except KeyError:
        backend, reason = _SELECTED[chosen, device, dtype] = _decide(chosen, device, dtype)
    if backend == "reference" and chosen == "auto" and reason not in _logged:
        _logged.add(reason)
        _log.warning("running the reference implementation: %s", reason)
    return backend


def _decide(chosen: str, device: str, dtype: torch.dtype) -> tuple[str, str]:
    if chosen != "auto":
        reason = _unsupported(chosen, device, dtype)
        if reason is not None:
            raise RuntimeError(f"backend {chosen!r} was asked for and cannot run this call: {reason}")
        return chosen, "asked for"
    preferred = {"cpu": "cpp", "cuda": "triton"}.get(device)
    if preferred is None:
        return "reference", f"no kernel backend runs on {device} tensors"
    reason = _unsupported(preferred, device, dtype)
    if reason is None:
        return preferred, f"the fastest on {device}"
    return "reference", f"{preferred}: {reason}"


@constant_result  # for these arguments
def mlp_backend(
    selected: str, sizes: tuple[int, int, int], operand: torch.dtype, backward: bool = False
) -> tuple[str, str | None]:
    """(the backend that runs an MLP of ``sizes`` (C, hidden, out), why it is not the one selected or None).

    The CUDA C++ kernels cover narrow streams of halves; the other MLPs stay with Triton.
    """
    if selected != "cuda":
        return selected, None
    reason = import_module("..backends.cuda", __package__).mlp_unsupported(*sizes, operand, backward)
    return (selected, None) if reason is None else ("triton", reason)


def explain_selection(device: str, dtype: torch.dtype) -> tuple[str, str]:
    """(backend, reason) for a call; the backend is ``"none"`` where an explicit choice cannot be met."""
    try:
        return _decide(_chosen, device, dtype)
    except RuntimeError as error:
        return "none", str(error)
