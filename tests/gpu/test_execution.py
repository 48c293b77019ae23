"""How the operators run where there is a device: streams, graphs, the compiler, memory, very large tensors.

Their numbers are in the contract.
"""

from pathlib import Path

import pytest
import torch
from contract.check import check, given, laid
from contract.common import BF16, F32, FORMATS
from contract.targets import TARGETS
from support.devices import assert_same_truth, on
from support.mlp import PLAIN
from support.problems import randn
from support.processes import run_pytest
from support.rule import assert_same, run

from poolformer_kernels import reference
from poolformer_kernels.ops import pool_mixer
from poolformer_kernels.ops.mlp import mlp, mlp_with_stats

from .cases import FUSED, MIXER, PAIR, SMALL, computed_late, each, huge, make_inputs, operator_of, over

pytestmark = pytest.mark.usefixtures("backend")


@over("shape, hidden", cuda=[((3, 17, 13, 29), None), SMALL[0]])
def test_truth_of_the_device_is_the_cpus(shape, hidden) -> None:
    operator, inputs = operator_of(hidden), make_inputs(shape, hidden, BF16)
    assert_same_truth(operator.problem.truth, inputs, operator.grad(inputs), residual=True)


# ---- devices, streams, graphs ------------------------------------------------------------------------------


@over(
    "shape, hidden, dtype",
    triton=each([MIXER, FUSED, PAIR], [F32]),
    cuda=[*each([MIXER], [F32]), *each(SMALL, [BF16])],
)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_device_that_is_not_current(shape, hidden, dtype, backend) -> None:
    operator = operator_of(hidden)

    def elsewhere(**arguments):
        tensors = {name: t.to("cuda:1") for name, t in arguments.items() if isinstance(t, torch.Tensor)}
        y = operator.call(**arguments | tensors)
        assert y.device == torch.device("cuda:1")
        return y.to("cuda:0")

    with torch.cuda.device(0):
        for layout in FORMATS:
            inputs = make_inputs(shape, hidden, dtype)
            check(TARGETS[backend], operator.problem, elsewhere, inputs, layout=layout, residual=True)
        assert torch.cuda.current_device() == 0


@over(
    "shape, hidden, dtype",
    triton=[((8, 64, 56, 56), None, F32), *each([FUSED, PAIR], [BF16])],
    cuda=[((8, 64, 56, 56), None, F32), *each(SMALL, [BF16])],
)
def test_stream_that_is_not_the_default(shape, hidden, dtype) -> None:
    inputs = on("cuda", make_inputs(shape, hidden, dtype))
    grad = torch.randn_like(inputs["x"])

    def values(*tensors):
        return run(operator_of(hidden).call, dict(zip(inputs, tensors, strict=True)), grad, residual=True)

    assert_same(computed_late(values, *inputs.values()), values(*inputs.values()))


GRAPHED = each([((4, 64, 28, 28), None)], FORMATS, [None])


@over(
    "shape, hidden, layout, save_hidden",
    triton=[*GRAPHED, *each([FUSED, PAIR], FORMATS, [False, True])],
    cuda=[*GRAPHED, *each(SMALL, FORMATS, [False, True])],
)
def test_graph_replay_with_changed_input(shape, hidden, layout, save_hidden) -> None:
    options = given(residual=True, save_hidden=save_hidden)
    inputs = laid(on("cuda", make_inputs(shape, hidden, BF16)), layout)
    grad = torch.randn_like(inputs["x"])

    def values():
        return run(operator_of(hidden).call, inputs, grad, **options)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        values()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = values()
    for seed in (1, 2):
        inputs["x"].copy_(randn(*inputs["x"].shape, mean=seed, seed=seed))
        for name in inputs.keys() - {"x"}:
            inputs[name].mul_(1.5)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(captured, values())


@pytest.mark.parametrize(
    ("file", "tests"),
    [
        ("pool_mixer", "test_pool_sizes or test_returned_statistics or (test_layouts and offset)"),
        ("mlp", "test_another_width or test_layouts_of_weights or (test_layouts and offset)"),
        ("mlp_backward", "test_hidden_saved and bfloat16"),
        ("both", "test_layouts and offset"),
    ],
)
def test_without_the_caching_allocator(file, tests, backend) -> None:
    """Every tensor is memory of its own then, and a kernel that writes or reads past one faults."""
    path = Path(__file__).parents[1] / "contract" / f"{file}.py"
    ours = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "POOLFORMER_TEST_TARGETS": backend}
    run_pytest(
        "-x", str(path), "-k", tests, cwd=path.parent, **ours
    )  # not where a source tree is found first


# ---- autocast and the compiler -----------------------------------------------------------------------------


