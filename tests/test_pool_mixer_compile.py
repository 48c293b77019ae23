"""The token mixer under torch.library.opcheck, FakeTensorMode, torch.compile and torch.export."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from support.layouts import LAYOUTS, as_layout
from support.pool_mixer import PARAMETERS, make_grad, make_inputs
from support.problems import tiled_stats
from support.rule import assert_same, bits, run
from torch._subclasses.fake_tensor import FakeTensorMode

import poolformer_kernels as pk
from poolformer_kernels.ops import dispatch as selection
from poolformer_kernels.ops import pool_mixer
from poolformer_kernels.ops.pool_mixer import pool_mixer_with_stats

pytestmark = pytest.mark.sampled(3)

FORMATS = ("nchw", "channels_last")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def forward_arguments(
    layout="nchw", parameters=PARAMETERS, stats=False, residual=True, return_stats=True, **options
):
    inputs = make_inputs((3, 5, 6, 7), parameters=parameters, **options)
    inputs["x"] = as_layout(inputs["x"], layout)
    given = tiled_stats(inputs["x"], 2) if stats else None
    return (*inputs.values(), given, 3, 1e-5, residual, return_stats)


def backward_arguments(layout="nchw", parameters=PARAMETERS, residual=True, **options):
    x, weight, bias, layer_scale, drop_scale, *_ = forward_arguments(layout, parameters, **options)
    mean_rstd = torch.ops.poolformer_kernels.pool_mixer_cpp(
        x, weight, bias, layer_scale, drop_scale, None, 3, 1e-5, residual, False
    )[1]
    grad = as_layout(make_grad({"x": x}), layout)
    return grad, x, mean_rstd, weight, bias, layer_scale, drop_scale, 3, residual


def require_grad(arguments: tuple) -> tuple:
    wanted = (t.detach().requires_grad_() if isinstance(t, torch.Tensor) else t for t in arguments)
    return tuple(wanted)


@pytest.mark.parametrize("stats", [False, True], ids=["computed", "given"])
@pytest.mark.parametrize("return_stats", [False, True], ids=["", "returned"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("grad", [False, True], ids=["", "requires_grad"])
def test_opcheck_forward(kernels, grad, residual, return_stats, stats):
    arguments = forward_arguments(residual=residual, return_stats=return_stats, stats=stats)
    if grad:  # statistics are constants
        arguments = (*require_grad(arguments[:5]), *arguments[5:])
    torch.library.opcheck(torch.ops.poolformer_kernels.pool_mixer_cpp.default, arguments)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "nchw"])
def test_opcheck_forward_layouts(kernels, layout):
    arguments = forward_arguments(layout)
    torch.library.opcheck(torch.ops.poolformer_kernels.pool_mixer_cpp.default, arguments)


@pytest.mark.parametrize("parameters", [(), ("weight",), ("bias", "drop_scale")], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_opcheck_forward_absent_parameters(kernels, dtype, parameters):
    arguments = forward_arguments("channels_last", parameters, dtype=dtype)
    arguments = (*require_grad(arguments[:5]), *arguments[5:])
    torch.library.opcheck(torch.ops.poolformer_kernels.pool_mixer_cpp.default, arguments)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_backward(kernels, layout, residual):
    arguments = backward_arguments(layout, residual=residual)
    torch.library.opcheck(torch.ops.poolformer_kernels.pool_mixer_cpp_backward.default, arguments)


@pytest.mark.parametrize("parameters", [(), PARAMETERS], ids=["none", "all"])
def test_opcheck_backward_with_requires_grad(kernels, parameters):
    """Its own derivative raises, so of the four checks those apply that do not take one."""
    arguments = require_grad(backward_arguments(parameters=parameters))
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.poolformer_kernels.pool_mixer_cpp_backward.default, arguments, test_utils=utilities
    )


@pytest.mark.parametrize("return_stats", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(3, 5, 6, 7), (2, 1, 6, 7), (2, 5, 1, 1), (1, 5, 6, 7), (0, 5, 6, 7)], ids=str
)
def test_fakes_have_the_real_strides(kernels, shape, layout, return_stats):
    inputs = make_inputs(shape)
    inputs["x"] = as_layout(inputs["x"], layout)
    arguments = (*inputs.values(), None, 3, 1e-5, True, return_stats)
    forward = torch.ops.poolformer_kernels.pool_mixer_cpp.default
    backward = torch.ops.poolformer_kernels.pool_mixer_cpp_backward.default
    real = forward(*arguments)
    last = (inputs["x"], real[1], *(inputs[name] for name in PARAMETERS), 3, True)
    grad = make_grad(inputs)
    reals = (*real, *backward(grad, *last))
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in (*arguments, grad, *last)]
        fakes = (*forward(*fake[: len(arguments)]), *backward(*fake[len(arguments) :]))
    for i, (a, b) in enumerate(zip(fakes, reals, strict=True)):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device), i
        assert (a.stride(), a.storage_offset()) == (b.stride(), b.storage_offset()), i


# ---- torch.compile -----------------------------------------------------------------------------------------


def compiled(function, backend: str = "aot_eager", **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


@pytest.mark.parametrize("layout", [*FORMATS, "sliced_hw", "transposed"])
@pytest.mark.parametrize("residual", [False, True])
def test_compile_is_bitwise_equal(backend, residual, layout):
    inputs = make_inputs((3, 5, 6, 7))
    inputs["x"] = as_layout(inputs["x"], layout)
    grad = make_grad(inputs)
    expected = run(pool_mixer, inputs, grad, residual=residual)
    actual = run(compiled(pool_mixer), inputs, grad, residual=residual)
    if backend == "reference":  # decomposed, which may add in another order
        for name, value in actual.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5, msg=name)
    else:
        assert_same(actual, expected)
        assert actual["y"].stride() == expected["y"].stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compile_by_inductor(kernels, dtype):
    """With operations around the mixer for the code generator to fuse, and statistics handed on."""
    if shutil.which("g++") is None:
        pytest.skip("the code generator needs g++")

    def block(x, weight, bias, layer_scale, drop_scale):
        y, stats = pool_mixer_with_stats(
            x * 1.5, weight, bias, layer_scale=layer_scale, drop_scale=drop_scale, residual=True
        )
        return pool_mixer_with_stats(y, weight, None, stats=stats)[0].sigmoid() + x

    inputs = make_inputs((3, 5, 6, 7), dtype)
    inputs["x"] = as_layout(inputs["x"], "channels_last")
    grad = make_grad(inputs)
    expected = run(block, inputs, grad)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for name, value in run(compiled(block, "inductor"), inputs, grad).items():
        torch.testing.assert_close(
            value, expected[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_compile_without_gradients(kernels):
    inputs = make_inputs((3, 5, 6, 7))
    with torch.no_grad():
        assert torch.equal(bits(compiled(pool_mixer)(**inputs)), bits(pool_mixer(**inputs)))


def test_compile_in_a_process_that_ran_nothing_before(kernels, monkeypatch):
    """The first call decides on the backend, inside the compiled code."""
    monkeypatch.setattr(selection, "_SELECTED", {})
    inputs = make_inputs((3, 5, 6, 7))
    assert torch.equal(compiled(pool_mixer)(**inputs), pool_mixer(**inputs))


@pytest.mark.parametrize("training", [False, True])
def test_no_recompiles_over_batch_sizes_marked_dynamic(kernels, training):
    function = compiled(pool_mixer)
    monitored = torch._dynamo.config.patch(error_on_recompile=True)
    for layout in FORMATS:
        torch._dynamo.reset()
        for batch in (3, 8, 2, 17):
            inputs = make_inputs((batch, 5, 6, 7))
            inputs["x"] = as_layout(inputs["x"], layout).requires_grad_(training)
            torch._dynamo.mark_dynamic(inputs["x"], 0)
            torch._dynamo.mark_dynamic(inputs["drop_scale"], 0)
            with monitored:
                y = function(**inputs, residual=True)
            plain = {**inputs, "x": inputs["x"].detach().requires_grad_(training)}
            expected = pool_mixer(**plain, residual=True)
            assert torch.equal(bits(y.detach()), bits(expected.detach()))
            if training:
                grad = make_grad(inputs)
                (dx,), (wanted,) = (
                    torch.autograd.grad(a, b["x"], grad) for a, b in ((y, inputs), (expected, plain))
                )
                assert torch.equal(bits(dx), bits(wanted))


def test_bad_arguments_raise_under_compile(backend):
    with pytest.raises(Exception, match="pool_size must be odd and positive, got 4"):
        compiled(pool_mixer)(torch.ones(1, 2, 3, 3), None, None, pool_size=4)


def test_changing_the_backend_takes_effect_under_compile(kernels):
    """The choice is guarded on: dbias is 0 from a kernel and rounding noise from the reference."""
    inputs = make_inputs((3, 5, 6, 7))
    function = compiled(pool_mixer)
    assert run(function, inputs, make_grad(inputs))["dbias"].abs().sum() == 0
    with pk.use_backend("reference"):
        assert run(function, inputs, make_grad(inputs))["dbias"].abs().sum() > 0
    assert run(function, inputs, make_grad(inputs))["dbias"].abs().sum() == 0


# ---- torch.export ------------------------------------------------------------------------------------------


class Mixer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        inputs = make_inputs((1, 5, 1, 1))
        self.weight, self.bias = (torch.nn.Parameter(inputs[name]) for name in ("weight", "bias"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return pool_mixer(x, self.weight, self.bias, residual=True)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("layout", FORMATS)
def test_export_with_a_dynamic_batch(backend, layout, strict):
    module = Mixer()
    example = as_layout(make_inputs((3, 5, 6, 7))["x"], layout)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(module, (example,), dynamic_shapes=({0: batch},), strict=strict)
    names = {str(node.target) for node in program.graph.nodes}
    assert ("poolformer_kernels.pool_mixer_cpp.default" in names) == (backend == "cpp")
    for size in (1, 3, 20):
        x = as_layout(make_inputs((size, 5, 6, 7), seed=size)["x"], layout)
        assert torch.equal(bits(program.module()(x).detach()), bits(module(x).detach()))


def test_an_exported_program_runs_in_a_new_process(kernels, tmp_path):
    """Importing the package registers the kernels: nothing else has to be called first."""
    x = torch.randn(2, 6, 5, 7)
    module = pk.nn.PoolMixer(6)
    torch.export.save(torch.export.export(module, (x,)), tmp_path / "mixer.pt2")
    torch.save((x, module(x).detach()), tmp_path / "values.pt")
    code = (
        "import sys, torch, poolformer_kernels\n"
        "x, y = torch.load(sys.argv[1] + '/values.pt')\n"
        "assert torch.equal(torch.export.load(sys.argv[1] + '/mixer.pt2').module()(x), y)\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
