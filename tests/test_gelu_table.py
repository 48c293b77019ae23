"""The numbers of csrc/cpu/mlp/gelu_table.h, computed again, and what the kernels make of them."""

import math
import re
from pathlib import Path

import numpy as np
import pytest

HEADER = (Path(__file__).parents[1] / "csrc/cpu/mlp/gelu_table.h").read_text()
END = 15.4375  # where z = 4 h is clamped
FACTORS = {"kGelu": 1.0, "kGeluToCut": 1 + 0.72 / 256}


def gelu(x: float) -> float:
    return 0.5 * x * math.erfc(-x / math.sqrt(2))


def written(name: str) -> np.ndarray:
    """The three rows of a table: a, b and c."""
    body = re.search(rf"GeluEntries {name} = {{(.*?)}};", HEADER, re.DOTALL)[1]
    return np.array(re.findall(r"-?\d[\d.e-]*(?=f)", body), np.float32).reshape(3, 32)


def computed(factor: float) -> np.ndarray:
    """Each entry interpolates at Chebyshev's three points; those of -15 and 15 end in 0 and in z / 4."""
    table = np.zeros((3, 32))
    for m in range(-14, 15):
        x = [m + 0.5 * math.cos(math.pi * (2 * k + 1) / 6) for k in range(3)]
        f = [gelu(v / 4) for v in x]
        first, second = (f[1] - f[0]) / (x[1] - x[0]), (f[2] - f[1]) / (x[2] - x[1])
        c = (second - first) / (x[2] - x[0])
        a = 0 if m == 0 else f[0] - first * x[0] + c * x[0] * x[1]
        table[:, m + 16] = a, first - c * (x[0] + x[1]), c
    table = (table * factor).astype(np.float32)
    slope = gelu(-14.5 / 4) / (-14.5 / 4) * 0.75 / (END - 14.5) / 4 * factor
    c = (np.float32(slope).view(np.uint32) & np.uint32(0xFFFFF000)).view(np.float32)  # 12 bits
    table[:, 1] = 0, float(c) * END, c
    table[:, 31] = 0, 0.25 * factor - float(c) * END, c
    return table


@pytest.mark.parametrize("name", FACTORS)
def test_the_numbers(name: str) -> None:
    np.testing.assert_array_equal(written(name), computed(FACTORS[name]))


@pytest.mark.parametrize("name", FACTORS)
def test_the_error(name: str) -> None:
    a, b, c = written(name)
    z = np.concatenate([np.linspace(-17, 17, 200001), [-1e30, -100, -15.4375, 15.4375, 100, 2.0**100]])
    z = z.astype(np.float32)
    clamped = np.clip(z, -END, END)
    entry = np.rint(clamped).astype(int) + 16
    value = ((c[entry] * clamped + b[entry]) * z + a[entry]) / FACTORS[name]
    exact = np.array([gelu(float(v) / 4) for v in z])
    inner = np.abs(z) < 20
    assert np.abs(value - exact)[inner].max() < 2.3e-4
    assert np.all(value[z <= -END] == 0)
    np.testing.assert_allclose(value[z >= END], z[z >= END] / 4, rtol=1e-6)


def test_cutting_is_right_on_average() -> None:
    """Of results times the factor, cut to bfloat16: no bias, and hardly more error than rounding leaves."""
    rng = np.random.default_rng(0)
    exact = 2 ** rng.uniform(-4, 3, 1 << 20)  # every order of magnitude is equally likely
    larger = (exact * FACTORS["kGeluToCut"]).astype(np.float32)
    cut = (larger.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    error = cut / exact - 1
    assert abs(error.mean()) < 5e-5
    assert math.sqrt((error**2).mean()) < 1.8e-3  # rounded to nearest: 1.67e-3
    representable = rng.integers(0x3E00, 0x4100, 1 << 12).astype(np.uint32) << 16
    larger = (representable.view(np.float32) * np.float32(FACTORS["kGeluToCut"])).view(np.uint32)
    np.testing.assert_array_equal(larger & np.uint32(0xFFFF0000), representable)
