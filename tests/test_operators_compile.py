"""Both operators under torch.library.opcheck, FakeTensorMode, torch.compile and torch.export."""

import shutil

import pytest
import torch
from support.layouts import LAYOUTS, as_layout
from support.mlp import PLAIN
from support.operators import EVERY, MLP, POOL_MIXER, Operator, SubBlock
from support.peers import relative_error
from support.problems import HALVES, Tensors, tiled_stats
from support.processes import python
from support.rule import assert_same, bits, run
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import poolformer_kernels as pk
from poolformer_kernels.ops import dispatch, mlp
from poolformer_kernels.ops.mlp import mlp_with_stats
from poolformer_kernels.ops.pool_mixer import pool_mixer_with_stats

pytestmark = [pytest.mark.sampled(3), pytest.mark.usefixtures("fresh_dynamo")]

FORMATS = ("nchw", "channels_last")
SHAPE = (3, 5, 6, 7)


def problem(
    operator: Operator, layout: str = "nchw", shape: tuple = SHAPE, dtype=torch.float32, **options
) -> Tensors:
    inputs = operator.inputs(shape, dtype=dtype, **options)
    return inputs | {"x": as_layout(inputs["x"], layout)}


# ---- the CPU's registered operators ------------------------------------------------------------------------


def flag_of(operator: Operator, flag: bool) -> dict[str, bool]:
    return {"save_hidden" if operator is MLP else "residual": flag}


def backward_arguments(
    operator: Operator, inputs: Tensors, layout: str = "nchw", *, save_hidden: bool = False, **options
) -> tuple:
    """``options`` are those of the backward."""
    own = {name: option for name, option in options.items() if name != "wanted"}
    saved = {"save_hidden": True} if save_hidden else {}
    arguments = operator.problem.forward_arguments(inputs, **own, **saved)
    _, mean_rstd, _, *hidden = operator.registered("cpp")[0](*arguments)
    grad = as_layout(operator.grad(inputs), layout)
    kept = hidden if save_hidden else []
    return operator.problem.backward_arguments(grad, inputs, mean_rstd, *kept, **options)


def require_grad(arguments: tuple, count: int) -> tuple:
    """The first ``count`` require gradients: statistics are constants."""
    first = (t.detach().requires_grad_() if isinstance(t, Tensor) else t for t in arguments[:count])
    return (*first, *arguments[count:])


@EVERY
@pytest.mark.parametrize("stats", [False, True], ids=["computed", "given"])
@pytest.mark.parametrize("return_stats", [False, True], ids=["", "returned"])
@pytest.mark.parametrize("flag", [False, True], ids=["", "residual or save_hidden"])
@pytest.mark.parametrize("grad", [False, True], ids=["", "requires_grad"])
def test_opcheck_forward(kernels, grad, flag, return_stats, stats, operator):
    inputs = problem(operator)
    given, options = tiled_stats(inputs["x"], 2) if stats else None, flag_of(operator, flag)
    arguments = operator.problem.forward_arguments(inputs, given, return_stats=return_stats, **options)
    arguments = require_grad(arguments, len(operator.names) if grad else 0)
    torch.library.opcheck(operator.registered("cpp")[0], arguments)


@EVERY
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "nchw"])
def test_opcheck_forward_layouts(kernels, layout, operator):
    arguments = operator.problem.forward_arguments(problem(operator, layout))
    torch.library.opcheck(operator.registered("cpp")[0], arguments)


