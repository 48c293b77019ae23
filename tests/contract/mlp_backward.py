"""The MLP's backward on every target: what is kept for it, its registered operators, tokens as rows."""

import itertools

import torch
from support.devices import on
from support.layouts import LAYOUTS, as_layout, as_weight_layout
from support.mlp import NAMES, PLAIN, VECTORS, WEIGHTS, backward_arguments, forward_arguments, make_grad
from support.operators import MLP
from support.rule import assert_same, threads
from torch import Tensor

from poolformer_kernels.backends import cpp
from poolformer_kernels.ops import mlp

from .cases import over
from .check import given, laid, of_mean, shift_some_channels, values
from .common import ACTIVATIONS, BF16, BOTH, DTYPES, EACH, F32, FORMATS, INF, NAN, SMALL, TWO, WIDE
from .mlp import check, problem
from .mlp_numerics import both_signs, off_zero
from .targets import Target

OPERATOR = "mlp"

# ---- what is kept ------------------------------------------------------------------------------------------


@over(
    also={
        "shape, hidden": [
            *(((4, 17, 6, 7), 40), ((3, 132, 2, 3), 70), ((3, 64, 13, 11), 128), ((2, 128, 7, 5), 128))
        ]
    },
    residual=BOTH,
    dtype=DTYPES,
    layout=FORMATS,
)
def test_hidden_saved_or_computed_again(target, shape, hidden, residual, dtype, layout):
    """The value is the same to the last bit; both gradients meet the error rule."""
    inputs = problem(target, shape, hidden, dtype)
    options = {"layout": layout, "residual": residual}
    both = [check(target, inputs, save_hidden=saved, **options) for saved in BOTH]
    assert_same({"y": both[0]["y"]}, {"y": both[1]["y"]})


@over(kernels=True, once=True, also=EACH, save_hidden=BOTH, normed=BOTH, dtype=DTYPES, layout=LAYOUTS)
def test_what_is_kept_for_the_backward(target, shape, hidden, save_hidden, normed, dtype, layout):
    """x itself, its statistics and the parameters; the hidden activations only where asked for."""
    inputs = laid(problem(target, shape, hidden, dtype, parameters=VECTORS if normed else PLAIN), layout)
    grad = make_grad(inputs).to(target.device)
    leaves = {name: t.requires_grad_() for name, t in on(target.device, given(**inputs)).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.detach()) or t, lambda t: t):
        y = mlp(**inputs | leaves, residual=normed, save_hidden=save_hidden)
    torch.autograd.grad(y, leaves["x"], grad)  # with these and nothing else
    x, parameters = leaves["x"], {t.data_ptr() for name, t in leaves.items() if name != "x"}
    same, *new = (t for t in kept if t.numel() > 0 and t.data_ptr() not in parameters)
    assert (same.data_ptr(), same.shape, same.stride()) == (x.data_ptr(), x.shape, x.stride())
    batch, _, height, width = shape
    wanted = [(2 * batch, F32)] if normed else []
    wanted += [(batch * height * width * len(inputs["w1"]), dtype)] if save_hidden else []
    assert [(t.numel(), t.dtype) for t in new] == wanted


# ---- the registered operators ------------------------------------------------------------------------------


def last_arguments(target: Target, operand: torch.dtype) -> tuple:
    return {"triton": (operand, False), "cpp": (None,), "cuda": ()}[target.backend]


