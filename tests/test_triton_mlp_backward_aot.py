"""The Triton launches of the MLP's backward, compiled without a GPU: registers, spills, memory, products."""

from typing import NamedTuple

import pytest
import torch
from support.ttgir import aot, check_accesses, check_products, compiled, parameters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from poolformer_kernels.backends.triton.mlp import backward

PRODUCTS = ("mlp_bwd_wgrad", "mlp_bwd_dx", "mlp_bwd_hidden", "mlp_bwd_outer", "mlp_bwd_dn")
SHAPES = ((64, 56), (96, 56), (128, 28), (192, 28), (320, 14), (512, 7))


class Case(NamedTuple):
    """A training step's call: no gradient of drop_scale."""

    channels: int
    size: int
    dtype: torch.dtype = torch.bfloat16
    save_hidden: bool = False
    drop_grad: bool = False
    offset: int = 0  # elements before each of the caller's tensors in its memory
    autocast: bool = False  # the products' operands are bfloat16
    allow_tf32: bool = False

    def __str__(self) -> str:
        flags = (name for name in self._fields[3:] if getattr(self, name))
        dtype = str(self.dtype).removeprefix("torch.")
        return ", ".join([f"{dtype} {self.channels}x{self.size}", *flags])

    def call(self) -> None:
        batch, channels, hidden = 256, self.channels, 4 * self.channels
        shape = (batch, channels, self.size, self.size)
        x = aot.meta(self.dtype, *shape, offset=self.offset, fmt=torch.channels_last)
        mean_rstd = aot.meta(torch.float32, batch, 2)
        w1, w2, b1, b2, gamma, beta, scale, drop = (
            aot.meta(self.dtype, *sizes, offset=self.offset)
            for sizes in ((hidden, channels), (channels, hidden), (hidden,), *[(channels,)] * 4, (batch,))
        )
        saved_dtype = torch.bfloat16 if self.autocast else self.dtype
        saved = aot.meta(saved_dtype, x.numel() * 4) if self.save_hidden else None
        parameters = (w1, b1, w2, b2, gamma, beta, scale, drop)
        operand = torch.bfloat16 if self.autocast else self.dtype
        flags = (True, True, True, self.drop_grad, operand, self.allow_tf32)
        backward.backward(x, x, mean_rstd, *parameters, saved, "gelu", *flags)


class Allocated(TorchDispatchMode):
    """Every memory that an operator returns, once: torch 2.14 makes some tensors by others' functions."""

    def __init__(self) -> None:
        super().__init__()
        self.storages = {}  # kept alive: an address names one of them

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                self.storages[storage._cdata] = storage
        return out

    def sizes(self) -> list[int]:
        return [storage.nbytes() for storage in self.storages.values()]


CASES = [Case(*shape) for shape in SHAPES]
TF32 = [Case(*shape, torch.float32, allow_tf32=True) for shape in SHAPES]
# on every architecture
FEW = [*(Case(*SHAPES[i]) for i in (0, 2, 5)), TF32[0], TF32[4], Case(*SHAPES[0], offset=1)]
USUAL = [  # on one
    *CASES,
    *(Case(*SHAPES[i], save_hidden=True) for i in (0, 2, 4)),
    *(Case(*SHAPES[i], drop_grad=True) for i in (0, 5)),
    *(Case(*SHAPES[i], offset=1) for i in (0, 5)),  # slices of larger tensors
    Case(*SHAPES[0], torch.float32),
    *(Case(*SHAPES[i], torch.float32, save_hidden=i == 4, autocast=True) for i in (0, 2, 4)),
    Case(*SHAPES[4], torch.float32),
    *(TF32[i] for i in (0, 4, 5)),
]
REST = [
    *(Case(*shape, drop_grad=drop, save_hidden=True) for shape in SHAPES for drop in (False, True)),
    *(Case(*shape, offset=1) for shape in SHAPES),
    *(Case(*shape, torch.float16, drop_grad=drop) for shape in SHAPES for drop in (False, True)),
    *(Case(*shape, torch.float32) for shape in SHAPES),
    *TF32,
    *(case._replace(drop_grad=drop, save_hidden=True) for case in TF32 for drop in (False, True)),
    *(case._replace(offset=1) for case in TF32),
]
MORE = [*CASES, *TF32, *(case._replace(offset=1) for case in (CASES[2], CASES[4], TF32[0], TF32[4]))]
COMPILED = [
    item
    for arch in aot.ARCHS
    for item in parameters(*((USUAL, REST) if arch == 90 else (FEW, MORE)), arch)
    if item.values[0].kernel in PRODUCTS or (arch == 90 and item.values[0].case == str(CASES[4]))
]


@pytest.mark.sampled(6)
@pytest.mark.parametrize(("launch", "arch"), COMPILED)
def test_resources(launch, arch) -> None:
    # With drop_scale's gradient, which no training asks for, 128 channels leave 2 to 4 registers on the
    # stack. A smaller tile would not, but gradients' bits must not depend on what else is asked for.
    constants = dict(launch.constants)
    used = compiled(launch, arch, spills=16 if constants.get("C") == 128 and constants.get("DROP") else 0)
    check_accesses(used, launch, arch)
    if launch.kernel not in PRODUCTS:
        assert used.warps >= 20
        return
    check_products(used, launch, arch)
    half = dict(launch.signature)["a_ptr" if launch.kernel == "mlp_bwd_outer" else "w1_ptr"] != "*fp32"
    narrow = half and constants.get("C") == 64 and launch.kernel in PRODUCTS[:2]
    training = not constants.get("DROP") and 1 in launch.divisible  # the gradient, aligned
    assert used.warps >= (12 if narrow and training else 8)


def test_both_forms_are_covered() -> None:
    for arch in aot.ARCHS:
        kernels = {item.values[0].kernel for item in COMPILED if item.values[1] == arch and not item.marks}
        assert kernels > set(PRODUCTS) if arch == 90 else kernels == set(PRODUCTS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_memory_of_a_call(case) -> None:
    """x, dx, the workspace and the weights' gradients; eager PyTorch holds 20 times x in its backward."""
    with Allocated() as allocated:
        aot.distinct([case])
    sizes = allocated.sizes()
    assert sizes[0] == 2 * 256 * case.channels * case.size**2  # x
    # The wide form's hidden activations and gradients, here of one chunk, are 8 times x.
    assert sum(sizes) <= (5 if case.channels <= 128 else 13) * sizes[0]
