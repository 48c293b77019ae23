"""Our models in torch.jit.trace, the legacy ONNX exporter and OpenVINO: plain PyTorch, the same numbers."""

import copy
import sys
import warnings

import pytest
import torch
from support.metaformer import SIZE
from support.models import FAMILIES, SMALL, small
from support.nn import gradients
from support.peers import randomise, require
from support.problems import randn
from support.processes import python
from support.rule import assert_close_to_fp64

import poolformer_kernels as pk
from poolformer_kernels.models import PoolFormer

pytestmark = [
    pytest.mark.skipif(sys.version_info >= (3, 14), reason="torch.jit.trace is gone"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


def assert_same(y: torch.Tensor, model: PoolFormer, x: torch.Tensor) -> None:
    """By the error rule, beside PyTorch's own operators."""
    with torch.no_grad(), pk.use_backend("reference"):
        exact, eager = copy.deepcopy(model).double()(x.double()), model(x)
    assert exact.std(0).norm() > 1e-3  # the image matters
    assert_close_to_fp64(y, eager, exact)


def traced(model: PoolFormer, x: torch.Tensor, gradients: bool = False) -> torch.jit.ScriptModule:
    """The trace; PyTorch's own modules may warn of what it makes constant, ours must not."""
    with warnings.catch_warnings(record=True) as caught, torch.set_grad_enabled(gradients):
        warnings.simplefilter("always")
        trace = torch.jit.trace(model, x)
    assert not [w for w in caught if "poolformer_kernels" in w.filename]
    return trace


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_trace_has_torchs_operators_alone(name, gradients, channels_last, kernels):
    """Without gradients and in channels_last, where all layers are one operator call otherwise, too."""
    model, x, larger = small(name, channels_last)
    trace = traced(model, x, gradients)
    assert "poolformer_kernels::" not in str(trace.inlined_graph)
    with torch.no_grad():
        for images in (x, larger):
            assert_same(trace(images), model, images)


def test_a_trace_of_training_gives_the_gradients(kernels):
    model, x, _ = small("PoolFormer")
    trace = traced(model.train(), x, gradients=True)
    own, given = (gradients(each, x, randn(2, 7, seed=1)) for each in (model, trace))
    torch.testing.assert_close(given, own, rtol=1e-4, atol=1e-5)


def test_a_backbone_gives_its_maps(kernels):
    torch.manual_seed(0)
    model, x = randomise(PoolFormer(SMALL, features_only=True)).eval(), randn(2, 3, *SIZE)
    trace = traced(model, x)
    assert "poolformer_kernels::" not in str(trace.inlined_graph)
    with torch.no_grad(), pk.use_backend("reference"):
        exact = copy.deepcopy(model).double()(x.double())
        for y, eager, right in zip(trace(x), model(x), exact, strict=True):
            assert_close_to_fp64(y, eager, right)


def test_a_saved_trace_runs_without_this_package(tmp_path, kernels):
    model, x, _ = small("PoolFormer")
    torch.jit.save(traced(model, x), tmp_path / "model.pt")
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch; torch.save(torch.jit.load('model.pt')(torch.load('x.pt')), 'y.pt');"
        " assert 'poolformer_kernels' not in sys.modules"
    )
    python("-W", "ignore", "-c", code, cwd=tmp_path)
    assert_same(torch.load(tmp_path / "y.pt").detach(), model, x)


@pytest.mark.parametrize(
    ("name", "channels_last"), [*((name, False) for name in FAMILIES), ("PoolFormer", True)]
)
def test_the_legacy_onnx_exporter(name, channels_last, tmp_path, kernels):
    require("onnx")
    onnxruntime = require("onnxruntime")
    model, x, larger = small(name, channels_last)
    file = str(tmp_path / "model.onnx")
    axes = {"images": {0: "batch"}, "logits": {0: "batch"}}
    names = {"input_names": ["images"], "output_names": ["logits"]}
    torch.onnx.export(model, (x,), file, dynamo=False, dynamic_axes=axes, **names)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for images in (x, larger):
        (y,) = session.run(None, {"images": images.contiguous().numpy()})
        assert_same(torch.from_numpy(y), model, images)


@pytest.mark.parametrize(
    ("name", "channels_last"),
    [("PoolFormer", True), *(pytest.param(name, False, marks=pytest.mark.long) for name in FAMILIES)],
)
def test_openvino(name, channels_last, kernels):
    openvino = pytest.importorskip("openvino")
    model, x, larger = small(name, channels_last)
    converted = openvino.convert_model(model, example_input=x)
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(converted, "CPU", options)
    for images in (x, larger):
        y = compiled(images.contiguous().numpy())[0]
        assert_same(torch.from_numpy(y), model, images)
