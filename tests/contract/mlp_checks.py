"""Bad arguments: the error names the argument, what came and what is allowed, alike on every backend."""

import re

import pytest
import torch
import torch.nn.functional as F
from support.peers import require_backend

import poolformer_kernels as pk
from poolformer_kernels.ops import mlp
from poolformer_kernels.ops.mlp import mlp_with_stats

from .cases import over

OPERATOR = "mlp"
B, C, HIDDEN, OUT = 2, 3, 5, 4
BF16, FP16 = torch.bfloat16, torch.float16
WEIGHTS = {"w1": (HIDDEN, C), "w2": (OUT, HIDDEN)}


def on_the_cpu(target) -> str | None:
    if target.device != "cpu":
        return "its tensors are the CPU's"
    return target.refuses("mlp", {"dtype": torch.float32})


def ones(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


def x_of(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return ones(B, C, 4, 5, dtype=dtype)


def all_of(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {"x": x_of(dtype)} | {name: ones(*shape, dtype=dtype) for name, shape in WEIGHTS.items()}


ACTIVATION = "activation must be one of gelu, gelu_tanh, relu, relu_squared, silu, got "
BAD = {
    # x
    "x a list": (TypeError, {"x": [[1.0]]}, ["x must be a tensor", "list"]),
    "x None": (TypeError, {"x": None}, ["x must be a tensor", "NoneType"]),
    "x int64": (TypeError, {"x": x_of(torch.int64)}, ["x must be float32, bfloat16, float16", "int64"]),
    "x sparse": (TypeError, {"x": x_of().to_sparse()}, ["x must be a dense tensor", "torch.sparse_coo"]),
    "x 3-D": (ValueError, {"x": ones(C, 4, 5)}, ["x must have 4 dimensions [B, C, H, W]", "(3, 4, 5)"]),
    "x no channels": (
        ValueError,
        {"x": ones(B, 0, 4, 5)},
        ["x must have at least one channel", "(2, 0, 4, 5)"],
    ),
    "x no rows": (ValueError, {"x": ones(B, C, 0, 5)}, ["x must have at least one", "(2, 3, 0, 5)"]),
    # the sizes of the weights
    "w1 of other channels": (
        ValueError,
        {"w1": ones(HIDDEN, C + 1)},
        ["w1 must have shape [hidden, C] = [any, 3], or [any, 3, 1, 1], got [5, 4]"],
    ),
    "w1 no rows": (ValueError, {"w1": ones(0, C)}, ["w1 must have shape [hidden, C] = [any, 3]", "[0, 3]"]),
    "w1 3x3": (ValueError, {"w1": ones(HIDDEN, C, 3, 3)}, ["[any, 3, 1, 1], got [5, 3, 3, 3]"]),
    "w1 1x3": (ValueError, {"w1": ones(HIDDEN, C, 1, 3)}, ["[any, 3, 1, 1], got [5, 3, 1, 3]"]),
    "w1 transposed": (ValueError, {"w1": ones(C, HIDDEN)}, ["w1 must have shape [hidden, C]", "[3, 5]"]),
    "w1 of a grouped convolution": (
        ValueError,
        {"w1": ones(HIDDEN, 1, 1, 1)},
        ["w1 must have", "[5, 1, 1, 1]"],
    ),
    "w2 of other hidden": (
        ValueError,
        {"w2": ones(OUT, HIDDEN + 1)},
        ["w2 must have shape [out, hidden] = [any, 5], or [any, 5, 1, 1], got [4, 6]"],
    ),
    "w2 no rows": (ValueError, {"w2": ones(0, HIDDEN, 1, 1)}, ["w2 must have shape", "[0, 5, 1, 1]"]),
    "w2 to other channels with residual": (
        ValueError,
        {"residual": True},
        ["w2 must have shape [out, hidden] = [3, 5], or [3, 5, 1, 1], got [4, 5]"],
    ),
    # dtypes of the weights
    "w2 not as w1": (
        TypeError,
        {"w1": ones(HIDDEN, C, dtype=BF16)},
        ["w2 must be of w1's dtype torch.bfloat16, got torch.float32"],
    ),
    "w1 other half": (
        TypeError,
        all_of(BF16) | {"w1": ones(HIDDEN, C, dtype=FP16)},
        ["w1 must be torch.bfloat16 or torch.float32 for x of torch.bfloat16, got torch.float16"],
    ),
    "w2 other half": (
        TypeError,
        all_of(FP16) | {"w2": ones(OUT, HIDDEN, dtype=BF16)},
        ["w2 must be torch.float16 or torch.float32 for x of torch.float16, got torch.bfloat16"],
    ),
    "w1 of float64 x": (
        TypeError,
        all_of(torch.float64) | {"w1": ones(HIDDEN, C)},
        ["w1 must be torch.float64 for x of torch.float64, got torch.float32"],
    ),
    # the activation
    "activation unknown": (ValueError, {"activation": "mish"}, [ACTIVATION + "'mish'"]),
    "activation StarReLU": (
        ValueError,
        {"activation": "star_relu"},
        [ACTIVATION + "'star_relu'", "'relu_squared' with s * w2 for w2", "StarReLU.fold(w2, b2)"],
    ),
    "activation None": (ValueError, {"activation": None}, [ACTIVATION + "None"]),
    "activation a function": (ValueError, {"activation": F.gelu}, [ACTIVATION + "<built-in function gelu>"]),
    "activation a list": (ValueError, {"activation": ["gelu"]}, [ACTIVATION + "['gelu']"]),
    # the norm
    "norm a string": (TypeError, {"norm": "layer"}, ["norm must be a bool or None", "str"]),
    "norm an int": (TypeError, {"norm": 1}, ["norm must be a bool or None", "int"]),
    "eps negative": (ValueError, {"eps": -1e-5}, ["eps must be finite and not negative, got", "-1e-05"]),
    "eps NaN": (ValueError, {"eps": float("nan")}, ["eps must be finite and not negative, got", "nan"]),
    "eps inf": (ValueError, {"eps": float("inf")}, ["eps must be finite and not negative, got", "inf"]),
    "eps a string": (TypeError, {"eps": "1e-5"}, ["eps must be a number", "str"]),
    "residual": (TypeError, {"residual": 1}, ["residual must be a bool", "int"]),
    "save_hidden": (TypeError, {"save_hidden": "yes"}, ["save_hidden must be a bool or None", "str"]),
    # statistics
    "stats without norm": (
        ValueError,
        {"stats": ones(B, 1, 3)},
        ["stats must be None where norm is False, got a tensor"],
    ),
    "stats a tuple": (
        TypeError,
        {"norm": True, "stats": (0.0, 1.0)},
        ["stats must be a tensor or None", "tuple"],
    ),
    "stats half": (
        TypeError,
        {"norm": True, "stats": ones(B, 1, 3, dtype=FP16)},
        ["stats must be torch.float32 for x of torch.float32", "torch.float16"],
    ),
    "stats batch": (
        ValueError,
        {"norm": True, "stats": ones(1, 1, 3)},
        ["stats must have shape [B, T, 3] = [2, T, 3], got [1, 1, 3]"],
    ),
    "stats no tiles": (ValueError, {"norm": True, "stats": ones(B, 0, 3)}, ["stats must have", "[2, 0, 3]"]),
}
for _name in ("norm_weight", "norm_bias"):
    BAD[f"{_name} without norm"] = (
        ValueError,
        {"norm": False, _name: ones(C)},
        [f"{_name} must be None where norm is False, got a tensor"],
    )
for _name, _shape in WEIGHTS.items():
    BAD |= {
        f"{_name} None": (TypeError, {_name: None}, [f"{_name} must be a tensor, got NoneType"]),
        f"{_name} a module": (
            TypeError,
            {_name: torch.nn.Linear(1, 1)},
            [f"{_name} must be a tensor", "Linear"],
        ),
        f"{_name} sparse": (
            TypeError,
            {_name: ones(*_shape).to_sparse()},
            [f"{_name} must be a dense tensor"],
        ),
        f"{_name} 1-D": (
            ValueError,
            {_name: ones(_shape[0])},
            [f"{_name} must have shape", f"[{_shape[0]}]"],
        ),
        f"{_name} 0-D": (ValueError, {_name: ones()}, [f"{_name} must have shape", "got []"]),
        f"{_name} int": (
            TypeError,
            {_name: ones(*_shape, dtype=torch.int8)},
            [f"{_name} must be torch.float32 or torch.bfloat16 or torch.float16 for x of", "torch.int8"],
        ),
        f"{_name} float64": (
            TypeError,
            {_name: ones(*_shape, dtype=torch.float64)},
            [f"{_name} must be torch.float32 or torch.bfloat16", "torch.float64"],
        ),
        f"{_name} device": (
            ValueError,
            {_name: ones(*_shape, device="meta")},
            [f"{_name} must be on x's device cpu, got meta"],
        ),
    }
for _name, _letter, _size in (
    ("b1", "hidden", HIDDEN),
    ("b2", "out", OUT),
    ("norm_weight", "C", C),
    ("norm_bias", "C", C),
    ("layer_scale", "out", OUT),
    ("drop_scale", "B", B),
):
    _shape = f"{_name} must have shape [{_letter}] = [{_size}]"
    BAD |= {
        f"{_name} a float": (TypeError, {_name: 0.5}, [f"{_name} must be a tensor or None, got float"]),
        f"{_name} size": (ValueError, {_name: ones(_size + 1)}, [f"{_shape}, got [{_size + 1}]"]),
        f"{_name} size 1": (ValueError, {_name: ones(1)}, [f"{_shape}, got [1]"]),
        f"{_name} 4-D": (ValueError, {_name: ones(_size, 1, 1)}, [f"{_shape}, got [{_size}, 1, 1]"]),
        f"{_name} 0-D": (ValueError, {_name: ones()}, [f"{_shape}, got []"]),
        f"{_name} sparse": (TypeError, {_name: ones(_size).to_sparse()}, [f"{_name} must be a dense tensor"]),
        f"{_name} device": (
            ValueError,
            {_name: ones(_size, device="meta")},
            [f"{_name} must be on x's device cpu, got meta"],
        ),
        f"{_name} int": (
            TypeError,
            {_name: ones(_size, dtype=torch.int64)},
            [f"{_name} must be torch.float32 for x of torch.float32, got torch.int64"],
        ),
        f"{_name} half of float32": (
            TypeError,
            {_name: ones(_size, dtype=BF16)},
            [f"{_name} must be torch.float32 for x of torch.float32, got torch.bfloat16"],
        ),
        f"{_name} other half": (
            TypeError,
            all_of(BF16) | {_name: ones(_size, dtype=FP16)},
            [f"{_name} must be torch.bfloat16 or torch.float32 for x of torch.bfloat16, got torch.float16"],
        ),
        f"{_name} float32 of float64": (
            TypeError,
            all_of(torch.float64) | {_name: ones(_size)},
            [f"{_name} must be torch.float64 for x of torch.float64, got torch.float32"],
        ),
    }


@over(case=tuple(BAD), once=True)
def test_bad_argument(target, case):
    error, changed, wanted = BAD[case]
    arguments = all_of(torch.float32) | {"b1": None, "b2": None} | changed
    if arguments["x"] is not None and getattr(arguments["x"], "dtype", None) == torch.float64:
        with pk.use_backend("reference"), pytest.raises(error) as caught:
            mlp_with_stats(**arguments)
    else:
        with pytest.raises(error) as caught:
            mlp_with_stats(**arguments)
    message = str(caught.value)
    for part in wanted:
        assert part in message, f"{part!r} is not in {message!r}"
    assert "\n" not in message
    if "stats" not in arguments:
        with pytest.raises(error, match=re.escape(message)):
            mlp(**arguments)


@over(case=("w1 of other channels", "activation unknown", "b1 size"), once=True)
def test_bad_argument_under_autocast(target, case):
    error, changed, wanted = BAD[case]
    with torch.autocast("cpu", BF16), pytest.raises(error, match=re.escape(wanted[0].partition(", got")[0])):
        mlp(**(all_of(torch.float32) | {"b1": None, "b2": None} | changed))


def test_arguments_are_checked_before_the_backend():
    """A wrong argument is told apart from a backend that is missing or does not take the call."""
    with pk.use_backend("triton"), pytest.raises(ValueError, match="activation must be one of"):
        mlp(**all_of(torch.float32), b1=None, b2=None, activation="tanh")


@over(once=True, kernels=True, where=on_the_cpu)
def test_float64_on_a_kernel_says_what_it_computes(target):
    message = rf"'{target.backend}' was asked for and cannot run this call.*not float64"
    with pytest.raises(RuntimeError, match=message):
        mlp(**all_of(torch.float64), b1=None, b2=None)


def test_options_are_keywords_only():
    with pytest.raises(TypeError):
        mlp(x_of(), ones(HIDDEN, C), None, ones(OUT, HIDDEN), None, "gelu")


def test_meta_tensors_run_the_reference():
    """For models that are built before they have memory."""
    x, w1, w2 = (t.to("meta") for t in all_of(torch.float32).values())
    y = mlp(x, w1, None, w2, None)
    assert y.device.type == "meta"
    assert y.shape == (B, OUT, 4, 5)


@over(once=True, where=on_the_cpu)
def test_what_is_allowed_is_taken(target):
    """eps = 0, an integer eps, an empty batch with its empty drop_scale, statistics of several tiles."""
    x = torch.arange(120.0).view(B, C, 4, 5).sin()
    w1, w2 = torch.arange(15.0).view(5, 3).cos(), torch.arange(15.0).view(3, 5).sin()
    normed = {"norm": True, "residual": True}
    same = [mlp(x, w1, None, w2, None, eps=eps, **normed) for eps in (1, 1.0)]
    assert torch.equal(*same)
    assert mlp(x, w1, None, w2, None, eps=0, **normed).isfinite().all()
    assert mlp(x[:0], w1, None, w2, None, drop_scale=ones(0), **normed).shape == (0, C, 4, 5)
    half = torch.tensor([[30.0, 0.0, 15.0], [30.0, 0.0, 15.0]]).expand(B, 2, 3)  # mean 0, variance 1/2
    whole = torch.tensor([[60.0, 0.0, 30.0]]).expand(B, 1, 3)
    results = [mlp_with_stats(x, w1, None, w2, None, stats=stats, **normed)[0] for stats in (half, whole)]
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("x", "operand"),
    [("float32", "float64"), ("float32", "int8"), ("bfloat16", "float32"), ("float16", "bfloat16")],
)
def test_the_cpu_operator_names_an_operand_that_is_not_allowed(x, operand):
    """`mlp` asks for none of these; a graph that was changed after its export could."""
    require_backend("cpp")
    image = torch.randn(1, 4, 3, 3, dtype=getattr(torch, x))
    w1, w2 = torch.randn(8, 4, dtype=image.dtype), torch.randn(4, 8, dtype=image.dtype)
    arguments = (image, w1, None, w2, *[None] * 6, "gelu", 1e-5, False, False, False, False)
    for allowed in (None, image.dtype):
        torch.ops.poolformer_kernels.mlp_cpp(*arguments, allowed)
    with pytest.raises(RuntimeError, match="operand must be float32, bfloat16 or float16 where x is float32"):
        torch.ops.poolformer_kernels.mlp_cpp(*arguments, getattr(torch, operand))
