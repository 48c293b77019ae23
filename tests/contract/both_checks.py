"""Bad arguments: the error names the argument, what came and what is allowed, alike on every backend."""

import re
from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from support.operators import EVERY, MLP, POOL_MIXER, Operator
from support.peers import require_backend
from torch import Tensor

import poolformer_kernels as pk
from poolformer_kernels.ops import mlp

from .cases import over
from .common import BF16, F16, F32, INF, NAN
from .targets import Target

OPERATOR = "mlp"
F64 = torch.float64
B, C, HIDDEN, OUT = 2, 3, 5, 4


def ones(*shape: int, dtype: torch.dtype = F32, device: str = "cpu") -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


def x_of(dtype: torch.dtype = F32) -> Tensor:
    return ones(B, C, 4, 5).to(dtype)


def required_by(operator: Operator, dtype: torch.dtype = F32) -> dict[str, Tensor | None]:
    """x and all other arguments without a default, of right sizes or None."""
    if operator is POOL_MIXER:
        return {"x": x_of(dtype), "weight": None, "bias": None}
    w1, w2 = ones(HIDDEN, C, dtype=dtype), ones(OUT, HIDDEN, dtype=dtype)
    return {"x": x_of(dtype), "w1": w1, "b1": None, "w2": w2, "b2": None}


def nested(layout: torch.layout) -> Tensor:
    """Two images of different heights."""
    return torch.nested.nested_tensor([ones(4, C, 5), ones(6, C, 5)], layout=layout)


# ---- messages, the error and what is given: of both operators ----------------------------------------------

Bad = dict[str, tuple[type[Exception], dict]]
NESTED = "x must be a dense tensor [B, C, H, W] of images of one size, got a nested tensor"
OF_BOTH: Bad = {
    "x must be a tensor, got list": (TypeError, {"x": [[1.0]]}),
    "x must be a tensor, got NoneType": (TypeError, {"x": None}),
    "x must be a dense tensor (torch.strided), got torch.sparse_coo": (TypeError, {"x": x_of().to_sparse()}),
    NESTED: (TypeError, {"x": nested(torch.strided)}),
    f"{NESTED}; call the operator with image[None] for each image of x.unbind()": (
        TypeError,
        {"x": nested(torch.jagged)},
    ),
    "eps must be finite and not negative, got 1000": (ValueError, {"eps": 10**400}),
    "eps must be a number, got str": (TypeError, {"eps": "1e-5"}),
    "eps must be a number, got NoneType": (TypeError, {"eps": None}),
    "residual must be a bool, got int": (TypeError, {"residual": 1}),
    "residual must be a bool, got str": (TypeError, {"residual": "a"}),
    "stats must be a tensor or None, got tuple": (TypeError, {"stats": (0.0, 1.0)}),
    "stats must be torch.float32 for x of torch.float32, got torch.float16": (
        TypeError,
        {"stats": ones(B, 1, 3, dtype=F16)},
    ),
    "stats must be torch.float64 for x of torch.float64, got torch.float32": (
        TypeError,
        {"x": x_of(F64), "stats": ones(B, 1, 3)},
    ),
    "stats must be on x's device cpu, got meta": (ValueError, {"stats": ones(B, 1, 3, device="meta")}),
}
for _dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn):
    _message = f"x must be float32, bfloat16, float16 or float64, got {_dtype}"
    OF_BOTH[_message] = (TypeError, {"x": x_of(_dtype)})
for _shape in ((C, 4, 5), (1, C, 2, 4, 5)):
    OF_BOTH[f"x must have 4 dimensions [B, C, H, W], got shape {_shape}"] = (ValueError, {"x": ones(*_shape)})
for _shape in ((B, 0, 4, 5), (B, C, 0, 5), (B, C, 4, 0)):
    _message = f"x must have at least one channel and one pixel, got shape {_shape}"
    OF_BOTH[_message] = (ValueError, {"x": ones(*_shape)})
for _eps in (-1e-5, NAN, INF):
    OF_BOTH[f"eps must be finite and not negative, got {_eps}"] = (ValueError, {"eps": _eps})
for _shape in ((B, 3), (1, 1, 3), (B, 1, 2), (B, 0, 3)):
    _message = f"stats must have shape [B, T, 3] = [2, T, 3], got {[*_shape]}"
    OF_BOTH[_message] = (ValueError, {"stats": ones(*_shape)})


