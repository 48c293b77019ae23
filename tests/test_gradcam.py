"""Grad-CAM: values against autograd in float64, and what it leaves alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.gradcam import CLASSES, tiny
from support.peers import randomise, require
from support.problems import randn
from torch import nn

import poolformer_kernels as pk
from poolformer_kernels.gradcam import grad_cam, target_layer
from poolformer_kernels.models import PoolFormer
from poolformer_kernels.nn.chain_cache import PLACE
from poolformer_kernels.numerics import errors, tolerance

require("captum")


def images(size: int = 128, dtype: torch.dtype = torch.float32, batch: int = 3) -> torch.Tensor:
    return randn(batch, 3, size, size, dtype=dtype, seed=3)


def map_of(activation: torch.Tensor, gradient: torch.Tensor, size: int) -> torch.Tensor:
    """Grad-CAM of a layer's ``[B, C, h, w]``, written out one image at a time."""
    maps = []
    for a, g in zip(activation.detach(), gradient, strict=True):
        raw = torch.zeros(a.shape[1:], dtype=a.dtype)
        for channel, weight in zip(a, g.flatten(1).mean(1), strict=True):
            raw += weight * channel
        wide = F.interpolate(raw.clamp_min(0)[None, None], (size, size), mode="bilinear")[0]
        wide -= wide.min()
        maps.append(wide / wide.max() if wide.max() > 0 else wide)
    return torch.stack(maps)


def expected(model: PoolFormer, x: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Of one of our models, through its two halves."""
    features = model.forward_features(x).detach().requires_grad_()
    score = sum(logits[c] for logits, c in zip(model.forward_head(features), classes, strict=True))
    (gradient,) = torch.autograd.grad(score, features)
    return map_of(features, gradient, x.shape[-1])


def timm_model(name: str, **options) -> nn.Module:
    timm = require("timm")
    torch.manual_seed(0)
    model = randomise(timm.create_model(name, num_classes=CLASSES, **options))
    for p in model.parameters():
        if not p.any():  # ResMLP's classifier starts as zero: nothing would depend on the picture
            nn.init.normal_(p, std=0.1)
    return model.eval()


# ---- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["official", "timm"])
def test_ours_in_float64(head):
    model, x = tiny(head).double().eval(), images(dtype=torch.float64)
    predicted = model(x).argmax(1)
    others = (predicted + torch.tensor([1, 2, 3])) % CLASSES
    for target, classes in ((None, predicted), (others, others), (2, torch.tensor([2, 2, 2]))):
        found = grad_cam(model, x, target)
        assert found.shape == (3, 1, 128, 128)
        assert found.dtype == torch.float64
        assert not found.requires_grad
        torch.testing.assert_close(found, expected(model, x, classes), rtol=1e-9, atol=1e-9)
        assert [found[i].min().item() for i in range(3)] == [0, 0, 0]
        assert [found[i].max().item() for i in range(3)] == pytest.approx([1, 1, 1])


def test_float32_is_within_the_error_rule():
    """Kernels that compute the network in float32, where eager is the chain of halves in float32."""
    model, x = tiny().eval(), images()
    classes = model(x).argmax(1)
    truth = expected(copy.deepcopy(model).double(), x.double(), classes)
    with pk.use_backend("reference"):
        eager = errors(expected(model, x, classes), truth)
    found = errors(grad_cam(model, x, classes), truth)
    assert found.within(tolerance(eager, truth, torch.float32))


def test_a_model_that_runs_as_one_call_without_gradients(kernels):
    """Inference in channels_last of frozen parameters is one operator call, which the watched layer ends."""
    model = tiny().eval().requires_grad_(False).to(memory_format=torch.channels_last)
    x = images().contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        classes = model(x).argmax(1)
        assert vars(model)[PLACE].chain is not None
        found = grad_cam(model, x).clone()
        assert model(x).argmax(1).equal(classes)
        assert vars(model)[PLACE].chain is not None
    with pk.use_backend("reference"):
        truth = expected(copy.deepcopy(model).double(), x.double(), classes)
        eager = errors(expected(model, x, classes), truth)
    assert errors(found, truth).within(tolerance(eager, truth, torch.float32))


def test_images_of_inference_mode():
    """Inference tensors, which autograd must not save, and parameters that require gradients."""
    model = tiny().eval()
    with torch.inference_mode():
        x = images(64)
        inside = grad_cam(model, x)
    assert inside.equal(grad_cam(model, images(64)))
    assert grad_cam(model, x).equal(inside)


def test_compiled_models_are_watched_too():
    x, whole, itself, inside = images(64), tiny().eval(), tiny().eval(), tiny().eval()
    plain = grad_cam(whole, x)
    compiled = torch.compile(whole, backend="eager")
    itself.compile(backend="eager")
    for module in inside.network:
        module.compile(backend="eager")
    for model in (compiled, itself, inside):
        model(x)
        assert grad_cam(model, x).equal(plain)
    assert target_layer(compiled) == "network.6"
    assert target_layer(torch.compile(timm_model("convnext_atto"), backend="eager")) == "stages.3"


def test_an_accelerated_timm_poolformer():
    require("timm")
    plain = tiny_timm()
    fast = pk.accelerate(copy.deepcopy(plain))
    assert "modules" not in str(pk.explain(fast))
    assert str(pk.explain(plain)).count("not accelerated") == 8
    x = images()
    classes = plain(x).argmax(1)
    assert target_layer(plain) == target_layer(fast) == "stages.3"
    truth = timm_map(copy.deepcopy(plain).double(), "stages.3", x.double(), classes)
    eager = errors(grad_cam(plain, x), truth)
    found = errors(grad_cam(fast, x), truth)
    assert found.within(tolerance(eager, truth, torch.float32))
    assert eager.largest < 1e-4


def tiny_timm() -> nn.Module:
    """timm's PoolFormer of the size of `tiny`."""
    from timm.models.metaformer import GroupNorm1, MetaFormer

    torch.manual_seed(0)
    model = MetaFormer(
        depths=(1, 1, 1, 1),
        dims=(16, 24, 32, 40),
        downsample_norm=None,
        mlp_act=nn.GELU,
        mlp_bias=True,
        norm_layers=GroupNorm1,
        layer_scale_init_values=1e-5,
        res_scale_init_values=None,
        use_mlp_head=False,
        num_classes=CLASSES,
    )
    return randomise(model).eval()


def timm_map(
    model: nn.Module, layer: str, x: torch.Tensor, classes: torch.Tensor, to_map=None
) -> torch.Tensor:
    """Of any model: the layer's output is kept, and the gradient with respect to it taken."""
    kept = []
    hook = model.get_submodule(layer).register_forward_hook(lambda module, args, out: kept.append(out))
    logits = model(x)
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[torch.arange(len(x)), classes].sum(), kept[0])
    to_map = to_map or (lambda t: t)
    return map_of(to_map(kept[0]), to_map(gradient), x.shape[-1])


