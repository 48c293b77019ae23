"""Which backend runs what, and why."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from .accelerate import gathered_modules, unfused_reasons
from .accelerate.choices import OWN, Row, choices, own_choices
from .accelerate.layouts import layout_of
from .nn import PoolFormerBlock
from .nn.chain_cache import modules_of
from .ops.dispatch import explain_selection

__all__ = ["Call", "Explanation", "explain"]

_OPERATORS = ("pool_mixer", "mlp")


@dataclass(frozen=True)
class Call:
    """One operator call: where, and which backend runs it."""

    path: str  # of the module or of the block's part, as in ``named_modules``; "" for the target itself
    operator: str  # "pool_mixer" or "mlp"
    backend: str  # its name, "modules" (plain PyTorch modules) or "none" (the call would raise)
    reason: str


@dataclass(frozen=True, repr=False)
class Explanation:
    """What `explain` finds: ``calls`` in the order of the modules; ``str`` and ``repr`` are the text."""

    calls: tuple[Call, ...]

    @property
    def summary(self) -> str:
        """How many calls run where, in a line: ``22 of 24 on cpp, 2 as modules``."""
        if not self.calls:
            return "no layer that this package computes"
        counts = Counter(call.backend for call in self.calls).most_common()
        kernels = [(name, count) for name, count in counts if name not in _NO_BACKEND]
        places = [(f"on {name}", count) for name, count in kernels]
        places += [(_NO_BACKEND[name], count) for name, count in counts if name in _NO_BACKEND]
        (place, count), *others = places
        first = f"{count} of {len(self.calls)} {place}"
        return ", ".join([first, *(f"{count} {place}" for place, count in others)])

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and strings, for `json.dumps`: ``calls`` with the fields of `Call`, and ``summary``."""
        return {"calls": [asdict(call) for call in self.calls], "summary": self.summary}

    def __str__(self) -> str:
        rows = [(call.path, call.operator, call.backend) for call in self.calls]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
        lines = [
            "  ".join((*map(str.ljust, row, widths), call.reason)).strip()
            for row, call in zip(rows, self.calls, strict=True)
        ]
        return "\n".join([*lines, self.summary])

    __repr__ = __str__


_NO_BACKEND = {"modules": "as modules", "none": "would raise"}


def explain(target: nn.Module | Tensor) -> Explanation:
    """Which backend runs each operator call of a module, or each operator for a tensor, and why.

    Args:
        target: a module, whose parameters give the device and dtype of its inputs; or the operator's input x.

    Returns:
        An `Explanation`. Printed, it is a line per call (place, operator, backend, reason) and a summary;
        ``calls``, ``summary`` and ``to_dict()`` are the same for programs.

        It holds for a call as things are now: under the choice of `poolformer_kernels.use_backend` in force,
        with the hooks and in the mode (train or eval) that the modules have. The backend is ``modules`` where
        a layer runs as plain PyTorch modules and ``none`` where an explicit choice cannot be met, so that the
        call would raise. Blocks of other packages' PoolFormers are listed too, with the reason where
        `poolformer_kernels.accelerate` leaves a part of one alone; modules that were put into an accelerated
        one are compared with the operators, as in a call. Reasons name modules by their paths in the
        block and classes with their packages.

    Raises:
        TypeError: another type of target.

    Example::

        >>> print(poolformer_kernels.explain(poolformer_kernels.create_model("poolformer_s12")))
        network.0.0.token_mixer  pool_mixer  cpp  the fastest on cpu
        network.0.0.mlp          mlp         cpp  the fastest on cpu
        ...
        24 of 24 on cpp
    """
    if isinstance(target, Tensor):
        selection = explain_selection(target.device, target.dtype)
        return Explanation(tuple(Call("", operator, *selection) for operator in _OPERATORS))
    if not isinstance(target, nn.Module):
        raise TypeError(f"target must be a module or a tensor, got {type(target).__name__}")
    calls: list[Call] = []
    explained: set[nn.Module] = set()
    gathered = gathered_modules(target)
    for path, module in modules_of(target):
        rows: list[Row] = []
        if isinstance(module, OWN):
            rows = own_choices(module) if module not in explained else []
            if isinstance(module, PoolFormerBlock):
                explained.add(module.mlp)
        elif (layout := layout_of(module)) is not None:
            rows = choices(module, layout, unfused_reasons(module, module in gathered))
        for part, which, choice in rows:
            place = ".".join(name for name in (path, part) if name)
            calls.append(Call(place, _OPERATORS[which], *choice))
    return Explanation(tuple(calls))
