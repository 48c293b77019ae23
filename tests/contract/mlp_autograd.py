"""What the MLP promises on every target: the same bits in every run, autograd, the registered operators."""

import itertools

import pytest
import torch
from support.devices import like_on, on
from support.layouts import as_layout
from support.mlp import NAMES, PLAIN, VECTORS, WEIGHTS, make_grad, y_of_mlp_with_stats
from support.problems import tiled_stats
from support.rule import assert_same, bits, run
from torch.utils.checkpoint import checkpoint

import poolformer_kernels as pk
from poolformer_kernels.ops import mlp
from poolformer_kernels.ops.mlp import mlp_with_stats

from .cases import over
from .check import values
from .mlp import ACTIVATIONS, BOTH, DTYPES, EACH, F32, FORMATS, ROUNDS, SMALL, TWO, WIDE, check, laid, problem
from .targets import Target

OPERATOR = "mlp"


# ---- determinism -------------------------------------------------------------------------------------------


def everything(target: Target, inputs, grad, stats) -> dict:
    returned = mlp_with_stats(**on(target.device, inputs), residual=True)[1]
    options = {"residual": True, "save_hidden": True, "stats": stats}
    given = values(target, y_of_mlp_with_stats, inputs, grad, **options)
    own = values(target, mlp, inputs, grad, residual=True)
    return own | {"stats": returned} | {f"given {name}": value for name, value in given.items()}


@over(
    also={
        "shape, hidden": [
            *(((5, 19, 14, 13), 57), ((1, 352, 3, 7), 1056), ((3, 96, 7, 7), 288), ((2, 132, 2, 3), 20)),
            *(((2, 64, 7, 7), 64), ((2, 96, 8, 16), 64), ((2, 128, 7, 7), 64), ((1, 192, 5, 13), 64)),
        ]
    },
    dtype=DTYPES,
    layout=FORMATS,
)
def test_every_run_has_the_same_bits(target, shape, hidden, dtype, layout):
    """On any number of threads, in any order of a block's: sums keep one order whoever computes the parts."""
    inputs = laid(problem(target, shape, hidden, dtype), layout)
    grad, stats = as_layout(make_grad(inputs), layout), tiled_stats(inputs["x"], 3).to(target.device)
    expected = everything(target, inputs, grad, stats)
    for _ in target.again():
        assert_same(everything(target, inputs, grad, stats), expected)


@pytest.mark.long
@over(
    kernels=True,
    also={
        "shape, hidden": [((16, 64, 56, 56), 256), ((16, 512, 7, 7), 2048), ((16, 17, 13, 29), 70), *ROUNDS]
    },
    dtype=TWO,
    layout=FORMATS,
    where=lambda target, **_: None if target.device == "cuda" else "the CPU divides smaller ones likewise",
)
def test_every_run_on_large_inputs_has_the_same_bits(target, shape, hidden, dtype, layout):
    test_every_run_has_the_same_bits(target, shape, hidden, dtype, layout)


@over(
    also={"shape, hidden": [SMALL, WIDE, ((4, 64, 9, 9), 128)]},
    dtype=DTYPES,
    layout=FORMATS,
    activation=ACTIVATIONS,
)
def test_a_sample_does_not_depend_on_its_batch(target, shape, hidden, dtype, layout, activation):
    inputs = laid(problem(target, shape, hidden, dtype), layout)
    grad = make_grad(inputs)
    whole = values(target, mlp, inputs, grad, residual=True, activation=activation)
    one = inputs | {"x": inputs["x"][2:3], "drop_scale": inputs["drop_scale"][2:3]}
    alone = values(target, mlp, one, grad[2:3], residual=True, activation=activation)
    for name in {"y", "dx", "ddrop_scale"} & whole.keys():
        if target.exact:
            assert_same({name: alone[name]}, {name: whole[name][2:3]})
        else:
            unit = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(alone[name], whole[name][2:3], rtol=unit, atol=unit * 8)


# ---- autograd ----------------------------------------------------------------------------------------------

SUBSETS = [  # each alone, each left out, all, none, and pairs
    (),
    *((name,) for name in NAMES),
    *itertools.combinations(NAMES, 2),
    *(tuple(n for n in NAMES if n != name) for name in NAMES),
    NAMES,
]
TINY = ((3, 5, 6, 7), 9)


@over(
    once=True,
    also={"shape, hidden": [TINY, ((3, 200, 2, 3), 20)]},
    residual=BOTH,
    save_hidden=BOTH,
    where=lambda target, shape, **_: (
        "it takes a minute, and the narrow one a few seconds"
        if shape[1] == 200 and target.elements < float("inf")
        else None
    ),
)
def test_subsets_of_requires_grad(target, shape, hidden, residual, save_hidden):
    inputs = on(target.device, problem(target, shape, hidden))
    grad = make_grad(inputs).to(target.device)
    options = {"residual": residual, "save_hidden": save_hidden}
    full = run(mlp, inputs, grad, **options)
    for subset in SUBSETS:
        leaves = {name: t.clone().requires_grad_(name in subset) for name, t in inputs.items()}
        y = mlp(**leaves, **options)
        assert y.requires_grad == bool(subset), subset
        if subset:
            y.backward(grad)
        found = {"y": y.detach()} | {f"d{name}": leaves[name].grad for name in subset}
        assert all(leaf.grad is None for name, leaf in leaves.items() if name not in subset), subset
        for name, value in found.items():
            if target.exact:
                assert torch.equal(bits(value), bits(full[name])), (subset, name)
            else:  # eager takes other ways through the same sums
                torch.testing.assert_close(value, full[name], rtol=1e-5, atol=1e-5)


