"""The MLP's backward kernels in the executor, called without the forward: many tiles, wrong arguments."""

import pytest
import torch
from support.layouts import as_layout
from support.mlp import NAMES, backward_arguments, make_grad, make_inputs, truth
from support.mlp_operator import statistics

BF16 = torch.bfloat16
backward = torch.ops.poolformer_kernels.mlp_cuda_backward


def problem(shape, **options):
    inputs = make_inputs(shape, 64, BF16, **options)
    return inputs | {"x": as_layout(inputs["x"], "channels_last")}


def test_more_tiles_than_one_group_of_sums() -> None:
    inputs = problem((1, 96, 91, 91), parameters=("norm_weight", "norm_bias"))
    grad = make_grad(inputs)
    right = truth(inputs, grad, residual=True)
    found = backward(*backward_arguments(grad, inputs, statistics(inputs["x"])))
    for name, value in zip(NAMES, found, strict=True):
        size = torch.linalg.vector_norm(right.scales[f"d{name}"])
        assert torch.linalg.vector_norm(value.double() - right.values[f"d{name}"]) <= 0.005 * size, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 32, 3, 3, dtype=BF16)}, "64, 96 or 128 channels"),
        ({"w1": torch.zeros(65, 64, dtype=BF16)}, "multiples of 64, got 64 and 65"),
        ({"w1": torch.zeros(64, 65, dtype=BF16)}, r"w1 must be a tensor \[64, 64\]"),
        ({"w2": torch.zeros(32, 64, dtype=BF16)}, r"w2 must be a tensor \[64, 64\]"),
        ({"w2": torch.zeros(64, 64)}, "bfloat16 or float16"),
        ({"x": torch.zeros(2, 64, 3, 3), "w1": torch.zeros(64, 64)}, "bfloat16 or float16"),
        ({"grad": torch.zeros(2, 64, 3, 2, dtype=BF16)}, "grad must be .* of x's shape and dtype"),
        ({"grad": torch.zeros(2, 64, 3, 3)}, "grad must be .* of x's shape and dtype"),
        ({"mean_rstd": torch.zeros(3, 2)}, r"mean_rstd must be .* of shape \[B, 2\]"),
        ({"hidden": torch.zeros(5, dtype=BF16)}, "hidden must be .* B H W hidden elements"),
        ({"b1": torch.zeros(63)}, "b1 must be .* of 64 elements"),
        (
            {"layer_scale": torch.zeros(64, dtype=torch.float64)},
            "layer_scale must be .* float32, bfloat16 or float16",
        ),
        ({"activation": "tanh"}, "activation must be gelu"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_refused(change, message) -> None:
    inputs = problem((2, 64, 3, 3), conv=False)
    arguments = {"grad": make_grad(inputs), "mean_rstd": statistics(inputs["x"]), **inputs}
    arguments |= {"hidden": None, "activation": "gelu", "norm": True, "residual": True}
    with pytest.raises(RuntimeError, match=message):
        backward(**arguments | {"parameter_grads": True, "drop_grad": True} | change)
