"""What only the CUDA C++ backend has: its kernels, refusals, what it leaves to Triton, whole models."""

import copy
import re
from functools import partial

import pytest
import torch
from contract.check import check_of, laid
from contract.common import FORMATS
from contract.targets import TARGETS
from cuda_executor.test_executed_norm_stats import (  # noqa: F401
    test_against_float64,
    test_nan_and_infinity_reach_the_statistics,
    test_not_dense_is_refused,
    test_unaligned_start,
)
from support import mlp as mlp_problems
from support import pool_mixer as pool_mixer_problems
from support.devices import like_on, on
from support.layouts import as_layout
from support.mlp import make_grad, make_inputs
from support.nn import gradients
from support.operators import MLP
from support.peers import randomise, relative_error, require_backend
from support.problems import HALVES
from support.rule import assert_same, run

import poolformer_kernels as pk
from poolformer_kernels.cli.kernels import built_kernels, kernels, short_name
from poolformer_kernels.nn import PoolFormerBlock, PoolFormerStage
from poolformer_kernels.ops import mlp, pool_mixer

from .cases import computed_late, images, s12

OPS = torch.ops.poolformer_kernels


@pytest.fixture(autouse=True)
def chosen():
    require_backend("cuda")
    with pk.use_backend("cuda"):
        yield


# ---- the kernels -------------------------------------------------------------------------------------------


@pytest.mark.host
def test_no_kernel_has_local_memory() -> None:
    """Spilled registers, and arrays that are not in registers, would be there."""
    from poolformer_kernels._C import kernel_uses

    uses = kernel_uses()
    names = {short_name(use["name"]).split("<")[0] for use in uses}
    assert names >= {"norm_stats", "pool_mixer_fwd", "mlp_fwd", "mlp_bwd_wgrad", "mlp_bwd_dgrad"}
    assert not [use for use in uses if use["local"] or not use["blocks"]]


@pytest.mark.host
def test_the_device_and_the_build_agree() -> None:
    """What `poolformer-kernels info --kernels` shows of a kernel."""
    major, minor = torch.cuda.get_device_capability()
    built = {(row.name, row.arch, row.threads, row.dynamic_shared): row for row in built_kernels()}
    found = [k for k in kernels() if k.arch.rstrip("af") == f"sm_{major}{minor}"]
    assert found
    for kernel in found:
        said = built.get((kernel.name, kernel.arch, kernel.threads, kernel.dynamic_shared))
        if said is not None:  # the driver compiled no PTX
            assert kernel == said
        assert kernel.blocks >= (1 if major == 9 or "_sm90" not in kernel.name else 0)


@pytest.fixture
def device() -> str:
    """Where the executor's tests of the statistics' kernel, which are imported above, run here."""
    return "cuda"


