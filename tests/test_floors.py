"""The package's floors (pyproject.toml, `lint-imports`) hold all of it, and nothing goes round them."""

import ast
import re
from graphlib import CycleError, TopologicalSorter

import grimp
import pytest
from support.processes import ROOT

PACKAGE = "poolformer_kernels"
# Who may import a module by a computed name: the command line a benchmark, which lies below; the backend of
# Triton its own kernels, at the first call; the commands what they need; the benchmarks the null GPU.
BY_NAME = {
    "poolformer_kernels/cli/main.py",
    "poolformer_kernels/backends/triton/__init__.py",
    "poolformer_kernels/cli/extras.py",
    "benchmarks/host_device.py",
}
IMPORTERS = ("import_module", "__import__", "spec_from_file_location", "module_from_spec", "exec_module")


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph(PACKAGE, "benchmarks", cache_dir=None)


def sorter(graph) -> TopologicalSorter:
    return TopologicalSorter({name: graph.find_modules_directly_imported_by(name) for name in graph.modules})


def test_no_circles(graph):
    assert len(graph.modules) > 80
    sorter(graph).prepare()  # a circle would be an error that names it


def test_a_circle_would_be_found():
    changed = grimp.build_graph(PACKAGE, cache_dir=None)
    changed.add_import(importer=f"{PACKAGE}.layout", imported=f"{PACKAGE}.nn.block")
    with pytest.raises(CycleError) as caught:
        sorter(changed).prepare()
    assert {f"{PACKAGE}.layout", f"{PACKAGE}.nn.block"} <= set(caught.value.args[1])


def test_every_module_is_on_a_floor(graph):
    text = (ROOT / "pyproject.toml").read_text()
    layers = re.search(r"^layers = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)[1]
    floors = tuple(re.findall(r"[\w.]+", layers))
    packages = {PACKAGE, f"{PACKAGE}.cli"}  # of several floors; the second holds nothing but a docstring
    outside = [m for m in graph.modules - packages if not any(f"{m}.".startswith(f"{f}.") for f in floors)]
    assert outside == []


def test_only_commands_import_the_whole_package(graph):
    importers = graph.find_modules_that_directly_import(PACKAGE)
    assert {m for m in importers if not m.startswith(("benchmarks.", f"{PACKAGE}.cli."))} == set()


def test_nothing_is_imported_by_name():
    found = set()
    for path in [*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in IMPORTERS:
                found.add(str(path.relative_to(ROOT)))
    assert found == BY_NAME
