"""Tests that need a CUDA device; without one nothing here is collected. Operators run once per backend."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.peers import require_backend

import poolformer_kernels as pk

if not torch.cuda.is_available():
    collect_ignore_glob = ["*"]


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test here with its backend: ``-m cuda`` and ``-m triton`` are all of them."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            given = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
            on_auto = "cuda" if item.path.stem == "test_cuda" else "triton"  # what the others run on
            item.add_marker(given or on_auto)


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest, monkeypatch) -> Iterator[str]:
    """The test runs on this backend; `cases.over` gives it the backend's own cases.

    Eager's convolutions run without TF32, which float32 has by default there: ours are measured by them.
    """
    require_backend(request.param)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with pk.use_backend(request.param):
        yield request.param
