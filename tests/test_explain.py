"""explain: the backend that really runs, for modules and tensors, and why."""

import copy
import dataclasses
import json
import sys
from functools import partial

import pytest
import torch
from support.accelerate import PoolFormerBlock, metaformer

import poolformer_kernels as pk
from poolformer_kernels.explain import Call, Explanation
from poolformer_kernels.ops.dispatch import select_backend

BACKEND = select_backend("cpu", torch.float32)


def test_tensor_names_the_backend_that_runs():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        backend = select_backend("cpu", dtype)
        found = pk.explain(torch.zeros(1, 1, 1, 1, dtype=dtype))
        assert [(c.path, c.operator, c.backend) for c in found.calls] == [
            ("", "pool_mixer", backend),
            ("", "mlp", backend),
        ]
        assert found.summary == f"2 of 2 on {backend}"
    assert "float64" in found.calls[0].reason


def test_model_has_a_line_for_every_operator():
    lines = str(pk.explain(pk.create_model("poolformer_s12"))).splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["pool_mixer", "mlp"] * 12
    assert lines[0].split()[:3] == ["network.0.0.token_mixer", "pool_mixer", BACKEND]
    assert lines[-2].split()[:3] == ["network.6.1.mlp", "mlp", BACKEND]
    assert lines[-1] == f"24 of 24 on {BACKEND}"


@pytest.mark.parametrize("name", ["reference", "auto"])
def test_lines_name_the_backends_that_the_operators_select(name, monkeypatch):
    selected = []

    def choose(operator, *args):
        selected.append((operator, select_backend(*args)))
        return "reference"

    for operator in ("pool_mixer", "mlp"):
        module = sys.modules[f"poolformer_kernels.ops.{operator}"]
        monkeypatch.setattr(module, "select_backend", partial(choose, operator))
    stage = pk.nn.PoolFormerStage(pk.nn.PoolFormerBlock(8), pk.nn.PoolFormerBlock(8))
    with pk.use_backend(name):
        stage(torch.zeros(1, 8, 4, 4))
        assert [(call.operator, call.backend) for call in pk.explain(stage).calls] == selected


def test_mixer_says_which_choice_cannot_be_met():
    with pk.use_backend("cpp" if "cpp" in pk.backend_reasons() else "triton"):
        found = pk.explain(torch.nn.Sequential(pk.nn.PoolMixer(8)))
    (call,) = found.calls
    assert (call.path, call.operator, call.backend) == ("0", "pool_mixer", "none")
    assert "was asked for and cannot run this call" in call.reason
    assert found.summary == "1 of 1 would raise"


def test_blocks_say_which_choice_cannot_be_met(kernels):
    for block in (pk.nn.PoolFormerBlock(8), pk.nn.MetaFormerBlock(8), pk.accelerate(PoolFormerBlock())):
        assert pk.explain(block.double()).summary == "2 of 2 would raise"


def test_block_that_runs_its_modules_says_why():
    block = pk.nn.PoolFormerBlock(8)
    block.norm1.register_forward_hook(lambda *_: None)
    mixer, mlp = pk.explain(block).calls
    assert (mixer.backend, mixer.reason) == ("modules", "norm1 has hooks")
    assert mlp.backend == BACKEND
    assert pk.explain(block).summary == f"1 of 2 on {mlp.backend}, 1 as modules"
    block = pk.nn.PoolFormerBlock(8, norm_layer=torch.nn.BatchNorm2d)
    mixer, mlp = pk.explain(block).calls
    assert mixer.reason == "norm1 is torch.nn.BatchNorm2d, not a GroupNorm of one group"
    assert mlp.backend == BACKEND
    reason = "norm2 is torch.nn.BatchNorm2d, not a GroupNorm of one group"
    assert mlp.reason.endswith(f"norm and residual as modules: {reason}")


def test_mlp_that_runs_its_modules_says_why():
    block = pk.nn.PoolFormerBlock(8, drop=0.1)
    for target in (block, block.mlp):
        call = pk.explain(target).calls[-1]
        assert (call.operator, call.backend, call.reason) == ("mlp", "modules", "drop is active (p = 0.1)")
        assert "modules" not in str(pk.explain(copy.deepcopy(target).eval()))
    block.mlp = torch.nn.Identity()
    call = pk.explain(block).calls[1]
    assert (call.backend, call.reason) == ("modules", "mlp is torch.nn.Identity, not Mlp")
    (call,) = pk.explain(pk.nn.Mlp(8)).calls
    assert (call.path, call.operator, call.backend) == ("", "mlp", BACKEND)


