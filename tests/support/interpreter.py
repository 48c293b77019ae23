"""Triton's interpreter without two things that it does again and again, a third of its time and more.

At each call of a device function it patches all of Triton's language, which the launch has patched; with each
tensor it makes a table of NumPy's types. Neither changes a result.
"""

from collections.abc import Callable
from functools import cache


def hasten() -> None:
    """From now on, in this process."""
    from triton.language import core
    from triton.runtime import interpreter

    if not {"_patch_lang", "_get_np_dtype"} <= vars(interpreter).keys():
        return  # another version's: only slower
    patch, numpy_type = interpreter._patch_lang, interpreter._get_np_dtype
    if patch.__name__ == "patch_once":
        return
    types = {}

    @cache
    def languages(function: Callable) -> list:
        given = {id(value) for value in function.__globals__.values()}
        return [language for language in (interpreter.tl, core) if id(language) in given]

    def patch_once(function: Callable):
        unpatched = any(core.is_builtin(language.load) for language in languages(function))
        return patch(function) if unpatched else None

    def known_numpy_type(dtype):
        if dtype.name not in types:
            types[dtype.name] = numpy_type(dtype)
        return types[dtype.name]

    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, known_numpy_type
