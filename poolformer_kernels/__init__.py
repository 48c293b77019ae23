"""Fused Triton and C++/CUDA kernels for PoolFormer, behind drop-in modules."""

from .cli import startup as _startup  # noqa: F401  (first: what fails below is one line of the command)

# isort: split
from . import backends, models, nn, ops, reference
from .accelerate import accelerate, restore
from .explain import explain
from .graphs import graphed, graphed_step
from .models import convert_state_dict, create_model, export_state_dict, list_models, load_checkpoint
from .ops.dispatch import available_backends, backend_reasons, get_backend, use_backend
from .version import __version__ as __version__

__all__ = [
    "accelerate",
    "available_backends",
    "backend_reasons",
    "backends",
    "convert_state_dict",
    "create_model",
    "explain",
    "export_state_dict",
    "get_backend",
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
