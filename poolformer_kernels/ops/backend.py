"""The old name of `poolformer_kernels.ops.dispatch`, until 0.3.0."""

from ..deprecation import moved
from . import dispatch, torch_private

_MOVED = {
    **dict.fromkeys(
        (
            "BACKENDS",
            "available_backends",
            "explain_selection",
            "mlp_backend",
            "mlp_of_cuda",
            "select_backend",
            "unavailable_reason",
            "use_backend",
        ),
        dispatch,
    ),
    "constant_result": torch_private,
}
__all__ = [*_MOVED]
__getattr__ = moved(__name__, _MOVED)
