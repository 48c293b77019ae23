"""Tests of the CUDA C++ kernels on the host, in a process of their own: see test_cuda_executor.py."""

import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import poolformer_kernels as pk
from poolformer_kernels.backends import cuda
from poolformer_kernels.ops import dispatch as selection

LIBRARY = os.environ.get("POOLFORMER_KERNELS_TEST_EXECUTOR")
if LIBRARY is None:
    collect_ignore_glob = ["*"]
else:
    from .build import load

    load(Path(LIBRARY))


@pytest.fixture(scope="session")
def executor_library() -> ctypes.CDLL:
    """The executor's own functions."""
    return ctypes.CDLL(LIBRARY)


@pytest.fixture
def other_orders(executor_library) -> Callable[[], Iterator[None]]:
    """For each order of a block's threads but the usual one: ``for _ in other_orders(): ...``."""

    def orders() -> Iterator[None]:
        try:
            for order in (1, 2, 3):  # descending; warp by warp; both
                executor_library.executor_order(order)
                yield
        finally:
            executor_library.executor_order(0)

    return orders


@pytest.fixture(autouse=True)
def executor(monkeypatch) -> Iterator[None]:
    """The "cuda" backend computes CPU tensors."""
    monkeypatch.setattr(cuda, "UNAVAILABLE", None)
    monkeypatch.setattr(cuda, "_unavailable", lambda device: None)
    monkeypatch.setattr(cuda, "DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(selection, "_SELECTED", {})
    with pk.use_backend("cuda"):
        yield