def of_tensor(name: str, right: tuple[int, ...], shape: str, wrong: Iterable[tuple[int, ...]], dtypes) -> Bad:
    """What is said of a parameter of wrong shapes, and of dtypes: (x's, the wrong one, those allowed)."""
    bad: Bad = {
        f"{name} must be a dense tensor": (TypeError, {name: ones(*right).to_sparse()}),
        f"{name} must be on x's device cpu, got meta": (ValueError, {name: ones(*right, device="meta")}),
    }
    for size in wrong:
        bad[f"{name} must have shape {shape}, got {[*size]}"] = (ValueError, {name: ones(*size)})
    for x, dtype, allowed in dtypes:
        message = f"{name} must be {allowed} for x of {x}, got {dtype}"
        bad[message] = (TypeError, {"x": x_of(x), name: ones(*right, dtype=dtype)})
    return bad


def of_vector(name: str, letter: str, size: int) -> Bad:
    """An optional one of ``size`` numbers, which the message calls ``letter``."""
    wrong = ((size + 1,), (1,), (size, 1, 1), ())
    dtypes = [(F32, dtype, F32) for dtype in (torch.int64, BF16, F64)]
    dtypes += [(F64, F32, F64), (BF16, F16, "torch.bfloat16 or torch.float32")]
    bad = of_tensor(name, (size,), f"[{letter}] = [{size}]", wrong, dtypes)
    return bad | {f"{name} must be a tensor or None, got float": (TypeError, {name: 0.5})}


def of_weight(name: str, right: tuple[int, ...], shape: str, wrong: Iterable[tuple[int, ...]]) -> Bad:
    any_float = "torch.float32 or torch.bfloat16 or torch.float16"
    dtypes = [(F32, torch.int8, any_float), (F32, F64, any_float), (F64, F32, "torch.float64")]
    dtypes += [(x, other, f"{x} or torch.float32") for x, other in ((BF16, F16), (F16, BF16))]
    return of_tensor(name, right, shape, wrong, dtypes) | {
        f"{name} must be a tensor, got NoneType": (TypeError, {name: None}),
        f"{name} must be a tensor, got Linear": (TypeError, {name: torch.nn.Linear(1, 1)}),
    }


# ---- of one ------------------------------------------------------------------------------------------------

OF_POOL_MIXER: Bad = {
    "pool_size must be below 2**31": (ValueError, {"pool_size": 10**30 + 1}),
    "pool_size must be an int, got float": (TypeError, {"pool_size": 3.0}),
    "pool_size must be an int, got bool": (TypeError, {"pool_size": True}),
    "pool_size must be an int, got tuple": (TypeError, {"pool_size": (3, 3)}),
    **{f"pool_size must be odd and positive, got {n}": (ValueError, {"pool_size": n}) for n in (2, 0, -3)},
}
for _name in ("weight", "bias", "layer_scale"):
    OF_POOL_MIXER |= of_vector(_name, "C", C)
OF_POOL_MIXER |= of_vector("drop_scale", "B", B)

ACTIVATION = "activation must be one of gelu, gelu_tanh, relu, relu_squared, silu, got "
OF_MLP: Bad = {
    "w2 must have shape [out, hidden] = [3, 5], or [3, 5, 1, 1], got [4, 5]": (
        ValueError,
        {"residual": True},
    ),
    "w2 must be of w1's dtype torch.bfloat16, got torch.float32": (
        TypeError,
        {"w1": ones(HIDDEN, C, dtype=BF16)},
    ),
    f"{ACTIVATION}'mish'": (ValueError, {"activation": "mish"}),
    f"{ACTIVATION}'star_relu'": (ValueError, {"activation": "star_relu"}),
    "'relu_squared' with s * w2 for w2": (ValueError, {"activation": "star_relu"}),
    "StarReLU.fold(w2, b2)": (ValueError, {"activation": "star_relu"}),
    f"{ACTIVATION}None": (ValueError, {"activation": None}),
    f"{ACTIVATION}<built-in function gelu>": (ValueError, {"activation": F.gelu}),
    f"{ACTIVATION}['gelu']": (ValueError, {"activation": ["gelu"]}),
    "norm must be a bool or None, got str": (TypeError, {"norm": "layer"}),
    "norm must be a bool or None, got int": (TypeError, {"norm": 1}),
    "save_hidden must be a bool or None, got str": (TypeError, {"save_hidden": "yes"}),
    **of_weight(
        "w1",
        (HIDDEN, C),
        "[hidden, C] = [any, 3], or [any, 3, 1, 1]",
        # also 3x3, 1x3, transposed, of a grouped convolution
        ((5, 4), (0, 3), (5, 3, 3, 3), (5, 3, 1, 3), (3, 5), (5, 1, 1, 1), (5,), ()),
    ),
    **of_weight(
        "w2",
        (OUT, HIDDEN),
        "[out, hidden] = [any, 5], or [any, 5, 1, 1]",
        ((4, 6), (0, 5, 1, 1), (4,), ()),
    ),
}
for _name, _value in (("norm_weight", ones(C)), ("norm_bias", ones(C)), ("stats", ones(B, 1, 3))):
    _message = f"{_name} must be None where norm is False, got a tensor"
    OF_MLP[_message] = (ValueError, {"norm": False, _name: _value})
