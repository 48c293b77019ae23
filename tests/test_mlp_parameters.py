"""The MLP follows its parameters: whatever is written to them, the next call computes with the new values.

A kernel may keep what it made of a weight, packed or converted, and has to notice every way in which the
weight changes. Each test compares with the same call on fresh copies, whose like no cache has seen.
"""

import copy
import io

import numpy as np
import pytest
import torch
from support.layouts import as_layout
from support.nn import gradients
from support.operators import MLP, SubBlock
from support.problems import HALVES, randn
from support.rule import assert_same
from torch import Tensor, nn

from poolformer_kernels.ops import mlp

DTYPES = (torch.float32, *HALVES)
B, C, H, W, HIDDEN = 2, 32, 5, 7, 96
ROUNDS = 3


def block_of(dtype: torch.dtype = torch.float32, seed: int = 0) -> SubBlock:
    return SubBlock(MLP, (B, C, H, W), HIDDEN, dtype, seed=seed)


def x_of(dtype: torch.dtype = torch.float32) -> Tensor:
    return as_layout(randn(B, C, H, W, dtype=dtype, mean=-2.3, sigma=0.5, seed=20), "channels_last")


def fresh(block: SubBlock) -> SubBlock:
    """A block of the same values in memory of its own, none of which a call has read before."""
    other = block_of(block.w1.dtype)
    for name, p in block.named_parameters():
        storage = torch.empty(p.numel() + 64, dtype=p.dtype)[64:].view(p.shape)
        setattr(other, name, nn.Parameter(storage.copy_(p.detach())))
    return other


@pytest.fixture(params=["inference_mode", "no_grad", "training"])
def mode(request: pytest.FixtureRequest) -> str:
    return request.param


def values_of(block: SubBlock, x: Tensor, mode: str) -> dict[str, Tensor]:
    if mode == "training":
        return gradients(block, x, torch.ones_like(x))
    with torch.inference_mode() if mode == "inference_mode" else torch.no_grad():
        return {"y": block(x).clone()}


def assert_follows(block: SubBlock, x: Tensor, mode: str, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """The block's values changed, and are those of a fresh one; returns them."""
    actual = values_of(block, x, mode)
    assert_same(actual, values_of(fresh(block), x, mode))
    assert not torch.equal(actual["y"], before["y"]), "the value did not change"
    return actual


# ---- optimisers --------------------------------------------------------------------------------------------

OPTIMISERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=False),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.1, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
}


@pytest.mark.parametrize(
    ("optimiser", "dtype", "autocast"),
    [
        *(
            (name, dtype, None)
            for name in OPTIMISERS
            for dtype in (torch.float32, torch.bfloat16)
            if (name, dtype) != ("SGD fused", torch.bfloat16)  # most of a parameter stays (torch 2.13)
        ),
        *(("AdamW", torch.float32, half) for half in HALVES),
    ],
    ids=str,
)
def test_optimiser_steps(backend, optimiser, dtype, autocast, mode):
    """The values after each step. Fused optimisers write without counting it in the tensor's version.

    The half weights that autocast makes are new tensors in each step, often at the same address.
    """
    block, x = block_of(dtype), x_of(dtype)
    optimiser = OPTIMISERS[optimiser](block.parameters())
    last = values_of(block, x, mode)
    for _ in range(ROUNDS):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = block(x).float().square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            last = assert_follows(block, x, mode, last)


# ---- writes ------------------------------------------------------------------------------------------------


