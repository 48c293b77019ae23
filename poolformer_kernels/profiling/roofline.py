"""The old name of `poolformer_kernels.profiling.limits`, until 0.3.0."""

from ..deprecation import moved
from . import limits

_MOVED = dict.fromkeys(("LimitProbes", "Limits", "measure_limits"), limits)
__all__ = [*_MOVED]
__getattr__ = moved(__name__, _MOVED)
