"""What both operators promise to autograd: subsets of gradients, graphs used again, what is refused."""

import pytest
import torch
from support.derivatives import TRANSFORMS
from support.devices import like_on, on
from support.layouts import as_layout
from support.operators import POOL_MIXER
from support.rule import assert_same, bits, run
from torch.utils.checkpoint import checkpoint

import poolformer_kernels as pk

from .both import some_of
from .cases import over
from .check import given, laid, problem_of, values
from .common import BOTH, FORMATS, INF, TINY, TWO
from .targets import Target


@over(
    repeats=True,
    once=True,
    pool_mixer={"sizes": [(0, 1, 5), (2,), (3, 4)], "shape": [TINY[0]]},
    mlp={
        "sizes": [(0, 1, 8, 9), (2,), (3, 4), (5, 6, 7)],
        "shape, hidden": [TINY, ((3, 200, 2, 3), 20)],
        "save_hidden": BOTH,
    },
    residual=BOTH,
    where=lambda target, shape, sizes, hidden=None, **_: (
        "it takes a minute, others seconds"
        if target.elements < INF and hidden and (shape[1] == 200 or sizes[0] > 2)
        else None
    ),
)
def test_subsets_of_requires_grad(target, operator, sizes, shape, hidden, residual, save_hidden):
    """All subsets of these sizes."""
    inputs = on(target.device, problem_of(operator, target, shape, hidden))
    grad = operator.grad(inputs).to(target.device)
    options = given(residual=residual, save_hidden=save_hidden)
    full = run(operator.call, inputs, grad, **options)
    for subset in some_of(operator.names, sizes):
        leaves = {name: t.clone().requires_grad_(name in subset) for name, t in inputs.items()}
        y = operator.call(**leaves, **options)
        assert y.requires_grad == bool(subset), subset
        if subset:
            y.backward(grad)
        found = {"y": y.detach()} | {f"d{name}": leaves[name].grad for name in subset}
        assert all(leaf.grad is None for name, leaf in leaves.items() if name not in subset), subset
        for name, value in found.items():
            if target.exact or (operator is POOL_MIXER and name == "y"):
                assert torch.equal(bits(value), bits(full[name])), (subset, name)
            else:  # eager takes other ways through the same sums, in another order
                torch.testing.assert_close(value, full[name], rtol=1e-5, atol=1e-5)


@over(
    once=True,
    mlp={"save_hidden": BOTH},
    dtype=TWO,
    residual=BOTH,
    layout=FORMATS,
    grad_layout=[*FORMATS, "expanded_all"],
)
def test_a_second_backward_through_the_same_graph(
    target, operator, save_hidden, dtype, residual, layout, grad_layout
):
    """What is saved is not written to, by any kernel of the first one."""
    inputs = on(target.device, laid(problem_of(operator, target, *TINY, dtype), layout))
    grad = like_on(target.device, as_layout(operator.grad(inputs), grad_layout))
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    y = operator.call(**leaves, **given(residual=residual, save_hidden=save_hidden))
    kept = y.detach().clone()
    first = torch.autograd.grad(y, list(leaves.values()), grad, retain_graph=True)
    second = torch.autograd.grad(y, list(leaves.values()), grad)
    assert torch.equal(y.detach(), kept)
    assert_same(dict(zip(leaves, first, strict=True)), dict(zip(leaves, second, strict=True)))


@over(once=True)
def test_outputs_share_no_memory(target, operator):
    inputs = on(target.device, problem_of(operator, target, *TINY))
    inputs["layer_scale"] = torch.zeros_like(inputs["layer_scale"])  # y = x
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    grad = operator.grad(inputs).to(target.device)
    options = {"pool_size": 1} if operator is POOL_MIXER else {}
    y, stats = operator.with_stats(**leaves, residual=True, **options)
    tensors = [*leaves.values(), y, stats, *torch.autograd.grad(y, list(leaves.values()), grad)]
    if target.kernels:  # eager's backward may hand the gradient on as it came
        tensors.append(grad)
    storages = [t.untyped_storage().data_ptr() for t in tensors]
    assert len(set(storages)) == len(storages)


@over(
    once=True,
    pool_mixer={"written": ["x"]},
    mlp={"written": ["x", "w1", "w2", "b1", "norm_weight"]},
    where=lambda target, written: (
        "eager need not read it" if not target.kernels and written in ("b1", "norm_weight") else None
    ),
)
def test_writing_a_saved_input_before_backward_raises(target, operator, written):
    """The version counters of all that the backward reads, as in PyTorch."""
    inputs = on(target.device, problem_of(operator, target, *TINY))
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    y = operator.call(**leaves, residual=True)
    with torch.no_grad():
        leaves[written].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@over(once=True, kernels=True)
