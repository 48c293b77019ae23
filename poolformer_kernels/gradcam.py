"""Grad-CAM: the places of a picture that a classifier's answer rests on."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .models import PoolFormer

__all__ = ["grad_cam", "target_layer"]

# The layers that the official code looks at, by timm's class; "-1" is a module's last child.
_TIMM_LAYERS = {
    "MetaFormer": "stages.-1",
    "ConvNeXt": "stages.-1",
    "ResNet": "layer4.-1",
    "SwinTransformer": "layers.-1.blocks.-1",
    "VisionTransformer": "blocks.-1.norm1",
    "MlpMixer": "blocks.-1",
}


def grad_cam(
    model: nn.Module, images: Tensor, target: Tensor | int | None = None, layer: nn.Module | None = None
) -> Tensor:
    """Where in each image a layer speaks for a class: Grad-CAM, by captum's `LayerGradCam`.

    Equivalent PyTorch, with ``A`` ``[B, C, h, w]`` the layer's output in a forward in eval mode::

        score = model(images).gather(1, target[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, A)
        weights = gradient.mean((2, 3), keepdim=True)
        maps = (weights * A).sum(1, keepdim=True).relu()
        maps = F.interpolate(maps, images.shape[2:], mode="bilinear")
        maps = maps - maps.amin((2, 3), keepdim=True)
        maps = maps / maps.amax((2, 3), keepdim=True)

    A map that is the same everywhere, mostly because it is zero, becomes zero and not NaN. The model is
    called once and left as it was: the mode of each module, its hooks, ``requires_grad`` and ``grad`` of its
    parameters. A kernel that runs the whole model as one call steps aside while the layer is watched, and
    compiled code too.

    Args:
        model: a classifier: images to logits ``[B, classes]``.
        images: ``[B, 3, H, W]``, normalised as the model wants them, on its device and in its dtype.
        target: the class to explain, for all images or one each, ``[B]``; None: the one predicted.
        layer: a module of the model whose output is ``[B, C, h, w]``, ``[B, h, w, C]`` where timm calls the
            model's ``output_fmt`` NHWC, or tokens ``[B, N, C]`` of square images: the first
            ``model.num_prefix_tokens`` are left out, the others are the rows of a square map. None: that of
            `target_layer`.

    Returns:
        maps ``[B, 1, H, W]`` in [0, 1], float32 (float64 for float64 images), without a graph.

    Raises:
        ImportError: captum is missing.
        TypeError: an argument of the wrong type.
        ValueError: images, targets or the layer's output of another shape or range; a layer that is not the
            model's; no layer for this model; a map of one pixel, which shows no place.
        RuntimeError: the model's forward does not call the layer.

    Example::

        >>> model = poolformer_kernels.create_model("poolformer_s12", checkpoint="poolformer_s12.pth.tar")
        >>> grad_cam(model, images).shape
        torch.Size([2, 1, 224, 224])

    Source: Grad-CAM (arXiv 1610.02391), equations 1 and 2; layers and scaling as in misc/cam_image.py of
    sail-sg/poolformer (MetaFormer, arXiv 2111.11418, appendix), by pytorch-grad-cam.
    """
    layer_grad_cam = _captum()
    _check(model, images, target)
    model = _original(model)
    layer = model.get_submodule(target_layer(model)) if layer is None else _own(model, layer)
    probe = nn.Identity()  # what captum watches: the layer's output as a map
    calls = []

    def watched(module: nn.Module, args: tuple, output: object) -> Tensor:
        calls.append(module)
        maps = probe(_as_map(output, model, images))
        return _like_output(maps, output, model)

    def score(x: Tensor) -> Tensor:
        logits = model(x)
        if not calls:
            raise RuntimeError("layer was not called in the model's forward")
        return logits.gather(1, _classes(logits, target).unsqueeze(1)).squeeze(1)

    not_compiled = torch.compiler.set_stance("force_eager")  # of modules inside, as ``model.compile()`` makes
    with not_compiled, torch.inference_mode(False), torch.enable_grad(), _in_eval_mode(model):
        hook = layer.register_forward_hook(watched)
        try:
            raw = layer_grad_cam(score, probe).attribute(images.detach().clone(), relu_attributions=True)
        finally:
            hook.remove()
    return _scaled(raw.detach(), images)


def target_layer(model: nn.Module) -> str:
    """The name of the layer that the official code looks at, for ``model.get_submodule``.

    Of this package's models and the official code's it is the last stage, before the norm: ``network[-1]``.
    Of timm's PoolFormers, MetaFormers and ConvNeXts it is ``stages[-1]``, of ResNets ``layer4[-1]``, of Swin
    Transformers ``layers[-1].blocks[-1]``, of Vision Transformers (DeiT) ``blocks[-1].norm1``, of ResMLPs and
    MLP-Mixers ``blocks[-1]``.

    Raises:
        ValueError: another model, or one without a classifier.
    """
    model = _original(model)
    if isinstance(model, PoolFormer) and model.features_only:
        raise ValueError("model was created with features_only=True; allowed: a classifier")
    if isinstance(getattr(model, "network", None), nn.ModuleList):  # ours and the official code's
        return _resolved(model, "network.-1")
    for cls in type(model).__mro__:
        if cls.__module__.partition(".")[0] == "timm" and cls.__name__ in _TIMM_LAYERS:
            return _resolved(model, _TIMM_LAYERS[cls.__name__])
    raise ValueError(
        f"no layer is known for {type(model).__name__}; allowed: this package's models, the official code's,"
        f" timm's {', '.join(_TIMM_LAYERS)}; or give the layer"
    )


def _original(model: nn.Module) -> nn.Module:
    """The module that `torch.compile` made another of: compiled code may leave hooks out."""
    return getattr(model, "_orig_mod", model)


def _resolved(model: nn.Module, path: str) -> str:
    """The path with the last children's own names."""
    names: list[str] = []
    for part in path.split("."):
        children = model.get_submodule(".".join(names))._modules
        names.append(list(children)[-1] if part == "-1" else part)
    return ".".join(names)


# ---- checks ------------------------------------------------------------------------------------------------


def _captum() -> type:
    try:
        from captum.attr import LayerGradCam
    except ImportError as error:
        raise ImportError("Grad-CAM needs the package captum: pip install captum") from error
    return LayerGradCam


def _check(model: object, images: object, target: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor, got {type(images).__name__}")
    if not images.is_floating_point():
        raise TypeError(f"images must be of a floating dtype, got {images.dtype}")
    if images.dim() != 4 or 0 in images.shape:
        raise ValueError(f"images must have shape [B, 3, H, W] and not be empty, got {list(images.shape)}")
    if target is None or type(target) is int:
        return
    if not isinstance(target, Tensor) or target.is_floating_point() or target.dtype == torch.bool:
        kind = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"target must be an int, a tensor of integers or None, got {kind}")
    if target.shape != images.shape[:1]:
        raise ValueError(
            f"target must have shape [{len(images)}], one class an image, got {list(target.shape)}"
        )


def _own(model: nn.Module, layer: object) -> nn.Module:
    if not isinstance(layer, nn.Module):
        raise TypeError(f"layer must be a torch.nn.Module or None, got {type(layer).__name__}")
    if not any(module is layer for module in model.modules()):
        raise ValueError(f"layer must be one of the model's modules, got another {type(layer).__name__}")
    return layer


def _classes(logits: object, target: Tensor | int | None) -> Tensor:
    """The class of each image whose logit is explained."""
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"model must return logits [B, classes], it returned {got}")
    if target is None:
        return logits.detach().argmax(1)
    classes = torch.as_tensor(target, device=logits.device).long().expand(len(logits))
    low, high = classes.min().item(), classes.max().item()
    if low < 0 or high >= logits.shape[1]:
        wrong = low if low < 0 else high
        raise ValueError(f"target is {wrong}; allowed: 0 to {logits.shape[1] - 1}, the model's classes")
    return classes


