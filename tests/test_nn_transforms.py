"""Layers that are compiled and copied; the block under torch.func, TorchScript traces and ONNX export."""

import copy
import io
import sys

import pytest
import torch
from support.nn import COPIES, gradients, make_block, make_mlp, make_stage
from support.peers import relative_error, require
from support.problems import randn
from support.rule import assert_close_to_fp64

import poolformer_kernels as pk
from poolformer_kernels.nn import PoolMixer

LAYERS = {  # and the shape of what they are called with
    "block": (lambda: make_block(drop_path=0.5), (2, 12, 6, 5)),
    "stage": (lambda: make_stage(2, drop_path=0.5), (2, 12, 6, 5)),
    "mlp": (lambda: make_mlp(12, 40), (2, 12, 5, 7)),
    "linear mlp": (lambda: make_mlp(12, 40, use_conv=False), (2, 5, 12)),
}


@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
def test_compiled_layers_have_no_graph_break(make, shape, backend, fresh_dynamo):
    layer = make().eval()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x, grad = randn(*shape), randn(*shape, seed=1)
    expected = gradients(layer, x, grad)
    for name, value in gradients(layer, x, grad, lambda _, x: compiled(x)).items():
        if not name.endswith("norm1.bias"):
            assert relative_error(value, expected[name]) < 1e-5, name
    layer.train()
    assert torch.isfinite(compiled(x)).all()


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)
def test_copies_are_independent(make, shape, copied, backend):
    layer, x = make().eval(), randn(*shape)
    expected, same = layer(x), copied(layer)
    assert torch.equal(same(x), expected)
    with torch.no_grad():
        for p in same.parameters():
            p.add_(1)
    assert torch.equal(layer(x), expected)
    layer.load_state_dict(same.state_dict())
    assert torch.equal(layer(x), same(x))


def test_vmap_keeps_gradients(kernels):
    """Inside vmap what requires gradients is hidden; of parameters stacked for an ensemble too."""
    blocks, x = [make_block(seed=seed) for seed in range(3)], randn(3, 2, 12, 6, 5).requires_grad_()
    parameters, _ = torch.func.stack_module_state(blocks)
    shared = torch.vmap(blocks[0])(x)
    own = torch.vmap(lambda p, x: torch.func.functional_call(blocks[0], p, (x,)))(parameters, x)
    for y, each in ((shared, [blocks[0]] * 3), (own, blocks)):
        wanted = torch.stack([block(v) for block, v in zip(each, x, strict=True)])
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
        given, right = (torch.autograd.grad(t.square().sum(), x, retain_graph=True)[0] for t in (y, wanted))
        torch.testing.assert_close(given, right, rtol=1e-4, atol=1e-4)
    name = "mlp.fc1.weight"
    given = torch.autograd.grad(own.square().sum(), parameters[name])[0]
    right = [
        torch.autograd.grad(b(v).square().sum(), b.mlp.fc1.weight)[0] for b, v in zip(blocks, x, strict=True)
    ]
    torch.testing.assert_close(given, torch.stack(right), rtol=1e-4, atol=1e-4)


def test_compiled_forward_derivatives_are_refused_as_eager_ones(kernels, fresh_dynamo):
    block, x = make_block(), randn(2, 12, 6, 5)
    jvp = torch.compile(lambda x: torch.func.jvp(block, (x,), (torch.ones_like(x),))[1], backend="eager")
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        jvp(x)


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="torch.jit.trace is gone")
@pytest.mark.parametrize("layer", [make_block, lambda: PoolMixer(12), lambda: make_block().mlp])
def test_a_trace_made_with_gradients_can_be_saved(layer, kernels):
    """And needs none of our operators."""
    layer, x, file = layer(), randn(2, 12, 6, 5), io.BytesIO()
    torch.jit.save(torch.jit.trace(layer, x), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert "poolformer_kernels::" not in str(loaded.inlined_graph)
    with pk.use_backend("reference"):
        eager, exact = layer(x), copy.deepcopy(layer).double()(x.double())
    assert_close_to_fp64(loaded(x), eager, exact)


def test_onnx_gets_the_reference(kernels, tmp_path):
    require("onnxscript")
    onnxruntime = require("onnxruntime")
    block, x = make_block().eval(), randn(2, 12, 6, 5)
    torch.onnx.export(block, (x,), dynamo=True, verbose=False).save(tmp_path / "block.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "block.onnx", providers=["CPUExecutionProvider"])
    y = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(y), block(x), rtol=1e-5, atol=1e-5)
