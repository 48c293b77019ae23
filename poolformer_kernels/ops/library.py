"""The torch.library namespace that every operator is defined in."""

import torch

__all__ = ["LIBRARY", "NAMESPACE"]

NAMESPACE = "poolformer_kernels"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