def tokens(prefix: int, side: int):
    """Tokens behind ``prefix`` others, row by row."""

    def to_map(t: torch.Tensor) -> torch.Tensor:
        rows = [t[:, prefix + side * i : prefix + side * (i + 1)] for i in range(side)]
        return torch.stack(rows, 1).permute(0, 3, 1, 2)

    return to_map


VIT = {"img_size": 64, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2}
OTHERS = [
    ("resnet18", {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}, 64, "layer4.0", None),
    ("deit_tiny_patch16_224", VIT, 64, "blocks.1.norm1", tokens(1, 4)),
    ("deit_tiny_distilled_patch16_224", VIT, 64, "blocks.1.norm1", tokens(2, 4)),
    ("resmlp_12_224", {"img_size": 64}, 64, "blocks.11", tokens(0, 4)),
    ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}, 64, "stages.3", None),
    (
        "swin_tiny_patch4_window7_224",
        {
            "img_size": 64,
            "embed_dim": 12,
            "depths": (1, 1, 1, 1),
            "num_heads": (1, 1, 1, 1),
            "window_size": 2,
        },
        64,
        "layers.3.blocks.0",
        lambda t: t.permute(0, 3, 1, 2),
    ),
]


@pytest.mark.parametrize(("name", "options", "size", "layer", "to_map"), OTHERS, ids=[o[0] for o in OTHERS])
def test_timms_models(name, options, size, layer, to_map):
    model = timm_model(name, **options).double()
    x = images(size, torch.float64)
    classes = torch.tensor([4, 0, 2])
    truth = timm_map(model, layer, x, classes, to_map)
    assert target_layer(model) == layer
    assert truth.amax() == 1  # not all zero
    torch.testing.assert_close(grad_cam(model, x, classes), truth, rtol=1e-9, atol=1e-9)


def test_a_layer_that_is_given():
    model, x = tiny().double().eval(), images(dtype=torch.float64)
    classes = model(x).argmax(1)
    truth = timm_map(model, "network.2", x, classes)
    torch.testing.assert_close(grad_cam(model, x, layer=model.network[2]), truth, rtol=1e-9, atol=1e-9)


def test_pictures_that_are_not_square():
    model = tiny().double().eval()
    x = randn(2, 3, 64, 160, dtype=torch.float64)
    found = grad_cam(model, x, 1)
    assert found.shape == (2, 1, 64, 160)
    one = torch.cat([grad_cam(model, x[i : i + 1], 1) for i in range(2)])
    torch.testing.assert_close(found, one, rtol=1e-9, atol=1e-9)


# ---- what is left alone ------------------------------------------------------------------------------------


