"""PoolFormerV2 against timm's, and StarReLU's fold into fc2."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.export import DIMS, LAYERS, ours, theirs
from support.models import images, on_meta
from support.nn import gradients
from support.peers import randomise, randomise_all, relative_error, require
from support.problems import randn, seeded

import poolformer_kernels as pk
from poolformer_kernels.models import ModelConfig, PoolFormerV2
from poolformer_kernels.nn import MetaFormerBlock, Mlp, PoolFormerBlock, StarReLU
from poolformer_kernels.ops.chain import Chain
from poolformer_kernels.profiling import count_macs

# ---- the models --------------------------------------------------------------------------------------------


def test_macs_are_poolformers_with_other_norms():
    v1, v2 = (count_macs(on_meta(f"poolformer{v}_s12"), (1, 3, 224, 224)) for v in ("", "v2"))
    assert v2["convolution"] == v1["convolution"]
    assert v2["group_norm"] == v1["group_norm"] - 5 * 512 * 49
    assert v2["layer_norm"] == 5 * (64 * 3136 * 2 + 128 * 784 + 320 * 196 + 512)


def test_the_released_size_equals_timm_and_its_file_loads(tmp_path):
    peer = randomise_all(require("timm").create_model("poolformerv2_s12", num_classes=20))
    torch.save(peer.state_dict(), tmp_path / "timm.pth")
    model = pk.create_model("poolformerv2_s12", num_classes=20, checkpoint=tmp_path / "timm.pth").eval()
    x = images(1, 3, 224, 224)
    with torch.no_grad():
        assert relative_error(model(x), peer(x)) < 1e-5
    # a file of our own, under our keys; .safetensors knows no head mode
    require("safetensors.torch").save_file(model.state_dict(), tmp_path / "ours.safetensors")
    again = pk.create_model("poolformerv2_s12", num_classes=20)
    assert pk.load_checkpoint(again, tmp_path / "ours.safetensors").source == "official"
    assert again.head_mode == "timm"
    with torch.no_grad():
        assert torch.equal(again.eval()(x), model(x))
    with pytest.raises(ValueError, match=r"does not fit poolformer_s12"):
        pk.create_model("poolformer_s12", num_classes=20, checkpoint=tmp_path / "timm.pth")


def test_logits_and_gradients_meet_the_error_rule(backend):
    """In the root mean square over eight inputs: a network's largest error is one element's luck, and in one
    input all early layers share the rounding errors of the gradient behind them.
    """
    model = ours("PoolFormerV2")
    peer = theirs("timm", "PoolFormerV2", pk.export_state_dict(model.state_dict(), "timm"))
    models = (model, peer, copy.deepcopy(peer).double())
    found = ([], [], [])
    for i in range(8):
        x, weight = images(2, 3, 48 + i, 37 + 4 * i, seed=2 * i), images(2, 7, seed=2 * i + 1)
        for each, values in zip(models, found, strict=True):
            grads = gradients(each, x.to(next(each.parameters()).dtype), weight)
            of_call = {name: grads.pop(name).flatten() for name in ("y", "dx")}
            values.append(of_call | (grads if each is model else pk.convert_state_dict(grads)))
    for name in found[0][0]:
        actual, eager, exact = (torch.cat([v[name] for v in values]).double() for values in found)
        floor = 4.5 * torch.finfo(torch.float32).eps * exact.norm()
        assert (actual - exact).norm() <= 1.5 * (eager - exact).norm() + floor, name


def test_initial_values():
    torch.manual_seed(0)
    model = PoolFormerV2(ModelConfig("small", LAYERS, DIMS, None, 0.1, None, 1.0))
    assert 0.018 < model.network[3].proj.weight.std() < 0.022
    assert not model.patch_embed.proj.bias.any()
    scales = [p for name, p in model.named_parameters() if "res_scale" in name]  # of the last two stages
    assert [p.unique().tolist() for p in scales] == [[1.0]] * 8
    act = model.network[0][0].mlp.act
    assert (act.scale.item(), act.bias.item()) == (1.0, 0.0)


def test_the_head_normalises_the_mean():
    model, x = ours("PoolFormerV2"), images(2, 3, 32, 32)
    model.reset_classifier(3)
    with torch.no_grad():
        pooled = model.forward_features(x).mean((2, 3))
        expected = F.layer_norm(pooled, DIMS[-1:], model.norm.weight, model.norm.bias, 1e-6)
        assert relative_error(model(x), expected @ model.head.weight.T) < 1e-5


# ---- StarReLU and ResScale ---------------------------------------------------------------------------------


def star_mlp(bias=False, **options):
    torch.manual_seed(0)
    mlp = Mlp(6, 20, 9, act_layer=lambda: StarReLU(0.8, -0.4), bias=bias, **options)
    for p in mlp.parameters():
        if p.dim() > 1 or p.numel() > 1:
            torch.nn.init.normal_(p, std=0.4)
    return mlp


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("use_conv", [False, True])
def test_star_relu_is_folded_with_its_gradients(bias, use_conv):
    mlp = star_mlp(bias, use_conv=use_conv).double()
    assert mlp.unfused_reason() is None
    assert mlp.activation == "relu_squared"
    x = randn(2, 6, 5, 7, dtype=torch.float64) if use_conv else randn(2, 5, 6, dtype=torch.float64)
    weight = torch.randn_like(mlp(x))
    found = gradients(mlp, x, weight)
    for name, right in gradients(mlp, x, weight, lambda mlp, x: mlp.fc2(mlp.act(mlp.fc1(x)))).items():
        assert relative_error(found[name], right) < (1e-14 if name == "y" else 1e-12), name


def test_star_relu_zero_scale_has_a_gradient():
    mlp = star_mlp()
    torch.nn.init.zeros_(mlp.act.scale)
    x = randn(2, 6, 5, 7)
    mlp(x).sum().backward()
    r = F.relu(mlp.fc1(x)).square()
    assert relative_error(mlp.act.scale.grad, F.conv2d(r, mlp.fc2.weight).sum().view(1)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_star_relu_is_folded_into_half_weights_with_float32_sums(dtype):
    act, weight, bias = StarReLU(0.8, -0.4).to(dtype), randn(9, 300, 1, 1, dtype=dtype), randn(9, dtype=dtype)
    scale, shift = (p.detach().double() for p in (act.scale, act.bias))
    exact = shift * weight.double().sum((1, 2, 3))
    for given, expected in ((None, exact), (bias, exact + bias.double())):
        folded, offset = act.fold(weight, given)
        assert folded.dtype == dtype
        assert torch.equal(folded, (scale * weight.double()).to(dtype))
        assert offset.dtype == torch.float32
        assert relative_error(offset, expected) < 1e-6


def test_a_changed_star_relu_is_seen_in_inference():
    """The fold is computed in each call: nothing keeps the old one."""
    block = PoolFormerBlock(6, act_layer=StarReLU).eval()
    assert not block.add_to(Chain())
    stage = pk.nn.PoolFormerStage(block)
    x = randn(2, 6, 5, 7).to(memory_format=torch.channels_last)
    torch.nn.init.ones_(block.layer_scale_2)
    with torch.no_grad():
        first = stage(x)
        block.mlp.act.bias.add_(1)
        difference = stage(x) - first
    expected = block.mlp.fc2.weight.sum((1, 2, 3)).view(-1, 1, 1).expand_as(difference)
    assert relative_error(difference, expected) < 1e-4


def test_res_scale_keeps_a_half_residual_stream_under_autocast():
    torch.manual_seed(0)
    block = randomise(MetaFormerBlock(6, res_scale_init_value=0.7)).eval()
    x = randn(2, 6, 5, 7, mean=0.5).bfloat16()
    expected = block(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, expected) < 0.02


@pytest.mark.parametrize("training", [False, True])
def test_res_scale_block_is_its_formula(training, backend):
    torch.manual_seed(0)
    block = randomise(MetaFormerBlock(6, drop_path=0.5, res_scale_init_value=0.7)).train(training)
    for p in (block.res_scale_1, block.res_scale_2):
        torch.nn.init.normal_(p, 0.7, 0.2)
    x, weight = randn(8, 6, 5, 7, mean=0.5), randn(8, 6, 5, 7, seed=1)
    torch.manual_seed(3)
    keep = [torch.empty(8).bernoulli_(0.5).mul(2).view(-1, 1, 1, 1) if training else 1.0 for _ in range(2)]

    def formula(block, x):
        n = block.norm1(x)
        branch = F.avg_pool2d(n, 3, 1, 1, count_include_pad=False) - n
        z = block.res_scale_1.view(-1, 1, 1) * x + keep[0] * block.layer_scale_1.view(-1, 1, 1) * branch
        branch = block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(z))))
        return block.res_scale_2.view(-1, 1, 1) * z + keep[1] * block.layer_scale_2.view(-1, 1, 1) * branch

    expected = gradients(block, x, weight, formula)
    found = seeded(gradients, block, x, weight, seed=3)
    assert relative_error(found["y"], expected["y"]) < 1e-6
    for name, right in expected.items():
        assert (found[name] - right).norm() < 1e-5 * (right.norm() + 1), name
