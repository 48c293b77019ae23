"""A pytest plugin: other packages' own tests run on accelerated models.

From the repository's root, with checkouts beside it for their tests, which no wheel has::

    export PYTHONPATH=.:tests
    python -m pytest -p support.accelerate_plugin ../pytorch-image-models/tests/test_models.py \\
        -k "poolformer and not pretrained and not forward_fx["
    python -m pytest -p support.accelerate_plugin ../transformers/tests/models/poolformer

Left out are downloads, and timm's test_model_forward_fx: it asks for equal bits of a model and of its graph,
and a graph is made of the modules. Every other test that passes without the plugin passes with it.

Every model that ``timm.create_model`` returns and every PoolFormer of transformers is accelerated before a
test sees it; what has no block to accelerate stays as it is. The summary says how many models these were and
how many calls of blocks and stages ran as operators, and the run fails where either is zero. In one process
only: under pytest-xdist the counts stay in the workers, and so the run fails.
"""

import importlib
from collections import Counter
from collections.abc import Callable
from functools import wraps
from types import ModuleType

import pytest
import torch
from torch import nn

from poolformer_kernels.accelerate import accelerate, blocks, unfused_reasons
from poolformer_kernels.accelerate.layouts import layout_of

_COUNTS = pytest.StashKey[Counter]()
_PATCHES = pytest.StashKey[pytest.MonkeyPatch]()


def pytest_configure(config: pytest.Config) -> None:
    counts = config.stash[_COUNTS] = Counter()
    patches = config.stash[_PATCHES] = pytest.MonkeyPatch()

    def accelerated(model: nn.Module) -> nn.Module:
        found = [block for block in model.modules() if layout_of(block) is not None]
        if found:
            calls = counts["calls"]
            accelerate(model)
            counts["calls"] = calls  # without those by which blocks are compared
            counts["models"] += 1
            counts["blocks"] += sum(unfused_reasons(block) == (None, None) for block in found)
        return model

    for owner, name in ((blocks.Recipe, "run"), (blocks, "run_chain")):
        patches.setattr(owner, name, _counted(getattr(owner, name), counts))
    timm = _module("timm.models._factory")
    if timm is not None:
        create = timm.create_model
        for place in ("timm", "timm.models", "timm.models._factory"):
            patches.setattr(f"{place}.create_model", _followed_by(create, accelerated))
    transformers = _module("transformers.models.poolformer.modeling_poolformer")
    if transformers is not None:  # the classifier has such a model inside, and no other blocks
        model = transformers.PoolFormerModel
        patches.setattr(model, "__init__", _initialised_and(model.__init__, accelerated))


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_PATCHES].undo()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.exitstatus == pytest.ExitCode.OK and _in_vain(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    counts = config.stash[_COUNTS]
    terminalreporter.section("accelerated models")
    terminalreporter.write_line(
        f"{counts['models']} models, {counts['blocks']} blocks in them all operators, {counts['calls']} calls"
    )
    if _in_vain(config):
        terminalreporter.write_line("FAILED: no test ran on an accelerated model", red=True)


def _in_vain(config: pytest.Config) -> bool:
    counts = config.stash[_COUNTS]
    return not (counts["blocks"] and counts["calls"]) and not config.option.collectonly


def _module(name: str) -> ModuleType | None:
    """A part of a package, or None where that is not installed or does not load beside this torch."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError):
        return None


def _counted(function: Callable, counts: Counter) -> Callable:
    """The function, which computes a block or a stage by operators unless it returns None."""

    @wraps(function)
    def call(*args):
        y = function(*args)
        if y is not None and not torch.compiler.is_compiling():
            counts["calls"] += 1
        return y

    return call


def _followed_by(create: Callable[..., nn.Module], then: Callable) -> Callable[..., nn.Module]:
    @wraps(create)
    def call(*args, **options):
        return then(create(*args, **options))

    return call


def _initialised_and(init: Callable[..., None], then: Callable) -> Callable[..., None]:
    @wraps(init)
    def call(self, *args, **options):
        init(self, *args, **options)
        then(self)

    return call
