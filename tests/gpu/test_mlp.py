"""The MLP's CUDA backend. Truth: fp64 on the CPU; eager: contiguous, on the device in the same dtype."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import (
    GRAD_LAYOUTS,
    HALVES,
    LAYOUTS,
    as_layout,
    assert_close_to_fp64,
    assert_same,
    randn,
    run,
    tiled_stats,
)
from mlp_helpers import (
    PLAIN,
    VECTORS,
    WEIGHT_LAYOUTS,
    WEIGHTS,
    as_weight_layout,
    eager,
    make_grad,
    make_inputs,
    truth,
    ulps_of,
    y_of_mlp_with_stats,
)

import poolformer_kernels as pk
from poolformer_kernels import reference
from poolformer_kernels.ops import mlp
from poolformer_kernels.ops.mlp import mlp_with_stats
from poolformer_kernels.ops.pool_mixer import pool_mixer_with_stats

DTYPES = (torch.float32, *HALVES)
FORMATS = ("nchw", "channels_last")
FORMS = {  # parameters, residual
    "plain": (PLAIN, False),
    "norm": (("b1", "b2", "norm_weight", "norm_bias"), False),
    "residual": (VECTORS, True),
}
STAGES = (  # x, hidden
    ((8, 64, 56, 56), 256),
    ((4, 128, 28, 28), 512),
    ((3, 320, 14, 14), 1280),
    ((3, 512, 7, 7), 2048),
    ((2, 96, 56, 56), 384),
    ((2, 192, 28, 28), 768),
    ((2, 384, 14, 14), 1536),
    ((1, 768, 7, 7), 3072),
)
ODD = (  # cut chunks and tiles, C in two parts, few pixels, one channel, many samples
    ((3, 17, 13, 29), 70),
    ((2, 3, 9, 1), 5),
    ((5, 24, 1, 1), 33),
    ((1, 5, 2, 2), 300),
    ((2, 1, 5, 31), 1),
    ((1, 160, 6, 11), 257),
    ((2, 200, 6, 6), 50),
    ((1, 513, 2, 16), 31),
    ((513, 24, 7, 7), 96),
)
FUSED, PAIR = ((4, 96, 14, 14), 384), ((4, 320, 14, 14), 640)
EACH = pytest.mark.parametrize(("shape", "hidden"), [FUSED, PAIR], ids=["fused", "pair"])


@pytest.fixture(autouse=True, params=["triton"])
def backend(request, monkeypatch):
    """Eager's convolutions without TF32, which float32 has by default there: ours are measured by them."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with pk.use_backend(request.param):
        yield request.param


def like_on(device, t):
    """The tensor with its strides on the device: an expanded or sliced one stays so."""
    size = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1 if t.numel() else 0
    flat = t.as_strided((size + t.storage_offset(),), (1,), 0).to(device)
    return flat.as_strided(t.shape, t.stride(), t.storage_offset())


def on(device, tensors):
    return {name: t if t is None else like_on(device, t) for name, t in tensors.items()}


def assert_rule(ours, theirs, right, inputs, y_dtype, operand, what="") -> None:
    for name, value in ours.items():
        dtype = y_dtype if name == "y" else inputs[name[1:]].dtype
        assert value.dtype == dtype, f"{what}{name}: {value.dtype}, not {dtype}"
        assert_close_to_fp64(
            value.cpu(), theirs[name].cpu(), right.values[name], scale=right.scales[name],
            ulps=ulps_of(value.dtype, operand, 8), what=what + name,
        )  # fmt: skip


def check(
    inputs, grad=None, *, layouts=("nchw",), device="cuda", stats=None, save_hidden=False, **options
) -> None:
    """The error rule with x in these layouts; nothing given is written to, y and dx are dense."""
    grad = make_grad(inputs) if grad is None else grad
    plain = {name: t if t is None else t.contiguous() for name, t in on(device, inputs).items()}
    theirs = run(eager, plain, like_on(device, grad).contiguous(), **options)
    right = truth(inputs, grad, **options)
    operand = inputs["x" if inputs["x"].dtype in HALVES else "w1"].dtype
    given = {} if stats is None else {"stats": stats.to(device)}
    for layout in layouts:
        laid = {**inputs, "x": as_layout(inputs["x"], layout)}
        cuda, cuda_grad = on(device, laid), like_on(device, grad)
        before = {name: t.clone() for name, t in cuda.items() if t is not None}
        function = mlp if stats is None else y_of_mlp_with_stats
        ours = run(function, cuda, cuda_grad, save_hidden=save_hidden, **given, **options)
        assert_same({name: cuda[name] for name in before}, before)
        assert torch.equal(cuda_grad.cpu(), grad)
        assert_rule(ours, theirs, right, inputs, inputs["x"].dtype, operand, f"{layout} ")
        assert {value.device for value in ours.values()} == {cuda["x"].device}
        fmt = reference.memory_format_of(laid["x"])
        assert ours["y"].is_contiguous(memory_format=fmt)
        assert ours["dx"].is_contiguous(memory_format=fmt)


