"""What accelerate says about what it took, strict, save_hidden."""

import logging
from collections import Counter

import pytest
import torch
from support.accelerate import (
    SOURCES,
    PoolFormerBlock,
    assert_equal,
    blocks_of,
    classes_and_attributes,
    image,
    make_model,
    metaformer,
    results,
)
from support.nn import COPIES
from support.peers import require
from torch import nn

import poolformer_kernels as pk
from poolformer_kernels.accelerate import accelerate, restore

MIXER = "token_mixer is timm.models.metaformer.{}, without 'pool'"
NORM = "norm2 is timm.models.metaformer.{}, not GroupNorm"
LINEAR = "mlp.fc1 is torch.nn.Linear, not Conv2d"
WARNING = "accelerate made nothing faster: "


def logged(caplog: pytest.LogCaptureFixture, model: nn.Module, **options) -> str:
    """The one line that a call logs."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "poolformer_kernels"):
        accelerate(model, **options)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("poolformer_kernels", logging.INFO)
    return record.getMessage()


# ---- what it says ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("source", SOURCES)
def test_a_line_says_how_many_sub_blocks_were_taken(source, caplog, kernels):
    model = make_model(source)
    name = f"{type(model).__module__}.{type(model).__name__}"
    line = logged(caplog, model, strict=True)
    assert line == f"accelerate: 10 of 10 sub-blocks of {name} run as operator calls"
    line = logged(caplog, model, mlp=False, strict=True)  # what was not asked for is not left alone
    assert line == f"accelerate: 5 of 5 sub-blocks of {name} run as operator calls"


def test_the_line_says_why_others_were_left(caplog, kernels):
    model = metaformer(["Pooling", "SepConv", "SepConv", "Attention"])
    assert logged(caplog, model) == (
        "accelerate: 4 of 8 sub-blocks of timm.models.metaformer.MetaFormer run as operator calls,"
        f" 4 as modules: {MIXER.format('SepConv')} (2); {MIXER.format('Attention')} (1); {LINEAR} (1)"
    )
    assert pk.explain(model).summary == "4 of 8 on cpp, 4 as modules"
    for block, reason in zip(blocks_of(model), ("1x1", "linear", "deep", "wide"), strict=True):
        block.mlp.fc1 = type(reason, (nn.Conv2d,), {})(32, 128, 1)
    line = logged(caplog, model)
    assert "1 of 8 sub-blocks" in line
    assert line.endswith("; and 3 more: see poolformer_kernels.explain")
    assert line.count(" (1)") + line.count(" (2)") == 3


OWN = "accelerate: the layers of poolformer_kernels.models.{} are this package's own"


def dropping() -> nn.Module:
    model = pk.create_model("poolformer_s12").train()
    for module in model.modules():
        if isinstance(module, pk.nn.Mlp):
            module.drop.p = 0.1
    return model


def test_own_layers_are_fast_already(caplog, kernels):
    model = pk.create_model("poolformer_s12", num_classes=2)
    before, explained = classes_and_attributes(model), pk.explain(model)
    line = OWN.format("poolformer.PoolFormer")
    assert logged(caplog, model, strict=True) == f"{line} and fast already"
    assert classes_and_attributes(model) == before
    assert pk.explain(model) == explained
    assert logged(caplog, model.double()) == f"{line}: see poolformer_kernels.explain"


@pytest.mark.parametrize(
    ("make", "kind", "path", "reason"),
    [
        (
            lambda: pk.create_model("poolformer_s12", norm_layer="layer"),
            "metaformer.MetaFormer",
            "network.0.0.token_mixer",
            "norm1 is poolformer_kernels.nn.ChannelLayerNorm, not a GroupNorm of one group",
        ),
        (dropping, "poolformer.PoolFormer", "network.0.0.mlp", "drop is active (p = 0.1)"),
    ],
    ids=["norm", "dropout"],
)
def test_own_layers_that_run_modules(make, kind, path, reason, caplog, kernels):
    model = make()
    assert logged(caplog, model) == f"{OWN.format(kind)}: see poolformer_kernels.explain"
    with pytest.raises(ValueError) as raised:
        accelerate(model, strict=True)
    first, second, *_ = str(raised.value).splitlines()
    assert first == "strict is True, and 12 of 24 sub-blocks would run as modules:"
    assert second == f"  {path}: {reason}"
    assert pk.explain(model).summary == "12 of 24 on cpp, 12 as modules"
    other = "mixer" if path.endswith("mlp") else "mlp"
    accelerate(model, mixer=other == "mixer", mlp=other == "mlp", strict=True)


@pytest.mark.filterwarnings("error::UserWarning")
def test_what_runs_on_the_reference_is_not_fast(caplog):
    reason = pk.explain(torch.zeros(1, 1, 1, 1, dtype=torch.float64)).calls[0].reason
    block = PoolFormerBlock().double()
    line = (
        "2 of 2 sub-blocks of support.accelerate.PoolFormerBlock run as operator calls,"
        f" 2 of them on the reference: {reason}"
    )
    with pytest.warns(UserWarning, match=WARNING) as warned:
        assert logged(caplog, block, strict=True) == f"accelerate: {line}"
    assert [str(w.message) for w in warned] == [f"{WARNING}{line}"]
    with pk.use_backend("reference"):
        assert logged(caplog, block).endswith("2 of them on the reference: asked for")
    with torch.device("meta"):  # it is not known yet where it will run
        accelerate(PoolFormerBlock())


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("convformer_s18", {NORM.format("LayerNorm2dNoBias"): 18, MIXER.format("SepConv"): 18}),
        ("caformer_s18", {NORM.format("LayerNormNoBias"): 12, MIXER.format("Attention"): 12}),
    ],
)
def test_metaformers_of_which_nothing_fits(name, reasons):
    model = require("timm").create_model(name)
    before, explained = classes_and_attributes(model), pk.explain(model)
    for inplace in (True, False):
        with pytest.warns(UserWarning, match=WARNING) as warned:
            assert (accelerate(model, inplace=inplace) is model) == inplace
        assert len(warned) == 1
        assert warned[0].filename == __file__
        text = str(warned[0].message)
        assert text.startswith(f"{WARNING}0 of 36 sub-blocks of timm.models.metaformer.MetaFormer run as")
        for reason, count in reasons.items():
            assert f"{reason} ({count})" in text
        assert classes_and_attributes(model) == before
        assert pk.explain(model) == explained
    found = Counter(call.reason for call in explained.calls)
    assert found.items() >= reasons.items()


def test_hooks_that_are_in_the_way_now_are_said(caplog):
    block = PoolFormerBlock().eval()
    handles = [module.register_forward_hook(lambda *_: None) for module in (block.norm1, block.mlp.fc1)]
    with pytest.warns(UserWarning, match=WARNING + r"0 of 2 .*: norm1 has hooks \(1\); mlp\.fc1 has hooks"):
        accelerate(block)
    for handle in handles:
        handle.remove()
    assert {call.backend for call in pk.explain(block).calls} == {pk.explain(block).calls[0].backend}
    assert "modules" not in pk.explain(block).summary


# ---- strict ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accelerated", [False, True])
def test_strict_names_what_was_left_and_changes_nothing(accelerated):
    model = metaformer(["Pooling", "Pooling", "SepConv", "Attention"])
    if accelerated:
        accelerate(model)
    before = classes_and_attributes(model)
    with pytest.raises(ValueError) as raised:
        accelerate(model, strict=True)
    assert str(raised.value).splitlines() == [
        "strict is True, and 3 of 8 sub-blocks would run as modules:",
        f"  stages.2.blocks.0.token_mixer: {MIXER.format('SepConv')}",
        f"  stages.3.blocks.0.token_mixer: {MIXER.format('Attention')}",
        f"  stages.3.blocks.0.mlp: {LINEAR}",
    ]
    assert classes_and_attributes(model) == before
    model = metaformer(["Pooling", "Pooling", "SepConv", "SepConv"])
    assert accelerate(model, mixer=False, strict=True) is model  # what is left was not asked for
    reasons = [call.reason for call in pk.explain(model).calls]
    assert reasons[::2] == ["accelerate was called with mixer=False"] * 4
    assert not any("accelerate" in reason for reason in reasons[1::2])


def test_strict_looks_at_what_holds_now():
    block = PoolFormerBlock(drop=0.1).train()
    with pytest.raises(ValueError, match=r"  mlp: mlp\.drop is active \(p = 0\.1\)$"):
        accelerate(block, strict=True)
    assert type(block) is PoolFormerBlock
    assert type(accelerate(block.eval(), strict=True)) is not PoolFormerBlock


@pytest.mark.parametrize("name", ["mixer", "mlp", "inplace", "strict", "save_hidden"])
@pytest.mark.parametrize("value", [1, "yes"])
def test_arguments_are_checked_first(name, value):
    block = PoolFormerBlock()
    allowed = "a bool or None" if name == "save_hidden" else "a bool"
    with pytest.raises(TypeError, match=f"^{name} must be {allowed}, got {type(value).__name__}$"):
        accelerate(block, **{name: value})
    assert type(block) is PoolFormerBlock


def test_save_hidden_without_an_mlp():
    block = PoolFormerBlock()
    with pytest.raises(ValueError, match=r"^save_hidden is True and mlp is False: .*; allowed: None$"):
        accelerate(block, mlp=False, save_hidden=True)
    assert type(block) is PoolFormerBlock
    accelerate(block, mlp=False, save_hidden=None)


# ---- save_hidden -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
def test_save_hidden_reaches_the_operator(source, operator_calls, kernels):
    model, x = make_model(source), image()
    expected = results(model, x)

    def given(model: nn.Module) -> list[bool | None]:
        operator_calls.clear()
        assert_equal(results(model, x), expected, 1e-4)
        return [call.options["save_hidden"] for call in operator_calls if call.name == "mlp"]

    for value in (None, True, False):
        accelerate(model, save_hidden=value)
        assert given(model) == [value] * 5
        for name in ("deepcopy", "pickle"):
            assert given(COPIES[name](model)) == [value] * 5
    assert given(accelerate(model)) == [None] * 5  # the last call counts


def saves_hidden(module: nn.Module, channels: int = 16) -> bool:
    """Whether the MLP's first layer's output is kept for the backward."""
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        module(torch.zeros(2, channels, 3, 5, requires_grad=True))
    return 2 * 4 * channels * 3 * 5 in saved


@pytest.mark.parametrize("kept", [True, False])
def test_what_is_saved_for_the_backward(kept, kernels):
    block = accelerate(PoolFormerBlock(), save_hidden=kept)
    assert saves_hidden(block) == kept
    assert saves_hidden(pk.nn.Mlp(16, 64, save_hidden=kept)) == kept
    assert saves_hidden(restore(block))  # eager keeps it


@pytest.mark.parametrize(("channels", "kept"), [(248, False), (256, True)])
def test_what_is_saved_of_wide_blocks(channels, kept, monkeypatch, kernels):
    monkeypatch.setattr("poolformer_kernels.backends.cpp.ISA", "avx2")  # with a matrix unit none is
    assert saves_hidden(accelerate(PoolFormerBlock(channels)), channels) == kept
