"""Tests of the kernels in Triton's interpreter, in a process of their own: see test_triton_interpreter.py."""

import os
from collections.abc import Iterator

import pytest
from support.interpreter import hasten

import poolformer_kernels as pk

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*"]


@pytest.fixture(scope="session", autouse=True)
def quick() -> None:
    hasten()


@pytest.fixture(autouse=True)
def triton() -> Iterator[None]:
    with pk.use_backend("triton"):
        yield
