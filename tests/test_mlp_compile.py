"""The MLP under torch.library.opcheck, FakeTensorMode, torch.compile, torch.export and autocast."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from support.layouts import LAYOUTS, as_layout
from support.mlp import PARAMETERS, PLAIN, VECTORS, eager, make_grad, make_inputs, truth, ulps_of
from support.problems import HALVES, tiled_stats
from support.rule import assert_close_to_fp64, assert_same, bits, run
from torch._subclasses.fake_tensor import FakeTensorMode

from poolformer_kernels.ops import dispatch as selection
from poolformer_kernels.ops import mlp
from poolformer_kernels.ops.mlp import mlp_with_stats

pytestmark = pytest.mark.sampled(3)

FORMATS = ("nchw", "channels_last")
FORWARD = torch.ops.poolformer_kernels.mlp_cpp.default
BACKWARD = torch.ops.poolformer_kernels.mlp_cpp_backward.default


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def forward_arguments(
    layout="nchw", shape=(3, 5, 6, 7), *, stats=False, norm=None, residual=True, return_stats=True,
    save_hidden=False, activation="gelu", **options,
):  # fmt: skip
    inputs = make_inputs(shape, 9, **options)
    inputs["x"] = as_layout(inputs["x"], layout)
    norm = inputs["norm_weight"] is not None if norm is None else norm
    given = tiled_stats(inputs["x"], 2) if stats else None
    return (*inputs.values(), given, activation, 1e-5, norm, residual, return_stats, save_hidden)


def backward_arguments(
    layout="nchw", shape=(3, 5, 6, 7), *, wanted=(True, True), save_hidden=False, **options
):
    arguments = forward_arguments(layout, shape, save_hidden=save_hidden, **options)
    tensors, (activation, _, norm, residual, *_) = arguments[:9], arguments[10:]
    _, mean_rstd, _, hidden = FORWARD(*arguments)
    grad = as_layout(make_grad({"x": tensors[0], "w2": tensors[3]}), layout)
    saved = hidden if save_hidden else None
    return (grad, tensors[0], mean_rstd, *tensors[1:], saved, activation, norm, residual, *wanted)


def require_grad(arguments: tuple, count: int) -> tuple:
    """The first ``count`` require gradients: statistics and saved tensors are constants."""
    wanted = (t.detach().requires_grad_() if isinstance(t, torch.Tensor) else t for t in arguments[:count])
    return (*wanted, *arguments[count:])


@pytest.mark.parametrize("stats", [False, True], ids=["computed", "given"])
@pytest.mark.parametrize("return_stats", [False, True], ids=["", "returned"])
@pytest.mark.parametrize("save_hidden", [False, True], ids=["", "save_hidden"])
@pytest.mark.parametrize("grad", [False, True], ids=["", "requires_grad"])
def test_opcheck_forward(kernels, grad, save_hidden, return_stats, stats):
    arguments = forward_arguments(stats=stats, return_stats=return_stats, save_hidden=save_hidden)
    torch.library.opcheck(FORWARD, require_grad(arguments, 9) if grad else arguments)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "nchw"])
def test_opcheck_forward_layouts(kernels, layout):
    torch.library.opcheck(FORWARD, forward_arguments(layout))


@pytest.mark.parametrize(
    ("parameters", "activation"),
    [((), "relu"), (PLAIN, "silu"), (("b1", "norm_bias", "drop_scale"), "gelu_tanh")],
    ids=str,
)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_opcheck_forward_absent_parameters(kernels, dtype, parameters, activation):
    arguments = forward_arguments(
        "channels_last", dtype=dtype, parameters=parameters, activation=activation, residual=False, out=4,
        norm="norm_bias" in parameters,
    )  # fmt: skip
    torch.library.opcheck(FORWARD, require_grad(arguments, 9))


@pytest.mark.parametrize("save_hidden", [False, True], ids=["", "save_hidden"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_backward(kernels, layout, save_hidden):
    torch.library.opcheck(BACKWARD, backward_arguments(layout, save_hidden=save_hidden))


@pytest.mark.parametrize(
    ("wanted", "conv"), [((False, False), True), ((True, False), False), ((False, True), True)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_opcheck_backward_of_less(kernels, dtype, wanted, conv):
    arguments = backward_arguments(
        "channels_last", dtype=dtype, wanted=wanted, parameters=PLAIN, out=4, residual=False, conv=conv
    )
    torch.library.opcheck(BACKWARD, arguments)


@pytest.mark.parametrize("parameters", [(), VECTORS], ids=["none", "all"])
def test_opcheck_backward_with_requires_grad(kernels, parameters):
    """Its own derivative raises, so of the four checks those apply that do not take one."""
    arguments = require_grad(backward_arguments(parameters=parameters), 11)
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(BACKWARD, arguments, test_utils=utilities)


@pytest.mark.parametrize("form", ["plain", "norm", "residual"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(3, 5, 6, 7), (2, 1, 6, 7), (2, 5, 1, 1), (1, 5, 6, 7), (0, 5, 6, 7)], ids=str
)
def test_fakes_have_the_real_strides(kernels, shape, layout, form):
    options = {
        "plain": {"parameters": PLAIN, "out": 4, "residual": False, "dtype": torch.bfloat16},
        "norm": {"residual": False, "return_stats": False, "weight_dtype": torch.float16},
        "residual": {"save_hidden": True},
    }[form]
    arguments = forward_arguments(layout, shape, **options)
    options.pop("return_stats", None)
    last = backward_arguments(layout, shape, **options, wanted=(form != "norm", form == "residual"))
    reals = (*FORWARD(*arguments), *BACKWARD(*last))
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in (*arguments, *last)]
        fakes = (*FORWARD(*fake[: len(arguments)]), *BACKWARD(*fake[len(arguments) :]))
    for i, (a, b) in enumerate(zip(fakes, reals, strict=True)):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device), i
        assert (a.stride(), a.storage_offset()) == (b.stride(), b.storage_offset()), i


# ---- torch.compile -----------------------------------------------------------------------------------------


def compiled(function, backend: str = "aot_eager", **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


@pytest.mark.parametrize("layout", [*FORMATS, "sliced_hw", "transposed"])
@pytest.mark.parametrize(("residual", "save_hidden"), [(False, False), (True, True)])
def test_compile_is_bitwise_equal(backend, residual, save_hidden, layout):
    inputs = make_inputs((3, 5, 6, 7), 9)
    inputs["x"] = as_layout(inputs["x"], layout)
    grad = make_grad(inputs)
    options = {"residual": residual, "save_hidden": save_hidden}
    expected = run(mlp, inputs, grad, **options)
    actual = run(compiled(mlp), inputs, grad, **options)
    if backend == "reference":  # decomposed, which may add in another order
        for name, value in actual.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5, msg=name)
    else:
        assert_same(actual, expected)
        assert actual["y"].stride() == expected["y"].stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compile_by_inductor(kernels, dtype):
    """With operations around the MLP for the code generator to fuse, and statistics handed on."""
    if shutil.which("g++") is None:
        pytest.skip("the code generator needs g++")

    def block(x, w1, b1, w2, b2, norm_weight, norm_bias, layer_scale, drop_scale):
        y, stats = mlp_with_stats(
            x * 1.5, w1, b1, w2, b2, norm_weight=norm_weight, norm_bias=norm_bias, layer_scale=layer_scale,
            drop_scale=drop_scale, residual=True,
        )  # fmt: skip
        last, _ = mlp_with_stats(y, w1 * 2, None, w2, None, norm=True, stats=stats, return_stats=False)
        return last.sigmoid() + x

    inputs = make_inputs((3, 5, 6, 7), 9, dtype)
    inputs["x"] = as_layout(inputs["x"], "channels_last")
    grad = make_grad(inputs)
    expected = run(block, inputs, grad)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for name, value in run(compiled(block, "inductor"), inputs, grad).items():
        error = (value.double() - expected[name].double()).norm() / expected[name].double().norm()
        assert error <= tolerance, (name, error)


def test_compile_without_gradients(kernels):
    inputs = make_inputs((3, 5, 6, 7), 9)
    with torch.no_grad():
        assert torch.equal(bits(compiled(mlp)(**inputs)), bits(mlp(**inputs)))


def test_compile_in_a_process_that_ran_nothing_before(kernels, monkeypatch):
    """The first call decides on the backend, inside the compiled code."""
    monkeypatch.setattr(selection, "_SELECTED", {})
    inputs = make_inputs((3, 5, 6, 7), 9)
    assert torch.equal(compiled(mlp)(**inputs), mlp(**inputs))


@pytest.mark.parametrize("save_hidden", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_no_recompiles_over_batch_sizes_marked_dynamic(kernels, training, save_hidden):
    function = compiled(mlp)
    monitored = torch._dynamo.config.patch(error_on_recompile=True)
    options = {"residual": True, "save_hidden": save_hidden}
    for layout in FORMATS:
        torch._dynamo.reset()
        for batch in (3, 8, 2, 17):
            inputs = make_inputs((batch, 5, 6, 7), 9)
            inputs["x"] = as_layout(inputs["x"], layout).requires_grad_(training)
            torch._dynamo.mark_dynamic(inputs["x"], 0)
            torch._dynamo.mark_dynamic(inputs["drop_scale"], 0)
            with monitored:
                y = function(**inputs, **options)
            plain = {**inputs, "x": inputs["x"].detach().requires_grad_(training)}
            expected = mlp(**plain, **options)
            assert torch.equal(bits(y.detach()), bits(expected.detach()))
            if training:
                grad = make_grad(inputs)
                (dx,), (wanted,) = (
                    torch.autograd.grad(a, b["x"], grad) for a, b in ((y, inputs), (expected, plain))
                )
                assert torch.equal(bits(dx), bits(wanted))


def test_a_weight_written_between_compiled_calls_counts(backend):
    inputs = make_inputs((3, 5, 6, 7), 9)
    function = compiled(mlp)
    with torch.no_grad():
        function(**inputs)
        inputs["w1"].mul_(-1.5)
        inputs["w2"].data.add_(0.25)
        torch.testing.assert_close(function(**inputs), mlp(**{k: t.clone() for k, t in inputs.items()}))


def test_bad_arguments_raise_under_compile(backend):
    w = torch.ones(2, 2)
    with pytest.raises(
        Exception, match="activation must be one of gelu, gelu_tanh, relu, relu_squared, silu, got 'tanh'"
    ):
        compiled(mlp)(torch.ones(1, 2, 3, 3), w, None, w, None, activation="tanh")


# ---- torch.export ------------------------------------------------------------------------------------------


class Mlp(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, t in make_inputs((1, 5, 1, 1), 9).items():
            if name in PARAMETERS and name != "drop_scale":
                self.register_parameter(name, torch.nn.Parameter(t))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return mlp(x, **dict(self.named_parameters()), residual=True)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("layout", FORMATS)
def test_export_with_a_dynamic_batch(backend, layout, strict):
    module = Mlp()
    example = as_layout(make_inputs((3, 5, 6, 7), 9)["x"], layout)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(module, (example,), dynamic_shapes=({0: batch},), strict=strict)
    names = {str(node.target) for node in program.graph.nodes}
    assert ("poolformer_kernels.mlp_cpp.default" in names) == (backend == "cpp")
    for size in (1, 3, 20):
        x = as_layout(make_inputs((size, 5, 6, 7), 9, seed=size)["x"], layout)
        torch.testing.assert_close(program.module()(x), module(x), rtol=1e-6, atol=1e-6)


def test_an_exported_program_runs_in_a_new_process(kernels, tmp_path):
    """Importing the package registers the kernels: nothing else has to be called first."""
    x = make_inputs((2, 5, 6, 7), 9)["x"]
    module = Mlp()
    torch.export.save(torch.export.export(module, (x,)), tmp_path / "mlp.pt2")
    torch.save((x, module(x).detach()), tmp_path / "values.pt")
    code = (
        "import sys, torch, poolformer_kernels\n"
        "x, y = torch.load(sys.argv[1] + '/values.pt')\n"
        "assert torch.equal(torch.export.load(sys.argv[1] + '/mlp.pt2').module()(x), y)\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# ---- autocast ----------------------------------------------------------------------------------------------


def plain_eager(x, w1, b1, w2, b2, **options):
    """Eager PyTorch as a user writes it, for autocast to choose the dtypes."""
    parameters = {name: p for name, p in options.items() if p is not None}
    n = x
    if "norm_weight" in parameters:
        n = torch.nn.functional.group_norm(x, 1, parameters["norm_weight"], parameters["norm_bias"])
    m = torch.nn.functional.conv2d(torch.nn.functional.gelu(torch.nn.functional.conv2d(n, w1, b1)), w2, b2)
    m = m * parameters["layer_scale"][:, None, None] if "layer_scale" in parameters else m
    return x + m if parameters.get("residual") else m


FORMS = {
    "plain": (PLAIN, False),
    "norm": (("b1", "b2", "norm_weight", "norm_bias"), False),
    "residual": (("b1", "b2", "norm_weight", "norm_bias", "layer_scale"), True),
}


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_autocast_as_eager(backend, half, form, layout):
    """A float32 model under CPU autocast: the dtypes of eager's value and gradients, and its errors."""
    parameters, residual = FORMS[form]
    inputs = make_inputs((3, 16, 6, 7), 40, parameters=parameters)
    grad = make_grad(inputs)
    with torch.autocast("cpu", half):
        assert plain_eager(**inputs, residual=residual).dtype == (torch.float32 if residual else half)
    grad = grad if residual else grad.to(half)

    def under_autocast(function):
        def call(**tensors):
            with torch.autocast("cpu", half):
                return function(**tensors, residual=residual)

        return call

    theirs = run(under_autocast(plain_eager), inputs, grad)
    ours = run(under_autocast(mlp), {**inputs, "x": as_layout(inputs["x"], layout)}, grad)
    right = truth(inputs, grad, residual=residual)
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert_close_to_fp64(
            value, theirs[name], right.values[name], scale=right.scales[name], what=name,
            ulps=ulps_of(value.dtype, half),
        )  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_autocast_of_a_half_x(backend, half, form):
    """What the layer before hands on: x keeps its dtype, the float32 parameters their gradients'."""
    parameters, residual = FORMS[form]
    inputs = make_inputs((3, 16, 6, 7), 40, half, parameters=parameters, weight_dtype=torch.float32)
    for name in parameters:
        inputs[name] = inputs[name].float()
    grad = make_grad(inputs)
    with torch.autocast("cpu", half):
        actual = run(mlp, inputs, grad, residual=residual)
    theirs, right = run(eager, inputs, grad, residual=residual), truth(inputs, grad, residual=residual)
    for name, value in actual.items():
        assert value.dtype == (half if name in ("y", "dx") else torch.float32), name
        assert_close_to_fp64(
            value, theirs[name], right.values[name], scale=right.scales[name], what=name,
            ulps=ulps_of(value.dtype, half),
        )  # fmt: skip