def test_statistics_have_the_same_bits_on_any_stream() -> None:
    x = torch.randn(4, 64, 56, 56, device="cuda", dtype=torch.bfloat16)
    first = OPS.norm_stats_cuda(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        again = [OPS.norm_stats_cuda(x) for _ in range(10)]
    stream.synchronize()
    assert all(torch.equal(first, other) for other in again)


# ---- nothing is written beside the tensors -----------------------------------------------------------------

SENTINEL = 0x5A


class Bytes:
    """Memory of the device by its address."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False), "shape": (size,), "typestr": "|u1", "strides": None, "version": 3,
        }  # fmt: skip


def written_outside(call, sizes) -> int:
    """How many bytes ``call`` writes of a memory pool outside of the tensors that it allocates there.

    The allocator gives out pieces of 512 bytes from its segments, of which the pool has enough when the call
    begins, full of sentinels; its history says which bytes were asked for.
    """
    pool = torch.cuda.MemPool()
    torch.cuda.synchronize()
    with torch.cuda.use_mem_pool(pool):
        filled = [torch.full((size,), SENTINEL, dtype=torch.uint8, device="cuda") for size in sizes]
        ranges = [(t.data_ptr(), t.numel()) for t in filled]
        del filled
        torch.cuda.memory._record_memory_history("all", context=None, stacks="python")
        try:
            result = call()
            trace = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
        finally:
            torch.cuda.memory._record_memory_history(None)
        torch.cuda.synchronize()
        found = [torch.as_tensor(Bytes(*piece), device="cuda").cpu() != SENTINEL for piece in ranges]
    allocated = [(event["addr"], event["size"]) for event in trace if event["action"] == "alloc"]
    held = [any(start <= at < start + size for start, size in ranges) for at, _ in allocated]
    assert held
    assert all(held)  # the guarded memory served every tensor
    for (start, size), changed in zip(ranges, found, strict=True):
        for at, length in allocated:  # a tensor may begin in the range before
            changed[min(max(at - start, 0), size) : min(max(at - start + length, 0), size)] = False
    del result
    return sum(int(changed.sum()) for changed in found)


def calls(dtype, layout):
    """Every operator of the backend, as it is called; sizes that end inside an allocation's last piece."""
    inputs = laid(on("cuda", pool_mixer_problems.make_inputs((3, 24, 9, 7), dtype)), layout)
    grad = torch.ones_like(inputs["x"])
    yield "norm_stats", partial(OPS.norm_stats_cuda, inputs["x"])
    for pool in (3, 5):
        forward = partial(OPS.pool_mixer_cuda, *pool_mixer_problems.forward_arguments(inputs, pool_size=pool))
        _, mean_rstd, _ = forward()
        yield f"pool_mixer {pool}", forward
        arguments = pool_mixer_problems.backward_arguments(grad, inputs, mean_rstd, pool_size=pool)
        yield f"pool_mixer_backward {pool}", partial(OPS.pool_mixer_cuda_backward, *arguments)
    operand = dtype if dtype in HALVES else torch.bfloat16
    for channels, hidden in ((64, 128), (96, 64), (128, 192), (192, 64)):
        inputs = make_inputs((3, channels, 9, 7), hidden, dtype, weight_dtype=operand)
        grad = make_grad(inputs).cuda()
        inputs = laid(on("cuda", inputs), layout)
        for activation, save in (("gelu", False), ("gelu", True), ("relu", False)):
            arguments = mlp_problems.forward_arguments(inputs, activation=activation, save_hidden=save)
            forward = partial(OPS.mlp_cuda, *arguments)
            yield f"mlp {channels} {activation} {save}", forward
            if channels == 192:  # of which Triton has the backward
                continue
            _, mean_rstd, _, hidden_kept = forward()
            saved = hidden_kept if save else None
            arguments = mlp_problems.backward_arguments(grad, inputs, mean_rstd, saved, activation=activation)
            yield f"mlp_backward {channels} {activation} {save}", partial(OPS.mlp_cuda_backward, *arguments)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_nothing_is_written_beside_the_tensors(dtype, layout) -> None:
    for name, call in calls(dtype, layout):
        with torch.no_grad():
            call()  # whatever is set up once
            outside = written_outside(call, [2**20] * 8 + [2**24])
        assert outside == 0, f"{name}: {outside} bytes"


# ---- what the backend refuses, and what it leaves to Triton ------------------------------------------------


@pytest.mark.host
def test_an_explicit_choice_that_cannot_be_met_raises(monkeypatch) -> None:
    asked = "backend 'cuda' was asked for and cannot run this call: "
    with pytest.raises(RuntimeError, match=f"{asked}it computes float32, bfloat16 and float16, not float64"):
        pool_mixer(torch.ones(1, 8, 4, 4, dtype=torch.float64, device="cuda"), None, None)
    with pytest.raises(RuntimeError, match=f"{asked}it runs on cuda tensors, not cpu"):
        pool_mixer(torch.ones(1, 8, 4, 4), None, None)
    wide = on("cuda", make_inputs((1, 320, 4, 4), 64, torch.bfloat16))
    monkeypatch.setattr(pk.backends.triton, "UNAVAILABLE", "gone")
    with pytest.raises(RuntimeError, match=r"no kernel for this call: 320 to 320 channels.*; triton: gone"):
        mlp(**wide)


@pytest.mark.parametrize(
    ("shape", "hidden", "out", "dtype"),
    [
        ((2, 320, 7, 7), 64, 320, torch.bfloat16),
        ((2, 64, 7, 7), 64, 128, torch.bfloat16),
        ((2, 64, 7, 7), 100, 64, torch.float16),
        ((2, 64, 7, 7), 64, 64, torch.float32),
    ],
    ids=str,
)
def test_other_mlps_are_tritons(shape, hidden, out, dtype) -> None:
    inputs = on("cuda", make_inputs(shape, hidden, dtype, out=out))
    grad = make_grad(inputs).cuda()
    ours = run(mlp, inputs, grad)
    with pk.use_backend("triton"):
        assert_same(ours, run(mlp, inputs, grad))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("shape", "hidden"),
    [((3, 192, 9, 6), 128), ((1, 192, 5, 13), 4096), ((21, 192, 29, 28), 768)],
    ids=str,
)
def test_gradients_that_triton_computes(shape, hidden, dtype, layout) -> None:
    """What the forward saves is what Triton's backward reads; the contract's check is of "triton" for it."""
    inputs = make_inputs(shape, hidden, dtype)
    found = check_of(MLP, TARGETS["triton"], inputs, layout=layout, residual=True)
    assert found.keys() == {"y", *(f"d{name}" for name in inputs)}


