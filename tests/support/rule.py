"""The error rule: a value is as near to float64 as eager PyTorch, or within a few ulps; bitwise equality."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from poolformer_kernels import reference
from poolformer_kernels.numerics import Errors, errors, tolerance
from support.problems import Tensors


def run(
    function: Callable[..., Tensor],
    inputs: Tensors,
    grad: Tensor,
    *,
    frozen: tuple = (),
    any_batch: bool = False,
    **options,
) -> Tensors:
    """y and the gradient of every input given, through ``function``; the tensors keep their strides.

    ``frozen`` are the names of those whose gradients nobody asks for. With ``any_batch`` a compiler is told
    that the batch varies.
    """
    leaves = {n: t if t is None else t.detach().requires_grad_(n not in frozen) for n, t in inputs.items()}
    for name in ("x", "drop_scale") if any_batch else ():
        torch._dynamo.mark_dynamic(leaves[name], 0)
    given = {name: t for name, t in leaves.items() if t is not None and name not in frozen}
    y = function(**leaves, **options)
    grads = torch.autograd.grad(y, list(given.values()), grad)
    return {"y": y.detach()} | {f"d{name}": g for name, g in zip(given, grads, strict=True)}


@dataclass
class Truth:
    """fp64 values, and the size of the terms that each was summed from, which rounding errors scale with."""

    values: dict[str, Tensor]
    scales: dict[str, Tensor]


def assert_close_to_fp64(
    actual: Tensor,
    eager: Tensor | None,
    exact: Tensor,
    *,
    scale: Tensor | None = None,
    ulps: float = 4,
    what: str = "value",
) -> None:
    """The rule of `poolformer_kernels.numerics`; ``scale`` is by default the exact value."""
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    exact, scale = exact.cpu(), (exact if scale is None else scale).cpu()
    error = errors(actual, exact)
    other = Errors(0.0, 0.0) if eager is None else errors(eager, exact)
    allowed = tolerance(other, scale, actual.dtype, ulps=ulps)
    assert error.within(allowed), f"{what}: {error}, allowed {allowed}; eager's {other}"


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_thread() -> contextlib.AbstractContextManager[None]:
    """For eager's error, the yardstick: several threads split its sums otherwise and change it by chance.

    Where x is far from zero, GroupNorm's gradient in PyTorch loses digits. Of two such errors, one measured
    on one thread and one on two, the second was smaller by a factor of three.
    """
    return threads(1)


def assert_right(
    actual: Tensors,
    inputs: Tensors,
    grad: Tensor,
    *,
    eager: Callable[..., Tensor],
    truth: Callable[..., Truth],
    ulps: Callable[[str, torch.dtype], float],
    **options,
) -> None:
    """Every value in ``actual`` (from `run`) has its input's dtype and meets the error rule.

    ``eager`` is what a model without this package computes, ``truth`` the formula in fp64. ``ulps`` is the
    rule's floor for a value of this name and dtype.
    """
    plain = {name: t if t is None else t.detach().contiguous().clone() for name, t in inputs.items()}
    with one_thread():
        theirs = run(eager, plain, grad.contiguous(), **options)
    right = truth(inputs, grad, **options)
    for name, value in actual.items():
        source = inputs["x" if name == "y" else name[1:]]
        assert value.dtype == source.dtype, f"{name}: {value.dtype}, not {source.dtype}"
        exact, scale, floor = right.values[name], right.scales[name], ulps(name, value.dtype)
        assert_close_to_fp64(value, theirs[name], exact, scale=scale, ulps=floor, what=name)


def assert_statistics_of(stats: Tensor, y: Tensor) -> None:
    """The partials that a kernel returned are those of y as it was rounded."""
    assert stats.dtype == torch.float32
    assert torch.equal(stats[:, :, 0].sum(1), torch.full((len(y),), float(y[0].numel())))
    exact = reference.merge_stats(reference.sample_stats(y.double()))
    ours = reference.merge_stats(stats.double())
    theirs = reference.merge_stats(reference.sample_stats(y))
    sigma = exact[1].sqrt()
    assert_close_to_fp64(ours[0].float(), theirs[0].float(), exact[0], scale=exact[0].abs() + sigma)
    scale = exact[1] + exact[0].abs() * sigma  # the partials' means are rounded to float32
    assert_close_to_fp64(ours[1].float(), theirs[1].float(), exact[1], scale=scale, ulps=2)


def assert_same(actual: Tensors, expected: Tensors) -> None:
    """Bitwise equality, NaN included."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(bits(value), bits(expected[name])), name


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])