def test_the_model_is_left_as_it_was():
    model, x = tiny().train(), images()
    model.network[0].eval()
    model.head.weight.requires_grad_(False)
    model.head.bias.grad = torch.full_like(model.head.bias, 7.0)
    seen = []
    model.network[-1].register_forward_hook(lambda module, args, out: seen.append(module))
    before = {name: (p.detach().clone(), p.requires_grad, p.grad) for name, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    hooks = [[*m._forward_hooks] for m in model.modules()]
    kept = x.clone()

    def unchanged() -> None:
        assert [m.training for m in model.modules()] == modes
        assert [[*m._forward_hooks] for m in model.modules()] == hooks
        for name, p in model.named_parameters():
            value, requires_grad, grad = before[name]
            assert p.detach().equal(value)
            assert p.requires_grad is requires_grad
            assert p.grad is grad
        assert not x.requires_grad
        assert x.equal(kept)

    grad_cam(model, x)
    unchanged()
    assert seen == [model.network[-1]]
    with pytest.raises(ValueError, match="target is 5"):
        grad_cam(model, x, 5)
    unchanged()
    assert torch.is_grad_enabled()


def test_eval_mode_counts_while_the_map_is_made():
    """Batch norm of a training model would mix the images, and its statistics would move."""
    model = timm_model("resnet18", layers=(1, 1, 1, 1), channels=(8, 8, 16, 16))
    x = images(64)
    in_eval = grad_cam(model, x, 1)
    model.train()
    statistics = copy.deepcopy(dict(model.named_buffers()))
    assert grad_cam(model, x, 1).equal(in_eval)
    assert all(b.equal(statistics[name]) for name, b in model.named_buffers())


def test_zero_and_constant_maps_are_zero():
    model, x = tiny().eval(), images()
    nn.init.zeros_(model.head.weight)
    assert grad_cam(model, x, 0).equal(torch.zeros(3, 1, 128, 128))

    class Constant(nn.Module):
        def __init__(self, sign: float) -> None:
            super().__init__()
            self.layer, self.sign = nn.Identity(), sign

        def forward(self, x):
            return self.sign * self.layer(x).mean((2, 3))

    for sign in (1.0, -1.0):  # the same everywhere; nothing positive
        constant = Constant(sign)
        assert grad_cam(constant, torch.ones(2, 3, 8, 8), 1, constant.layer).equal(torch.zeros(2, 1, 8, 8))


# ---- errors ------------------------------------------------------------------------------------------------


def test_errors_name_the_argument():
    model, x = tiny(), images(64, batch=2)
    wrong = [
        (TypeError, "model must be a torch.nn.Module, got str", ("model", x)),
        (TypeError, "images must be a tensor, got list", (model, [x])),
        (TypeError, "images must be of a floating dtype, got torch.uint8", (model, x.byte())),
        (
            ValueError,
            r"images must have shape \[B, 3, H, W\] and not be empty, got \[3, 64, 64\]",
            (model, x[0]),
        ),
        (TypeError, "target must be an int, a tensor of integers or None, got bool", (model, x, True)),
        (TypeError, "target must be .*, got torch.float32", (model, x, torch.ones(2))),
        (
            ValueError,
            r"target must have shape \[2\], one class an image, got \[3\]",
            (model, x, torch.arange(3)),
        ),
        (ValueError, "target is -1; allowed: 0 to 4", (model, x, torch.tensor([0, -1]))),
        (TypeError, "layer must be a torch.nn.Module or None, got str", (model, x, 0, "network")),
        (ValueError, "layer must be one of the model's modules", (model, x, 0, nn.Identity())),
        (ValueError, "no layer is known for Linear; allowed: .*MetaFormer", (nn.Linear(2, 2), x)),
        (ValueError, "1 x 1 pixels for images of 32 x 32, which shows no place", (model, x[..., :32, :32])),
        (ValueError, r"output must be \[B, C, h, w\] or tokens .*, got \[2, 5\]", (model, x, 0, model.head)),
    ]
    for kind, message, arguments in wrong:
        with pytest.raises(kind, match=message):
            grad_cam(*arguments)
    backbone = PoolFormer(model.config, features_only=True)
    with pytest.raises(ValueError, match="features_only=True; allowed: a classifier"):
        grad_cam(backbone, x)
    tokens_at_once = timm_model("deit_tiny_patch16_224", **VIT)
    tokens_at_once.num_prefix_tokens = 0  # the class token cannot lie in the map
    with pytest.raises(ValueError, match="17 tokens for images of 64 x 64 are no square map"):
        grad_cam(tokens_at_once, x)
    unused = tiny()
    unused.add_module("spare", nn.Identity())
    with pytest.raises(RuntimeError, match="layer was not called"):
        grad_cam(unused, x, 0, unused.spare)
