"""The Triton backend: CUDA tensors, CPU tensors too where ``TRITON_INTERPRET=1`` is set before import."""

import importlib.util
import os

import torch

from ...ops.library import LIBRARY
from .config import stats_tiles
from .mlp_config import mlp_stats_tiles

__all__ = ["DEVICES", "UNAVAILABLE", "mlp_stats_tiles", "stats_tiles"]

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ("cuda", "cpu") if _INTERPRETED else ("cuda",)
UNAVAILABLE: str | None = None

if importlib.util.find_spec("triton") is None:
    UNAVAILABLE = "triton is not installed"
elif not (_INTERPRETED or torch.cuda.is_available()):
    UNAVAILABLE = "no CUDA device"
else:
    from . import mlp, mlp_backward, pool_mixer

    for _device in DEVICES:
        LIBRARY.impl("pool_mixer_triton", pool_mixer.forward, _device.upper())
        LIBRARY.impl("pool_mixer_triton_backward", pool_mixer.backward, _device.upper())
        LIBRARY.impl("mlp_triton", mlp.forward, _device.upper())
        LIBRARY.impl("mlp_triton_backward", mlp_backward.backward, _device.upper())
