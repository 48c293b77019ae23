"""Names that have moved: the old place works until 0.3.0 and warns."""

import warnings
from collections.abc import Callable
from types import ModuleType

__all__ = ["moved"]


def moved(old: str, new: ModuleType, names: tuple[str, ...] | None = None) -> Callable[[str], object]:
    """A module's ``__getattr__`` that finds ``names`` (by default ``new.__all__``) in another module."""

    def find(name: str) -> object:
        if name not in (new.__all__ if names is None else names):
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        message = f"{old}.{name} is now {new.__name__}.{name}; the old name goes in 0.3.0"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return getattr(new, name)

    return find
