"""How far a result may be from float64: one rule for `poolformer-kernels verify`, benchmarks and tests.

For outputs and every gradient, in the L2 norm and in the maximum::

    error(ours) <= 1.5 * error(eager, same dtype) + floor

against float64 from the dtype-rounded inputs. The floor is what correct rounding alone may cost.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["SLACK", "Errors", "errors", "tolerance", "without_tf32"]

SLACK = 1.5  # times eager's error: sums in another order have another error of the same size


@contextmanager
def without_tf32() -> Iterator[None]:
    """Inside, float32 products on CUDA are not computed in TF32, neither eager's nor ours.

    The rule is for sums in different orders. In TF32 errors come from the operands instead, which our kernels
    truncate and eager's may round: then truncating alone costs 2.6 times eager's error in the L2 norm.
    """
    settings = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


class Errors(NamedTuple):
    """The L2 norm and the largest absolute value of a difference, or what is allowed of them."""

    l2: float
    largest: float

    def relative_l2(self, scale: Tensor) -> float:
        """The L2 norm relative to that of ``scale``, mostly the exact value."""
        return self.l2 / scale.double().norm().item()

    def within(self, allowed: "Errors") -> bool:
        """Whether both are allowed; a NaN is not."""
        return self.l2 <= allowed.l2 and self.largest <= allowed.largest


def _norms(t: Tensor) -> Errors:
    return Errors(t.norm().item(), t.abs().max().item())


def errors(value: Tensor, exact: Tensor) -> Errors:
    """The errors of ``value``; ``exact`` is float64 on the CPU.

    Example:
        >>> errors(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0], dtype=torch.float64))
        Errors(l2=0.5, largest=0.5)
    """
    return _norms(value.detach().double().cpu() - exact)


def tolerance(eager: Errors, scale: Tensor, dtype: torch.dtype, *, ulps: float = 0.0) -> Errors:
    """The allowed errors of a value in ``dtype``, given eager's.

    Args:
        scale: what rounding errors are relative to: the exact value, or where it is a sum that cancels, the
            size of its terms.
        ulps: of the accumulator's type (float32; float64 for float64), of ``scale``. A sum of n products
            takes about sqrt(n).

    The floor is half an ulp of the dtype, for rounding once, and ``ulps``; where values are subnormal, their
    distance.
    """
    info, accumulator = torch.finfo(dtype), torch.finfo(torch.promote_types(dtype, torch.float32))
    floor = info.eps / 2 + ulps * accumulator.eps
    subnormal = info.smallest_normal * info.eps
    size = _norms(scale.double())
    return Errors(
        SLACK * eager.l2 + floor * size.l2 + subnormal * scale.numel() ** 0.5,
        SLACK * eager.largest + floor * size.largest + subnormal,
    )