@over(
    repeats=True,
    kernels=True,
    once=True,
    also={
        "shape, hidden, layout": [
            *((*SMALL, layout) for layout in ("nchw", "channels_last", "sliced_hw", "transposed")),
            *((WIDE[0], 50, "nchw"), ((67, 5, 1, 3), 9, "channels_last"), ((0, 5, 3, 4), 9, "nchw")),
        ]
    },
    dtype=DTYPES,
    vector_dtype=(None, F32),
)
def test_opcheck(target, shape, hidden, layout, dtype, vector_dtype):
    """Schemas, fakes and registrations of the operators behind both directions."""
    forward, backward = MLP.registered(target.backend)
    inputs = problem(target, shape, hidden, dtype, vector_dtype=vector_dtype)
    inputs = on(target.device, laid(inputs, layout))
    grad, more = make_grad(inputs).to(target.device), last_arguments(target, dtype)
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    for flag in BOTH:
        arguments = forward_arguments(leaves, return_stats=flag, save_hidden=flag)
        torch.library.opcheck(forward, (*arguments, *more))
    arguments = forward_arguments(inputs, return_stats=False, save_hidden=True)
    _, mean_rstd, _, saved = forward(*arguments, *more)
    for flag in BOTH:
        kept = saved if flag else None
        arguments = backward_arguments(grad, inputs, mean_rstd, kept, wanted=(flag, flag))
        torch.library.opcheck(backward, (*arguments, *more))


@over(kernels=True, once=True, also=EACH, norm=BOTH)
def test_outputs_not_asked_for_are_empty(target, shape, hidden, norm):
    """Of the forward and of the backward, whose other values are the same bits."""
    forward, backward = MLP.registered(target.backend)
    inputs = problem(target, shape, hidden, parameters=VECTORS if norm else PLAIN)
    more = last_arguments(target, inputs["x"].dtype)
    inputs = on(target.device, inputs)
    grad = make_grad(inputs).to(target.device)
    options = {"norm": norm, "residual": False}
    _, *others = forward(*forward_arguments(inputs, return_stats=False, **options), *more)
    assert [t.numel() for t in others] == [2 * shape[0] * norm, 0, 0]
    found = {}
    for wanted in itertools.product(BOTH, BOTH):  # of the parameters, of drop_scale
        arguments = backward_arguments(grad, inputs, others[0], wanted=wanted, **options)
        found[wanted] = dict(zip(NAMES, backward(*arguments, *more), strict=True))
    for (of_parameters, of_drop), some in found.items():
        for name, value in some.items():
            asked = name == "x" or (of_drop if name == "drop_scale" else of_parameters)
            full = found[True, True][name]
            assert_same({name: value}, {name: full if asked else full.new_empty(0)})


# ---- tokens as rows ----------------------------------------------------------------------------------------
# What a matrix unit computes in another way: bfloat16 products, channels_last, whole tiles, many tokens,
# and no gradient of drop_scale, which is therefore not asked for.

ROWS = ((3, 64, 13, 11), 128)
ROWS_SHAPES = (
    *(((2, 64, 14, 14), 256), ((3, 96, 13, 11), 384), ((2, 320, 14, 14), 1280), ((1, 320, 19, 29), 96)),
    ((1, 32, 17, 19), 32),  # 323 tokens: the last 32 are not whole
    ((5, 128, 28, 28), 512),  # blocks of tokens that begin within samples
    *(((1, 224, 16, 18), 896), ((1, 256, 16, 18), 1024), ((289, 64, 1, 1), 96), ((97, 32, 1, 5), 64)),
    *(((2, 352, 17, 19), 96), ((6, 512, 7, 7), 2048), ((4, 512, 14, 14), 128), ((3, 384, 13, 13), 160)),
    *(((2, 768, 14, 14), 320), ((2, 64, 13, 17), 1312), ((7, 160, 7, 7), 640)),
    ((1, 64, 57, 59), 128),  # one sample of many blocks
)
FROZEN = ("drop_scale",)


def some_rows(target: Target) -> tuple[tuple[int, ...], int]:
    """`ROWS`, with fewer pixels for a target that cannot afford so many."""
    (batch, channels, height, width), hidden = ROWS
    if batch * height * width * hidden > target.elements:
        height, width = 5, 6
    return (batch, channels, height, width), hidden


def rows(target: Target, shape, hidden: int, dtype: torch.dtype = BF16, **options):
    inputs = laid(problem(target, shape, hidden, dtype, **options), "channels_last")
    return inputs, as_layout(make_grad(inputs), "channels_last")