@pytest.mark.parametrize(
    ("operator", "parameters", "options"),
    [
        *((POOL_MIXER, parameters, {}) for parameters in ((), ("weight",), ("bias", "drop_scale"))),
        (MLP, (), {"activation": "relu", "norm": False, "residual": False}),
        (MLP, PLAIN, {"activation": "silu", "norm": False, "residual": False}),
        (MLP, ("b1", "norm_bias", "drop_scale"), {"activation": "gelu_tanh", "residual": False}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_opcheck_forward_absent_parameters(kernels, dtype, operator, parameters, options):
    width = {"out": 4} if operator is MLP else {}
    inputs = problem(operator, "channels_last", dtype=dtype, parameters=parameters, **width)
    arguments = operator.problem.forward_arguments(inputs, **options)
    torch.library.opcheck(operator.registered("cpp")[0], require_grad(arguments, len(operator.names)))


@EVERY
@pytest.mark.parametrize("flag", [False, True], ids=["", "residual or save_hidden"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_backward(kernels, layout, flag, operator):
    inputs = problem(operator, layout)
    arguments = backward_arguments(operator, inputs, layout, **flag_of(operator, flag))
    torch.library.opcheck(operator.registered("cpp")[1], arguments)


@pytest.mark.parametrize(
    ("wanted", "conv"), [((False, False), True), ((True, False), False), ((False, True), True)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_opcheck_backward_of_less(kernels, dtype, wanted, conv):
    inputs = problem(MLP, "channels_last", dtype=dtype, parameters=PLAIN, out=4, conv=conv)
    options = {"norm": False, "residual": False, "wanted": wanted}
    arguments = backward_arguments(MLP, inputs, "channels_last", **options)
    torch.library.opcheck(MLP.registered("cpp")[1], arguments)


@EVERY
@pytest.mark.parametrize("given", [False, True], ids=["none", "all"])
def test_opcheck_backward_with_requires_grad(kernels, given, operator):
    """Its own derivative raises, so of the four checks those apply that do not take one."""
    inputs = problem(operator, parameters=operator.vectors if given else ())
    options = {"norm": given} if operator is MLP else {}
    arguments = backward_arguments(operator, inputs, **options)
    arguments = require_grad(arguments, len(arguments))
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator.registered("cpp")[1], arguments, test_utils=utilities)


FORMS = {  # the operator, its problem, options of the forward, of the backward
    "mixer": (POOL_MIXER, {}, {"return_stats": False}, {}),
    "mixer, statistics returned": (POOL_MIXER, {}, {}, {}),
    "plain": (
        MLP,
        {"parameters": PLAIN, "out": 4, "dtype": torch.bfloat16},
        {"norm": False, "residual": False},
        {"norm": False, "residual": False, "wanted": (True, False)},
    ),
    "norm": (
        MLP,
        {"weight_dtype": torch.float16},
        {"residual": False, "return_stats": False},
        {"residual": False, "wanted": (False, False)},
    ),
    "residual": (MLP, {}, {"save_hidden": True}, {"save_hidden": True}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(3, 5, 6, 7), (2, 1, 6, 7), (2, 5, 1, 1), (1, 5, 6, 7), (0, 5, 6, 7)], ids=str
)
def test_fakes_have_the_real_strides(kernels, shape, layout, form):
    operator, of_problem, of_forward, of_backward = FORMS[form]
    inputs = problem(operator, layout, shape, **of_problem)
    forward, backward = operator.registered("cpp")
    arguments = operator.problem.forward_arguments(inputs, **of_forward)
    last = backward_arguments(operator, inputs, layout, **of_backward)
    reals = (*forward(*arguments), *backward(*last))
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in (*arguments, *last)]
        fakes = (*forward(*fake[: len(arguments)]), *backward(*fake[len(arguments) :]))
    for i, (a, b) in enumerate(zip(fakes, reals, strict=True)):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device), i
        assert (a.stride(), a.storage_offset()) == (b.stride(), b.storage_offset()), i


# ---- torch.compile -----------------------------------------------------------------------------------------


def compiled(function, backend: str = "aot_eager"):
    return torch.compile(function, fullgraph=True, backend=backend)


@EVERY
@pytest.mark.parametrize("layout", [*FORMATS, "sliced_hw", "transposed"])
@pytest.mark.parametrize("residual", [False, True])
def test_compile_is_bitwise_equal(backend, residual, layout, operator):
    """With the residual the MLP's hidden activations are saved, too."""
    inputs = problem(operator, layout)
    grad = operator.grad(inputs)
    options = {"residual": residual} | ({"save_hidden": residual} if operator is MLP else {})
    expected = run(operator.call, inputs, grad, **options)
    actual = run(compiled(operator.call), inputs, grad, **options)
    if backend == "reference":  # decomposed, which may add in another order
        for name, value in actual.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5, msg=name)
    else:
        assert_same(actual, expected)
        assert actual["y"].stride() == expected["y"].stride()


def mixers(x, weight, bias, layer_scale, drop_scale) -> Tensor:
    options = {"layer_scale": layer_scale, "drop_scale": drop_scale, "residual": True}
    y, stats = pool_mixer_with_stats(x * 1.5, weight, bias, **options)
    return pool_mixer_with_stats(y, weight, None, stats=stats)[0].sigmoid() + x


def mlps(x, w1, b1, w2, b2, **options) -> Tensor:
    y, stats = mlp_with_stats(x * 1.5, w1, b1, w2, b2, **options, residual=True)
    last, _ = mlp_with_stats(y, w1 * 2, None, w2, None, norm=True, stats=stats, return_stats=False)
    return last.sigmoid() + x


@pytest.mark.parametrize(("operator", "block"), [(POOL_MIXER, mixers), (MLP, mlps)], ids=["mixers", "mlps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compile_by_inductor(kernels, dtype, operator, block):
    """With operations around two calls for the code generator to fuse, and statistics handed on."""
    if shutil.which("g++") is None:
        pytest.skip("the code generator needs g++")
    inputs = problem(operator, "channels_last", dtype=dtype)
    grad = operator.grad(inputs)
    expected = run(block, inputs, grad)
    unit = 1e-5 if dtype == torch.float32 else 2e-2
    for name, value in run(compiled(block, "inductor"), inputs, grad).items():
        if operator is MLP:
            assert relative_error(value, expected[name]) <= unit, name
        else:
            torch.testing.assert_close(value, expected[name], rtol=unit, atol=unit, msg=name)


@EVERY
def test_compile_without_gradients(kernels, operator):
    inputs = problem(operator)
    with torch.no_grad():
        assert torch.equal(bits(compiled(operator.call)(**inputs)), bits(operator.call(**inputs)))


@EVERY
def test_compile_in_a_process_that_ran_nothing_before(kernels, operator, monkeypatch):
    """The first call decides on the backend, inside the compiled code."""
    monkeypatch.setattr(dispatch, "_SELECTED", {})
    inputs = problem(operator)
    assert torch.equal(compiled(operator.call)(**inputs), operator.call(**inputs))


@pytest.mark.parametrize(
    ("operator", "options"),
    [(POOL_MIXER, {}), (MLP, {"save_hidden": False}), (MLP, {"save_hidden": True})],
    ids=["pool_mixer", "mlp", "mlp, save_hidden"],
)
@pytest.mark.parametrize("training", [False, True])
def test_no_recompiles_over_batch_sizes_marked_dynamic(kernels, training, operator, options):
    function = compiled(operator.call)
    for layout in FORMATS:
        torch._dynamo.reset()
        for batch in (3, 8, 2, 17):
            inputs = problem(operator, layout, (batch, *SHAPE[1:]))
            inputs["x"].requires_grad_(training)
            torch._dynamo.mark_dynamic(inputs["x"], 0)
            torch._dynamo.mark_dynamic(inputs["drop_scale"], 0)
            with torch._dynamo.config.patch(error_on_recompile=True):
                y = function(**inputs, **options, residual=True)
            plain = {**inputs, "x": inputs["x"].detach().requires_grad_(training)}
            expected = operator.call(**plain, **options, residual=True)
            assert torch.equal(bits(y.detach()), bits(expected.detach()))
            if training:
                grad = operator.grad(inputs)
                (dx,), (wanted,) = (
                    torch.autograd.grad(a, b["x"], grad) for a, b in ((y, inputs), (expected, plain))
                )
                assert torch.equal(bits(dx), bits(wanted))


def test_a_weight_written_between_compiled_calls_counts(backend):
    inputs = problem(MLP)
    function = compiled(mlp)
    with torch.no_grad():
        function(**inputs)
        inputs["w1"].mul_(-1.5)
        inputs["w2"].data.add_(0.25)
        torch.testing.assert_close(function(**inputs), mlp(**{k: t.clone() for k, t in inputs.items()}))


@pytest.mark.parametrize(
    ("operator", "changed", "message"),
    [
        (POOL_MIXER, {"pool_size": 4}, "pool_size must be odd and positive, got 4"),
        (MLP, {"activation": "tanh"}, "activation must be one of gelu, gelu_tanh, relu, .*, got 'tanh'"),
    ],
    ids=["pool_size", "activation"],
)
def test_bad_arguments_raise_under_compile(backend, operator, changed, message):
    with pytest.raises(Exception, match=message):
        compiled(operator.call)(**problem(operator), **changed)


def test_changing_the_backend_takes_effect_under_compile(kernels):
    """The choice is guarded on: dbias is 0 from a kernel and rounding noise from the reference."""
    inputs = problem(POOL_MIXER)
    grad, function = POOL_MIXER.grad(inputs), compiled(POOL_MIXER.call)
    assert run(function, inputs, grad)["dbias"].abs().sum() == 0
    with pk.use_backend("reference"):
        assert run(function, inputs, grad)["dbias"].abs().sum() > 0
    assert run(function, inputs, grad)["dbias"].abs().sum() == 0


@pytest.mark.parametrize("residual", [False, True])
def test_autocast_disabled_or_compiled(backend, residual):
    inputs = MLP.inputs((3, 16, 6, 7), 40)
    expected = mlp(**inputs, residual=residual)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(mlp(**inputs, residual=residual), expected)
        under_autocast = mlp(**inputs, residual=residual)
        again = compiled(mlp)(**inputs, residual=residual)
    assert again.dtype == under_autocast.dtype
    torch.testing.assert_close(again, under_autocast, rtol=1e-2, atol=1e-2)
    assert not torch.equal(under_autocast.float(), expected)


# ---- torch.export ------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("layout", FORMATS)
def test_export_with_a_dynamic_batch(backend, layout, strict, operator):
    module = SubBlock(operator, SHAPE)
    example = problem(operator, layout)["x"]
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(module, (example,), dynamic_shapes=({0: batch},), strict=strict)
    names = {str(node.target) for node in program.graph.nodes}
    assert (f"poolformer_kernels.{operator}_cpp.default" in names) == (backend == "cpp")
    unit = 1e-6 if operator is MLP else 0
    for size in (1, 3, 20):
        x = problem(operator, layout, (size, *SHAPE[1:]), seed=size)["x"]
        torch.testing.assert_close(program.module()(x), module(x), rtol=unit, atol=unit)


@EVERY
def test_an_exported_program_runs_in_a_new_process(kernels, operator, tmp_path):
    """Importing the package registers the kernels: nothing else has to be called first."""
    x = problem(operator)["x"]
    module = SubBlock(operator, SHAPE)
    torch.export.save(torch.export.export(module, (x,)), tmp_path / "module.pt2")
    torch.save((x, module(x).detach()), tmp_path / "values.pt")
    code = (
        "import sys, torch, poolformer_kernels\n"
        "x, y = torch.load(sys.argv[1] + '/values.pt')\n"
        "assert torch.equal(torch.export.load(sys.argv[1] + '/module.pt2').module()(x), y)\n"
    )
    python("-c", code, tmp_path)
