"""accelerate and explain on models that something else has wrapped, compiled, traced or quantised."""

import copy
from functools import partial

import pytest
import torch
from support.accelerate import ALL, DEPTHS, blocks_of, image, logits, make_model
from support.chain import Calls
from support.peers import require
from torch import nn

import poolformer_kernels as pk
from poolformer_kernels.accelerate import accelerate, restore

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.usefixtures("fresh_dynamo"),
]


# ---- code that is compiled once and for all ----------------------------------------------------------------


def scripted(model: nn.Module) -> nn.Module:
    with require("timm").layers.set_scriptable(True):
        return torch.jit.script(model)


def traced(model: nn.Module) -> nn.Module:
    return torch.jit.trace(model, image(), check_trace=False)


def exported(model: nn.Module) -> nn.Module:
    return torch.export.export(model, (image(),)).module()


COMPILED = "TorchScript has compiled some modules: accelerate the model before torch.jit"
GRAPHS = "a tracer has made graphs of some modules: accelerate the model before it is traced"


@pytest.mark.parametrize(
    ("compiled", "hint"),
    [(scripted, COMPILED), (traced, COMPILED), (torch.fx.symbolic_trace, GRAPHS), (exported, GRAPHS)],
)
@pytest.mark.parametrize("inside", [False, True])
def test_compiled_models_are_refused_with_the_reason(compiled, hint, inside):
    model = compiled(make_model("timm"))
    model = nn.Sequential(model, nn.Identity()) if inside else model
    x = image()
    expected = model(x)
    with pytest.raises(ValueError, match=f"^no block to accelerate in .*; {hint}$"):
        accelerate(model)
    assert pk.explain(model).calls == ()
    assert restore(model) is model
    assert torch.equal(model(x), expected)


def test_a_scripted_mixer_in_a_stage_of_ours(kernels):
    stage = pk.nn.PoolFormerStage(pk.nn.PoolFormerBlock(8), pk.nn.PoolFormerBlock(8)).eval()
    x = torch.randn(1, 8, 5, 4)
    with torch.no_grad():
        expected = stage(x)
        stage[0].token_mixer = torch.jit.script(pk.nn.Pooling())
        for _ in range(2):
            torch.testing.assert_close(stage(x), expected)
    found = pk.explain(stage)
    kind = "torch.jit._script.RecursiveScriptModule"
    assert found.calls[0].reason == f"token_mixer is {kind}, not Pooling"
    assert found.summary == "3 of 4 on cpp, 1 as modules"


# ---- wrappers that call the modules ------------------------------------------------------------------------


def compiled_around(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="aot_eager")


def compiled_itself(model: nn.Module) -> nn.Module:
    model.compile(backend="aot_eager")
    return model


def parts_compiled(model: nn.Module) -> nn.Module:
    for block in blocks_of(model):
        block.mlp.compile(backend="aot_eager")
        block.token_mixer.compile(backend="aot_eager")
    return model


@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (nn.DataParallel, "module."),
        (compiled_around, "_orig_mod."),
        (compiled_itself, ""),
        (parts_compiled, ""),
        (torch.optim.swa_utils.AveragedModel, "module."),
    ],
)
def test_wrapped_models_are_looked_into(wrap, prefix, kernels):
    """Also after they have been called, and restored."""
    plain, x = make_model("timm"), image()
    model = wrap(copy.deepcopy(plain))
    with torch.inference_mode():
        expected = plain(x)
        for _ in range(2):
            torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
            assert accelerate(model, strict=True) is model
            assert pk.explain(model).summary == ALL
            assert pk.explain(model).calls[0].path == f"{prefix}stages.0.blocks.0.token_mixer"
            with Calls() as calls:
                torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
            assert calls.kernels() == {"chain_cpp": len(DEPTHS)}
            restore(model)
            with Calls() as calls:
                torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
            assert not [name for name in calls.counts if name.endswith("_cpp")]


@pytest.mark.parametrize("part", ["token_mixer", "mlp"])
@pytest.mark.parametrize(
    ("wrap", "kind"),
    [
        (torch.jit.script, "torch.jit._script.RecursiveScriptModule"),
        (partial(torch.compile, backend="aot_eager"), "torch._dynamo.eval_frame.OptimizedModule"),
    ],
    ids=["scripted", "compiled"],
)
def test_wrapped_parts_leave_the_other_part_to_the_operators(wrap, kind, part, kernels):
    model, x = make_model("official"), image()
    expected, originals = logits(model, x), [getattr(block, part) for block in blocks_of(model)]
    for block, original in zip(blocks_of(model), originals, strict=True):
        setattr(block, part, wrap(original))
    accelerate(model)
    for call in pk.explain(model).calls:
        wrapped = call.path.endswith(part)
        assert call.backend == ("modules" if wrapped else "cpp"), call
        assert (call.reason.startswith(part) and f" is {kind}, " in call.reason) == wrapped, call
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(logits(model, x), expected, atol=1e-5, rtol=1e-4)
    for block, original in zip(blocks_of(model), originals, strict=True):
        setattr(block, part, original)
    assert pk.explain(model).summary == ALL
    torch.testing.assert_close(logits(model, x), expected, atol=1e-5, rtol=1e-4)


# ---- quantised models --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_quantised_layers_are_named(kernels):
    quantization = torch.ao.quantization
    model, x = make_model("timm"), image()
    for block in blocks_of(model):
        block.mlp.qconfig = quantization.get_default_qconfig("fbgemm")
    observed = quantization.prepare(model)
    observed(x)
    kept = observed(x)
    accelerate(observed)
    torch.testing.assert_close(observed(x), kept, rtol=1e-5, atol=1e-5)
    converted = quantization.convert(observed)
    reasons = {call.reason for call in pk.explain(observed).calls[1::2]}
    assert reasons == {"mlp.fc1 has hooks"}
    reasons = {call.reason for call in pk.explain(converted).calls[1::2]}
    assert reasons == {"mlp.fc1 is torch.ao.nn.quantized.modules.conv.Conv2d, not Conv2d"}
