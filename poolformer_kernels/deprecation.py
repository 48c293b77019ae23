"""Names that have moved: the old place works until 0.3.0 and warns."""

import warnings
from collections.abc import Callable
from types import ModuleType

__all__ = ["moved"]


def moved(old: str, names: dict[str, ModuleType]) -> Callable[[str], object]:
    """The ``__getattr__`` of a module ``old``, whose ``names`` are now in other modules."""

    def find(name: str) -> object:
        new = names.get(name)
        if new is None:
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        message = f"{old}.{name} is now {new.__name__}.{name}; the old name goes in 0.3.0"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return getattr(new, name)

    return find