def gradients(target: Target, inputs, grad: Tensor, frozen: tuple[str, ...] = FROZEN, **options):
    found = values(target, mlp, inputs, grad, frozen=frozen, residual=True, **options)
    del found["y"]
    return found


def check_rows(target: Target, inputs, grad: Tensor, **options):
    options = {"residual": True} | options
    return check(target, inputs, grad, frozen=FROZEN, layout="channels_last", **options)


@over(kernels=True, also={"shape, hidden": ROWS_SHAPES}, dropped=BOTH)
def test_rows(target, shape, hidden, dropped):
    inputs, grad = rows(target, shape, hidden)
    inputs["drop_scale"] = inputs["drop_scale"] if dropped else None
    check_rows(target, inputs, grad)


@over(kernels=True, residual=BOTH, normed=BOTH, vector_dtype=TWO)
def test_forms_of_rows(target, residual, normed, vector_dtype):
    parameters = ("b1", "norm_weight", "layer_scale") if normed else ("b2", "layer_scale")
    inputs, grad = rows(target, *some_rows(target), parameters=parameters, vector_dtype=vector_dtype)
    check_rows(target, inputs, grad, residual=residual)


@over(
    kernels=True,
    also={
        "dtype, weight_dtype": [(F32, BF16), (BF16, F32)],
        "shape, hidden": [ROWS, ((2, 320, 14, 14), 640), ((6, 512, 7, 7), 256)],
    },
    dropped=BOTH,
)
def test_dtypes_of_rows(target, dtype, weight_dtype, shape, hidden, dropped):
    """One of x and the weights in float32; its gradients are, too."""
    inputs, grad = rows(target, shape, hidden, dtype, weight_dtype=weight_dtype, vector_dtype=F32)
    inputs["drop_scale"] = inputs["drop_scale"] if dropped else None
    found = check_rows(target, inputs, grad)
    for name in ("dx", "dw1", "dw2"):
        rounded = torch.equal(found[name], found[name].to(BF16).to(found[name].dtype))
        assert rounded == (found[name].dtype == BF16), name


@over(repeats=True, kernels=True, layout=("channels_last", "sliced_c_last", "offset_last"))
def test_layouts_of_rows(target, layout):
    """Rows of weights that are apart, or not aligned, and tensors that begin anywhere."""
    inputs, grad = rows(target, *some_rows(target))
    expected = gradients(target, inputs, grad)
    inputs["x"], grad = as_layout(inputs["x"], layout), as_layout(grad, layout)
    assert_same(gradients(target, inputs, grad), expected)
    for w in ("strided", "padded", "offset"):
        other = inputs | {name: as_weight_layout(inputs[name], w) for name in WEIGHTS}
        assert_same(gradients(target, other, grad), expected)


@over(
    kernels=True,
    also={"shape, hidden": [((5, 64, 28, 28), 256), ((3, 320, 13, 11), 1280), ((1, 96, 19, 23), 64), ROWS]},
)
def test_every_run_on_rows_has_the_same_bits(target, shape, hidden):
    inputs, grad = rows(target, shape, hidden)
    expected = gradients(target, inputs, grad)
    for _ in target.again():
        assert_same(gradients(target, inputs, grad), expected)
    if target.backend == "cpp":
        with threads(7):
            assert_same(gradients(target, inputs, grad), expected)


@over(kernels=True, also={"shape, hidden": [((3, 64, 13, 11), 256), ((2, 320, 14, 14), 640), ROWS]})
def test_rows_of_x_alone(target, shape, hidden):
    """What is frozen changes no other gradient."""
    inputs, grad = rows(target, shape, hidden)
    full = gradients(target, inputs, grad)
    found = gradients(target, inputs, grad, tuple(name for name in inputs if name != "x"))
    assert_same(found, {"dx": full["dx"]})


