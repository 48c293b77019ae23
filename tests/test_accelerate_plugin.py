"""The plugin by which other packages' own tests run on accelerated models."""

from types import ModuleType

import pytest
from support.peers import require

from poolformer_kernels.accelerate import equivalence

pytest_plugins = "pytester"

CALLED = """
import timm
from timm import create_model
import torch
from transformers import PoolFormerConfig, PoolFormerForImageClassification

def test_timm():
    with torch.no_grad():
        for create in (create_model, timm.create_model):
            create("poolformer_s12").eval()(torch.zeros(1, 3, 32, 32))
    assert type(create_model("resnet18")).__name__ == "ResNet"

def test_transformers():
    config = PoolFormerConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 8])
    PoolFormerForImageClassification(config)(torch.zeros(1, 3, 64, 64))
"""
CREATED = """
import timm

def test_created():
    timm.create_model("poolformer_s12")
"""
OTHERS = CREATED.replace("poolformer_s12", "resnet18")


@pytest.fixture
def timm() -> ModuleType:
    """Loaded, like transformers, before pytester: it unloads in the end what it did not find."""
    require("transformers", "models.poolformer.modeling_poolformer")
    return require("timm")


@pytest.mark.parametrize(
    ("tests", "code", "counts"),
    [
        (CALLED, 0, "3 models, 28 blocks in them all operators, 12 calls"),
        (CREATED, 1, "1 models, 12 blocks in them all operators, 0 calls"),
        (OTHERS, 1, "0 models, 0 blocks in them all operators, 0 calls"),
    ],
    ids=["called", "created", "others"],
)
def test_plugin(tests, code, counts, timm, pytester, monkeypatch, kernels):
    create = timm.create_model
    monkeypatch.setattr(equivalence, "_compared", {})  # the calls for it do not count
    pytester.makepyfile(tests)
    run = pytester.runpytest_inprocess("-p", "support.accelerate_plugin")
    assert run.ret == code
    run.assert_outcomes(passed=tests.count("def test"))
    run.stdout.fnmatch_lines(["*= accelerated models =*", counts])
    assert timm.create_model is create