def test_the_backward_keeps_the_backend_of_its_forward(target, operator):
    inputs = on(target.device, problem_of(operator, target, *TINY))
    grad = operator.grad(inputs).to(target.device)
    expected = run(operator.call, inputs, grad, residual=True)
    leaves = {f"d{name}": t.requires_grad_() for name, t in inputs.items()}
    y = operator.call(**inputs, residual=True)
    with pk.use_backend("reference"):
        grads = torch.autograd.grad(y, list(leaves.values()), grad)
    assert_same({"y": y.detach(), **dict(zip(leaves, grads, strict=True))}, expected)


@over(once=True, mlp={"save_hidden": BOTH}, mode=(torch.no_grad, torch.inference_mode))
def test_the_value_is_the_same_without_autograd(target, operator, save_hidden, mode):
    inputs = on(target.device, problem_of(operator, target, *TINY))
    recorded = operator.call(**inputs | {"x": inputs["x"].clone().requires_grad_()}, residual=True)
    with mode():
        y = operator.call(**inputs, **given(residual=True, save_hidden=save_hidden))
    assert not y.requires_grad
    assert torch.equal(bits(y), bits(recorded.detach()))


@over(once=True, mlp={"save_hidden": BOTH})
def test_gradients_accumulate_over_calls(target, operator, save_hidden):
    """The same weights in two calls, and a backward through several outputs."""
    inputs = on(target.device, problem_of(operator, target, *TINY))
    grad = operator.grad(inputs).to(target.device)
    options = given(residual=True, save_hidden=save_hidden)
    once = run(operator.call, inputs, grad, **options)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    torch.autograd.backward([operator.call(**leaves, **options) for _ in range(2)], [grad, grad])
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, 2 * once[f"d{name}"], rtol=1e-6, atol=1e-6)


@over(once=True, mlp={"save_hidden": BOTH})
def test_checkpointing_computes_the_same(target, operator, save_hidden):
    """torch.utils.checkpoint runs the forward again inside the backward."""
    inputs = problem_of(operator, target, *TINY)
    grad, options = operator.grad(inputs), given(residual=True, save_hidden=save_hidden)

    def checkpointed(**tensors):
        return checkpoint(lambda: operator.call(**tensors, **options), use_reentrant=False)

    again = values(target, checkpointed, inputs, grad)
    assert_same(again, values(target, operator.call, inputs, grad, **options))


def without_gradients(target: Target, shape, hidden) -> str | None:
    """The gradients of 192 channels are Triton's on a GPU; the executor has no other backend."""
    own = not hidden or target.differentiates("mlp", target.fit(shape[1], hidden, None)[0])
    return None if own or target.device == "cuda" else "another target computes its gradients"


@over(
    once=True,
    kernels=True,
    where=without_gradients,
    pool_mixer={"shape, hidden": [((2, 3, 4, 5), None)]},
    mlp={"shape, hidden": [((2, 3, 4, 5), 7), ((1, 192, 3, 3), 64)]},
)
def test_a_second_derivative_says_what_to_do(target, operator, shape, hidden):
    inputs = on(target.device, problem_of(operator, target, shape, hidden))
    x = inputs["x"].requires_grad_()
    y = operator.call(**inputs, residual=True)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    message = f"{operator} on the '{target.backend}' backend has no second derivative.*use_backend"
    with pytest.raises(RuntimeError, match=message + r"\('reference'\)"):
        dx.square().sum().backward()


@over(
    once=True,
    kernels=True,
    pool_mixer={"name": ["x", "weight"]},
    mlp={"name": ["x", "w1", "b2"]},
    transform=TRANSFORMS,
)
def test_other_derivatives_are_refused(target, operator, name, transform):
    """A kernel has no tangents: a zero or a missing one would be a wrong number."""
    inputs = on(target.device, problem_of(operator, target, (2, 3, 5, 6), 7))
    at = inputs.pop(name)

    def function(t: torch.Tensor) -> torch.Tensor:
        return operator.call(**inputs, **{name: t}, residual=True)

    with pytest.raises(RuntimeError, match=r"no forward-mode derivative and no torch\.func gradient; use"):
        TRANSFORMS[transform](function, at, torch.ones_like(at))
