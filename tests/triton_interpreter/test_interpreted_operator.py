"""The Triton operators as torch.library sees them: opcheck, autograd, compile, and what they write."""

import itertools

import pytest
import torch
from helpers import PARAMETERS, as_layout, assert_same, make_grad, make_inputs, run

import poolformer_kernels as pk
from poolformer_kernels.backends import triton as backend
from poolformer_kernels.ops import pool_mixer
from poolformer_kernels.ops.pool_mixer import pool_mixer_with_stats

pytestmark = pytest.mark.sampled(4)

FORWARD = torch.ops.poolformer_kernels.pool_mixer_triton.default
BACKWARD = torch.ops.poolformer_kernels.pool_mixer_triton_backward.default


def test_the_interpreter_makes_the_backend_available_on_the_cpu() -> None:
    assert "triton" in pk.available_backends()
    assert "cpu" in backend.DEVICES


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        *((torch.float32, layout) for layout in ("nchw", "channels_last")),
        *((torch.bfloat16, layout) for layout in ("channels_last", "sliced_hw")),
        *((torch.float16, layout) for layout in ("nchw", "transposed")),
    ],
    ids=str,
)
def test_opcheck(dtype, layout) -> None:
    inputs = make_inputs((2, 5, 8, 6), dtype)
    inputs["x"] = as_layout(inputs["x"], layout)
    grad = make_grad(inputs)
    for t in inputs.values():
        t.requires_grad_()
    for stats in (True, False):
        torch.library.opcheck(FORWARD, (*inputs.values(), None, 3, 1e-5, True, stats))
    x, weight, bias, scale, drop = (t.detach() for t in inputs.values())
    _, mean_rstd, _ = FORWARD(x, weight, bias, scale, drop, None, 3, 1e-5, True, False)
    torch.library.opcheck(BACKWARD, (grad, x, mean_rstd, weight, bias, scale, drop, 3, True))


@pytest.mark.parametrize("count", [1, len(PARAMETERS), len(PARAMETERS) + 1])
def test_subsets_of_gradients(count) -> None:
    inputs = make_inputs((2, 5, 4, 6))
    grad = make_grad(inputs)
    everything = run(pool_mixer, inputs, grad, residual=True)
    for names in itertools.combinations(inputs, count):
        leaves = {name: t.clone().requires_grad_(name in names) for name, t in inputs.items()}
        grads = torch.autograd.grad(pool_mixer(**leaves, residual=True), [leaves[n] for n in names], grad)
        assert_same(
            {f"d{n}": g for n, g in zip(names, grads, strict=True)},
            {f"d{n}": everything[f"d{n}"] for n in names},
        )


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_empty_batch(layout) -> None:
    inputs = make_inputs((0, 5, 8, 6))
    inputs["x"] = inputs["x"].contiguous(
        memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
    )
    result = run(pool_mixer, inputs, make_grad(inputs), residual=True)
    assert result["y"].shape == (0, 5, 8, 6)
    for name in ("dweight", "dbias", "dlayer_scale"):
        assert torch.equal(result[name], torch.zeros(5))
    _, stats = pool_mixer_with_stats(**inputs)
    assert stats.shape[0] == 0
    assert stats.shape[2] == 3


def test_runs_are_bitwise_equal() -> None:
    """The interpreter has one order: what could differ is memory that was not written."""
    inputs = make_inputs((3, 17, 9, 13), torch.bfloat16)
    grad = make_grad(inputs)
    first = run(pool_mixer, inputs, grad, residual=True)
    for _ in range(2):
        assert_same(run(pool_mixer, inputs, grad, residual=True), first)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    inputs = make_inputs((5, 17, 9, 6))
    grad = make_grad(inputs)
    whole = run(pool_mixer, inputs, grad, residual=True)
    one = inputs | {"x": inputs["x"][3:4], "drop_scale": inputs["drop_scale"][3:4]}
    alone = run(pool_mixer, one, grad[3:4], residual=True)
    names = ("y", "dx", "ddrop_scale")
    assert_same({n: alone[n] for n in names}, {n: whole[n][3:4] for n in names})


def test_second_derivative_raises() -> None:
    x = make_inputs((1, 4, 7, 7))["x"].requires_grad_()
    (dx,) = torch.autograd.grad(pool_mixer(x, None, None).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


def test_compiled_graph_is_whole_and_equal() -> None:
    inputs = make_inputs((2, 5, 8, 6))
    grad = make_grad(inputs)
    compiled = torch.compile(pool_mixer, fullgraph=True, backend="aot_eager")
    for batch in (2, 3, 4):
        inputs = make_inputs((batch, 5, 8, 6))
        grad = make_grad(inputs)
        torch._dynamo.mark_dynamic(inputs["x"], 0)
        torch._dynamo.mark_dynamic(inputs["drop_scale"], 0)
        assert_same(run(compiled, inputs, grad, residual=True), run(pool_mixer, inputs, grad, residual=True))


def test_nothing_outside_the_outputs_is_written(monkeypatch) -> None:
    guard, blocks = 4096, []
    empty = torch.empty

    def guarded(size, *, dtype=None, device=None, **kw):
        numel = torch.Size([size] if isinstance(size, int) else size).numel()
        block = empty(numel + 2 * guard, dtype=dtype, device=device).fill_(123.0)
        blocks.append((block, numel))
        return block[guard : guard + numel].view(size)

    def guarded_like(t, *, memory_format):
        if memory_format is torch.channels_last:
            b, c, h, w = t.shape
            return guarded((b, h, w, c), dtype=t.dtype).permute(0, 3, 1, 2)
        return guarded(t.shape, dtype=t.dtype)

    inputs = make_inputs((2, 17, 9, 13), torch.bfloat16)
    vectors = (inputs["weight"], inputs["bias"], inputs["layer_scale"], inputs["drop_scale"])
    for x in (inputs["x"], inputs["x"].contiguous(memory_format=torch.channels_last)):
        monkeypatch.setattr(torch, "empty", guarded)
        monkeypatch.setattr(torch, "empty_like", guarded_like)
        _, mean_rstd, _ = FORWARD(x, *vectors, None, 3, 1e-5, True, True)
        BACKWARD(x, x, mean_rstd, *vectors, 3, True)
        monkeypatch.undo()
    assert len(blocks) == 2 * 12
    for block, numel in blocks:
        assert (block[:guard] == 123).all()
        assert (block[guard + numel :] == 123).all()
        assert not (block[guard : guard + numel] == 123).any()  # and every output is written
