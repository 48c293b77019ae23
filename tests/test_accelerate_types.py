"""The annotations of accelerate, restore and explain, which a user's type checker reads."""

import ast
import inspect
import typing
from pathlib import Path

import pytest
from torch import nn

import poolformer_kernels as pk
from poolformer_kernels.explain import Explanation

PACKAGE = Path(pk.__file__).parent
FILES = [
    *sorted((PACKAGE / "accelerate").glob("*.py")),
    *(PACKAGE / name for name in ("explain.py", "nn/chain_cache.py", "nn/fusion.py", "nn/names.py")),
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_function_is_annotated(path):
    """In full: a checker takes an unannotated function's arguments and result for anything."""
    missing = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            arguments += [a for a in (node.args.vararg, node.args.kwarg) if a is not None]
            names = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            names += [] if node.returns is not None else ["return"]
            missing += [f"line {node.lineno}, {node.name}: {name}" for name in names]
    assert missing == []


@pytest.mark.parametrize("function", [pk.accelerate, pk.restore])
def test_a_model_keeps_its_type(function):
    """One type variable is argument and result, so that a checker knows a MyNet as a MyNet afterwards."""
    hints = typing.get_type_hints(function)
    assert isinstance(hints["model"], typing.TypeVar)
    assert hints["model"].__bound__ is nn.Module
    assert hints["return"] is hints["model"]
    assert hints.keys() == {*inspect.signature(function).parameters, "return"}


def test_explain_gives_an_explanation():
    assert typing.get_type_hints(pk.explain)["return"] is Explanation
