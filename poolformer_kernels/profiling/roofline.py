"""The old name of `poolformer_kernels.profiling.limits`, until 0.3.0."""

from ..deprecation import moved
from . import limits

__getattr__ = moved(__name__, limits)