# ---- the error rule ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "hidden"), STAGES + ODD, ids=str)
def test_error_rule(shape, hidden, dtype, form) -> None:
    parameters, residual = FORMS[form]
    check(make_inputs(shape, hidden, dtype, parameters=parameters), layouts=FORMATS, residual=residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "hidden", "out"),
    [((2, 17, 5, 8), 20, 9), ((2, 64, 7, 7), 64, 330), ((1, 320, 6, 8), 33, 64)],
    ids=str,
)
def test_another_number_of_outputs(shape, hidden, out, dtype) -> None:
    for parameters in ((), PLAIN, VECTORS):
        check(make_inputs(shape, hidden, dtype, out=out, parameters=parameters, conv=False), layouts=FORMATS)


@pytest.mark.parametrize("activation", [name for name in reference.ACTIVATIONS if name != "gelu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EACH
def test_activations(shape, hidden, dtype, activation) -> None:
    check(make_inputs(shape, hidden, dtype), layouts=FORMATS, activation=activation, residual=True)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "hidden"), [*STAGES[1:4], FUSED, ODD[0]], ids=str)
def test_saved_hidden_activations(shape, hidden, dtype, activation) -> None:
    check(
        make_inputs(shape, hidden, dtype), layouts=FORMATS, activation=activation, residual=True,
        save_hidden=True,
    )  # fmt: skip


@pytest.mark.parametrize("without", VECTORS)
@EACH
def test_without_one_parameter(shape, hidden, without) -> None:
    parameters = tuple(name for name in VECTORS if name != without)
    check(make_inputs(shape, hidden, torch.bfloat16, parameters=parameters), residual=True)


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "vector_dtype"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float16, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float32, torch.float16, torch.float16),
    ],
    ids=str,
)
@EACH
def test_mixed_dtypes(shape, hidden, dtype, weight_dtype, vector_dtype) -> None:
    inputs = make_inputs(shape, hidden, dtype, weight_dtype=weight_dtype, vector_dtype=vector_dtype)
    check(inputs, layouts=FORMATS, residual=True)


@pytest.mark.parametrize("grad_layout", GRAD_LAYOUTS)
def test_layouts(grad_layout) -> None:
    for shape, hidden in (((3, 24, 9, 6), 50), ((3, 200, 3, 6), 50)):
        inputs = make_inputs(shape, hidden)
        inputs["x"] = as_layout(inputs["x"], "expanded")  # which repeats, so the others can hold it too
        check(inputs, as_layout(make_grad(inputs), grad_layout), layouts=LAYOUTS, residual=True)


@pytest.mark.parametrize("layout", WEIGHT_LAYOUTS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_layouts_of_weights(name, layout) -> None:
    for shape, hidden in (((3, 24, 9, 6), 50), ((3, 200, 3, 6), 50)):
        inputs = make_inputs(shape, hidden, torch.bfloat16)
        inputs[name] = as_weight_layout(inputs[name], layout)
        check(inputs, layouts=FORMATS, residual=True)


# ---- hard values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "mean", "sigma"),
    [
        (torch.float32, 1e2, 1.0),
        (torch.float32, 1e4, 1.0),
        (torch.float32, 1e2, 1e-2),
        *((half, 1e2, 1.0) for half in HALVES),
    ],
    ids=str,
)
@EACH
def test_mean_much_larger_than_sigma(shape, hidden, dtype, mean, sigma) -> None:
    inputs = make_inputs(shape, hidden, dtype, mean=mean, sigma=sigma)
    for residual in (True, False):
        check(inputs, layouts=FORMATS, residual=residual)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EACH
def test_a_sample_that_is_not_finite_stays_alone(shape, hidden, dtype, value) -> None:
    for parameters in (PLAIN, VECTORS):
        inputs = on("cuda", make_inputs(shape, hidden, dtype, parameters=parameters))
        clean = mlp(**inputs)
        inputs["x"][2, 3, 2, 4] = value
        y = mlp(**inputs)
        hurt = torch.zeros(y.shape, dtype=torch.bool, device=y.device)
        hurt[2 if parameters is VECTORS else (2, slice(None), 2, 4)] = True
        assert not y[hurt].isfinite().any()
        assert torch.equal(y[~hurt], clean[~hurt])


