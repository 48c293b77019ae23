"""Other people's packages that the tests compare with, and weights under which every branch matters."""

import importlib.util
import os
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import poolformer_kernels as pk


def require(name: str, part: str = "") -> ModuleType:
    """The package, or the test is skipped without it; in CI that is a failure.

    ``part`` is a module of a package that imports its own lazily; RuntimeError: torchvision beside a torch
    without CUDA.
    """
    try:
        if part:
            importlib.import_module(f"{name}.{part}")
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        if os.environ.get("CI"):
            pytest.fail(f"needs {name}: {error}")
        pytest.skip(f"needs {name}: {error}", allow_module_level=True)


def require_backend(name: str) -> None:
    """Skip the test where the backend cannot run; in CI that is a failure."""
    reason = pk.backend_reasons().get(name)
    if reason is not None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"backend {name}: {reason}")


def require_null_gpu(*, extension: bool = False, triton: bool = False) -> None:
    """Skip the test where there is no null GPU; in CI, with a torch that has CUDA, that is a failure.

    With ``extension`` or ``triton`` it needs them, too.
    """
    from null_gpu.build import unavailable
    from null_gpu.extension import extension_file

    reason = unavailable()
    if reason is None and extension and extension_file() is None:
        reason = "the extension was built without CUDA"
    if reason is None and triton and importlib.util.find_spec("triton") is None:
        reason = "triton is not installed"
    if reason is not None:
        (pytest.fail if os.environ.get("CI") and torch.version.cuda else pytest.skip)(reason)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random norms, biases and a LayerScale of order 0.1: at the initial 1e-5 no wrong branch would show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                mean, sigma = (1.0, 0.2) if "norm" in name and name.endswith("weight") else (0.0, 0.1)
                mean, sigma = (0.2, 0.1) if "layer_scale" in name else (mean, sigma)
                p.copy_(torch.randn(p.shape, generator=generator).mul_(sigma).add_(mean))
    return model


def randomise_all(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights that keep the size of what they multiply, too: an exchange of any two parameters shows."""
    torch.manual_seed(seed)
    for name, p in randomise(model, seed).named_parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
        elif "res_scale" in name or name.endswith("act.scale"):
            nn.init.normal_(p, 0.9, 0.1)
    return model.eval()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The L2 norm of the difference, relative to the expected value's."""
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def timm_model(name: str = "poolformer_s12", seed: int = 0, **options) -> nn.Module:
    """timm's model of this name with random weights, in eval mode."""
    return randomise_all(require("timm").create_model(name, **options), seed)


def transformers_model(num_classes: int, seed: int = 0) -> nn.Module:
    """transformers' S12 with random weights, in eval mode."""
    return randomise_all(poolformer_of_transformers(num_classes), seed)


def timm_twins(name: str = "poolformer_s12", **options) -> tuple[nn.Module, nn.Module]:
    """Our model and timm's with the same random weights, both in eval mode."""
    theirs = timm_model(name, **options)
    ours = pk.create_model(name, head="timm", **options).eval()
    ours.load_state_dict(pk.convert_state_dict(theirs.state_dict()))
    return ours, theirs


def poolformer_of_timm(depths, dims, num_classes: int, version: int = 1, **options) -> nn.Module:
    """timm's PoolFormer of these sizes, or its PoolFormerV2."""
    metaformer = require("timm", "models.metaformer").models.metaformer
    if version == 1:
        options |= {"downsample_norm": None, "mlp_act": nn.GELU, "mlp_bias": True}
        options |= {"layer_scale_init_values": 1e-5, "res_scale_init_values": None}
    norm = metaformer.GroupNorm1 if version == 1 else metaformer.GroupNorm1NoBias
    sizes = {"depths": depths, "dims": dims, "num_classes": num_classes}
    return metaformer.MetaFormer(**sizes, norm_layers=norm, use_mlp_head=False, **options)


def poolformer_of_transformers(
    num_classes: int, depths=(2, 2, 6, 2), dims=(64, 128, 320, 512), **options
) -> nn.Module:
    """transformers' PoolFormer of these sizes, by default S12's."""
    transformers = require("transformers", "models.poolformer.modeling_poolformer")
    options = {"depths": list(depths), "hidden_sizes": list(dims), "num_labels": num_classes} | options
    return transformers.PoolFormerForImageClassification(transformers.PoolFormerConfig(**options))


MMPRETRAIN = {  # the beginnings of the official names and of mmpretrain's
    "patch_embed.": "backbone.patch_embed.",
    "network.": "backbone.network.",
    "norm.": "backbone.norm6.",
    "head.": "head.fc.",
}


def as_mmpretrain(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A whole model's weights under mmpretrain's names."""
    renamed = {}
    for key, value in state.items():
        (start,) = (start for start in MMPRETRAIN if key.startswith(start))
        renamed[MMPRETRAIN[start] + key.removeprefix(start)] = value
    return renamed


def assert_as_accurate(
    actual: torch.Tensor,
    eager: torch.Tensor,
    exact: torch.Tensor,
    floor: float = 8 * torch.finfo(torch.float32).eps,
    what: str = "value",
) -> None:
    """The error rule in the L2 norm: at most 1.5 times eager's error and ``floor`` of the value's size."""
    assert actual.shape == exact.shape, what
    error, other = ((t.double() - exact.double()).norm().item() for t in (actual, eager))
    least = floor * exact.double().norm().item()
    assert error <= 1.5 * other + least, f"{what}: {error:.3e}, eager {other:.3e}, floor {least:.3e}"


def block_formula(p, x, pool_size=3, masks=(1.0, 1.0)):
    """The paper's block as a function of its parameters, in the dtype of x or as autocast decides."""
    s1, s2 = (p.get(f"layer_scale_{i}", x.new_ones(())).view(-1, 1, 1) for i in (1, 2))
    m1, m2 = (torch.as_tensor(m, dtype=x.dtype).view(-1, 1, 1, 1) for m in masks)
    n = F.group_norm(x, 1, p["norm1.weight"], p["norm1.bias"])
    x = x + m1 * (s1 * (F.avg_pool2d(n, pool_size, 1, pool_size // 2, count_include_pad=False) - n))
    n = F.group_norm(x, 1, p["norm2.weight"], p["norm2.bias"])
    h = F.gelu(F.conv2d(n, p["mlp.fc1.weight"], p["mlp.fc1.bias"]))
    return x + m2 * (s2 * F.conv2d(h, p["mlp.fc2.weight"], p["mlp.fc2.bias"]))
