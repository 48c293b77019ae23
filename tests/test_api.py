"""What the package is for other programs: cheap to import, typed, of one version, complete in a wheel."""

import ast
import re
import sys
import textwrap
from pathlib import Path

import pytest
from setuptools.config.pyprojecttoml import read_configuration
from support.peers import require_backend
from support.processes import ROOT, python

import poolformer_kernels as pk

PACKAGE = Path(pk.__file__).parent
# what takes long to import, or may not be installed
HEAVY = ("triton", "torch._dynamo", "torch._inductor", "torch.onnx", "torch.distributed.tensor")
HEAVY += ("torch.utils.flop_counter", "torch.utils.cpp_extension", "numpy", "sympy", "onnx", "matplotlib")
HEAVY += ("PIL", "huggingface_hub", "rich", "safetensors", "setuptools", "timm", "torchvision")


def modules_after(code: str) -> list[set[str]]:
    """The modules that are loaded in a fresh process at each ``look()`` of the code."""
    looking = "import sys\ndef look(): print(*sys.modules)\n"
    done = python("-c", looking + code)
    return [set(line.split()) for line in done.stdout.splitlines()]


def test_the_import_brings_nothing_but_the_package() -> None:
    """Beyond PyTorch and what that imports: a heavy package is imported by the first call that needs it."""
    torch_alone, ours = modules_after("import torch\nlook()\nimport poolformer_kernels\nlook()")
    new = ours - torch_alone
    assert "poolformer_kernels.models" in new
    assert [name for name in new if f"{name}.".startswith(tuple(f"{module}." for module in HEAVY))] == []
    others = {name.partition(".")[0] for name in new} - {"poolformer_kernels", "torch"}
    assert others - sys.stdlib_module_names == set()


def test_numpy_is_not_needed(tmp_path: Path) -> None:
    """For models, operators, checkpoints and `poolformer-kernels info`; extras that use it bring it."""
    code = f"""
        import sys
        sys.modules["numpy"] = None  # as if it were not installed
        import torch
        import poolformer_kernels as pk
        from poolformer_kernels.cli.main import main
        torch.save(pk.create_model("poolformer_s12").state_dict(), {str(tmp_path / "s12.pth")!r})
        model = pk.create_model("poolformer_s12", checkpoint={str(tmp_path / "s12.pth")!r})
        model(torch.ones(1, 3, 32, 32)).sum().backward()
        sys.exit(main(["info"]))
    """
    done = python("-W", "ignore", "-c", textwrap.dedent(code))
    assert "cpu, float32" in done.stdout


# ---- types -------------------------------------------------------------------------------------------------

TYPED = ("__init__.py", "environment.py", "layout.py", "numerics.py", "reference.py", "version.py")
TYPED += ("ops/*.py", "backends/__init__.py", "backends/cpp.py", "backends/cuda.py")


def public_functions(tree: ast.AST, owner: str = ""):
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name == "__init__"):
            yield f"{owner}{node.name}", node


@pytest.mark.parametrize(
    "file", [path for pattern in TYPED for path in sorted(PACKAGE.glob(pattern))], ids=lambda p: p.name
)
def test_public_functions_are_annotated(file: Path) -> None:
    missing = []
    for name, function in public_functions(ast.parse(file.read_text())):
        given = function.args
        arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
        bare = [a.arg for a in arguments if a is not None and a.annotation is None and a.arg != "self"]
        missing += [f"{name}({argument})" for argument in bare] + [name] * (function.returns is None)
    assert missing == []


def test_the_stub_has_what_the_extension_has() -> None:
    """Names and how many arguments each function takes, which pybind11 writes into its first line."""
    require_backend("cpp")
    from poolformer_kernels import _C

    tree = ast.parse((PACKAGE / "_C.pyi").read_text())
    stub = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    public = {name: value for name, value in vars(_C).items() if not name.startswith("_")}
    assert {name for name in stub if not name.startswith("_")} == public.keys()
    pairs = [(stub[name], value) for name, value in public.items() if isinstance(stub[name], ast.FunctionDef)]
    methods = {node.name: node for node in stub["Tape"].body}
    own = {n: value for n, value in vars(_C.Tape).items() if not n.startswith("_") or n == "__init__"}
    assert methods.keys() == own.keys()
    pairs += [(methods[name], value) for name, value in own.items()]
    assert len(pairs) > 12
    for node, value in pairs:
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
        theirs = re.match(r"\w+\((.*)\) -> ", value.__doc__)[1]
        assert len(names) == theirs.count(": "), f"{node.name}: {names}, {theirs}"
        if "arg0" not in theirs:
            assert names == re.findall(r"(\w+): ", theirs)


def test_the_stub_has_the_facts_of_the_build() -> None:
    require_backend("cpp")
    info = pk.backends.cpp.build_info()
    assert info.keys() == pk.backends.cpp.BuildInfo.__annotations__.keys()
    for name, kind in pk.backends.cpp.BuildInfo.__annotations__.items():
        assert isinstance(info[name], getattr(kind, "__origin__", kind)), name


# ---- packaging ---------------------------------------------------------------------------------------------


def test_the_version_is_written_once() -> None:
    """pyproject.toml takes it from version.py, which is read there and not imported."""
    configuration = read_configuration(ROOT / "pyproject.toml")
    assert configuration["project"]["version"] == pk.__version__
    assert not re.search(rf'"{re.escape(pk.__version__)}"', (ROOT / "pyproject.toml").read_text())
    code = "import sys; sys.modules['torch'] = None\n"
    code += "from setuptools.config.pyprojecttoml import read_configuration\n"
    code += "print(read_configuration('pyproject.toml')['project']['version'])"
    assert python("-c", code, cwd=ROOT).stdout == f"{pk.__version__}\n"