# ---- maps --------------------------------------------------------------------------------------------------


def _as_map(output: object, model: nn.Module, images: Tensor) -> Tensor:
    """The layer's output as ``[B, C, h, w]``."""
    if not isinstance(output, Tensor) or output.dim() not in (3, 4):
        got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"the layer's output must be [B, C, h, w] or tokens [B, N, C], got {got}")
    if output.dim() == 4:
        maps = output.permute(0, 3, 1, 2) if _channels_behind(model) else output
    else:
        maps = _square_map(output, getattr(model, "num_prefix_tokens", 0), images)
    if maps.shape[2:].numel() == 1:
        height, width = images.shape[2:]
        raise ValueError(
            f"the layer's map is 1 x 1 pixels for images of {height} x {width}, which shows no place;"
            " allowed: larger images"
        )
    return maps


def _channels_behind(model: nn.Module) -> bool:
    """Whether the model's maps are [B, h, w, C], as those of timm's Swin Transformers."""
    return getattr(model, "output_fmt", "NCHW") == "NHWC"


def _square_map(tokens: Tensor, prefix: int, images: Tensor) -> Tensor:
    height, width = images.shape[2:]
    count = tokens.shape[1] - prefix
    side = math.isqrt(max(count, 0))
    if height != width or side * side != count or side == 0:
        raise ValueError(
            f"the layer's {count} tokens for images of {height} x {width} are no square map; allowed: square"
            " images"
        )
    return tokens[:, prefix:].transpose(1, 2).unflatten(2, (side, side))


def _like_output(maps: Tensor, output: Tensor, model: nn.Module) -> Tensor:
    """The way back from `_as_map`, through which the gradient comes."""
    if output.dim() == 4:
        return maps.permute(0, 2, 3, 1) if _channels_behind(model) else maps
    tokens = maps.flatten(2).transpose(1, 2)
    return torch.cat([output[:, : output.shape[1] - tokens.shape[1]], tokens], 1)


def _scaled(raw: Tensor, images: Tensor) -> Tensor:
    """Upsampled to the images' size, and each map stretched to [0, 1]."""
    wide = raw.to(torch.promote_types(raw.dtype, torch.float32))
    maps = F.interpolate(wide, images.shape[2:], mode="bilinear", align_corners=False)
    maps = maps - maps.amin((2, 3), keepdim=True)
    largest = maps.amax((2, 3), keepdim=True)
    return maps / torch.where(largest == 0, 1, largest)


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside, all modules are in eval mode.

    The flags are set directly: some modules' own ``train`` and ``eval`` do more, such as merging weights.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
