"""MetaFormer: every mixer and ablation against the formulas, and the modules as objects."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.metaformer import LAYERS, SIZE, Shift, tiny, twin
from support.peers import relative_error
from support.problems import randn, seeded
from torch import nn

import poolformer_kernels as pk
from poolformer_kernels.ops.chain import Chain

CASES = {
    "pooling": {},
    "pool_5": {"pool_size": 5},
    "identity": {"token_mixers": "identity"},
    "random_matrix": {"token_mixers": "random_matrix"},
    "convolution": {"token_mixers": "convolution", "pool_size": 5},
    "attention": {"token_mixers": "attention"},
    "ppaa": {"token_mixers": ("pooling", "pooling", "attention", "attention"), "norm_layer": "layer"},
    "ppff": {"token_mixers": ["pooling", "pooling", "spatial_fc", "spatial_fc"]},
    "callables": {"token_mixers": ("pooling", Shift, "identity", Shift), "act_layer": nn.Tanh},
    "layer_norm": {"norm_layer": "layer", "act_layer": "relu"},
    "batch_norm": {"norm_layer": "batch", "act_layer": "silu"},
    "no_norm": {"norm_layer": "none"},
    "no_residual": {"residual": False},
    "no_residual_attention": {"residual": False, "token_mixers": "attention", "norm_layer": "layer"},
    "no_mlp": {"mlp": False},
    "no_mlp_no_residual": {"mlp": False, "residual": False, "token_mixers": "convolution"},
    "no_layer_scale": {"layer_scale_init": None, "token_mixers": "convolution"},
}


def leaves(model):
    return [p for p in model.parameters() if p.requires_grad]


def largest_error(gradients, exact):
    """The largest of the errors, as fractions of the gradient, or of a 20th of the largest gradient."""
    largest = max(e.norm() for e in exact)  # some are zero, but for rounding
    pairs = zip(gradients, exact, strict=True)
    return max(((g - e).norm() / max(e.norm(), largest / 20)).item() for g, e in pairs)


def conditioning(exact, x, weight, expected):
    """How far the float64 gradients move when x is rounded to float32 in other ways."""
    moved = []
    for seed in range(4):
        other = x.double() * (1 + 2**-24 * randn(*x.shape, seed=seed).double())
        gradients = torch.autograd.grad((exact(other) * weight).sum(), leaves(exact))
        moved.append(largest_error(gradients, expected))
    return max(moved)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_the_formulas(case):
    model = tiny(**CASES[case])
    weight, x = randn(3, 7, seed=1), randn(3, 3, *SIZE, mean=0.1)
    exact = copy.deepcopy(model).double()
    state = {**dict(exact.named_parameters()), **dict(exact.named_buffers())}
    maps, logits = twin(model.config, state, x.double())
    expected = torch.autograd.grad((logits * weight).sum(), leaves(exact))
    assert logits.std(0).norm() > 1e-3  # the image matters
    for own, tolerance in ((exact, 1e-10), (model, 2e-5)):
        dtype = own.head.weight.dtype
        assert relative_error(own.forward_features(x.to(dtype)), maps) < tolerance
        y = own(x.to(dtype))
        assert relative_error(y, logits) < tolerance
        grads = torch.autograd.grad((y * weight).sum(), leaves(own))
        with torch.no_grad():  # the inference chain, where there is one
            last = x.to(dtype, memory_format=torch.channels_last)
            assert relative_error(own(last), logits) < tolerance
        allowed = 10 * tolerance
        if own is model:  # attention on so few tokens amplifies any rounding two hundred times
            allowed = max(allowed, 32 * conditioning(exact, x, weight, expected))
        assert largest_error(grads, expected) < allowed


def test_kernels_compute_what_they_can():
    """Pooling with GroupNorm is the operator, so is every MLP; what is left is named."""
    found = pk.explain(tiny(token_mixers=("pooling", "pooling", "attention", "attention")))
    fused = [call.path for call in found.calls if call.backend != "modules"]
    assert [p for p in fused if p.endswith("token_mixer")] == [f"network.{i}.0.token_mixer" for i in (0, 2)]
    assert sum(p.endswith("mlp") for p in fused) == sum(LAYERS)
    assert "token_mixer is poolformer_kernels.nn.Attention, not Pooling" in str(found)
    calls = pk.explain(tiny(norm_layer="layer", mlp=False)).calls
    reason = "norm1 is poolformer_kernels.nn.ChannelLayerNorm, not a GroupNorm of one group"
    assert {call.reason for call in calls} == {reason}
    assert {call.operator for call in calls} == {"pool_mixer"}  # of an MLP that is not there nothing is said


def test_another_pool_and_activation_stay_one_operator_in_inference():
    for structure, chained in (({"pool_size": 5, "act_layer": "relu"}, True), ({"residual": False}, False)):
        assert tiny(**structure).add_to(Chain()) is chained


def test_batch_norm_trains():
    model = tiny(norm_layer="batch").train()
    x = randn(4, 3, *SIZE, mean=0.1)
    before = model.norm.running_mean.clone()
    n = model.patch_embed(x)
    block = model.network[0][0]
    normed = F.batch_norm(n, None, None, block.norm1.weight, block.norm1.bias, training=True)
    pooled = F.avg_pool2d(normed, 3, 1, 1, count_include_pad=False) - normed
    expected = n + block.layer_scale_1.view(-1, 1, 1) * pooled
    assert relative_error(block.mixer_with_stats(n, None, False)[0], expected) < 1e-6
    model(x).square().sum().backward()
    assert not torch.equal(model.norm.running_mean, before)


@pytest.mark.parametrize("structure", [{}, {"residual": False}, {"mlp": False}], ids=str)
def test_drop_path_drops_the_branch(structure):
    model = tiny(drop_path_rate=0.5, token_mixers="convolution", **structure)
    x = randn(64, 96, 3, 4)
    block = model.network[6][0].train()
    y = seeded(block, x, seed=1)
    torch.manual_seed(1)
    kept = [torch.empty(64).bernoulli_(0.5).view(-1, 1, 1, 1) for _ in range(2)]
    assert 10 < kept[0].sum() < 54
    m = 2 * kept[0] * block.layer_scale_1.view(-1, 1, 1) * block.token_mixer(block.norm1(x))
    z = m if structure.get("residual") is False else x + m
    if block.mlp is not None:
        m = 2 * kept[1] * block.layer_scale_2.view(-1, 1, 1) * block.mlp(block.norm2(z))
        z = m if structure.get("residual") is False else z + m
    assert relative_error(y, z) < 1e-5


def test_random_matrix_is_frozen_and_saved():
    model = tiny(token_mixers="random_matrix").requires_grad_(True)
    matrix = model.network[2][0].token_mixer.random_matrix
    assert not matrix.requires_grad
    assert "network.2.0.token_mixer.random_matrix" in model.state_dict()
    assert torch.allclose(matrix.sum(1), torch.ones(35))
    widths = matrix.log().aminmax(dim=1)  # torch.rand's numbers, but for one constant a row
    assert 0.95 < (widths.max - widths.min).max() < 1
    assert matrix.std() > 0.2 / 35


def test_position_embedding_moves_the_indices_after_it():
    model = tiny(token_mixers=("pooling", "pooling", "attention", "attention"))
    kinds = [type(module).__name__ for module in model.network]
    stage, embed = "PoolFormerStage", "PatchEmbed"
    assert kinds == [stage, embed, stage, embed, "PositionEmbedding", stage, embed, stage]
    assert model.network[4].pos_embed.shape == (1, 64, 3, 4)


@pytest.mark.parametrize("norm_layer", ["group", "layer", "batch"])
def test_features_and_heads(norm_layer):
    structure = {"token_mixers": ("pooling", "attention", "identity", "attention"), "norm_layer": norm_layer}
    model, backbone = tiny(**structure), tiny(features_only=True, **structure)
    backbone.load_state_dict(model.state_dict(), strict=False)
    x = randn(2, 3, *SIZE)
    with torch.no_grad():
        maps = backbone(x)
        assert [m.shape[1:] for m in maps] == [(32, 10, 14), (32, 5, 7), (64, 3, 4), (96, 2, 2)]
        last = model.forward_features(x)
        assert relative_error(maps[3], backbone.norm6(last)) < 1e-6
        pooled = model.forward_head(last, pre_logits=True)
        assert relative_error(pooled, model.norm(last).mean((2, 3))) < 1e-6
        if norm_layer == "batch":
            with pytest.raises(ValueError, match=r"head is 'timm'; allowed: official"):
                model.head_mode = "timm"
            return
        model.head_mode = "timm"
        expected = F.layer_norm(last.mean((2, 3)), (96,), model.norm.weight, model.norm.bias, 1e-6)
        assert relative_error(model.forward_head(last, pre_logits=True), expected) < 1e-6
    model.reset_classifier(4)
    assert model(x).shape == (2, 4)


# ---- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random_matrix", "spatial_fc", "attention"])
def test_images_of_another_size(kind):
    model = tiny(token_mixers=("pooling", "pooling", "pooling", kind))
    with pytest.raises(ValueError, match=r"40 x 88 pixels; .*=\(40, 56\).*=\(40, 88\)"):
        model(torch.zeros(1, 3, 40, 88))


def test_a_block_without_an_mlp_hands_its_statistics_on():
    block, x = pk.nn.MetaFormerBlock(8, mlp=False), torch.randn(1, 8, 5, 5)
    stats = pk.reference.sample_stats(x)
    y, handed = block.mlp_with_stats(x, stats, True)
    assert y is x
    assert handed is stats