@pytest.mark.parametrize("name", ["w1", "b1", "w2", "b2", "norm_weight", "norm_bias", "layer_scale"])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@EACH
def test_nan_in_a_parameter_is_not_lost(shape, hidden, activation, name) -> None:
    parameters = tuple(vector for vector in VECTORS if vector != "drop_scale")
    inputs = on("cuda", make_inputs(shape, hidden, torch.bfloat16, parameters=parameters))
    inputs[name].view(-1)[3] = float("nan")
    y = mlp(**inputs, activation=activation)
    assert torch.equal(y.isnan(), eager(**inputs, activation=activation).isnan())
    assert y.isnan().any()


def test_empty_batch() -> None:
    inputs = on("cuda", make_inputs((0, 5, 8, 6), 9))
    result = run(mlp, inputs, torch.empty_like(inputs["x"]), residual=True)
    assert result["y"].shape == (0, 5, 8, 6)
    for name in ("w1", "b1", "w2", "norm_weight", "layer_scale"):
        assert torch.equal(result[f"d{name}"], torch.zeros_like(inputs[name]))


@pytest.mark.parametrize(("channels", "pixels"), [(4, (3, 2)), (200, (1, 2)), (4, (6, 6))], ids=str)
def test_batch_past_the_grid_limits(channels, pixels) -> None:
    inputs = make_inputs((70_000, channels, *pixels), 8, parameters=("b1", "b2", "norm_weight", "norm_bias"))
    inputs = on("cuda", inputs)
    tail = {**inputs, "x": inputs["x"][-3:]}
    grad = torch.ones_like(inputs["x"])
    whole, part = (run(mlp, given, grad[-len(given["x"]) :], residual=True) for given in (inputs, tail))
    for name in ("y", "dx"):
        torch.testing.assert_close(whole[name][-3:], part[name], rtol=1e-5, atol=1e-5)
    assert torch.equal(whole["db2"], torch.full_like(whole["db2"], 70_000.0 * pixels[0] * pixels[1]))


# ---- statistics --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiles", [1, 5, 33])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EACH
def test_statistics_given(shape, hidden, dtype, tiles) -> None:
    inputs = make_inputs(shape, hidden, dtype, mean=30.0)
    check(inputs, layouts=FORMATS, stats=tiled_stats(inputs["x"], tiles), residual=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "hidden"), [STAGES[0], FUSED, PAIR, *ODD], ids=str)
def test_statistics_returned(shape, hidden, dtype, layout, form) -> None:
    parameters, residual = FORMS[form]
    inputs = on("cuda", make_inputs(shape, hidden, dtype, parameters=parameters, mean=30.0))
    inputs["x"] = as_layout(inputs["x"], layout)
    y, stats = mlp_with_stats(**inputs, residual=residual)
    assert torch.equal(y, mlp(**inputs, residual=residual))
    assert torch.equal(stats[..., 0].sum(1), torch.full_like(stats[:, 0, 0], y[0].numel()))
    flat = y.double().flatten(1)
    mean, variance = reference.merge_stats(stats.double())
    unit = torch.finfo(torch.float32).eps
    size = flat.abs().amax(1)
    assert ((mean - flat.mean(1)).abs() <= 8 * unit * size).all()
    exact = flat.var(1, correction=0)
    assert ((variance - exact).abs() <= 1e-5 * exact + (8 * unit * size) ** 2).all()


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EACH
def test_a_block_through_statistics(shape, hidden, dtype, layout) -> None:
    """mixer, MLP, mixer: each normalises by what the one before hands on, not by another look at its x."""

    def block(x, w1, b1, w2, b2, norm_weight, norm_bias, layer_scale, drop_scale, chained=True):
        affine = {"layer_scale": layer_scale, "drop_scale": drop_scale, "residual": True}
        pool = lambda t, stats: pool_mixer_with_stats(t, norm_weight, norm_bias, stats=stats, **affine)  # noqa: E731
        kept = lambda stats: stats if chained else None  # noqa: E731
        x, stats = pool(x, None)
        x, stats = mlp_with_stats(
            x, w1, b1, w2, b2, norm_weight=norm_weight, norm_bias=norm_bias, stats=kept(stats), **affine
        )
        return pool(x, kept(stats))[0]

    inputs = make_inputs(shape, hidden, dtype)
    grad = make_grad(inputs)
    cuda = on("cuda", {**inputs, "x": as_layout(inputs["x"], layout)})
    ours = run(block, cuda, like_on("cuda", grad))
    with pk.use_backend("reference"):
        theirs = run(block, on("cuda", inputs), like_on("cuda", grad), chained=False)
        doubled = {name: t.double() for name, t in inputs.items()}
        right = run(block, doubled, grad.double(), chained=False)
    for name, value in ours.items():
        assert_close_to_fp64(value.cpu(), theirs[name].cpu(), right[name], ulps=64, what=name)


