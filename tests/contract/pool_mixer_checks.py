"""Bad arguments: the error names the argument, what came and what is allowed, alike on every backend."""

import re

import numpy as np
import pytest
import torch

import poolformer_kernels as pk
from poolformer_kernels.ops import pool_mixer
from poolformer_kernels.ops.pool_mixer import pool_mixer_with_stats

from .cases import over

OPERATOR = "pool_mixer"
C, B = 3, 2


def x_of(dtype: torch.dtype = torch.float32, *shape: int) -> torch.Tensor:
    return torch.ones(shape or (B, C, 4, 5), dtype=dtype)


def ones(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


def nested(layout: torch.layout) -> torch.Tensor:
    """Two images of different heights."""
    return torch.nested.nested_tensor([ones(4, C, 5), ones(6, C, 5)], layout=layout)


NESTED = ["x must be a dense tensor [B, C, H, W] of images of one size, got a nested tensor", "x.unbind()"]

BAD = {
    "x sparse": (TypeError, {"x": x_of().to_sparse()}, ["x must be a dense tensor", "torch.sparse_coo"]),
    "x nested": (TypeError, {"x": nested(torch.strided)}, NESTED),
    "x nested and jagged": (TypeError, {"x": nested(torch.jagged)}, NESTED),
    "weight sparse": (TypeError, {"weight": ones(C).to_sparse()}, ["weight must be a dense tensor"]),
    "pool_size huge": (ValueError, {"pool_size": 10**30 + 1}, ["pool_size must be below 2**31"]),
    "eps huge": (ValueError, {"eps": 10**400}, ["eps must be finite and not negative, got"]),
    "eps inf": (ValueError, {"eps": float("inf")}, ["eps must be finite and not negative, got", "inf"]),
    "residual": (TypeError, {"residual": "a"}, ["residual must be a bool", "str"]),
    # x
    "x a list": (TypeError, {"x": [[1.0]]}, ["x must be a tensor", "list"]),
    "x None": (TypeError, {"x": None}, ["x must be a tensor", "NoneType"]),
    "x int64": (
        TypeError,
        {"x": x_of(torch.int64)},
        ["x must be", "float32", "bfloat16", "float16", "int64"],
    ),
    "x bool": (TypeError, {"x": x_of(torch.bool)}, ["x must be", "torch.bool"]),
    "x complex": (TypeError, {"x": x_of(torch.complex64)}, ["x must be", "torch.complex64"]),
    "x float8": (TypeError, {"x": x_of().to(torch.float8_e4m3fn)}, ["x must be", "torch.float8_e4m3fn"]),
    "x 3-D": (ValueError, {"x": ones(C, 4, 5)}, ["x must have 4 dimensions [B, C, H, W]", "(3, 4, 5)"]),
    "x 5-D": (ValueError, {"x": ones(1, C, 2, 4, 5)}, ["x must have 4 dimensions", "(1, 3, 2, 4, 5)"]),
    "x no channels": (
        ValueError,
        {"x": ones(B, 0, 4, 5), "weight": None, "bias": None},
        ["x must have at least one channel and one pixel", "(2, 0, 4, 5)"],
    ),
    "x no rows": (ValueError, {"x": ones(B, C, 0, 5)}, ["x must have at least one", "(2, 3, 0, 5)"]),
    "x no columns": (ValueError, {"x": ones(B, C, 4, 0)}, ["x must have at least one", "(2, 3, 4, 0)"]),
    # the pool and eps
    "pool even": (ValueError, {"pool_size": 2}, ["pool_size must be odd and positive", "2"]),
    "pool 0": (ValueError, {"pool_size": 0}, ["pool_size must be odd and positive", "0"]),
    "pool negative": (ValueError, {"pool_size": -3}, ["pool_size must be odd and positive", "-3"]),
    "pool a float": (TypeError, {"pool_size": 3.0}, ["pool_size must be an int", "float"]),
    "pool a bool": (TypeError, {"pool_size": True}, ["pool_size must be an int", "bool"]),
    "pool a tuple": (TypeError, {"pool_size": (3, 3)}, ["pool_size must be an int", "tuple"]),
    "eps negative": (ValueError, {"eps": -1e-5}, ["eps must be finite and not negative, got", "-1e-05"]),
    "eps NaN": (ValueError, {"eps": float("nan")}, ["eps must be finite and not negative, got", "nan"]),
    "eps a string": (TypeError, {"eps": "1e-5"}, ["eps must be a number", "str"]),
    "eps None": (TypeError, {"eps": None}, ["eps must be a number", "NoneType"]),
    # statistics
    "stats a tuple": (TypeError, {"stats": (0.0, 1.0)}, ["stats must be a tensor or None", "tuple"]),
    "stats half": (
        TypeError,
        {"stats": ones(B, 1, 3, dtype=torch.float16)},
        ["stats must be torch.float32 for x of torch.float32", "torch.float16"],
    ),
    "stats 2-D": (
        ValueError,
        {"stats": ones(B, 3)},
        ["stats must have shape [B, T, 3] = [2, T, 3]", "[2, 3]"],
    ),
    "stats batch": (ValueError, {"stats": ones(1, 1, 3)}, ["stats must have shape", "[1, 1, 3]"]),
    "stats pairs": (ValueError, {"stats": ones(B, 1, 2)}, ["stats must have shape", "[2, 1, 2]"]),
    "stats no tiles": (ValueError, {"stats": ones(B, 0, 3)}, ["stats must have shape", "[2, 0, 3]"]),
    "stats device": (
        ValueError,
        {"stats": ones(B, 1, 3, device="meta")},
        ["stats must be on x's device cpu", "meta"],
    ),
}
for _name, _size in (("weight", C), ("bias", C), ("layer_scale", C), ("drop_scale", B)):
    _letter = "B" if _name == "drop_scale" else "C"
    BAD |= {
        f"{_name} a float": (TypeError, {_name: 0.5}, [f"{_name} must be a tensor or None", "float"]),
        f"{_name} size": (
            ValueError,
            {_name: ones(_size + 1)},
            [f"{_name} must have shape [{_letter}] = [{_size}]", f"[{_size + 1}]"],
        ),
        f"{_name} size 1": (ValueError, {_name: ones(1)}, [f"{_name} must have shape [{_letter}]", "[1]"]),
        f"{_name} 4-D": (
            ValueError,
            {_name: ones(_size, 1, 1)},
            [f"{_name} must have shape", f"[{_size}, 1, 1]"],
        ),
        f"{_name} 0-D": (ValueError, {_name: ones()}, [f"{_name} must have shape", "[]"]),
        f"{_name} device": (
            ValueError,
            {_name: ones(_size, device="meta")},
            [f"{_name} must be on x's device cpu", "meta"],
        ),
        f"{_name} int": (
            TypeError,
            {_name: ones(_size, dtype=torch.int64)},
            [f"{_name} must be torch.float32 for x of torch.float32", "torch.int64"],
        ),
        f"{_name} half of float32": (
            TypeError,
            {_name: ones(_size, dtype=torch.bfloat16)},
            [f"{_name} must be torch.float32 for x of torch.float32", "torch.bfloat16"],
        ),
        f"{_name} float64 of float32": (
            TypeError,
            {_name: ones(_size, dtype=torch.float64)},
            [f"{_name} must be torch.float32 for x of torch.float32", "torch.float64"],
        ),
        f"{_name} fp16 of bf16": (
            TypeError,
            {
                "x": x_of(torch.bfloat16),
                "weight": None,
                "bias": None,
                _name: ones(_size, dtype=torch.float16),
            },
            [f"{_name} must be torch.bfloat16 or torch.float32 for x of torch.bfloat16", "torch.float16"],
        ),
    }


@over(case=tuple(BAD), once=True)
def test_bad_argument(target, case):
    error, changed, wanted = BAD[case]
    arguments = {"x": x_of(), "weight": ones(C), "bias": ones(C)} | changed
    with pytest.raises(error) as caught:
        pool_mixer_with_stats(**arguments)
    message = str(caught.value)
    for part in wanted:
        assert part in message, f"{part!r} is not in {message!r}"
    assert "\n" not in message
    if "stats" not in arguments:
        with pytest.raises(error, match=re.escape(message)):
            pool_mixer(**arguments)


@pytest.mark.parametrize("name", ["weight", "bias", "layer_scale", "drop_scale"])
def test_float64_takes_no_other_dtype(name):
    arguments = {"x": x_of(torch.float64), "weight": None, "bias": None} | {
        name: ones(B if name[0] == "d" else C)
    }
    message = f"{name} must be torch.float64 for x of torch.float64, got torch.float32"
    with pytest.raises(TypeError, match=re.escape(message)):
        pool_mixer(**arguments)
    with pytest.raises(TypeError, match=r"stats must be torch\.float64"):
        pool_mixer_with_stats(x_of(torch.float64), None, None, stats=ones(B, 1, 3))


def test_arguments_are_checked_before_the_backend():
    """A wrong argument is told apart from a backend that is missing or does not take the call."""
    with (
        pk.use_backend("triton"),
        pytest.raises(ValueError, match="pool_size must be odd and positive, got 4"),
    ):
        pool_mixer(x_of(), None, None, pool_size=4)


def test_options_are_keywords_only():
    with pytest.raises(TypeError):
        pool_mixer(x_of(), None, None, 3)


@over(once=True, where=lambda target: None if target.device == "cpu" else "its tensors are the CPU's")
def test_what_is_allowed_is_taken(target):
    """eps = 0, an integer eps, numpy's integers, an empty batch with its empty drop_scale, several tiles."""
    x = torch.arange(120.0).view(B, C, 4, 5).sin()
    five, numpys = (pool_mixer(x, None, None, pool_size=size) for size in (5, np.int64(5)))
    assert torch.equal(five, numpys)
    assert torch.equal(pool_mixer(x, None, None, eps=1), pool_mixer(x, None, None, eps=1.0))
    assert pool_mixer(x, None, None, eps=0).isfinite().all()
    assert pool_mixer(x[:0], None, None, drop_scale=torch.ones(0)).shape == (0, C, 4, 5)
    half = torch.tensor([[30.0, 0.0, 15.0], [30.0, 0.0, 15.0]]).expand(B, 2, 3)  # mean 0, variance 1/2
    whole = torch.tensor([[60.0, 0.0, 30.0]]).expand(B, 1, 3)
    results = [pool_mixer_with_stats(x, None, None, stats=stats)[0] for stats in (half, whole)]
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
