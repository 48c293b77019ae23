"""The CUDA C++ kernels' source, compiled for the host: the contract's target "executor"."""

import ctypes
import os
from collections.abc import Iterator
from functools import cache

import torch

from poolformer_kernels.backends import cuda
from poolformer_kernels.ops import dispatch

VARIABLE = "POOLFORMER_KERNELS_TEST_EXECUTOR"  # the library that tests/cuda_executor/build.py made


@cache
def library() -> ctypes.CDLL:
    """The executor's own functions; from the first call on the "cuda" backend computes CPU tensors."""
    path = os.environ[VARIABLE]
    torch.ops.load_library(path)
    cuda.UNAVAILABLE = None
    cuda._unavailable = lambda device: None
    cuda.DEVICES = ("cuda", "cpu")
    dispatch._SELECTED.clear()
    return ctypes.CDLL(path)


def orders() -> Iterator[None]:
    """Each order of a block's threads but the usual one: descending; warp by warp; both."""
    try:
        for order in (1, 2, 3):
            library().executor_order(order)
            yield
    finally:
        library().executor_order(0)
