"""Fused Triton and C++/CUDA kernels for PoolFormer, behind drop-in modules."""

from . import backends, models, nn, ops, reference
from .accelerate import accelerate, restore
from .explain import explain
from .graphs import graphed, graphed_step
from .models import convert_state_dict, create_model, list_models, load_checkpoint
from .ops.dispatch import available_backends, use_backend

__all__ = [
    "accelerate",
    "available_backends",
    "backends",
    "convert_state_dict",
    "create_model",
    "explain",
    "graphed",
    "graphed_step",
    "list_models",
    "load_checkpoint",
    "models",
    "nn",
    "ops",
    "reference",
    "restore",
    "use_backend",
]
__version__ = "0.2.0"
