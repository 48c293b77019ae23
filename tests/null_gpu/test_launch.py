"""The launcher of the Triton kernels: what reaches the driver is what Triton's own launcher sends."""

import logging

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs

from poolformer_kernels.backends.triton import launch
from poolformer_kernels.backends.triton.launch import Kernel, kernel

from .null_gpu import recorded

pytestmark = pytest.mark.host


@kernel(do_not_specialize=("n",))
def scaled(x_ptr, bias_ptr, y_ptr, n, m, eps, NAME: tl.constexpr, BLOCK: tl.constexpr):
    """Uses each of its arguments, so that none is left out of the machine code."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32) * eps + m
    if bias_ptr is not None:
        value += tl.load(bias_ptr + i, mask=i < n, other=0.0)
    if NAME == "negative":
        value = -value
    tl.store(y_ptr + i, value, mask=i < n)


def by_triton(kernel: Kernel, grid, *args, **options) -> list:
    with recorded() as launches:
        triton.JITFunction.__getitem__(kernel, grid)(*args, **options)
    return launches


def tensors(offset: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.empty(1024 + offset, dtype=dtype, device="cuda")[offset:] for _ in range(3)]


CALLS = [
    (*tensors(), 1000, 5, 0.5, "", 128),
    (*tensors(), 1000, 16, 0.5, "", 128),
    (*tensors(), 1000, 1, 0.5, "", 128),
    (*tensors(), 16, 5, 0.25, "negative", 128),
    (*tensors(), 1, 5, 0.25, "negative", 256),
    (*tensors(1), 1000, 5, 0.5, "", 128),
    (*tensors(0, torch.bfloat16), 1000, 5, 0.5, "", 128),
    (*tensors(1, torch.bfloat16), 1000, 5, 0.5, "", 128),
    (*tensors(), 1000, 2**40, 0.5, "", 128),
    (*tensors(), 2**40, 5, 0.5, "", 128),
    (*tensors(), 1000, -(2**31) - 1, 0.5, "", 128),
    (*tensors(), 1000, -7, -1e30, "", 128),
] if torch.cuda.is_available() else []  # fmt: skip
CALLS += [(x, None, y, *rest) for x, _, y, *rest in CALLS[:2]]


@pytest.mark.parametrize("options", [{}, {"num_warps": 8}, {"num_warps": 2, "maxnreg": 64}], ids=str)
def test_the_driver_gets_what_triton_sends(options) -> None:
    """In any order of calls that differ in types, alignment, constants, missing tensors and options."""
    expected = [by_triton(scaled, (3,), *call, **options) for call in CALLS]
    for _ in range(2):
        for call, (wanted,) in zip(CALLS, expected, strict=True):
            with recorded() as launches:
                scaled[(3,)](*call, **options)
            assert launches == [wanted]
    assert len({(w.registers, w.arguments, w.block) for (w,) in expected}) == len(CALLS)


def test_kernels_are_prepared_once(monkeypatch) -> None:
    seen, prepared = [], launch._prepared
    monkeypatch.setattr(launch, "_prepared", lambda compiled: seen.append(compiled) or prepared(compiled))
    x, bias, y = tensors()
    for n in (1, 7, 16, 1000):
        for bias_ptr in (bias, None):
            name = "".join(["on", "ce"])  # another string each time, as the dispatcher makes them
            scaled[(2,)](x, bias_ptr, y, n, 5, float(n), name, 128)
    assert len(seen) == 2


def test_calls_that_cannot_be_launched() -> None:
    x, bias, y = tensors()
    scaled[(1,)](x, bias, y, 1, 5, 0.5, "", 128)
    with recorded() as launches:
        scaled[(0,)](x, bias, y, 1, 5, 0.5, "", 128)
        with pytest.raises(RuntimeError, match="takes a grid of one number and 8 arguments, got 8 of both"):
            scaled[(1,)](x, bias, y, 1, 5, 0.5, "")
        with pytest.raises(RuntimeError, match="too large for one launch, 2147483648 blocks"):
            scaled[(2**31,)](x, bias, y, 1, 5, 0.5, "", 128)
        with pytest.raises(AttributeError, match="data_ptr"):
            scaled[(1,)](x, [], y, 1, 5, 0.5, "", 128)
    assert launches == []


def test_a_profiler_sees_tritons_launches() -> None:
    """A hook of Triton's is called for each launch while it is set."""
    seen = []
    hook = seen.append
    call = CALLS[0]
    scaled[(1,)](*call)
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        scaled[(1,)](*call)
        scaled[(1,)](*call)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    scaled[(1,)](*call)
    assert [data.get()["name"] for data in seen] == ["scaled", "scaled"]


@pytest.mark.parametrize("change", ["scratch", "ptx", "type", "threads"])
def test_a_format_that_is_not_known_is_left_to_triton(change, monkeypatch, caplog) -> None:
    """Every launch is then Triton's, and the log says so once."""

    @kernel
    def other(x_ptr, n, BLOCK: tl.constexpr):
        tl.store(x_ptr + tl.arange(0, BLOCK), n)

    class Changed:
        """A compiled kernel as another Triton might make it."""

        def __init__(self, compiled) -> None:
            self.src, self.function = compiled.src, compiled.function
            self.metadata, self.asm = compiled.metadata, dict(compiled.asm)
            if change == "scratch":
                self.metadata = compiled.metadata._replace(global_scratch_size=64)
            elif change == "ptx":
                self.asm["ptx"] = self.asm["ptx"].replace(".param .u64 .ptr", ".param .u32 .ptr", 1)
            elif change == "threads":
                self.metadata = compiled.metadata._replace(num_warps=compiled.metadata.num_warps + 1)

    prepared = launch._prepared
    if change == "type":
        monkeypatch.setattr(launch, "_PASSED", {})
    monkeypatch.setattr(launch, "_prepared", lambda compiled: prepared(Changed(compiled)))
    launch._warn_once.cache_clear()
    x = torch.empty(128, device="cuda")
    with caplog.at_level(logging.WARNING, "poolformer_kernels"), recorded() as launches:
        for _ in range(3):
            other[(1,)](x, 5, 128)
    assert [(launched.name, launched.grid) for launched in launches] == [("other", (1, 1, 1))] * 3
    assert caplog.text.count("Triton's own launcher is used") == 1
