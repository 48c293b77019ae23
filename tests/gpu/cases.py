"""The CUDA tests' dtypes and formats, and each backend's cases."""

from collections.abc import Iterable

import pytest
import torch
from support.problems import HALVES

DTYPES = (torch.float32, *HALVES)
FORMATS = ("nchw", "channels_last")


def over(names: str, triton: Iterable[tuple] = (), cuda: Iterable[tuple] = ()) -> pytest.MarkDecorator:
    """Runs a test on each backend's own cases, tuples of the arguments ``names``.

    Triton compiles for every shape, dtype and option, seconds each: there every value appears, but not every
    combination. The CUDA C++ kernels are compiled beforehand and have more cases.
    """
    rows = [("triton", *case) for case in triton] + [("cuda", *case) for case in cuda]
    arguments = ("backend", *names.split(", "))
    return pytest.mark.parametrize(arguments, rows, indirect=["backend"], ids=str)
