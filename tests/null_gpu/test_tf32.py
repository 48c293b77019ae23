"""Which float32 products may be TF32: those that would be in eager, in the backward as in the forward."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import poolformer_kernels as pk
from poolformer_kernels.ops import mlp

pytestmark = pytest.mark.host

OPS = torch.ops.poolformer_kernels
TRITON = (OPS.mlp_triton.default, OPS.mlp_triton_backward.default)


class Allowed(TorchDispatchMode):
    """(operator, allow_tf32) of each call of Triton's MLP; nothing is launched, as there is no sample."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, bool]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in TRITON:
            self.found.append((function._opname, args[-1]))
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    set_precision("tf32", "ieee")
    yield
    set_precision("tf32", "ieee")


def set_precision(convolutions: str, products: str) -> None:
    torch.backends.cudnn.conv.fp32_precision = convolutions
    torch.backends.cuda.matmul.fp32_precision = products


def tensors(dtype=torch.float32, ranks=(4, 4)) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.empty((0, 64, 4, 4), dtype=dtype, device="cuda", requires_grad=True)
    sizes = ((256, 64), (64, 256))
    return x, *(
        x.new_empty((*size, 1, 1)[:rank], requires_grad=True) for size, rank in zip(sizes, ranks, strict=True)
    )


def allowed(dtype=torch.float32, ranks=(4, 4)) -> list[tuple[str, bool]]:
    x, w1, w2 = tensors(dtype, ranks)
    with Allowed() as seen:
        mlp(x, w1, None, w2, None).sum().backward()
    return seen.found


@pytest.mark.parametrize("convolutions", ["tf32", "ieee"])
@pytest.mark.parametrize("products", ["tf32", "ieee"])
@pytest.mark.parametrize("ranks", [(4, 4), (2, 2), (4, 2), (2, 4)], ids=str)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_weights_say_whose_setting_counts(backend, ranks, products, convolutions) -> None:
    set_precision(convolutions, products)
    of_rank = {4: convolutions == "tf32", 2: products == "tf32"}
    expected = all(of_rank[rank] for rank in ranks)
    with pk.use_backend(backend):
        assert allowed(ranks=ranks) == [("mlp_triton", expected), ("mlp_triton_backward", expected)]


def test_the_older_names_of_the_settings() -> None:
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = True
    assert [allowed(ranks=ranks)[0][1] for ranks in ((4, 4), (2, 2))] == [False, True]
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_tf32 = False
    assert [allowed(ranks=ranks)[0][1] for ranks in ((4, 4), (2, 2))] == [True, False]


def test_halves_have_no_tf32() -> None:
    with pk.use_backend("triton"):
        found = [*allowed(torch.bfloat16), *allowed(torch.float16)]
        with torch.autocast("cuda"):
            found += allowed()
    assert [flag for _, flag in found] == [False] * 6


@pytest.mark.parametrize("first", ["tf32", "ieee"])
def test_the_backward_keeps_what_held_in_the_forward(first) -> None:
    set_precision(first, "ieee")
    x, w1, w2 = tensors()
    with Allowed() as seen:
        y = mlp(x, w1, None, w2, None)
        set_precision("ieee" if first == "tf32" else "tf32", "ieee")
        y.sum().backward()
    assert [flag for _, flag in seen.found] == [first == "tf32"] * 2


def test_compiled_code_follows_a_changed_setting() -> None:
    called = []  # the flag of each call, from the graph that runs it

    def keep(graph, inputs):
        (node,) = (node for node in graph.graph.nodes if node.target is TRITON[0])

        def run(*args):
            called.append(node.args[-1])
            return graph.forward(*args)

        return run

    @torch.compile(backend=keep, fullgraph=True)
    def f(x, w1, w2):
        return mlp(x, w1, None, w2, None)

    for precision in ("tf32", "ieee", "tf32"):
        set_precision(precision, "ieee")
        f(*tensors())
    assert called == [True, False, True]
    torch.compiler.reset()
