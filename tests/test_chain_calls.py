"""Inference as one operator: which calls run so, torch.compile and export, what the operator refuses."""

from dataclasses import replace

import pytest
import torch
from support.chain import (
    FIRST,
    LAST,
    ONE,
    RIGHT,
    SMALL,
    Calls,
    by_reference,
    calls,
    images,
    infer,
    make_model,
    operators_of,
)
from support.layouts import as_layout
from support.peers import randomise_all, relative_error
from support.problems import HALVES, randn
from support.processes import python
from support.rule import bits
from torch._dynamo.testing import EagerAndRecordGraphs

import poolformer_kernels as pk
from poolformer_kernels.models import PoolFormer
from poolformer_kernels.models.poolformer import PatchEmbed
from poolformer_kernels.ops.chain import CONV, MIXER, MLP, POOLS, Chain

pytestmark = pytest.mark.usefixtures("kernels")
OPERATOR = torch.ops.poolformer_kernels.chain_cpp.default
TINY = replace(SMALL, layers=(1, 1, 1, 1))  # for what is traced


@pytest.fixture
def x():
    return images(2, 3, 41, 33)


def test_inference_is_one_operator(x):
    model = make_model()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), Calls() as counted:
            model(x)
        assert dict(counted.counts) == {"chain_cpp": 1}


def test_parts_are_one_operator_each(x):
    model = make_model()
    y = infer(model.patch_embed, x)
    assert calls(model.patch_embed, x) == ONE
    assert calls(model.network[0], y) == ONE
    assert relative_error(infer(model.network[0], y), by_reference(model.network[0], y)) < RIGHT
    assert calls(model.network[0], y.contiguous()) == ONE
    assert infer(model.network[0], y.contiguous()).is_contiguous()


def test_training_calls_modules(x):
    model = make_model()
    with Calls() as counted:
        logits = model(x)
    assert "chain_cpp" not in counted.counts
    logits.sum().backward()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all(), name
        assert p.grad.any() != name.endswith("norm1.bias"), name  # which the token mixer cancels
    assert relative_error(logits.detach(), infer(model, x)) < RIGHT


def test_nchw_is_one_operator_a_stage(x):
    model = make_model(fmt=FIRST)
    assert calls(model, x.contiguous()) == {"chain_cpp": 4, "convolution": 4}
    assert relative_error(infer(model, x.contiguous()), by_reference(model, x)) < RIGHT


def test_features_are_one_operator_a_stage_and_a_convolution(x):
    model = make_model(features_only=True)
    assert calls(model, x) == {"chain_cpp": 8}
    for actual, exact in zip(infer(model, x), by_reference(model, x), strict=True):
        assert relative_error(actual, exact) < RIGHT


def test_other_calls_go_by_modules(x):
    model = make_model()
    exact = by_reference(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert "chain_cpp" not in calls(model, x)
        assert 1e-4 < relative_error(infer(model, x), exact) < 0.05
    with pk.use_backend("reference"):
        assert "chain_cpp" not in calls(model, x)
        assert relative_error(infer(model, x), exact) < RIGHT
    assert calls(model, x) == ONE
    with pk.use_backend("auto"):
        assert calls(model, x) == ONE
        assert calls(model.double(), x.double()).keys() == {"convolution"}


def test_vmap_goes_by_modules(x):
    try:
        with torch.no_grad():
            torch.func.vmap(torch.nn.GroupNorm(1, 4))(torch.ones(2, 1, 3, 3, 4).movedim(-1, 2))
    except RuntimeError as error:  # PyTorch 2.13
        pytest.skip(f"this PyTorch's own group_norm: {error}")
    model = make_model()
    many = torch.stack([x, images(2, 3, 41, 33, seed=8)])
    with torch.no_grad(), Calls() as counted:
        logits = torch.func.vmap(model)(many)
    assert "chain_cpp" not in counted.counts
    assert relative_error(logits, torch.stack([infer(model, each) for each in many])) < RIGHT


def test_a_subclass_is_called(x):
    class Negative(PoolFormer):
        def forward_features(self, x):
            return -super().forward_features(x)

    plain = make_model()
    model = Negative(SMALL, num_classes=7).eval()
    model.load_state_dict(plain.state_dict())
    assert relative_error(infer(model, x), by_reference(model, x)) < RIGHT
    assert relative_error(infer(model, x), infer(plain, x)) > 0.1


def test_x_of_another_dtype_than_the_weights_is_refused(x):
    model = make_model()
    before = infer(model, x)
    with pytest.raises(RuntimeError, match="type"):
        infer(model, x.bfloat16())
    assert torch.equal(infer(model, x), before)


def test_a_parameter_on_another_device_is_refused(x):
    model = make_model()
    infer(model, x)
    model.norm.to("meta")
    with pytest.raises((RuntimeError, ValueError), match=r"device|meta"):
        infer(model, x)


# ---- the operator under torch.library, torch.compile and torch.export --------------------------------------


def arguments(x, *modules, channels_last=True):
    chain = Chain()
    assert all(module.add_to(chain) for module in modules)
    parameters = [p.detach() for p in chain._parameters]
    return x, parameters, chain._steps, chain._epsilons, channels_last


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_opcheck(dtype, x):
    model, x = make_model(dtype=dtype), x.to(dtype)
    stage, y = model.network[0], infer(model.patch_embed, x)
    headless = make_model(dtype=dtype, head="timm", num_classes=0)
    for given in (
        arguments(x, model),
        arguments(x, headless),
        arguments(x[:0], model),
        arguments(as_layout(x, "sliced_c"), model.patch_embed, model.network[0]),
        arguments(y, stage),
        arguments(y.contiguous(), stage, channels_last=False),
    ):
        torch.library.opcheck(OPERATOR, given)


def test_compiled_for_any_batch_at_once(fresh_dynamo):
    model, backend = make_model(TINY), EagerAndRecordGraphs()
    graphs = backend.graphs
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    for batch in (2, 3, 5):
        x = images(batch, 3, 41, 33)
        assert relative_error(infer(compiled, x), infer(model, x)) < RIGHT
    assert len(graphs) == 1
    # Dynamo of PyTorch 2.13 does not see the layout of the stem's weight: an operator a stage
    assert len(operators_of(graphs[0].graph)) in ((1,) if torch.__version__ >= "2.15" else (1, 7))
    with torch.no_grad():
        model.network[0][0].mlp.fc1.weight.mul_(-1)
    assert relative_error(infer(compiled, x), infer(model, x)) < RIGHT
    assert len(graphs) == 1
    compiled(x).sum().backward()
    assert len(graphs) == 2
    assert "chain_cpp" not in operators_of(graphs[1].graph)
    assert model.patch_embed.proj.weight.grad.any()
    model.network[0][0].token_mixer.pool_size, before = 5, infer(model, x)
    logits = infer(compiled, x)
    assert relative_error(logits, by_reference(model, x)) < RIGHT
    assert relative_error(logits, before) > 1e-3


def test_exported(x):
    model = make_model(TINY)
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=shapes)
    assert operators_of(program.graph) == ["chain_cpp"]
    for batch in (1, 2, 7):
        other = images(batch, 3, 41, 33)
        assert torch.equal(bits(infer(program.module(), other)), bits(infer(model, other)))


