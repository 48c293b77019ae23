"""explain: the backend that really runs, for modules and tensors, and why."""

import pytest
import torch

import poolformer_kernels as pk
from poolformer_kernels.ops.backend import select_backend


def test_tensor_names_the_backend_that_runs():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        backend = select_backend("cpu", dtype)
        assert pk.explain(torch.zeros(1, 1, 1, 1, dtype=dtype)).split()[:2] == ["pool_mixer", backend]
    assert "float64" in pk.explain(torch.zeros(1, 1, 1, 1, dtype=torch.float64))


def test_model_has_a_line_for_every_operator():
    lines = pk.explain(pk.create_model("poolformer_s12")).splitlines()
    assert [line.split()[1] for line in lines] == ["pool_mixer", "mlp"] * 12
    assert lines[0].split()[:3] == [
        "network.0.0.token_mixer",
        "pool_mixer",
        select_backend("cpu", torch.float32),
    ]


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
    assert "modules" in pk.explain(block)
    assert "has hooks" in pk.explain(block)
    block = pk.nn.PoolFormerBlock(8, norm_layer=torch.nn.BatchNorm2d)
    assert "norm1 is BatchNorm2d, not a GroupNorm of one group" in pk.explain(block)


def test_other_targets_are_refused():
    with pytest.raises(TypeError, match="target must be a module or a tensor, got str"):
        pk.explain("poolformer_s12")