def test_autocast_keeps_the_residual_stream_in_float32() -> None:
    inputs = on("cuda", make_inputs((2, 16, 8, 6), None, BF16, vector_dtype=F32))
    with torch.autocast("cuda", BF16):
        y = pool_mixer(**inputs, residual=True)
    assert y.dtype == F32
    assert torch.equal(y, pool_mixer(**(inputs | {"x": inputs["x"].float()}), residual=True))


COMPILED = each([(64, None)], [F32], FORMATS, [None])


@over(
    "channels, hidden, dtype, layout, save_hidden",
    triton=[*COMPILED, (64, 256, F32, "channels_last", True), (320, 640, F32, "nchw", False)],
    cuda=[
        *COMPILED,
        (64, 256, BF16, "channels_last", True),
        (128, 512, BF16, "nchw", False),
        (192, 192, BF16, "channels_last", False),
    ],
)
def test_compiled_whole_over_dynamic_batches(channels, hidden, dtype, layout, save_hidden) -> None:
    operator, options = operator_of(hidden), given(residual=True, save_hidden=save_hidden)
    torch._dynamo.reset()
    compiled = torch.compile(operator.call, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (2, 3, 5):
            inputs = make_inputs((batch, channels, 14, 14), hidden, dtype)
            grad, inputs = operator.grad(inputs).cuda(), on("cuda", laid(inputs, layout))
            found = run(compiled, inputs, grad, any_batch=True, **options)
            assert_same(found, run(operator.call, inputs, grad, **options))


# ---- more than 2^31 elements -------------------------------------------------------------------------------

SHAPES = {"batch": (170, 64, 448, 448), "sample": (1, 64, 8192, 4112)}


@pytest.mark.large
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_token_mixer_of_more_than_two_to_the_31_elements(shape, layout) -> None:
    x = huge(shape, layout, gib=40)
    assert x.numel() > 2**31
    y = pool_mixer(x, None, None, residual=True)
    # The last elements; all but its upper and left edge see only what is in it
    corner = x[-1:, -2:, -40:, -30:].double().contiguous()
    pooled = torch.nn.functional.avg_pool2d(corner, 3, 1, 1, count_include_pad=False)
    expected = corner + (pooled - corner) / (0.25 + 1e-5) ** 0.5
    assert torch.allclose(y[-1:, -2:, -39:, -29:].double(), expected[..., 1:, 1:], rtol=2e-2, atol=5e-2)


LARGE = (*((shape, 64, False) for shape in SHAPES.values()), ((44, 64, 448, 448), 256, True))


@pytest.mark.large
@over(
    "shape, hidden, save_hidden, layout",
    # 1280: so many hidden activations, which are written
    triton=each([*LARGE, ((17, 320, 320, 320), 1280, False)], FORMATS),
    cuda=each([*LARGE, ((1, 128, 4096, 4112), 64, False)], FORMATS),
)
def test_mlp_of_more_than_two_to_the_31_elements(shape, hidden, save_hidden, layout) -> None:
    """A token depends on no other, given statistics: the first and the last against the fp64 reference."""
    x = huge(shape, layout, gib=64)
    tokens = x.numel() // shape[1]
    assert tokens * max(shape[1], hidden) > 2**31
    parameters = on("cuda", make_inputs((1, shape[1], 1, 1), hidden, BF16, parameters=PLAIN))
    del parameters["x"]
    size = x[0].numel()
    stats = torch.tensor([[[size, -2.3, 0.25 * size]]], device="cuda").expand(shape[0], 1, 3)

    def exact(x, **options):
        doubled = {name: t if t is None else t.double() for name, t in parameters.items()}
        return reference.mlp(x.double(), **doubled, residual=True, **options)

    corners = [
        (slice(None, 1), ..., slice(None, 3), slice(None, 5)),
        (slice(-1, None), ..., slice(-3, None), slice(-5, None)),
    ]
    y, partials = mlp_with_stats(x, **parameters, norm=True, residual=True, stats=stats)
    for at in corners:
        wanted = exact(x[at], norm=True, stats=stats[:1].double())
        torch.testing.assert_close(y[at].double(), wanted, rtol=2e-2, atol=5e-2)
    mean = reference.merge_stats(partials.double())[0]
    assert abs(mean[-1].item() - y[-1].mean(dtype=torch.float64).item()) < 1e-3
    del y, partials

    x.requires_grad_()
    parameters["b2"].requires_grad_()
    y = mlp(x, **parameters, residual=True, save_hidden=save_hidden)
    ones = torch.ones((), dtype=BF16, device="cuda").expand(y.shape)
    dx, db2 = torch.autograd.grad(y, (x, parameters["b2"]), ones)
    for at in corners:
        corner = x[at].detach().double().requires_grad_()
        (wanted,) = torch.autograd.grad(exact(corner).sum(), corner)
        torch.testing.assert_close(dx[at].double(), wanted, rtol=2e-2, atol=5e-2)
    torch.testing.assert_close(db2.double(), torch.full_like(db2, tokens).double(), rtol=2**-7, atol=0)
