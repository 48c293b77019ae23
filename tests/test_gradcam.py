"""Grad-CAM: values against autograd in float64, and what it leaves alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.gradcam import CLASSES, DIMS, tiny
from support.models import unchanged
from support.peers import poolformer_of_timm, randomise, require, timm_model
from support.problems import randn
from support.rule import assert_close_to_fp64
from torch import nn

import poolformer_kernels as pk
from poolformer_kernels.gradcam import grad_cam, target_layer
from poolformer_kernels.models import PoolFormer
from poolformer_kernels.nn.chain_cache import PLACE

require("captum")


def images(size: int = 128, dtype: torch.dtype = torch.float32, batch: int = 3) -> torch.Tensor:
    return randn(batch, 3, size, size, dtype=dtype, seed=3)


def map_of(activation: torch.Tensor, gradient: torch.Tensor, size: int) -> torch.Tensor:
    """Grad-CAM of a layer's ``[B, C, h, w]``, written out one image at a time."""
    maps = []
    for a, g in zip(activation.detach(), gradient, strict=True):
        raw = torch.einsum("c,chw->hw", g.mean((1, 2)), a)
        wide = F.interpolate(raw.clamp_min(0)[None, None], (size, size), mode="bilinear")[0]
        wide -= wide.min()
        maps.append(wide / wide.max() if wide.max() > 0 else wide)
    return torch.stack(maps)


def as_it_is(t: torch.Tensor) -> torch.Tensor:
    return t


def expected(
    model: nn.Module, x: torch.Tensor, classes: torch.Tensor, layer: str = "network.6", to_map=as_it_is
) -> torch.Tensor:
    """The layer's output is kept, and the gradient with respect to it taken."""
    kept = []

    def keep(module, args, out):
        kept.append(out.detach().requires_grad_())
        return kept[0]

    hook = model.get_submodule(layer).register_forward_hook(keep)
    logits = model(x)
    hook.remove()
    (gradient,) = torch.autograd.grad(logits[torch.arange(len(x)), classes].sum(), kept[0])
    return map_of(to_map(kept[0]), to_map(gradient), x.shape[-1])


def assert_right(found: torch.Tensor, model: nn.Module, x: torch.Tensor, classes: torch.Tensor) -> None:
    """By the error rule, beside the map of PyTorch's own operators."""
    with pk.use_backend("reference"):
        truth = expected(copy.deepcopy(model).double(), x.double(), classes)
        eager = expected(model, x, classes)
    assert_close_to_fp64(found, eager, truth, ulps=0)


# ---- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["official", "timm"])
def test_ours_in_float64(head):
    model, x = tiny(head).double().eval(), images(dtype=torch.float64)
    predicted = model(x).argmax(1)
    others = (predicted + torch.tensor([1, 2, 3])) % CLASSES
    for target, classes in ((None, predicted), (others, others), (2, torch.tensor([2, 2, 2]))):
        found = grad_cam(model, x, target)
        assert not found.requires_grad
        torch.testing.assert_close(found, expected(model, x, classes), rtol=1e-9, atol=1e-9)
        assert found.amin((1, 2, 3)).tolist() == [0, 0, 0]
        assert found.amax((1, 2, 3)).tolist() == pytest.approx([1, 1, 1])


def test_float32_is_within_the_error_rule():
    """Kernels that compute the network in float32, where eager is the chain of halves in float32."""
    model, x = tiny().eval(), images()
    classes = model(x).argmax(1)
    assert_right(grad_cam(model, x, classes), model, x, classes)


def test_a_model_that_runs_as_one_call_without_gradients(kernels):
    """Inference in channels_last of frozen parameters is one operator call, which the watched layer ends."""
    model = tiny().eval().requires_grad_(False).to(memory_format=torch.channels_last)
    x = images().contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        predicted = model(x).argmax(1)
        assert vars(model)[PLACE].chain is not None
        found = grad_cam(model, x).clone()
        assert model(x).argmax(1).equal(predicted)
        assert vars(model)[PLACE].chain is not None
    assert_right(found, model, x, predicted.clone())  # autograd takes no tensor of inference mode


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
    torch.manual_seed(0)
    plain = randomise(poolformer_of_timm((1, 1, 1, 1), DIMS, CLASSES)).eval()
    fast = pk.accelerate(copy.deepcopy(plain))
    assert "modules" not in str(pk.explain(fast))
    assert str(pk.explain(plain)).count("not accelerated") == 8
    x = images()
    classes = plain(x).argmax(1)
    assert target_layer(plain) == target_layer(fast) == "stages.3"
    truth = expected(copy.deepcopy(plain).double(), x.double(), classes, "stages.3")
    eager = grad_cam(plain, x)
    assert_close_to_fp64(grad_cam(fast, x), eager, truth, ulps=0)
    torch.testing.assert_close(eager.double(), truth, rtol=0, atol=1e-4)


