"""The MLP's forward in floats where tokens are rows: channels_last, whole blocks of channels, many tokens.

On AVX-512 it must give what the usual way gives, to the last bit; that is taken where fc1's output is saved.
Other levels always take the usual way.
"""

import pytest
import torch
from support.layouts import as_layout
from support.mlp import make_inputs
from support.rule import assert_same

from poolformer_kernels.ops import mlp

SHAPES = (  # x, hidden
    ((2, 64, 14, 14), 256),
    ((1, 32, 17, 19), 32),  # 323 tokens: the last block is not whole
    ((3, 96, 13, 11), 384),
    ((2, 320, 14, 14), 1280),
    ((8, 512, 7, 7), 2048),
    ((97, 32, 1, 5), 64),
    ((2, 160, 13, 17), 1312),
    ((1, 64, 40, 41), 160),  # several panels
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("shape", "hidden"), SHAPES, ids=str)
def test_core_float_rows_are_the_columns_results(kernels, shape, hidden, dtype):
    inputs = make_inputs(shape, hidden, dtype)
    inputs["x"] = as_layout(inputs["x"], "channels_last")
    with torch.no_grad():
        rows = mlp(**inputs)
    leaves = {n: t if t is None else t.detach().requires_grad_() for n, t in inputs.items()}
    assert_same({"y": rows}, {"y": mlp(**leaves, save_hidden=True).detach()})


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "relu_squared", "silu"])
def test_core_float_rows_of_one_sample(kernels, activation):
    inputs = make_inputs((4, 64, 9, 9), 128, torch.float32)
    inputs["x"] = as_layout(inputs["x"], "channels_last")
    one = {**inputs, "x": inputs["x"][1:2]}
    if inputs.get("drop_scale") is not None:
        one["drop_scale"] = inputs["drop_scale"][1:2]
    with torch.no_grad():
        all_of_them, alone = mlp(**inputs, activation=activation), mlp(**one, activation=activation)
    assert_same({"y": all_of_them[1:2]}, {"y": alone})
