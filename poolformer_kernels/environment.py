"""The environment variables that the package reads when it is imported; an empty one counts as unset."""

import os
from collections.abc import Sequence

__all__ = ["choice"]


def choice(name: str, allowed: Sequence[str]) -> str:
    """What a variable names, in upper or lower case; where it is unset or empty, the first allowed name.

    Raises:
        ValueError: another name. The message begins with the variable's name, by which `cli.startup` knows
            it: on the command line it is one line.
    """
    given = os.environ.get(name) or allowed[0]
    if given.lower() not in allowed:
        raise ValueError(f"{name} is {given!r}; allowed: {', '.join(allowed)}")
    return given.lower()
