"""Which backend runs what, and why."""

import torch
from torch import Tensor, nn

from .nn import Mlp, PoolFormerBlock, PoolMixer
from .ops.backend import explain_selection

__all__ = ["explain"]


def explain(target: nn.Module | Tensor) -> str:
    """A line per operator call of a module, or of a tensor: place, operator, backend and reason.

    Args:
        target: a module, whose parameters give the device and dtype of its inputs; or the operator's input x.

    Returns:
        The lines, aligned, under the choice of `poolformer_kernels.use_backend` in force. The backend is
        ``modules`` where a layer runs as plain PyTorch modules and ``none`` where an explicit choice cannot
        be met, so that the call would raise.

    Raises:
        TypeError: another type of target.

    Example::

        >>> print(poolformer_kernels.explain(poolformer_kernels.create_model("poolformer_s12")))
        network.0.0.token_mixer  pool_mixer  cpp        the fastest on cpu
        network.0.0.mlp          mlp         modules    no kernel yet: fc1, act and fc2 run one by one
        ...
    """
    if isinstance(target, Tensor):
        rows = [("", "pool_mixer", *explain_selection(target.device.type, target.dtype))]
    elif isinstance(target, nn.Module):
        rows = [row for name, module in target.named_modules() for row in _rows(name, module)]
    else:
        raise TypeError(f"target must be a module or a tensor, got {type(target).__name__}")
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    return "\n".join("  ".join((*map(str.ljust, row, widths), row[3])).strip() for row in rows)


def _rows(name: str, module: nn.Module) -> list[tuple[str, str, str, str]]:
    if isinstance(module, PoolMixer):
        return [(name, "pool_mixer", *_selected(module))]
    if isinstance(module, PoolFormerBlock):
        reason = module.unfused_reason()
        place = f"{name}.token_mixer".lstrip(".")
        return [(place, "pool_mixer", *(_selected(module) if reason is None else ("modules", reason)))]
    if isinstance(module, Mlp):
        return [(name, "mlp", "modules", "no kernel yet: fc1, act and fc2 run one by one")]
    return []


def _selected(module: nn.Module) -> tuple[str, str]:
    parameter = next(module.parameters(), torch.empty(0))
    return explain_selection(parameter.device.type, parameter.dtype)