# ---- what runs when, and where -----------------------------------------------------------------------------


@pytest.mark.parametrize("save_hidden", [False, True], ids=["", "save_hidden"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("shape", "hidden"), [STAGES[0], *STAGES[3:6], ODD[0]], ids=str)
def test_ten_runs_are_bitwise_equal(shape, hidden, layout, dtype, save_hidden) -> None:
    inputs = make_inputs((16, *shape[1:]), hidden, dtype)
    grad = like_on("cuda", make_grad(inputs))
    inputs = on("cuda", {**inputs, "x": as_layout(inputs["x"], layout)})

    def everything():
        _, stats = mlp_with_stats(**inputs, residual=True)
        return run(mlp, inputs, grad, residual=True, save_hidden=save_hidden) | {"stats": stats}

    first = everything()
    for _ in range(9):
        assert_same(everything(), first)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@EACH
def test_device_that_is_not_current(shape, hidden) -> None:
    with torch.cuda.device(0):
        check(make_inputs(shape, hidden), layouts=FORMATS, device="cuda:1", residual=True)
        assert torch.cuda.current_device() == 0


@EACH
def test_stream_that_is_not_the_default(shape, hidden) -> None:
    inputs = on("cuda", make_inputs(shape, hidden, torch.bfloat16))
    grad = torch.randn_like(inputs["x"])
    expected = run(mlp, inputs, grad, residual=True)
    late = {name: torch.zeros_like(t) for name, t in inputs.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # kernels on another stream would read zeros
        for name, t in inputs.items():
            late[name].copy_(t)
        got = run(mlp, late, grad, residual=True)
    stream.synchronize()
    assert_same(got, expected)


@pytest.mark.parametrize("save_hidden", [False, True], ids=["", "save_hidden"])
@pytest.mark.parametrize("layout", FORMATS)
@EACH
def test_graph_replay_with_changed_input(shape, hidden, layout, save_hidden) -> None:
    options = {"residual": True, "save_hidden": save_hidden}
    inputs = on("cuda", make_inputs(shape, hidden, torch.bfloat16))
    inputs["x"] = as_layout(inputs["x"], layout)
    grad = torch.randn_like(inputs["x"])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(mlp, inputs, grad, **options)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(mlp, inputs, grad, **options)
    for seed in (1, 2):
        inputs["x"].copy_(randn(*inputs["x"].shape, mean=seed, seed=seed))
        for name in ("w1", "b2", "norm_weight", "drop_scale"):
            inputs[name].mul_(1.5)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(captured, run(mlp, inputs, grad, **options))


def test_without_the_caching_allocator() -> None:
    """Every tensor is memory of its own then, and a kernel that writes or reads past one faults."""
    names = "test_layouts_of_weights or test_another_number or test_saved_hidden"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", names],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


# ---- autograd, autocast and the compiler -------------------------------------------------------------------


def test_double_backward_raises() -> None:
    inputs = on("cuda", make_inputs((1, 4, 7, 7), 9))
    x = inputs.pop("x").requires_grad_()
    (dx,) = torch.autograd.grad(mlp(x, **inputs).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@EACH
def test_autocast(shape, hidden, x_dtype, half, form) -> None:
    """Eager's dtypes: half, but for a residual stream, which is float32. Gradients have their tensors'."""
    parameters, residual = FORMS[form]
    inputs = make_inputs(shape, hidden, parameters=parameters)
    inputs["x"] = inputs["x"].to(x_dtype)
    if form == "plain":
        inputs["x"] = inputs["x"].to(half).to(x_dtype)  # fc1's cast of it is then exact
    wanted = torch.float32 if residual else half
    grad = make_grad(inputs).to(half)

    def under_autocast(**tensors):
        with torch.autocast("cuda", half):
            return mlp(**tensors, residual=residual)

    def by_eager(x, **tensors):
        with torch.autocast("cuda", half):
            return eager(x.float(), **tensors, residual=residual)

    cuda = on("cuda", inputs)
    ours = run(under_autocast, cuda, like_on("cuda", grad).to(wanted))
    theirs = run(by_eager, cuda, like_on("cuda", grad).float())
    right = truth(inputs, grad.float(), residual=residual)
    assert_rule(ours, theirs, right, inputs, wanted, half)


def test_opcheck() -> None:
    inputs = on("cuda", make_inputs((2, 5, 8, 6), 9))
    for t in inputs.values():
        t.requires_grad_()
    op = torch.ops.poolformer_kernels.mlp_triton.default
    for save_hidden in (False, True):
        torch.library.opcheck(op, (*inputs.values(), None, "gelu", 1e-5, True, True, True, save_hidden))


@pytest.mark.parametrize("save_hidden", [False, True], ids=["", "save_hidden"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(("channels", "hidden"), [(64, 256), (320, 640)], ids=["fused", "pair"])
def test_compiled_whole_over_dynamic_batches(channels, hidden, layout, save_hidden) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(mlp, fullgraph=True)
    options = {"residual": True, "save_hidden": save_hidden}
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (2, 3, 5):
            inputs = make_inputs((batch, channels, 14, 14), hidden)
            grad = make_grad(inputs).cuda()
            inputs = on("cuda", {**inputs, "x": as_layout(inputs["x"], layout)})
            leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
            torch._dynamo.mark_dynamic(leaves["x"], 0)
            torch._dynamo.mark_dynamic(leaves["drop_scale"], 0)
            y = compiled(**leaves, **options)
            got = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad), strict=True))
            got = {"y": y.detach()} | {f"d{name}": t for name, t in got.items()}
            assert_same(got, run(mlp, inputs, grad, **options))


# ---- more than 2^31 elements -------------------------------------------------------------------------------


@pytest.mark.large
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(
    ("shape", "hidden", "save_hidden"),
    [
        ((170, 64, 448, 448), 64, False),
        ((1, 64, 8192, 4112), 64, False),
        ((17, 320, 320, 320), 1280, False),  # so many hidden activations, which the pair of kernels writes
        ((44, 64, 448, 448), 256, True),
    ],
    ids=["batch", "sample", "pair", "saved"],
)
def test_more_than_two_to_the_31_elements(shape, hidden, save_hidden, layout) -> None:
    """A token depends on no other, given statistics: the first and the last against the fp64 reference."""
    if torch.cuda.get_device_properties(0).total_memory < 64 * 2**30:
        pytest.skip("needs 64 GiB of device memory")
    fmt = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=fmt)
    x.normal_(-2.3, 0.5, generator=generator)
    tokens = x.numel() // shape[1]
    assert tokens * max(shape[1], hidden) > 2**31
    parameters = on("cuda", make_inputs((1, *shape[1:2], 1, 1), hidden, torch.bfloat16, parameters=PLAIN))
    del parameters["x"]
    size = x[0].numel()
    stats = torch.tensor([[[size, -2.3, 0.25 * size]]], device="cuda").expand(shape[0], 1, 3)

    def exact(x):
        doubled = {name: t if t is None else t.double() for name, t in parameters.items()}
        return lambda **options: reference.mlp(x.double(), **doubled, residual=True, **options)

    corners = [
        (slice(None, 1), ..., slice(None, 3), slice(None, 5)),
        (slice(-1, None), ..., slice(-3, None), slice(-5, None)),
    ]
    y, partials = mlp_with_stats(x, **parameters, norm=True, residual=True, stats=stats)
    for at in corners:
        wanted = exact(x[at])(norm=True, stats=stats[:1].double())
        torch.testing.assert_close(y[at].double(), wanted, rtol=2e-2, atol=5e-2)
    mean = reference.merge_stats(partials.double())[0]
    assert abs(mean[-1].item() - y[-1].mean(dtype=torch.float64).item()) < 1e-3
    del y, partials

    x.requires_grad_()
    parameters["b2"].requires_grad_()
    y = mlp(x, **parameters, residual=True, save_hidden=save_hidden)
    dx, db2 = torch.autograd.grad(
        y, (x, parameters["b2"]), torch.ones((), device="cuda").bfloat16().expand(y.shape)
    )
    for at in corners:
        corner = x[at].detach().double().requires_grad_()
        with torch.enable_grad():
            (wanted,) = torch.autograd.grad(exact(corner)().sum(), corner)
        torch.testing.assert_close(dx[at].double(), wanted, rtol=2e-2, atol=5e-2)
    torch.testing.assert_close(db2.double(), torch.full_like(db2, tokens).double(), rtol=2**-7, atol=0)
