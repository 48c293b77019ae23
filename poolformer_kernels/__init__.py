"""Fused Triton and C++/CUDA kernels for PoolFormer, behind drop-in modules."""

from . import ops, reference
from .ops.backend import available_backends, use_backend

__all__ = ["available_backends", "ops", "reference", "use_backend"]
__version__ = "0.1.0"
