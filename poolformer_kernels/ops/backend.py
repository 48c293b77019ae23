"""The old name of `poolformer_kernels.ops.dispatch`, until 0.3.0."""

from ..deprecation import moved
from . import dispatch

__getattr__ = moved(__name__, dispatch)
