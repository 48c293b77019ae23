"""Tests that need a CUDA device; without one nothing here is collected. Operators run once per backend."""

from collections.abc import Iterator

import pytest
import torch
from helpers import require_backend

import poolformer_kernels as pk

if not torch.cuda.is_available():
    collect_ignore_glob = ["*"]


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest, monkeypatch) -> Iterator[str]:
    """The test runs on this backend; `cases.over` gives it the backend's own cases.

    Eager's convolutions run without TF32, which float32 has by default there: ours are measured by them.
    """
    require_backend(request.param)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with pk.use_backend(request.param):
        yield request.param