def test_other_targets_are_refused():
    with pytest.raises(TypeError, match="target must be a module or a tensor, got str"):
        pk.explain("poolformer_s12")


# ---- the structured form -----------------------------------------------------------------------------------


def test_text_is_the_calls_in_columns_and_the_summary():
    calls = (
        Call("stages.0.mlp", "mlp", "cpp", "asked for"),
        Call("stages.0.token_mixer", "pool_mixer", "modules", "norm1 has hooks"),
        Call("0", "mlp", "cpp", "asked for"),
        Call("1", "mlp", "triton", "asked for; cuda has no kernel for it"),
        Call("2", "mlp", "none", "it cannot run"),
    )
    found = Explanation(calls)
    assert str(found).splitlines() == [
        "stages.0.mlp          mlp         cpp      asked for",
        "stages.0.token_mixer  pool_mixer  modules  norm1 has hooks",
        "0                     mlp         cpp      asked for",
        "1                     mlp         triton   asked for; cuda has no kernel for it",
        "2                     mlp         none     it cannot run",
        "2 of 5 on cpp, 1 on triton, 1 as modules, 1 would raise",
    ]
    assert repr(found) == f"{found}" == str(found)
    assert json.loads(json.dumps(found.to_dict())) == {
        "calls": [
            {"path": c.path, "operator": c.operator, "backend": c.backend, "reason": c.reason} for c in calls
        ],
        "summary": found.summary,
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.calls = ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        calls[0].backend = "cuda"


@pytest.mark.parametrize(
    ("backends", "summary"),
    [
        (["cpp"] * 24, "24 of 24 on cpp"),
        (["cpp"] * 22 + ["modules"] * 2, "22 of 24 on cpp, 2 as modules"),
        (["modules"] * 23 + ["cpp"], "1 of 24 on cpp, 23 as modules"),
        (["triton", "cuda", "cuda"], "2 of 3 on cuda, 1 on triton"),
        (["modules"] * 4, "4 of 4 as modules"),
        (["none"] * 2, "2 of 2 would raise"),
        ([], "no layer that this package computes"),
    ],
)
def test_summary(backends, summary):
    found = Explanation(tuple(Call(str(i), "mlp", backend, "") for i, backend in enumerate(backends)))
    assert found.summary == summary
    assert str(found).splitlines()[-1] == summary


def test_a_model_without_our_layers():
    assert pk.explain(torch.nn.Linear(2, 2)).calls == ()


# ---- reasons that are true ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pk.nn.PoolFormerBlock, pk.nn.Mlp, pk.nn.PoolMixer])
def test_layers_with_other_forwards_are_not_claimed(kind):
    """What they call is not known: their forward need not call ours."""
    other, layer = type("Other", (kind,), {"forward": lambda self, x: x})(8), kind(8)
    layer.forward = lambda x: x
    overrides = f"test_explain.Other overrides the forward of poolformer_kernels.nn.{kind.__name__}"
    for module, reason in ((other, overrides), (layer, "forward was set on the module itself")):
        choices = {(call.backend, call.reason) for call in pk.explain(module).calls}
        assert choices == {("modules", reason)}


LINES = {  # of a block: the rows that call it
    "mixer_with_stats": [True, False],
    "mlp_with_stats": [False, True],
    "forward_with_stats": [True, True],
}


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("kind", [pk.nn.PoolFormerBlock, pk.nn.MetaFormerBlock])
def test_lines_of_a_block_that_are_not_ours_are_not_claimed(name, kind):
    def line(self, x, stats=None, return_stats=False, residual=True):
        return x, None

    other, block = type("Other", (kind,), {name: line})(8), kind(8)
    setattr(block, name, partial(line, block))
    owner = kind if name in vars(kind) else pk.nn.PoolFormerBlock
    overrides = f"test_explain.Other overrides the {name} of poolformer_kernels.nn.{owner.__name__}"
    for module, reason in ((other, overrides), (block, f"{name} was set on the module itself")):
        calls = pk.explain(module).calls
        assert [call.backend == "modules" for call in calls] == LINES[name]
        assert {call.reason for call in calls if call.backend == "modules"} == {reason}
        assert {call.backend for call in calls} <= {"modules", BACKEND}
    assert pk.explain(kind(8)).summary == f"2 of 2 on {BACKEND}"


@pytest.mark.parametrize("part", ["token_mixer", "mlp"])
def test_our_layer_in_another_packages_block_has_one_line(part, kernels):
    model = metaformer(["Pooling"] * 4)
    for stage in model.stages:
        ours = pk.nn.PoolMixer(32) if part == "token_mixer" else pk.nn.Mlp(32, 128)
        stage.blocks[0].set_submodule(part, ours)
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    assert pk.explain(model).summary == "4 of 8 on cpp, 4 as modules"
    pk.accelerate(model, strict=True)
    found = pk.explain(model)
    places = [f"stages.{i}.blocks.0.{name}" for i in range(4) for name in ("token_mixer", "mlp")]
    assert sorted(call.path for call in found.calls) == sorted(places)
    assert found.summary == "8 of 8 on cpp"
    torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)


