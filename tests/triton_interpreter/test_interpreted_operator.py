"""The Triton mixer's operators: compiled graphs, what they write, offsets; the rest is in the contract."""

import pytest
import torch
from contract.check import laid
from support.pool_mixer import backward_arguments, forward_arguments, make_grad, make_inputs
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
        found = run(compiled, inputs, grad, any_batch=True, residual=True)
        assert_same(found, run(pool_mixer, inputs, grad, residual=True))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_nothing_outside_the_outputs_is_written(layout) -> None:
    inputs = laid(make_inputs((2, 17, 9, 13), torch.bfloat16), layout)

    def both_directions() -> None:
        _, mean_rstd, _ = FORWARD(*forward_arguments(inputs))
        BACKWARD(*backward_arguments(inputs["x"], inputs, mean_rstd))

    assert check_writes(both_directions) == 12


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_64_bit_offsets_change_nothing(layout, monkeypatch) -> None:
    inputs = laid(make_inputs((2, 17, 9, 6)), layout)
    grad = make_grad(inputs)
    narrow = run(pool_mixer, inputs, grad)
    mixer_launch = kernels.mixer_launch
    monkeypatch.setattr(kernels, "mixer_launch", lambda *args: mixer_launch(*args)._replace(wide=True))
    assert_same(run(pool_mixer, inputs, grad), narrow)


def test_samples_of_two_to_the_31_elements_get_64_bit_offsets() -> None:
    assert not kernels.mixer_launch(64, 56, 56, True, 3, 2).wide
    assert kernels.mixer_launch(64, 2**13, 2**12, True, 3, 2).wide
