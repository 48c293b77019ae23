"""Types for other programs: the public API in use, under mypy and basedpyright, strict; accelerate's own."""

import ast
import importlib
import json
import sys
import typing
from pathlib import Path

import pytest
from support.peers import require
from support.processes import ROOT, python
from torch import nn

import poolformer_kernels as pk
from poolformer_kernels.explain import Explanation

PACKAGE = Path(pk.__file__).parent
FILES = [
    *sorted((PACKAGE / "accelerate").glob("*.py")),
    *(PACKAGE / name for name in ("explain.py", "nn/chain_cache.py", "nn/fusion.py", "nn/names.py")),
]
SCRIPT = Path(__file__).parent / "typing" / "public_api.py"
MODULES = {"": "pk", "nn": "pk.nn", "models": "pk.models", "ops": "pk.ops", "dense": "dense"}


def test_the_script_uses_every_public_name():
    attributes = (node for node in ast.walk(ast.parse(SCRIPT.read_text())) if isinstance(node, ast.Attribute))
    used = {ast.unparse(node) for node in attributes}
    for module, written in MODULES.items():
        if module == "dense":
            require("torchvision")
        names = importlib.import_module(f"poolformer_kernels.{module}".rstrip(".")).__all__
        assert {f"{written}.{name}" for name in names} - used == set()


@pytest.mark.long
def test_the_script_runs(tmp_path):
    for package in ("captum", "timm", "torchvision"):
        require(package)
    done = python(SCRIPT, cwd=tmp_path)
    assert done.stdout.splitlines()[-1].startswith("24 of 24 on ")


@pytest.mark.long
@pytest.mark.parametrize("checker", ["mypy", "basedpyright"])
def test_no_error_in_strict_mode(checker, tmp_path):
    """Of the script. Of the package only what it tells the script: its own files have tests of their own."""
    require(checker)
    settings = {"include": [str(SCRIPT)], "extraPaths": [str(ROOT)], "typeCheckingMode": "strict"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    options = {
        "mypy": ["--strict", "--follow-imports=silent", "--cache-dir", str(tmp_path), str(SCRIPT)],
        "basedpyright": ["--project", str(tmp_path), "--pythonpath", sys.executable],
    }
    python("-m", checker, *options[checker], cwd=ROOT)


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
    assert typing.get_type_hints(pk.explain)["return"] is Explanation
