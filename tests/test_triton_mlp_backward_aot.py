"""The Triton launches of the MLP's backward, compiled without a GPU: registers, spills, memory, products."""

import importlib.util
import os
from typing import NamedTuple

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    if os.environ.get("CI"):
        raise ModuleNotFoundError("the ahead-of-time tests need triton")
    pytest.skip("triton is not installed", allow_module_level=True)

from poolformer_kernels.backends.triton import aot, mlp_backward

SHARED = {80: 166912, 90: 232448, 100: 232448}  # bytes a block may use
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}  # mma.sync, wgmma, tcgen05
PRODUCTS = ("mlp_bwd_wgrad", "mlp_bwd_dx", "mlp_bwd_hidden", "mlp_bwd_outer", "mlp_bwd_dn")
SHAPES = ((64, 56), (96, 56), (128, 28), (192, 28), (320, 14), (512, 7))


class Case(NamedTuple):
    """A training step's call: no gradient of drop_scale."""

    channels: int
    size: int
    save_hidden: bool = False
    drop_grad: bool = False

    def __str__(self) -> str:
        flags = (name for name in self._fields[2:] if getattr(self, name))
        return ", ".join([f"{self.channels}x{self.size}", *flags])

    def call(self) -> None:
        bf16 = {"dtype": torch.bfloat16, "device": "meta"}
        batch, channels, hidden = 256, self.channels, 4 * self.channels
        shape = (batch, channels, self.size, self.size)
        x = torch.empty(shape, memory_format=torch.channels_last, **bf16)
        mean_rstd = torch.empty((batch, 2), device="meta")
        w1, w2 = torch.empty((hidden, channels), **bf16), torch.empty((channels, hidden), **bf16)
        b1 = torch.empty(hidden, **bf16)
        b2, gamma, beta, scale = (torch.empty(channels, **bf16) for _ in range(4))
        drop = torch.empty(batch, **bf16)
        saved = torch.empty(x.numel() * 4, **bf16) if self.save_hidden else None
        parameters = (w1, b1, w2, b2, gamma, beta, scale, drop)
        mlp_backward.backward(x, x, mean_rstd, *parameters, saved, "gelu", True, True, True, self.drop_grad)


def recorded(cases: list[Case], arch: int) -> list[aot.Launch]:
    """The launches of the cases as the launchers configure them for an architecture."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlp_backward, "architecture", lambda x: arch)
        return aot.distinct(cases)


CASES = [Case(*shape) for shape in SHAPES]
OTHERS = [  # one architecture tells
    *(Case(*SHAPES[i], save_hidden=True) for i in (0, 2, 4)),
    *(Case(*SHAPES[i], drop_grad=True) for i in (0, 5)),
]
COMPILED = [
    *((n, 90) for n in recorded([*CASES, *OTHERS], 90) if n.kernel in PRODUCTS),
    *((n, arch) for arch in (80, 100) for n in recorded(CASES[:1] + CASES[2:], arch) if n.kernel in PRODUCTS),
    *((n, 90) for n in recorded([CASES[4]], 90) if n.kernel not in PRODUCTS),
]


@pytest.mark.parametrize(("launch", "arch"), COMPILED, ids=lambda p: getattr(p, "name", p))
def test_resources(launch, arch) -> None:
    used = aot.compile_launch(launch, arch)
    threads = 32 * dict(launch.options).get("num_warps", 4)
    assert used.spills == 0
    assert used.shared <= SHARED[arch]
    assert used.registers * threads <= 65536  # what an SM has
    if launch.kernel not in PRODUCTS:
        assert used.registers <= 96
        return
    assert set(used.matrix) == {MATRIX[arch]}
    if arch == 90 and dict(launch.constants).get("C") == 64 and launch.kernel in PRODUCTS[:2]:
        assert used.registers <= 168  # three blocks on an SM


def test_both_forms_are_covered() -> None:
    assert {n.kernel for n, _ in COMPILED} > set(PRODUCTS)
    for arch in aot.ARCHS:
        assert {n.kernel for n, a in COMPILED if a == arch} >= set(PRODUCTS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_memory_of_a_call(case, monkeypatch) -> None:
    """x, dx, the workspace and the weights' gradients; eager PyTorch holds 20 times x in its backward."""
    sizes = []
    for name in ("empty", "zeros"):
        function = getattr(torch, name)

        def counted(*args, function=function, **options):
            t = function(*args, **options)
            sizes.append(t.numel() * t.element_size())
            return t

        monkeypatch.setattr(torch, name, counted)
    recorded([case], 90)
    assert sum(sizes) <= (7 if case.channels == 512 else 5) * sizes[0]  # weights outweigh activations at 512
