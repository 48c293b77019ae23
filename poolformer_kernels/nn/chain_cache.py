"""Which modules run as one operator call, found once and kept for as long as nothing about them changes."""

import threading
from collections.abc import Iterator, Set
from operator import getitem, is_
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor, nn

from ..ops.chain import Chain, chainable
from ..ops.torch_private import HOOKS, compiled_on_its_own, has_global_hooks
from .checks import hooked

__all__ = ["CHANGES", "PLACE", "Chained", "calls_more", "forget_chain", "modules_of", "run_chain"]

PLACE = "_poolformer_kernels_plan"  # an attribute of the module, so that both die together
CHANGES = threading.RLock()  # held by a thread while it gives modules other classes or attributes
_INTERNAL = vars(nn.Module()).keys() - {"training"} | {PLACE}


class Chained(Protocol):
    """A module that can be layers of a chain."""

    def add_to(self, chain: Chain) -> bool:
        """Adds the module's layers to the chain; False where its call computes what no chain computes."""


def calls_more(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward: it has hooks, all have, or it is compiled."""
    return hooked(module) or compiled_on_its_own(module) or has_global_hooks()


def run_chain(module: nn.Module, x: Tensor, channels_last: bool) -> Tensor | None:
    """``module.forward(x)`` by one operator call, or None where modules must be called."""
    if not chainable(x) or has_global_hooks():
        return None
    if torch.compiler.is_compiling():  # the compiler's own guards say whether the modules have changed
        chain = _collect(module)
    else:
        cached = module.__dict__.get(PLACE)
        if cached is None or not cached.is_current(module):
            cached = _CachedChain(module)
        chain = cached.chain
    return chain.run(x, channels_last) if chain is not None and chain.takes(x, channels_last) else None


def forget_chain(module: nn.Module) -> None:
    """Removes what `run_chain` keeps in the module."""
    with CHANGES:
        module.__dict__.pop(PLACE, None)


def modules_of(root: nn.Module, again: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """``root.named_modules()``, also while another thread puts modules in or takes some out.

    A module that is in several places comes once, or ``again`` in each. What TorchScript has compiled comes
    without its parts, which are no modules any more.
    """
    seen: set[nn.Module] = set()
    left = [("", root)]
    while left:
        path, module = left.pop()
        if again or module not in seen:
            seen.add(module)
            yield path, module
            if not isinstance(module, torch.jit.ScriptModule):
                inside = reversed(module._modules.copy().items())
                left += ((f"{path}.{name}".lstrip("."), m) for name, m in inside if m is not None)


def _is_chained(module: nn.Module) -> bool:
    """Whether the module can be layers of a chain; `poolformer_kernels.restore` takes that from it."""
    return hasattr(type(module), "add_to")


def _collect(module: nn.Module) -> Chain | None:
    chain = Chain()
    add_to = getattr(module, "add_to", None)  # None: another thread has just restored it
    try:
        return chain if add_to is not None and add_to(chain) else None
    except KeyError:  # something that is mostly a parameter or a module is a plain attribute
        return None


class _CachedChain:
    """A module's chain, and everything that the chain was read from.

    To walk the modules costs a tenth of a small model's inference; to see that they are the same, by identity
    and in loops that run in C, much less. Copies and pickles of the module do not get it.
    """

    def __init__(self, root: nn.Module) -> None:
        with CHANGES:
            if _is_chained(root):
                root.__dict__.setdefault(PLACE, None)  # counted by the sizes below
        self._root = ref(root)
        self._places: list[dict[str, Any]] = []
        self._keys: list[str] = []
        self._values: list[object] = []
        modules = [module for _, module in modules_of(root)]
        self._modules = [m for m in modules if not isinstance(m, torch.jit.ScriptModule)]  # of no chain
        self._types = [*map(type, self._modules)]
        self._hooks: list[dict[str, Any]] = []
        for module in self._modules:
            attributes = module.__dict__
            self._watch(attributes, _INTERNAL)
            self._watch(module._parameters)
            self._watch(module._modules)
            self._watch(module._buffers)
            if module is not root:  # the call that led here has run root's hooks
                self._hooks += (attributes[name] for name in HOOKS)
        self._hooked = [*map(bool, self._hooks)]
        self._sized = [place for m in self._modules for place in (m.__dict__, m._parameters, m._modules)]
        # A forward that is set on an instance adds an entry, so a size changes.
        self._sizes = [*map(len, self._sized)]
        self._ordered = [m._modules for m in self._modules if len(m._modules) > 1]
        self._orders = [*map(list, self._ordered)]
        # a parametrization computes its tensor anew in each call
        computed = any("parametrizations" in m._modules for m in self._modules)
        self.chain = None if computed else _collect(root)
        with CHANGES:
            if PLACE in root.__dict__:  # else another thread has restored the module or forgotten its chain
                root.__dict__[PLACE] = self

    def _watch(self, place: dict[str, Any], without: Set[str] = frozenset()) -> None:
        entries = {key: value for key, value in place.copy().items() if key not in without}
        self._places += [place] * len(entries)
        self._keys += entries.keys()
        self._values += entries.values()

    def is_current(self, root: nn.Module) -> bool:
        """Whether nothing that the chain was read from has changed."""
        try:
            same = all(map(is_, map(getitem, self._places, self._keys), self._values))
        except KeyError:
            return False
        return (
            same
            and self._root() is root
            and [*map(type, self._modules)] == self._types
            and [*map(len, self._sized)] == self._sizes
            and [*map(list, self._ordered)] == self._orders
            and [*map(bool, self._hooks)] == self._hooked
        )

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()