for _name, _letter, _size in (
    *(("b1", "hidden", HIDDEN), ("b2", "out", OUT), ("norm_weight", "C", C), ("norm_bias", "C", C)),
    *(("layer_scale", "out", OUT), ("drop_scale", "B", B)),
):
    OF_MLP |= of_vector(_name, _letter, _size)
BAD = {"pool_mixer": OF_BOTH | OF_POOL_MIXER, "mlp": OF_BOTH | OF_MLP}


# ---- tests -------------------------------------------------------------------------------------------------


def arguments_of(operator: Operator, changed: dict) -> dict:
    """The MLP's weights are of x's dtype; it takes statistics with a norm."""
    dtype = getattr(changed.get("x"), "dtype", F32)
    norm = {"norm": True} if operator is MLP and "stats" in changed else {}
    return required_by(operator, dtype if dtype.is_floating_point else F32) | norm | changed


@over(**{name: {"message": tuple(bad)} for name, bad in BAD.items()}, once=True)
def test_bad_argument(target, operator, message):
    error, changed = BAD[operator.name][message]
    arguments = arguments_of(operator, changed)
    with pytest.raises(error, match=re.escape(message)) as caught:
        operator.with_stats(**arguments)
    assert "\n" not in str(caught.value)
    if "stats" not in arguments:
        with pytest.raises(error, match=re.escape(str(caught.value))):
            operator.call(**arguments)


@over(
    message=[
        f"{ACTIVATION}'mish'",
        "w1 must have shape [hidden, C] = [any, 3], or [any, 3, 1, 1], got [5, 4]",
        "b1 must have shape [hidden] = [5], got [6]",
    ],
    once=True,
)
def test_bad_argument_under_autocast(target, message):
    error, changed = OF_MLP[message]
    with torch.autocast("cpu", BF16), pytest.raises(error, match=re.escape(message)):
        mlp(**arguments_of(MLP, changed))


@pytest.mark.parametrize(
    ("operator", "changed", "message"),
    [
        (POOL_MIXER, {"pool_size": 4}, "pool_size must be odd and positive, got 4"),
        (MLP, {"activation": "tanh"}, "activation must be one of"),
    ],
    ids=str,
)
def test_arguments_are_checked_before_the_backend(operator, changed, message):
    """A wrong argument is told apart from a backend that is missing or does not take the call."""
    with pk.use_backend("triton"), pytest.raises(ValueError, match=message):
        operator.call(**required_by(operator), **changed)


def elsewhere(target: Target, **_) -> str | None:
    return None if target.device == "cpu" else "its tensors are the CPU's"


@over(once=True, kernels=True, dtype=[F32], where=elsewhere)
def test_float64_on_a_kernel_says_what_it_computes(target, operator, dtype):
    message = rf"'{target.backend}' was asked for and cannot run this call.*not float64"
    with pytest.raises(RuntimeError, match=message):
        operator.call(**required_by(operator, F64))


@EVERY
def test_options_are_keywords_only(operator):
    with pytest.raises(TypeError):
        operator.call(*required_by(operator).values(), {POOL_MIXER: 3, MLP: "gelu"}[operator])


def test_meta_tensors_run_the_reference():
    """For models that are built before they have memory."""
    y = mlp(**{name: t if t is None else t.to("meta") for name, t in required_by(MLP).items()})
    assert y.device.type == "meta"
    assert y.shape == (B, OUT, 4, 5)


@over(once=True, dtype=[F32], where=elsewhere)
def test_what_is_allowed_is_taken(target, operator, dtype):
    """eps = 0, an integer eps, an empty batch with its empty drop_scale, statistics of several tiles."""
    x = torch.arange(120.0).view(B, C, 4, 5).sin()
    arguments = required_by(operator) | {"x": x}
    if operator is MLP:
        w1, w2 = torch.arange(15.0).view(5, 3).cos(), torch.arange(15.0).view(3, 5).sin()
        arguments |= {"w1": w1, "w2": w2, "norm": True, "residual": True}
    assert torch.equal(*(operator.call(**arguments, eps=eps) for eps in (1, 1.0)))
    assert operator.call(**arguments, eps=0).isfinite().all()
    assert operator.call(**arguments | {"x": x[:0]}, drop_scale=ones(0)).shape == (0, C, 4, 5)
    half = torch.tensor([[30.0, 0.0, 15.0], [30.0, 0.0, 15.0]]).expand(B, 2, 3)  # mean 0, variance 1/2
    whole = torch.tensor([[60.0, 0.0, 30.0]]).expand(B, 1, 3)
    results = [operator.with_stats(**arguments, stats=stats)[0] for stats in (half, whole)]
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
