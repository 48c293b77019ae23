"""The Triton mixer's operators: compiled graphs, what they write, offsets; the rest is in the contract."""

import pytest
import torch
from support.layouts import as_layout
from support.pool_mixer import make_grad, make_inputs
from support.rule import assert_same, run

import poolformer_kernels as pk
from poolformer_kernels.backends import triton as backend
from poolformer_kernels.backends.triton import pool_mixer as kernels
from poolformer_kernels.ops import pool_mixer

pytestmark = pytest.mark.sampled(4)

FORWARD = torch.ops.poolformer_kernels.pool_mixer_triton.default
BACKWARD = torch.ops.poolformer_kernels.pool_mixer_triton_backward.default


def test_the_interpreter_makes_the_backend_available_on_the_cpu() -> None:
    assert "triton" in pk.available_backends()
    assert "cpu" in backend.DEVICES


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


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_64_bit_offsets_change_nothing(layout, monkeypatch) -> None:
    inputs = make_inputs((2, 17, 9, 6))
    inputs["x"] = as_layout(inputs["x"], layout)
    grad = make_grad(inputs)
    narrow = run(pool_mixer, inputs, grad)
    mixer_launch = kernels.mixer_launch
    monkeypatch.setattr(kernels, "mixer_launch", lambda *args: mixer_launch(*args)._replace(wide=True))
    assert_same(run(pool_mixer, inputs, grad), narrow)


def test_samples_of_two_to_the_31_elements_get_64_bit_offsets() -> None:
    assert not kernels.mixer_launch(64, 56, 56, True, 3, 2).wide
    assert kernels.mixer_launch(64, 2**13, 2**12, True, 3, 2).wide