@over(
    also={
        "shape, hidden": [
            ((4, 17, 6, 7), 40),
            ((3, 132, 2, 3), 70),
            ((3, 64, 13, 11), 128),
            ((2, 128, 7, 5), 128),
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


@over(kernels=True, once=True, also=EACH, save_hidden=BOTH)
def test_what_is_kept_for_the_backward(target, shape, hidden, save_hidden):
    """x, its statistics and the parameters; the hidden activations only where asked for."""
    inputs = {n: t.requires_grad_() for n, t in on(target.device, problem(target, shape, hidden)).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mlp(**inputs, residual=True, save_hidden=save_hidden)
    new = [t.numel() for t in kept if all(t.data_ptr() != given.data_ptr() for given in inputs.values())]
    batch, _, height, width = shape
    saved = [batch * height * width * len(inputs["w1"])] if save_hidden else []
    assert sorted(new) == [2 * batch, *saved]


@over(
    once=True,
    dtype=TWO,
    residual=BOTH,
    save_hidden=BOTH,
    layout=FORMATS,
    grad_layout=[*FORMATS, "expanded_all"],
)
def test_a_second_backward_through_the_same_graph(target, dtype, residual, save_hidden, layout, grad_layout):
    """What is saved is not written to, by any kernel of the first one."""
    inputs = on(target.device, laid(problem(target, *TINY, dtype), layout))
    grad = like_on(target.device, as_layout(make_grad(inputs), grad_layout))
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    y = mlp(**leaves, residual=residual, save_hidden=save_hidden)
    kept = y.detach().clone()
    first = torch.autograd.grad(y, list(leaves.values()), grad, retain_graph=True)
    second = torch.autograd.grad(y, list(leaves.values()), grad)
    assert torch.equal(y.detach(), kept)
    assert_same(dict(zip(leaves, first, strict=True)), dict(zip(leaves, second, strict=True)))


@over(once=True)
def test_outputs_share_no_memory(target):
    inputs = on(target.device, problem(target, *TINY))
    inputs["layer_scale"] = torch.zeros_like(inputs["layer_scale"])  # y = x
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    grad = make_grad(inputs).to(target.device)
    y, stats = mlp_with_stats(**leaves, residual=True)
    tensors = [*leaves.values(), y, stats, *torch.autograd.grad(y, list(leaves.values()), grad)]
    if target.kernels:  # eager's backward may hand the gradient on as it came
        tensors.append(grad)
    storages = [t.untyped_storage().data_ptr() for t in tensors]
    assert len(set(storages)) == len(storages)


@over(
    once=True,
    written=("x", "w1", "w2", "b1", "norm_weight"),
    where=lambda target, written: (
        "eager need not read it" if not target.kernels and written not in WEIGHTS else None
    ),
)
def test_writing_a_saved_input_before_backward_raises(target, written):
    """The version counters of all that the backward reads, as in PyTorch."""
    leaves = {name: t.requires_grad_() for name, t in on(target.device, problem(target, *TINY)).items()}
    y = mlp(**leaves, residual=True)
    with torch.no_grad():
        leaves[written].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@over(once=True, kernels=True)
def test_the_backward_keeps_the_backend_of_its_forward(target):
    inputs = on(target.device, problem(target, *TINY))
    grad = make_grad(inputs).to(target.device)
    expected = run(mlp, inputs, grad, residual=True)
    w1 = inputs["w1"].requires_grad_()
    y = mlp(**inputs, residual=True)
    with pk.use_backend("reference"):
        (dw1,) = torch.autograd.grad(y, w1, grad)
    assert torch.equal(bits(dw1), bits(expected["dw1"]))


@over(once=True, mode=(torch.no_grad, torch.inference_mode), save_hidden=BOTH)
def test_the_value_is_the_same_without_autograd(target, mode, save_hidden):
    inputs = on(target.device, problem(target, *TINY))
    recorded = mlp(**{**inputs, "w2": inputs["w2"].clone().requires_grad_()}, residual=True)
    with mode():
        y = mlp(**inputs, residual=True, save_hidden=save_hidden)
    assert not y.requires_grad
    assert torch.equal(bits(y), bits(recorded.detach()))


@over(once=True, kernels=True)
def test_a_second_derivative_says_what_to_do(target):
    inputs = on(target.device, problem(target, (2, 3, 4, 5), 7))
    x = inputs["x"].requires_grad_()
    (dx,) = torch.autograd.grad(mlp(**inputs, residual=True).square().sum(), x, create_graph=True)
    message = rf"mlp on the '{target.backend}' backend has no second derivative.*use_backend\('reference'\)"
    with pytest.raises(RuntimeError, match=message):
        dx.square().sum().backward()


@over(once=True, save_hidden=BOTH)
def test_gradients_accumulate_over_calls(target, save_hidden):
    """The same weights in two calls, and a backward through several outputs."""
    inputs = on(target.device, problem(target, *TINY))
    grad = make_grad(inputs).to(target.device)
    options = {"residual": True, "save_hidden": save_hidden}
    once = run(mlp, inputs, grad, **options)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    torch.autograd.backward([mlp(**leaves, **options) for _ in range(2)], [grad, grad])
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, 2 * once[f"d{name}"], rtol=1e-6, atol=1e-6)


@over(once=True, save_hidden=BOTH)
def test_checkpointing_computes_the_same(target, save_hidden):
    """torch.utils.checkpoint runs the forward again inside the backward."""
    inputs = problem(target, *TINY)
    grad, options = make_grad(inputs), {"residual": True, "save_hidden": save_hidden}

    def checkpointed(**tensors):
        return checkpoint(lambda: mlp(**tensors, **options), use_reentrant=False)

    again = values(target, checkpointed, inputs, grad)
    assert_same(again, values(target, mlp, inputs, grad, **options))


def jvp_by_func(function, x, tangent):
    return torch.func.jvp(function, (x,), (tangent,))


def jvp_by_dual(function, x, tangent):
    with torch.autograd.forward_ad.dual_level():
        return function(torch.autograd.forward_ad.make_dual(x, tangent))


def grad_by_func(function, x, tangent):
    return torch.func.grad(lambda a: function(a).sum())(x)


TRANSFORMS = {f.__name__: f for f in (jvp_by_func, jvp_by_dual, grad_by_func)}


@over(once=True, kernels=True, name=("x", "w1", "b2"), transform=TRANSFORMS)
def test_other_derivatives_are_refused(target, name, transform):
    """A kernel has no tangents: a zero or a missing one would be a wrong number."""
    inputs = on(target.device, problem(target, (2, 3, 5, 6), 7))
    at = inputs.pop(name)
    with pytest.raises(RuntimeError, match=r"no forward-mode derivative and no torch\.func gradient; use"):
        TRANSFORMS[transform](lambda t: mlp(**inputs, **{name: t}, residual=True), at, torch.ones_like(at))


# ---- the registered operators ------------------------------------------------------------------------------


def operators(target: Target):
    found = torch.ops.poolformer_kernels
    return (getattr(found, f"mlp_{target.op}{part}").default for part in ("", "_backward"))


def last_arguments(target: Target, operand: torch.dtype) -> tuple:
    return {"triton": (operand, False), "cpp": (None,), "cuda": ()}[target.backend]


@over(
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
    forward, backward = operators(target)
    inputs = problem(target, shape, hidden, dtype, vector_dtype=vector_dtype)
    inputs = on(target.device, laid(inputs, layout))
    grad, more = make_grad(inputs).to(target.device), last_arguments(target, dtype)
    given = [inputs[name] for name in NAMES]
    for t in given:
        t.requires_grad_()
    for flag in BOTH:
        torch.library.opcheck(forward, (*given, None, "gelu", 1e-5, True, True, flag, flag, *more))
    x, *parameters = (t.detach() for t in given)
    _, mean_rstd, _, saved = forward(x, *parameters, None, "gelu", 1e-5, True, True, False, True, *more)
    for flag in BOTH:
        kept = saved if flag else None
        arguments = (grad, x, mean_rstd, *parameters, kept, "gelu", True, True, flag, flag, *more)
        torch.library.opcheck(backward, arguments)


@over(kernels=True, once=True, also=EACH)
def test_outputs_not_asked_for_are_empty(target, shape, hidden):
    """Of the forward and of the backward, whose other values are the same bits."""
    forward, backward = operators(target)
    for norm in BOTH:
        inputs = problem(target, shape, hidden, parameters=VECTORS if norm else PLAIN)
        more = last_arguments(target, inputs["x"].dtype)
        inputs = on(target.device, inputs)
        grad = make_grad(inputs).to(target.device)
        given = [inputs[name] for name in NAMES]
        _, *others = forward(*given, None, "gelu", 1e-5, norm, False, False, False, *more)
        assert [t.numel() for t in others] == [2 * shape[0] * norm, 0, 0]
        x, *parameters = given
        found = {}
        for wanted in itertools.product(BOTH, BOTH):  # of the parameters, of drop_scale
            arguments = (grad, x, others[0], *parameters, None, "gelu", norm, False, *wanted, *more)
            found[wanted] = dict(zip(NAMES, backward(*arguments), strict=True))
        for (of_parameters, of_drop), some in found.items():
            for name, value in some.items():
                asked = name == "x" or (of_drop if name == "drop_scale" else of_parameters)
                full = found[True, True][name]
                assert_same({name: value}, {name: full if asked else full.new_empty(0)})