# ---- what is refused ---------------------------------------------------------------------------------------

V = randn(2, 4, 5, 6)
EPS = [1e-5] * 4
OFFICIAL, TIMM = POOLS["official"], POOLS["timm"]
W1, W2 = torch.ones(8, 4), torch.ones(4, 8)
UNIT = torch.ones(8, 4, 1, 1)

REFUSED = {
    "no layers": ("must hold a layer", [], []),
    "an unknown kind": ("no layer of kind 9", [9, 0], []),
    "a negative kind": ("no layer of kind -1", [-1, 0], []),
    "a kind alone": ("within a layer", [MIXER], []),
    "no pool size": ("within a layer", [MIXER, 0], []),
    "a convolution cut short": ("within a layer", [CONV, 0, 1], [UNIT]),
    "no parameter": ("lacks a parameter", [MIXER, 1, 3], []),
    "no second weight": ("lacks a parameter", [MLP, 0, 0], [W1]),
    "an even pool size": ("pool_size .* got 2", [MIXER, 0, 2], []),
    "a negative pool size": ("pool_size .* got -3", [MIXER, 0, -3], []),
    "an unknown activation": ("no activation 5", [MLP, 0, 5], [W1, W2]),
    "a negative activation": ("no activation -1", [MLP, 0, -1], [W1, W2]),
    "a scale of another size": ("layer_scale_1 .* 4 elements", [MIXER, 4, 3], [torch.ones(5)]),
    "a norm of two dimensions": ("norm1.weight .* 4 elements", [MIXER, 1, 3], [torch.ones(4, 1)]),
    "an integer norm": ("must be float", [MIXER, 2, 3], [torch.ones(4, dtype=torch.int32)]),
    "fc1 of other columns": ("fc1.weight", [MLP, 0, 0], [torch.ones(8, 5), W2]),
    "fc1 of three dimensions": ("fc1.weight", [MLP, 0, 0], [torch.ones(8, 4, 1), W2]),
    "fc2 of other columns": ("fc2.weight", [MLP, 0, 0], [W1, torch.ones(4, 7)]),
    "fc2 of other rows": ("fc2.weight .* 4 rows", [MLP, 0, 0], [W1, torch.ones(5, 8)]),
    "fc2 of another dtype": ("fc1.weight's dtype", [MLP, 0, 0], [W1, W2.half()]),
    "fc1's bias of another size": ("fc1.bias .* 8 elements", [MLP, 1, 0], [W1, W2, torch.ones(4)]),
    "fc2's bias of another size": ("fc2.bias .* 4 elements", [MLP, 2, 0], [W1, W2, torch.ones(8)]),
    "a weight of other channels": ("weight .* 4,", [CONV, 0, 1, 0], [torch.ones(8, 3, 1, 1)]),
    "a weight of another dtype": ("x's dtype", [CONV, 0, 1, 0], [UNIT.half()]),
    "a weight of three dimensions": ("weight", [CONV, 0, 1, 0], [torch.ones(8, 4, 1)]),
    "a bias of another size": ("bias .* 8 elements", [CONV, 1, 1, 0], [UNIT, torch.ones(7)]),
    "no stride": ("stride must be positive", [CONV, 0, 0, 0], [UNIT]),
    "a negative padding": ("padding not negative", [CONV, 0, 1, -1], [UNIT]),
    "a kernel larger than x": ("smaller than", [CONV, 0, 1, 0], [torch.ones(8, 4, 6, 1)]),
    "a kernel larger by less than a stride": ("smaller than", [CONV, 0, 4, 0], [torch.ones(8, 4, 7, 7)]),
    "pooling first": ("pooling must follow", [OFFICIAL, 0], []),
    "pooling twice": ("pooling", [MIXER, 0, 3, OFFICIAL, 0, OFFICIAL, 0], []),
    "a token mixer behind the pooling": ("pooling", [TIMM, 0, MIXER, 0, 3], []),
    "an mlp behind the pooling": ("pooling", [MIXER, 0, 3, OFFICIAL, 0, MLP, 0, 0], [W1, W2]),
    "a parameter too many": ("parameter", [MIXER, 0, 3], [torch.ones(4)]),
    "an unknown parameter": ("parameter", [MIXER, 8, 3], [torch.ones(4)]),
}


