"""What `graphed` and `graphed_step` refuse, before any work."""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["check_device", "check_groups", "check_hooks", "check_kinds", "check_like", "check_loss"]


def check_kinds(model: object, **tensors: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")


def check_device(function: str, model: nn.Module, example: Tensor, target: Tensor | None = None) -> None:
    if not torch.cuda.is_available():
        raise RuntimeError(f"{function} captures a CUDA graph, and torch sees no CUDA device")
    if not example.is_cuda:
        raise ValueError(f"example must be a CUDA tensor, got one on {example.device}")
    if example.numel() == 0:
        raise ValueError(f"example must not be empty, got shape {list(example.shape)}")
    if target is not None and target.device != example.device:
        raise ValueError(f"target must be on example's device {example.device}, got {target.device}")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device != example.device:
            raise ValueError(
                f"model must be on example's device {example.device}, but {name} is on {tensor.device}"
            )


def check_like(name: str, given: object, captured: Tensor, function: str) -> None:
    """Raise unless the tensor has the captured one's dtype, shape and device."""
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(given).__name__}")
    if given.dtype != captured.dtype:
        raise TypeError(f"{name} must be of the captured dtype {captured.dtype}, got {given.dtype}")
    if given.shape != captured.shape:
        raise ValueError(
            f"{name} must have the captured shape {list(captured.shape)}, got {list(given.shape)}; "
            f"{function} captures another"
        )
    if given.device != captured.device:
        raise ValueError(f"{name} must be on the captured device {captured.device}, got {given.device}")


# ---- what a step asks for ----------------------------------------------------------------------------------

_MODULE_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_OPTIMIZER_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


def check_hooks(model: nn.Module, optimizer: Optimizer) -> None:
    owners = [
        *((f"model's module {name!r}", module, _MODULE_HOOKS) for name, module in model.named_modules()),
        *((f"model's parameter {name}", p, _TENSOR_HOOKS) for name, p in model.named_parameters()),
        ("optimizer", optimizer, _OPTIMIZER_HOOKS),
    ]
    for owner, holder, kinds in owners:
        if any(getattr(holder, kind, None) for kind in kinds):
            raise ValueError(f"{owner} has hooks, whose Python code no replay would run; remove them")


def check_groups(model: nn.Module, optimizer: Optimizer, device: torch.device) -> None:
    own = set(model.parameters())
    kind = type(optimizer).__name__
    for i, group in enumerate(optimizer.param_groups):
        if any(p not in own for p in group["params"]):
            raise ValueError(f"param group {i} of optimizer has parameters that are not the model's")
        if not group.get("capturable"):
            reason = "must have" if "capturable" in group else f"is {kind}'s, which has no"
            raise ValueError(f"param group {i} of optimizer {reason} capturable=True")
        lr = group.get("lr")
        if isinstance(lr, Tensor) and lr.device != device:
            raise ValueError(
                f"param group {i} of optimizer has its lr on {lr.device}; allowed: a number, or a tensor on "
                f"{device}"
            )
    if not any(p.requires_grad for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("optimizer must have a parameter that needs a gradient, got none")


def check_loss(value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"loss must return a tensor, got {type(value).__name__}")
    if value.numel() != 1:
        raise ValueError(f"loss must return one element, got shape {list(value.shape)}")
    if not value.requires_grad:
        raise ValueError("loss must return a tensor that needs a gradient, got one without")
