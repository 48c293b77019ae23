"""The block under torch.func transforms, TorchScript traces and ONNX export."""

import copy
import io
import sys

import pytest
import torch
from support.peers import require
from support.problems import randn
from support.rule import assert_close_to_fp64

import poolformer_kernels as pk
from poolformer_kernels.nn import PoolFormerBlock, PoolMixer


def random_block(seed: int = 0) -> PoolFormerBlock:
    torch.manual_seed(seed)
    block = PoolFormerBlock(12)
    with torch.no_grad():
        for p in block.parameters():
            p.normal_(std=0.3)
    return block


def test_vmap_keeps_gradients(kernels):
    """Inside vmap what requires gradients is hidden; of parameters stacked for an ensemble too."""
    blocks, x = [random_block(seed) for seed in range(3)], randn(3, 2, 12, 6, 5).requires_grad_()
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


def test_compiled_forward_derivatives_are_refused_as_eager_ones(kernels):
    block, x = random_block(), randn(2, 12, 6, 5)
    torch.compiler.reset()
    jvp = torch.compile(lambda x: torch.func.jvp(block, (x,), (torch.ones_like(x),))[1], backend="eager")
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        jvp(x)


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="torch.jit.trace is gone")
@pytest.mark.parametrize("layer", [random_block, lambda: PoolMixer(12), lambda: random_block().mlp])
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
    block, x = random_block().eval(), randn(2, 12, 6, 5)
    torch.onnx.export(block, (x,), dynamo=True, verbose=False).save(tmp_path / "block.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "block.onnx", providers=["CPUExecutionProvider"])
    y = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(y), block(x), rtol=1e-5, atol=1e-5)
