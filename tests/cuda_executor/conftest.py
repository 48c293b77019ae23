"""Tests of the CUDA C++ kernels on the host, in a process of their own: see test_cuda_executor.py."""

import os
from collections.abc import Iterator

import pytest
from contract import executor

import poolformer_kernels as pk
from poolformer_kernels.ops import dispatch

if executor.VARIABLE in os.environ:
    executor.library()
else:
    collect_ignore_glob = ["*"]


@pytest.fixture
def device() -> str:
    """Of the kernels' tensors."""
    return "cpu"


@pytest.fixture(autouse=True)
def cuda(monkeypatch) -> Iterator[None]:
    """The "cuda" backend computes, and a test that takes Triton away decides anew."""
    monkeypatch.setattr(dispatch, "_SELECTED", {})
    with pk.use_backend("cuda"):
        yield
