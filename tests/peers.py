"""Other people's packages that the tests compare with, and weights under which every branch matters."""

import importlib
import os
from types import ModuleType

import pytest
import torch
from torch import nn


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
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"needs {name}: {error}")


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


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The L2 norm of the difference, relative to the expected value's."""
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