@pytest.mark.parametrize(("message", "steps", "parameters"), REFUSED.values(), ids=REFUSED)
def test_the_operator_refuses(message, steps, parameters):
    with pytest.raises(RuntimeError, match=message):
        OPERATOR(V, parameters, steps, EPS[: 3 if "pooling" in message else 1], True)


@pytest.mark.parametrize(
    ("x", "epsilons", "channels_last", "message"),
    [
        (V.double(), EPS, True, "float32, bfloat16 or float16"),
        (V.int(), EPS, True, "float32, bfloat16 or float16"),
        (V[0], EPS, True, "B, C, H, W"),
        (V[:, :0], EPS, True, "channels and pixels"),
        (V[:, :, :0], EPS, True, "channels and pixels"),
        (V, [], True, "lacks its eps"),
        (V, EPS, False, "channels_last"),
    ],
    ids=["float64", "int32", "rank 3", "no channels", "no pixels", "no eps", "nchw convolution"],
)
def test_the_operator_refuses_x(x, epsilons, channels_last, message):
    with pytest.raises(RuntimeError, match=message):
        OPERATOR(x, [UNIT], [MIXER, 0, 3, CONV, 0, 1, 0], epsilons, channels_last)


def test_what_would_leave_memory_is_refused():
    """A kernel without rows and a convolution that enlarges what was pooled; a crash ends their process."""
    code = """
import torch, poolformer_kernels
x = torch.ones(1, 4, 5, 6)
for parameter, steps in (
    (torch.ones(8, 4, 0, 1), [0, 0, 1, 0]), (torch.ones(4, 4, 1, 1), [4, 0, 0, 0, 1, 1])
):
    try:
        torch.ops.poolformer_kernels.chain_cpp(x, [parameter], steps, [1e-5] * (len(steps) > 4), True)
    except RuntimeError as error:
        print("refused", "chain_cpp" in str(error))
"""
    assert python("-c", code).stdout == 2 * "refused True\n"


def test_no_samples():
    y = OPERATOR(V[:0], [UNIT], [CONV, 0, 2, 1], [], True)
    assert y.shape == (0, 8, 4, 4)
    assert OPERATOR(V[:0], [], [MIXER, 0, 3, OFFICIAL, 0], EPS[:2], True).shape == (0, 4)
    model = make_model()
    assert infer(model, images(2, 3, 33, 35)[:0]).shape == (0, 7)


@pytest.mark.parametrize("size", [(2, 2), (1, 9), (2, 9)], ids=str)
def test_a_convolution_refuses_images_that_eager_refuses(size):
    """Kernel 7, stride 4, padding 2: two pixels and their padding are one less than the kernel."""
    embed = randomise_all(PatchEmbed(3, 5, 7, 4, 2))
    for module in (embed.proj, embed):
        with pytest.raises(RuntimeError):
            infer(module, images(1, 3, *size))


def test_x_is_not_written():
    model = make_model()
    for module, shape in ((model, (2, 3, 41, 33)), (model.network[0], (3, SMALL.dims[0], 9, 7))):
        for fmt in (LAST, FIRST):
            x = images(*shape, fmt=fmt)
            before = x.clone()
            infer(module, x)
            assert torch.equal(bits(x), bits(before))
    chain = Chain()  # the MLP, which is computed in place further on
    mlp = model.network[0][0].mlp
    for _ in range(2):
        chain.mlp(mlp.fc1.weight, mlp.fc2.weight, (None,) * 5, "gelu", 1e-5)
    x = images(2, 16, 5, 7)
    before = x.clone()
    with torch.no_grad():
        assert relative_error(chain.run(x, True), before) > 0.1
    assert torch.equal(bits(x), bits(before))
