"""Tests on the null GPU, in a process of their own: see test_null_gpu.py. No test may leave a complaint."""

from collections.abc import Iterator

import pytest

from . import null_gpu

if not null_gpu.ACTIVE:
    collect_ignore_glob = ["*"]


@pytest.fixture(autouse=True)
def without_complaints() -> Iterator[None]:
    """What the test records is its own, and whatever it does a GPU would have done."""
    null_gpu.take()
    null_gpu.take_complaints()
    yield
    complaints = null_gpu.take_complaints()
    assert not complaints, complaints