def tokens(prefix: int, side: int):
    """Tokens behind ``prefix`` others, row by row."""

    return lambda t: t[:, prefix:].unflatten(1, (side, side)).permute(0, 3, 1, 2)


ONES = (1, 1, 1, 1)
RESNET = {"layers": ONES, "channels": (8, 8, 16, 16)}
VIT = {"img_size": 64, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 64, "embed_dim": 12, "depths": ONES, "num_heads": ONES, "window_size": 2}
OTHERS = [
    ("resnet18", RESNET, "layer4.0", as_it_is),
    ("deit_tiny_patch16_224", VIT, "blocks.1.norm1", tokens(1, 4)),
    ("deit_tiny_distilled_patch16_224", VIT, "blocks.1.norm1", tokens(2, 4)),
    ("resmlp_12_224", {"img_size": 64}, "blocks.11", tokens(0, 4)),
    ("convnext_atto", {"depths": ONES, "dims": (8, 8, 16, 16)}, "stages.3", as_it_is),
    ("swin_tiny_patch4_window7_224", SWIN, "layers.3.blocks.0", lambda t: t.permute(0, 3, 1, 2)),
]


@pytest.mark.parametrize(("name", "options", "layer", "to_map"), OTHERS, ids=[o[0] for o in OTHERS])
def test_timms_models(name, options, layer, to_map):
    model = timm_model(name, num_classes=CLASSES, **options).double()
    x = images(64, torch.float64)
    classes = torch.tensor([4, 0, 2])
    truth = expected(model, x, classes, layer, to_map)
    assert target_layer(model) == layer
    assert truth.amax() == 1  # not all zero
    torch.testing.assert_close(grad_cam(model, x, classes), truth, rtol=1e-9, atol=1e-9)


def test_a_layer_that_is_given():
    model, x = tiny().double().eval(), images(dtype=torch.float64)
    classes = model(x).argmax(1)
    truth = expected(model, x, classes, "network.2")
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
    with unchanged(model):
        grad_cam(model, x)
    assert seen == [model.network[-1]]
    with unchanged(model), pytest.raises(ValueError, match="target is 5"):
        grad_cam(model, x, 5)
    assert not x.requires_grad
    assert x.equal(images())
    assert torch.is_grad_enabled()


def test_eval_mode_counts_while_the_map_is_made():
    """Batch norm of a training model would mix the images, and its statistics would move."""
    model = timm_model("resnet18", num_classes=CLASSES, **RESNET)
    x = images(64)
    in_eval = grad_cam(model, x, 1)
    model.train()
    with unchanged(model):
        assert grad_cam(model, x, 1).equal(in_eval)


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


MODEL, X = tiny(), images(64, batch=2)
BACKBONE = PoolFormer(MODEL.config, features_only=True)
SHAPE = r"images must have shape \[B, 3, H, W\] and not be empty, got \[3, 64, 64\]"
TARGET = "target must be an int, a tensor of integers or None, got "


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "model must be a torch.nn.Module, got str", {"model": "model"}),
        (TypeError, "images must be a tensor, got list", {"images": [X]}),
        (TypeError, "images must be of a floating dtype, got torch.uint8", {"images": X.byte()}),
        (ValueError, SHAPE, {"images": X[0]}),
        (TypeError, f"{TARGET}bool", {"target": True}),
        (TypeError, f"{TARGET}torch.float32", {"target": torch.ones(2)}),
        (ValueError, r"target must have shape \[2\], one class an i.*\[3\]", {"target": torch.arange(3)}),
        (ValueError, "target is -1; allowed: 0 to 4", {"target": torch.tensor([0, -1])}),
        (TypeError, "layer must be a torch.nn.Module or None, got str", {"layer": "network"}),
        (ValueError, "layer must be one of the model's modules", {"layer": nn.Identity()}),
        (ValueError, "no layer is known for Linear; allowed: .*MetaFormer", {"model": nn.Linear(2, 2)}),
        (ValueError, "1 x 1 pixels for images of 32 x 32, .* no place", {"images": X[..., :32, :32]}),
        (ValueError, r"output must be \[B, C, h, w\] or tokens .*, got \[2, 5\]", {"layer": MODEL.head}),
        (ValueError, "features_only=True; allowed: a classifier", {"model": BACKBONE}),
    ],
)
def test_errors_name_the_argument(error, message, arguments):
    with pytest.raises(error, match=message):
        grad_cam(**({"model": MODEL, "images": X} | arguments))


def test_tokens_that_are_no_square():
    model = timm_model("deit_tiny_patch16_224", num_classes=CLASSES, **VIT)
    model.num_prefix_tokens = 0  # the class token cannot lie in the map
    with pytest.raises(ValueError, match="17 tokens for images of 64 x 64 are no square map"):
        grad_cam(model, X)


def test_a_layer_that_is_not_called():
    model = tiny()
    model.add_module("spare", nn.Identity())
    with pytest.raises(RuntimeError, match="layer was not called"):
        grad_cam(model, X, 0, model.spare)
