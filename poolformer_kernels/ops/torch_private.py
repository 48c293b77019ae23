"""The parts of PyTorch that are not public API, each with the reason for which nothing public will do.

The rest of the package uses no others but a module's `_modules`, `_parameters` and `_buffers`: the public
ways to them copy or search in each call. The oldest torch that is supported is 2.10;
tests/test_torch_private.py says which of these a torch has not, or has otherwise.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "CALLED_INSTEAD",
    "HOOKS",
    "TRACED_PARAMETERS",
    "OpOverload",
    "OwnRandomNumbers",
    "TorchDispatchMode",
    "allow_repeated_backward",
    "any_requires_grad",
    "below_autograd",
    "compiled_on_its_own",
    "constant_result",
    "differentiating_transform",
    "dispatch_modes",
    "forward_mode",
    "frozen_weights",
    "has_global_hooks",
    "has_hooks",
    "in_transform",
    "observed",
    "outside_modes",
    "outside_transforms_and_modes",
    "tf32_allowed",
    "tree_leaves",
    "tree_map",
]

_P = ParamSpec("_P")
_R = TypeVar("_R")

# The type of torch.ops.<namespace>.<name>.<overload>, which has no public name.
OpOverload = torch._ops.OpOverload

# `TorchDispatchMode` sees every operator that runs, and `tree_leaves` finds the tensors among its arguments:
# the bytes that eager PyTorch moves are counted so, and torch.profiler counts none on the meta device. With
# `tree_map` the rules for `torch.vmap` take a member's tensors out of an operator's arguments.

# A module's hooks: nn.Module registers them publicly, but cannot be asked whether there are any.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# Attributes of a module that its call prefers to its class's forward: one set by hand, `module.compile()`.
CALLED_INSTEAD = ("forward", "_compiled_call_impl")

# What parameters are while torch.export traces; torch.compiler.is_exporting does not tell of one tensor.
TRACED_PARAMETERS = (FakeTensor, FunctionalTensor)


def constant_result(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """`torch.compiler.assume_constant_result`, which would import the whole compiler: 1.5 s of our import."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def in_transform() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp, functionalize) is running; nothing public tells."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def differentiating_transform() -> bool:
    """Whether one of the transforms of torch.func that are running is grad or jvp."""
    functorch = torch._C._functorch
    kinds = {interpreter.key() for interpreter in functorch.get_interpreter_stack() or ()}
    return bool(kinds & {functorch.TransformType.Grad, functorch.TransformType.Jvp})


class _TF32Allowed(ModuleType):
    """Whether float32 products on CUDA may be computed in TF32, as each of these asks torch's settings.

    Neither public way does: reading `allow_tf32` raises an error where `fp32_precision` was set as well, and
    that the compiler cannot trace. This is a module because the compiler takes a module's attributes for
    constants and reads them again before each call, so that a changed setting recompiles.
    """

    @property
    def convolutions(self) -> bool:
        """What `torch.backends.cudnn` says, or else `torch.backends.fp32_precision`."""
        return torch._C._get_fp32_precision_getter("cuda", "conv") == "tf32"

    @property
    def matrix_products(self) -> bool:
        """What `torch.backends.cuda.matmul` says, or else the same two."""
        return torch._C._get_fp32_precision_getter("cuda", "matmul") == "tf32"


tf32_allowed = _TF32Allowed("tf32_allowed")


def forward_mode() -> bool:
    """Whether a `torch.autograd.forward_ad.dual_level` is entered; nothing public tells."""
    return forward_ad._current_level >= 0


def any_requires_grad(*args: object) -> bool:
    """Whether a tensor among the arguments, or in a list among them, requires a gradient.

    In C, while a loop in Python takes longer than some of our kernels.
    """
    return torch._C._any_requires_grad(*args)


# A context in which a call of an operator skips autograd. `torch.no_grad` still enters its Python autograd
# kernel, which takes 4 us.
below_autograd = torch._C._AutoDispatchBelowAutograd

# Whether hooks are set that every module's call runs (`torch.nn.modules.module.register_module_*_hook`).
has_global_hooks = _has_any_global_hook


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks of its own; see `HOOKS`."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def dispatch_modes() -> bool:
    """Whether a dispatch mode is active; nothing public tells."""
    return torch._C._len_torch_dispatch_stack() > 0


def observed(x: Tensor) -> bool:
    """Whether something sees, and may replace, the operators that are called on x.

    A dispatch mode (fake tensors, counters of operations), or x itself, if it is of a subclass of Tensor.
    """
    return dispatch_modes() or type(x) not in (Tensor, nn.Parameter)


def compiled_on_its_own(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called; nothing public tells."""
    return module._compiled_call_impl is not None


class OwnRandomNumbers(TorchDispatchMode):
    """Random operators of this thread draw from a generator of their own, the same numbers every time.

    `torch.random.fork_rng` would seed the generator of all threads. The schema, which is not public, says
    whether an operator takes a generator; the few that take none (attention, say, which draws nothing without
    dropout) run as they are.
    """

    def __init__(self) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(0)

    def __torch_dispatch__(
        self,
        function: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in function.tags:
            given = _arguments(function)
            packet = function.overloadpacket
            for overload in (function, *(getattr(packet, name) for name in packet.overloads())):
                if _arguments(overload) == given | {"generator"}:
                    return overload(*args, **kwargs | {"generator": self._generator})
        return function(*args, **kwargs)


def _arguments(function: OpOverload) -> set[str]:
    return {argument.name for argument in function._schema.arguments}


# A context in which no dispatch mode sees what is called.
outside_modes = _disable_current_modes


def outside_transforms_and_modes() -> ExitStack:
    """A context that no transform of torch.func and no dispatch mode (fake tensors, tracing) sees into.

    A model may be accelerated while one is running, and the comparison of numbers must not become part of it.
    """
    stack = ExitStack()
    stack.enter_context(_disable_current_modes())
    stack.enter_context(temporarily_clear_interpreter_stack())
    return stack


def frozen_weights() -> AbstractContextManager[object]:
    """A context in which torch.compile makes weights constants of what it compiles, for the benchmarks.

    The compiler is imported here: that takes seconds.
    """
    import torch._inductor.config as config

    return config.patch(freezing=True)


def allow_repeated_backward() -> None:
    """Compiled graphs keep their buffers for further backwards (``retain_graph=True``): for benchmarks."""
    import torch._functorch.config as config

    config.donated_buffer = False
