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

from .guarded import check_writes

pytestmark = pytest.mark.sampled(4)

FORWARD = torch.ops.poolformer_kernels.pool_mixer_triton.default
BACKWARD = torch.ops.poolformer_kernels.pool_mixer_triton_backward.default


def test_the_interpreter_makes_the_backend_available_on_the_cpu() -> None:
    assert "triton" in pk.available_backends()
    assert "cpu" in backend.DEVICES


def test_compiled_graph_is_whole_and_equal() -> None:
    compiled = torch.compile(pool_mixer, fullgraph=True, backend="aot_eager")
    for batch in (2, 3, 4):
        inputs = make_inputs((batch, 5, 8, 6))
        grad = make_grad(inputs)
        torch._dynamo.mark_dynamic(inputs["x"], 0)
        torch._dynamo.mark_dynamic(inputs["drop_scale"], 0)
        assert_same(run(compiled, inputs, grad, residual=True), run(pool_mixer, inputs, grad, residual=True))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_nothing_outside_the_outputs_is_written(layout) -> None:
    x, *vectors = make_inputs((2, 17, 9, 13), torch.bfloat16).values()
    x = as_layout(x, layout)

    def both_directions() -> None:
        _, mean_rstd, _ = FORWARD(x, *vectors, None, 3, 1e-5, True, True)
        BACKWARD(x, x, mean_rstd, *vectors, 3, True)

    assert check_writes(both_directions) == 12


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
