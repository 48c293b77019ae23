"""explain: the backend that really runs, for modules and tensors, and why."""

import copy
import re
import sys
from functools import partial

import pytest
import torch

import poolformer_kernels as pk
from poolformer_kernels.ops.dispatch import select_backend


def test_tensor_names_the_backend_that_runs():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        backend = select_backend("cpu", dtype)
        lines = pk.explain(torch.zeros(1, 1, 1, 1, dtype=dtype)).splitlines()
        assert [line.split()[:2] for line in lines] == [["pool_mixer", backend], ["mlp", backend]]
    assert "float64" in pk.explain(torch.zeros(1, 1, 1, 1, dtype=torch.float64))


def test_model_has_a_line_for_every_operator():
    lines = pk.explain(pk.create_model("poolformer_s12")).splitlines()
    assert [line.split()[1] for line in lines] == ["pool_mixer", "mlp"] * 12
    backend = select_backend("cpu", torch.float32)
    assert lines[0].split()[:3] == ["network.0.0.token_mixer", "pool_mixer", backend]
    assert lines[-1].split()[:3] == ["network.6.1.mlp", "mlp", backend]


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
        assert [tuple(line.split()[1:3]) for line in pk.explain(stage).splitlines()] == selected


def test_mixer_says_which_choice_cannot_be_met():
    with pk.use_backend("cpp" if pk.available_backends()["cpp"] else "triton"):
        place, operator, backend, reason = pk.explain(torch.nn.Sequential(pk.nn.PoolMixer(8))).split(
            maxsplit=3
        )
    assert (place, operator, backend) == ("0", "pool_mixer", "none")
    assert "was asked for and cannot run this call" in reason


def test_block_that_runs_its_modules_says_why():
    block = pk.nn.PoolFormerBlock(8)
    block.norm1.register_forward_hook(lambda *_: None)
    mixer, mlp = pk.explain(block).splitlines()
    assert mixer.split(maxsplit=3)[2:] == ["modules", "norm1 or drop_path has hooks"]
    assert mlp.split()[2] == select_backend("cpu", torch.float32)
    block = pk.nn.PoolFormerBlock(8, norm_layer=torch.nn.BatchNorm2d)
    mixer, mlp = pk.explain(block).splitlines()
    assert mixer.endswith("norm1 is BatchNorm2d, not a GroupNorm of one group")
    assert mlp.split()[2] == select_backend("cpu", torch.float32)
    assert mlp.endswith("norm and residual as modules: norm2 is BatchNorm2d, not a GroupNorm of one group")


def test_mlp_that_runs_its_modules_says_why():
    block = pk.nn.PoolFormerBlock(8, drop=0.1)
    for target in (block, block.mlp):
        assert re.search(r"mlp +modules +drop is active \(p = 0.1\)$", pk.explain(target))
        assert "modules" not in pk.explain(copy.deepcopy(target).eval())
    block.mlp = torch.nn.Identity()
    assert pk.explain(block).splitlines()[1].split(maxsplit=3)[2:] == ["modules", "mlp is Identity, not Mlp"]
    assert pk.explain(pk.nn.Mlp(8)).split()[:2] == ["mlp", select_backend("cpu", torch.float32)]


def test_other_targets_are_refused():
    with pytest.raises(TypeError, match="target must be a module or a tensor, got str"):
        pk.explain("poolformer_s12")