@pytest.mark.host
def test_explain() -> None:
    calls = pk.explain(s12()).calls
    assert len(calls) == 2 * 12
    for call in calls:
        narrow = call.path.startswith(("network.0.", "network.2."))
        if call.operator == "pool_mixer" or narrow:
            assert (call.backend, call.reason) == ("cuda", "asked for")
        else:
            assert call.backend == "triton"
            missing = r"asked for; cuda has no kernel for (320|512) to .* channels, not .*"
            assert re.fullmatch(missing, call.reason)


# ---- whole models ------------------------------------------------------------------------------------------


def test_s12_against_fp64() -> None:
    """The error rule. Vectors of a kind are judged together: alone they have few elements."""
    grad = torch.randn(8, 20, generator=torch.Generator().manual_seed(1)).bfloat16().cuda()

    def values(dtype: torch.dtype, memory_format: torch.memory_format) -> dict[str, torch.Tensor]:
        model = s12(dtype, memory_format, num_classes=20)
        return gradients(model, images(8, 224, dtype, memory_format), grad)

    ours = values(torch.bfloat16, torch.channels_last)
    with pk.use_backend("reference"):
        theirs, right = (values(t, torch.contiguous_format) for t in (torch.bfloat16, torch.float64))
    kinds: dict[str, list[str]] = {}
    for name in right:
        if name.endswith("norm1.bias"):  # the pool takes constants away: exactly zero
            assert not ours[name].any()
        else:
            kinds.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append(name)
    for kind, names in kinds.items():
        sizes = [right[name].norm() for name in names]
        scaled = [
            torch.cat(
                [(found[name].double() / size).flatten() for name, size in zip(names, sizes, strict=True)]
            )
            for found in (ours, theirs, right)
        ]
        error, other = (relative_error(value, scaled[2]) for value in scaled[:2])
        assert error <= 1.5 * other + torch.finfo(torch.bfloat16).eps / 2, (kind, error, other)


def test_model_on_another_stream() -> None:
    model, x = s12(num_classes=20).eval(), images(4, seed=1)
    with torch.inference_mode():
        assert torch.equal(computed_late(model, x), model(x))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("channels", [64, 192, 320])
def test_compiled_stage(channels, layout) -> None:
    """One graph; of 192 channels the MLP's backward is Triton's, of 320 all of the MLP."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    stage = randomise(PoolFormerStage(*(PoolFormerBlock(channels, mlp_ratio=1.0) for _ in range(2))))
    stage = stage.to("cuda", torch.bfloat16)
    x = as_layout(torch.randn(3, channels, 14, 14).bfloat16(), layout).cuda()
    grad = like_on("cuda", torch.randn(3, channels, 14, 14).bfloat16())
    compiled = torch.compile(copy.deepcopy(stage), fullgraph=True)
    eager, other = (gradients(module, x, grad) for module in (stage, compiled))
    assert_same(other, eager)