@over(
    kernels=True,
    also={"shape, hidden": [((4, 64, 12, 12), 256), ((4, 64, 9, 9), 128)]},
    where=lambda target, shape, **_: (
        "of so few tokens half as many are no rows" if target.backend == "cpp" and shape[2] < 12 else None
    ),
)
def test_rows_of_dropped_samples(target, shape, hidden):
    """A sample whose drop_scale is 0 hands on the gradient as it is, and adds nothing to a parameter's."""
    inputs, grad = rows(target, shape, hidden)
    inputs["drop_scale"] = torch.tensor([1.25, 0.0, 1.25, 0.0], dtype=BF16)
    found = gradients(target, inputs, grad)
    assert torch.equal(found["dx"][1::2].cpu(), grad[1::2])
    kept = {**inputs, "x": inputs["x"][::2], "drop_scale": inputs["drop_scale"][::2]}
    fewer = gradients(target, kept, grad[::2])
    assert torch.equal(found["dx"][::2], fewer["dx"])
    for name in ("db1", "db2", "dw1", "dw2"):
        atol = 2**-7 * fewer[name].abs().max().item()
        torch.testing.assert_close(found[name], fewer[name], rtol=2**-7, atol=atol)


@over(kernels=True, activation=ACTIVATIONS)
def test_activations_of_rows(target, activation):
    inputs, grad = rows(target, *some_rows(target))
    if activation == "relu":
        off_zero(inputs)
    check_rows(target, inputs, grad, activation=activation)


@over(kernels=True, size=(0.0, 1.0, 3.5, 50.0, 1e4))
def test_far_hidden_activations_of_rows(target, size):
    """b1 of +-size, where gelu and its slope end in those of relu; about 0 and where a table ends, too."""
    inputs, grad = rows(target, *some_rows(target))
    inputs["b1"] = both_signs(inputs["b1"], size)
    inputs["w2"] = inputs["w2"] / max(size, 1)
    check_rows(target, inputs, grad)
    if size > 10:
        inputs["b1"].fill_(-size)
        found = gradients(target, inputs, grad)
        for name in ("dw1", "db1", "dw2", "dnorm_weight", "dnorm_bias"):
            assert not found[name].any(), name
        assert torch.equal(found["dx"].cpu(), grad)


@over(kernels=True, bad=(NAN, INF))
def test_rows_not_finite(target, bad):
    """In x, g or a parameter: in dx it stays in its sample, and no gradient that it reaches is a number."""
    inputs, grad = rows(target, *some_rows(target))
    inputs["drop_scale"] = None
    clean = gradients(target, inputs, grad)["dx"]
    reached = ("dx", "dw1", "db1", "dnorm_weight", "dnorm_bias")
    for where, names in (("x", (*reached, "dw2")), ("grad", (*reached, "dw2", "db2"))):
        hurt, g = {**inputs, "x": inputs["x"].clone()}, grad.clone()
        (hurt["x"] if where == "x" else g)[1, 5, 3, 4] = bad
        found = gradients(target, hurt, g)
        assert not found["dx"][1].isfinite().any()
        assert torch.equal(found["dx"][[0, 2]], clean[[0, 2]])
        assert all(not found[name].isfinite().all() for name in names)
    if bad == INF and not (target.backend == "cpp" and cpp.ISA == "amx"):
        return  # the slope of an infinite h may be 0 or 1; that of eager is not a number
    for name in ("w1", "b1", "w2", "norm_weight", "norm_bias"):
        hurt = {**inputs, name: inputs[name].clone()}
        hurt[name].view(-1)[3] = bad
        found = gradients(target, hurt, grad)
        assert not found["dx"].isfinite().any(), name
        assert not found["dw1"].isfinite().all(), name
        assert found["dw2"].isfinite().all() == (name == "w2"), name


@over(kernels=True, also={"shape, hidden": [((3, 64, 13, 11), 256), ROWS]})
def test_rows_of_trained_statistics(target, shape, hidden):
    """Channels with means of their own, far from zero."""
    inputs, grad = rows(target, shape, hidden)
    shift_some_channels(inputs["x"], 30)
    check_rows(target, inputs, grad, ulps=of_mean(target, 8))