def test_subclasses_without_a_forward_are_ours():
    mine = type("Mine", (pk.nn.PoolFormerBlock,), {})
    assert pk.explain(mine(8)).summary == f"2 of 2 on {BACKEND}"


@pytest.mark.parametrize("accelerated", [False, True])
def test_hooks_of_all_modules(accelerated):
    """While they are set an accelerated block runs its modules, so that they see each."""
    block = PoolFormerBlock()
    if accelerated:
        pk.accelerate(block)
    with torch.nn.modules.module.register_module_forward_hook(lambda *_: None):
        found = pk.explain(block)
    assert {call.reason for call in found.calls} == {"hooks are set that every module's call runs"}
    assert found.summary == "2 of 2 as modules"
    assert pk.explain(block).summary == (f"2 of 2 on {BACKEND}" if accelerated else "2 of 2 as modules")


@pytest.mark.parametrize("options", [{}, {"mlp": False}, {"mixer": False}, {"save_hidden": True}])
@pytest.mark.parametrize("wrapped", ["norm1", "norm2", "token_mixer", "mlp", "mlp.fc1", "mlp.act"])
@pytest.mark.filterwarnings("ignore:accelerate made nothing faster")
def test_what_was_asked_of_accelerate_is_only_said_where_it_is_so(options, wrapped):
    """Whatever was in a block when it was accelerated, and whatever is in it now."""

    class Wrapper(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) * 1.5

    block = PoolFormerBlock()
    inner = block.get_submodule(wrapped)
    block.set_submodule(wrapped, Wrapper(inner))
    pk.accelerate(block, **options)
    wanted = options.get("mixer", True), options.get("mlp", True)
    changed = 0 if wrapped in ("norm1", "token_mixer") else 1
    taken = wanted[1 - changed]  # else nothing fitted, and the block stayed as it was
    for unwrapped in (False, True, False):
        block.set_submodule(wrapped, inner if unwrapped else Wrapper(inner))
        for which, call in enumerate(pk.explain(block).calls):
            if taken and not wanted[which]:
                assert call.reason == f"accelerate was called with {('mixer', 'mlp')[which]}=False"
            elif which == changed and not unwrapped:
                assert call.reason.startswith(f"{wrapped} is {__name__}.test_what_was_asked")
            elif taken:
                assert call.backend == BACKEND
            else:
                assert call.reason == "not accelerated: see poolformer_kernels.accelerate"


@pytest.mark.parametrize("path", ["norm1", "norm2", "token_mixer", "mlp", "drop_path", "mlp.fc1", "mlp.drop"])
@pytest.mark.parametrize("accelerated", [False, True])
def test_hooks_and_forwards_of_instances_are_told_apart(path, accelerated):
    block = pk.accelerate(PoolFormerBlock()) if accelerated else pk.nn.PoolFormerBlock(8)
    module = block.get_submodule(path)
    handle = module.register_forward_hook(lambda *_: None)
    name = path if accelerated else path.removeprefix("mlp.")  # ours names the MLP's by their place in it
    texts = (f"{name} has hooks", f"forward was set on {name} itself")
    for expected in texts:
        reasons = [call.reason for call in pk.explain(block).calls]
        assert any(reason.endswith(expected) for reason in reasons), reasons
        handle.remove()
        module.forward = lambda x: x
    del module.forward
    assert not any(text in str(pk.explain(block)) for text in texts)
