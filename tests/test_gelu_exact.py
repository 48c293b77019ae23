"""The numbers of csrc/cpu/mlp/gelu_exact.h, computed again, and their error."""

import math
import re
from pathlib import Path

import numpy as np

HEADER = (Path(__file__).parents[1] / "csrc/cpu/mlp/gelu_exact.h").read_text()
END = np.float32(6.2)


def tail(a: float) -> float:
    return 0.5 * math.erfc(a / math.sqrt(2))


def written() -> np.ndarray:
    body = re.search(r"TailEntries kTail = {{(.*?)}};", HEADER, re.DOTALL)[1]
    return np.array(re.findall(r"-?\d[\d.e-]*(?=f)", body), np.float32).reshape(5, 32)


def computed() -> np.ndarray:
    """Each entry interpolates at Chebyshev points; that of 0, which has a right half only, is 1/2 at 0."""
    table = np.zeros((5, 32))
    points = [math.cos(math.pi * (2 * k + 1) / 10) / 2 for k in range(5)]
    for n in range(31):
        r = np.array(
            points if n else [0.0] + [0.25 + math.cos(math.pi * (2 * k + 1) / 8) / 4 for k in range(4)]
        )
        values = [tail((n + v) / 5) for v in r]
        table[:, n] = np.linalg.solve(np.vander(r, increasing=True), values)
    return table.astype(np.float32)


def gelu(x: np.ndarray) -> np.ndarray:
    """As the kernels compute it; products are exact in float64, as in a fused multiply-add."""
    a, c = np.minimum(np.abs(x), END).astype(np.float64), written().astype(np.float64)
    n = np.rint(a * 5)
    r = (a * 5 - n).astype(np.float32)
    value = c[4, n.astype(int)].astype(np.float32)
    for i in (3, 2, 1, 0):
        value = (value * r.astype(np.float64) + c[i, n.astype(int)]).astype(np.float32)
    return np.where(x == -np.inf, np.float32(np.nan), (np.maximum(x, 0) - a * value).astype(np.float32))


def test_the_numbers() -> None:
    np.testing.assert_allclose(written(), computed(), rtol=3e-7, atol=0)


def test_the_error() -> None:
    """Below 1.3 ulps for positive x; on the left, where gelu is small, relative to gelu, too."""
    x = np.concatenate(
        [np.linspace(-8, 8, 200001), np.geomspace(1e-20, 1, 500), -np.geomspace(1e-20, 1, 500)]
    )
    x = x.astype(np.float32)
    exact = np.array([float(v) * tail(-float(v)) for v in x])
    error = np.abs(gelu(x) - exact)
    right = x > 0
    assert (error[right] / np.spacing(np.abs(exact[right]).astype(np.float32))).max() < 1.3
    assert error.max() < 2.5e-7
    left = (x > -3) & (x < 0)
    assert (error[left] / -exact[left]).max() < 1e-6


def test_the_ends() -> None:
    x = np.array([-np.inf, -1e30, -6.2, 6.2, 1e30, np.inf], np.float32)
    np.testing.assert_array_equal(gelu(x), [np.nan, 0, 0, np.float32(6.2), np.float32(1e30), np.inf])
