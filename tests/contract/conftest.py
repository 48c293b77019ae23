"""Runs the contract's tests on the targets of this run."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.interpreter import hasten
from support.operators import OPERATORS
from support.peers import require_backend

from . import cases
from .targets import Target, chosen


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" not in metafunc.fixturenames:
        return
    given = getattr(metafunc.function, "cases", cases.Cases())
    of_both = "operator" in metafunc.fixturenames
    names = ["target", *["operator"] * of_both, *given.names]
    rows = []
    for target, operator in itertools.product(chosen(), OPERATORS.values()):
        if not of_both and operator.name != metafunc.module.OPERATOR:
            continue
        for values, long in cases.selection(target, operator.name, given):
            cases.NOT_RUN[target.name][cases.LONG] += long
            row = [target, *[operator] * of_both, *values]
            name = "-".join(str(value) for value in row if not (of_both and value is None))
            rows.append(pytest.param(*row, id=name, marks=[pytest.mark.long] if long else []))
    none = pytest.param(*[None] * len(names), id="no target")
    metafunc.parametrize(names, rows or [none], indirect=["target"])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test that concerns no target of this run is no test of it."""
    ours = [item for item in items if item.path.parent == Path(__file__).parent and hasattr(item, "callspec")]
    targets = {item: item.callspec.params["target"] for item in ours if "target" in item.callspec.params}
    nobody = {item for item, target in targets.items() if target is None}
    if nobody:
        config.hook.pytest_deselected(items=[*nobody])
        items[:] = [item for item in items if item not in nobody]
    for item, target in targets.items():
        if target is not None and target.device == "cuda":
            item.add_marker(target.backend)


@pytest.fixture(scope="session", autouse=True)
def quick() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        hasten()


@pytest.fixture
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """The test computes on this target."""
    if not request.param.architecture:
        require_backend(request.param.backend)
    with request.param.use():
        yield request.param