@pytest.mark.parametrize("x_dtype", HALVES, ids=str)
def test_autocast_of_the_other_half(backend, x_dtype):
    """x in one half dtype, autocast to the other: eager takes it, its convolutions cast x too."""
    half = HALVES[1 - HALVES.index(x_dtype)]
    inputs = make_inputs((2, 5, 6, 7), 9, parameters=PLAIN)
    x = inputs.pop("x").to(x_dtype)
    with torch.autocast("cpu", half):
        assert plain_eager(x, **inputs).dtype == half
        y = mlp(x, **inputs)
    torch.testing.assert_close(y.float(), mlp(x.float(), **inputs), rtol=3e-2, atol=3e-2)


def test_autocast_leaves_float64_alone():
    inputs = make_inputs((2, 5, 6, 7), 9, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = mlp(**inputs, residual=True)
    assert torch.equal(y, mlp(**inputs, residual=True))


@pytest.mark.parametrize("residual", [False, True])
def test_autocast_disabled_or_compiled(backend, residual):
    inputs = make_inputs((3, 16, 6, 7), 40)
    expected = mlp(**inputs, residual=residual)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(mlp(**inputs, residual=residual), expected)
        under_autocast = mlp(**inputs, residual=residual)
        again = compiled(mlp)(**inputs, residual=residual)
    assert again.dtype == under_autocast.dtype
    torch.testing.assert_close(again, under_autocast, rtol=1e-2, atol=1e-2)
    assert not torch.equal(under_autocast.float(), expected)
