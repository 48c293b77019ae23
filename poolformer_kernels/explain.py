"""Which backend runs what, and why."""

import torch
from torch import Tensor, nn

from .accelerate import unfused_reasons
from .accelerate.layouts import FC1, FC2, layout_of
from .nn import Mlp, PoolFormerBlock, PoolMixer
from .nn.fusion import MLP
from .ops.dispatch import explain_selection, mlp_backend

__all__ = ["explain"]

_OPERATORS = ("pool_mixer", "mlp")


def explain(target: nn.Module | Tensor) -> str:
    """A line per operator call of a module, or per operator for a tensor: place, operator, backend, reason.

    Args:
        target: a module, whose parameters give the device and dtype of its inputs; or the operator's input x.

    Returns:
        The lines, aligned, under the choice of `poolformer_kernels.use_backend` in force. The backend is
        ``modules`` where a layer runs as plain PyTorch modules and ``none`` where an explicit choice cannot
        be met, so that the call would raise. Blocks of other packages' PoolFormers are listed too, with the
        reason where `poolformer_kernels.accelerate` leaves a part of one alone.

    Raises:
        TypeError: another type of target.

    Example::

        >>> print(poolformer_kernels.explain(poolformer_kernels.create_model("poolformer_s12")))
        network.0.0.token_mixer  pool_mixer  cpp        the fastest on cpu
        network.0.0.mlp          mlp         cpp        the fastest on cpu
        ...
    """
    if isinstance(target, Tensor):
        selection = explain_selection(target.device, target.dtype)
        rows = [("", operator, *selection) for operator in _OPERATORS]
    elif isinstance(target, nn.Module):
        rows, explained = [], set()
        for name, module in target.named_modules():
            if module not in explained:
                rows += _rows(name, module)
            if isinstance(module, PoolFormerBlock):
                explained.add(module.mlp)
    else:
        raise TypeError(f"target must be a module or a tensor, got {type(target).__name__}")
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    return "\n".join("  ".join((*map(str.ljust, row, widths), row[3])).strip() for row in rows)


def _rows(name: str, module: nn.Module) -> list[tuple[str, str, str, str]]:
    if isinstance(module, PoolMixer):
        return [(name, "pool_mixer", *_selected(module))]
    if isinstance(module, PoolFormerBlock):
        reason = module.mixer_unfused_reason()
        mixer = _selected(module) if reason is None else ("modules", reason)
        reason = module.mlp_unfused_reason()
        mlp = _mlp_selected(*_layers(module.mlp)) if reason is None else _mlp_alone(module.mlp, reason)
        return _block_rows(name, ("token_mixer", "mlp"), (mixer, mlp))
    if isinstance(module, Mlp):
        reason = module.unfused_reason()
        return [(name, "mlp", *(_mlp_selected(*_layers(module)) if reason is None else ("modules", reason)))]
    layout = layout_of(module)
    if layout is None:
        return []
    mixer_reason, mlp_reason = unfused_reasons(module)
    mixer = _selected(module) if mixer_reason is None else ("modules", mixer_reason)
    mlp = ("modules", mlp_reason)
    if mlp_reason is None:
        parts = layout.parts(module, MLP)
        mlp = _mlp_selected(parts[FC1], parts[FC2])
    return _block_rows(name, layout.bodies, (mixer, mlp))


def _block_rows(
    name: str, parts: tuple[str, str], rows: tuple[tuple[str, str], tuple[str, str]]
) -> list[tuple[str, str, str, str]]:
    places = (f"{name}.{part}".lstrip(".") for part in parts)
    return [(place, operator, *row) for place, operator, row in zip(places, _OPERATORS, rows, strict=True)]


def _mlp_alone(mlp: nn.Module, reason: str) -> tuple[str, str]:
    """Of a block's MLP that is not one call with its norm and residual: it may still be one without them."""
    if not isinstance(mlp, Mlp) or mlp.unfused_reason() is not None:
        return "modules", reason
    backend, why = _mlp_selected(*_layers(mlp))
    return backend, f"{why}; norm and residual as modules: {reason}"


def _layers(mlp: Mlp) -> tuple[nn.Module, nn.Module]:
    return mlp.fc1, mlp.fc2


def _mlp_selected(fc1: nn.Module, fc2: nn.Module) -> tuple[str, str]:
    """The backend of the forward of an MLP of these layers, and where the backward's is another, both."""
    selected, why = _selected(fc1)
    w1, w2 = fc1.weight, fc2.weight
    sizes = w1.shape[1], w1.shape[0], w2.shape[0]
    backend, reason = mlp_backend(selected, w1.device, sizes, w1.dtype)
    nothing = "none" if why == "asked for" else "reference"
    if reason is not None:
        return nothing if backend == "reference" else backend, f"{why}; {selected} has no kernel for {reason}"
    other, reason = mlp_backend(selected, w1.device, sizes, w1.dtype, backward=True)
    if reason is None:
        return backend, why
    if other == "reference":  # then the forward runs there, too
        return backend, f"{why}; with gradients {nothing}: no {selected} kernel for the backward of {reason}"
    return backend, f"{why}; backward in {other}: no {selected} kernel for {reason}"


def _selected(module: nn.Module) -> tuple[str, str]:
    parameter = next(module.parameters(), torch.empty(0))
    return explain_selection(parameter.device, parameter.dtype)