WRITES = {
    "in place": lambda p: p.detach().mul_(-1.5),
    "copy_": lambda p: p.detach().copy_(p.detach().flip(0) + 0.25),
    "one number": lambda p: p.detach().view(-1)[-1].add_(4.0),
    "data in place": lambda p: p.data.mul_(-1.5),
    "data replaced": lambda p: setattr(p, "data", p.data * -1.5),
    "through numpy's memory": lambda p: torch.frombuffer(
        memoryview(p.detach().view(torch.uint8).numpy()), dtype=p.dtype
    ).mul_(-1.5),
    "foreach": lambda p: torch._foreach_mul_([p.detach()], -1.5),
    "init": lambda p: nn.init.normal_(p),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("write", WRITES)
def test_writes(backend, write, dtype, mode):
    """Also those that PyTorch does not count in the tensor's version: .data, and memory that others share."""
    block, x = block_of(dtype), x_of(dtype)
    last = values_of(block, x, mode)
    for p in block.parameters():
        WRITES[write](p)
        last = assert_follows(block, x, mode, last)


def test_writes_inside_inference_mode(backend):
    """Tensors of inference mode have no version counter."""
    with torch.inference_mode():
        block, x = block_of(), x_of()
        assert block.w1.is_inference()
        last = {"y": block(x).clone()}
        for p in block.parameters():
            p.mul_(-1.5)
            last = assert_follows(block, x, "no_grad", last)


def test_writes_through_a_view_of_all_parameters(backend, mode):
    """Sharded training keeps every parameter as a view of one flat tensor and writes that."""
    block, x = block_of(), x_of()
    flat = torch.cat([p.detach().flatten() for p in block.parameters()])
    at = 0
    for p in block.parameters():
        p.data = flat[at : at + p.numel()].view(p.shape)
        at += p.numel()
    last = values_of(block, x, mode)
    for _ in range(ROUNDS):
        flat.mul_(-0.75)
        last = assert_follows(block, x, mode, last)


# ---- loading, converting, copying --------------------------------------------------------------------------


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_load_state_dict(backend, dtype, assign, mode):
    block, x = block_of(dtype), x_of(dtype)
    last = values_of(block, x, mode)
    for seed in range(1, ROUNDS + 1):
        block.load_state_dict(block_of(dtype, seed=10 * seed).state_dict(), assign=assign)
        last = assert_follows(block, x, mode, last)


def test_conversions(backend, mode):
    """.to(dtype) there and back, and another memory format, on the module that was used before."""
    block = block_of()
    last = values_of(block, x_of(), mode)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.bfloat16):
        block.to(dtype)
        last = assert_follows(block, x_of(dtype), mode, last)
    block.to(memory_format=torch.channels_last)
    assert_same(values_of(block, x_of(torch.bfloat16), mode), last)


def test_copies_are_independent(backend, mode):
    """copy.deepcopy, torch.save and load: a copy computes as its original, until either is written."""
    block, x = block_of(), x_of()
    first = values_of(block, x, mode)
    file = io.BytesIO()
    torch.save(block.state_dict(), file)
    loaded = block_of(seed=50)
    loaded.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
    for other in (copy.deepcopy(block), loaded):
        assert_same(values_of(other, x, mode), first)
        with torch.no_grad():
            other.w1.mul_(-1.5)
        assert_follows(other, x, mode, first)
        assert_same(values_of(block, x, mode), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_new_parameters_at_an_old_address(backend, dtype, mode):
    """New tensors where freed ones lay: same addresses, sizes and versions.

    The memory is NumPy's: an allocator may keep what was freed, as that of a sanitizer does.
    """
    x, last = x_of(dtype), None
    memory = {name: np.empty(p.nbytes, np.uint8) for name, p in block_of(dtype).named_parameters()}
    for seed in range(12):
        block = block_of(dtype, seed=10 * seed)
        for name, p in list(block.named_parameters()):
            anew = torch.from_numpy(memory[name]).view(p.dtype).view(p.shape).copy_(p.detach())
            setattr(block, name, nn.Parameter(anew))
            assert getattr(block, name).data_ptr() == memory[name].ctypes.data
        values = values_of(block, x, mode)
        assert_same(values, values_of(fresh(block), x, mode))
        assert last is None or not torch.equal(values["y"], last)
        last = values["y"]
        del block, p, anew, values


def test_another_tensor_around_the_same_memory(backend, mode):
    """One storage, written and wrapped anew: neither the address nor the version tells the weights apart."""
    block, x = block_of(), x_of()
    memory = torch.empty_like(block.w1)
    last = values_of(block, x, mode)
    for seed in range(1, ROUNDS + 1):
        memory.data.copy_(block_of(seed=10 * seed).w1.detach())
        block.w1 = nn.Parameter(memory.view(HIDDEN, C, 1, 1).data)
        last = assert_follows(block, x, mode, last)


def test_weights_swapped(backend, mode):
    """Two blocks exchange their weights; and the shapes that share memory are told apart."""
    one, two, x = block_of(), block_of(seed=10), x_of()
    first, second = values_of(one, x, mode), values_of(two, x, mode)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        p.data, q.data = q.data, p.data
    assert_same(values_of(one, x, mode), second)
    assert_same(values_of(two, x, mode), first)


def test_one_memory_as_weights_of_two_shapes(backend):
    """[96, 32] and [32, 96] of the same numbers, in turns."""
    memory = randn(HIDDEN * C, sigma=0.2)
    wide, narrow = memory.view(HIDDEN, C), memory.view(C, HIDDEN)
    x, hidden = x_of(), randn(B, HIDDEN, H, W, seed=4)
    for _ in range(2):
        for given, w1, w2 in ((x, wide, narrow), (hidden, narrow, wide)):
            expected = mlp(given, w1.clone(), None, w2.clone(), None)
            torch.testing.assert_close(mlp(given, w1, None, w2, None), expected, rtol=0, atol=0)
