"""The "cuda" backend as a whole, in the executor: what it is asked, and blocks of a model on it."""

import copy

import pytest
import torch
from helpers import assert_close_to_fp64

import poolformer_kernels as pk
from poolformer_kernels.ops import backend as selection


def lines(module) -> dict[str, list[str]]:
    return {line.split()[0]: line.split(maxsplit=3)[2:] for line in pk.explain(module).splitlines()}


def test_explain_says_what_stays_with_triton() -> None:
    model = pk.create_model("poolformer_s12").bfloat16()
    of = lines(model)
    mixers = [row for place, row in of.items() if place.endswith("token_mixer")]
    assert mixers == [["cuda", "asked for"]] * 12
    assert of["network.0.0.mlp"] == of["network.2.0.mlp"] == ["cuda", "asked for"]
    backend, reason = of["network.4.0.mlp"]
    assert backend == "triton"
    assert reason.startswith("asked for; cuda has no kernel for 320 to 320 channels")
    wide = lines(torch.nn.Sequential(pk.nn.Mlp(192, 768)).half())
    assert wide["0"][0] == "cuda"
    assert wide["0"][1].startswith("asked for; backward in triton: no cuda kernel for 192 to 192 channels")
    narrow = lines(torch.nn.Sequential(pk.nn.Mlp(64, 256)))
    assert narrow["0"] == ["triton", "asked for; cuda has no kernel for products of float32"]


@pytest.mark.parametrize(
    ("archs", "capability", "expected"),
    [
        ("8.0 9.0a 10.0+PTX", (8, 0), True),
        ("8.0 9.0a 10.0+PTX", (8, 9), True),
        ("8.0 9.0a 10.0+PTX", (9, 0), True),
        ("8.0 9.0a 10.0+PTX", (12, 0), True),
        ("8.0 9.0a 10.0+PTX", (7, 5), False),
        ("9.0a", (10, 0), False),
        ("9.0a+PTX", (10, 0), False),
        ("8.9", (8, 6), False),
        ("8.0", (9, 0), False),
    ],
)
def test_devices_that_the_build_is_for(archs, capability, expected) -> None:
    assert pk.backends.cuda.runs(archs.split(), capability) is expected


def test_a_backward_that_only_triton_has_is_refused_at_once_without_triton(monkeypatch) -> None:
    monkeypatch.setattr(pk.backends.triton, "UNAVAILABLE", "no CUDA device")
    mlp = pk.nn.Mlp(192, 768).half()
    x = torch.ones(1, 192, 2, 2, dtype=torch.float16)
    with torch.no_grad():
        assert mlp(x).shape == x.shape
    with pytest.raises(
        RuntimeError, match=r"no kernel for this call \(backward: 192 to 192 channels.*'triton'"
    ):
        mlp(x)


def test_auto_does_not_take_it() -> None:
    with pk.use_backend("auto"):
        assert selection.select_backend("cpu", torch.bfloat16) != "cuda"


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_stage_with_its_gradients(dtype, layout) -> None:
    """Two blocks, statistics handed on between all four operators, against the reference in float64."""
    torch.manual_seed(0)
    stage = pk.nn.PoolFormerStage(*(pk.nn.PoolFormerBlock(64, layer_scale_init_value=0.3) for _ in range(2)))
    stage = stage.to(dtype)
    x = (torch.randn(2, 64, 9, 10) - 0.7).to(dtype).contiguous(memory_format=layout)
    grad = torch.randn_like(x)

    def values(module, backend, *tensors):
        module = copy.deepcopy(module)
        x, grad = (t.clone().to(next(module.parameters()).dtype) for t in tensors)
        with pk.use_backend(backend):
            y = module(x.requires_grad_())
            y.backward(grad)
        return {"y": y.detach(), "dx": x.grad} | {name: p.grad for name, p in module.named_parameters()}

    ours, eager = values(stage, "cuda", x, grad), values(stage, "reference", x, grad)
    exact = values(copy.deepcopy(stage).double(), "reference", x.double(), grad.double())
    for name, value in ours.items():
        if name.endswith("norm1.bias"):  # exactly zero, and rounding noise in eager
            assert torch.equal(value, torch.zeros_like(value))
            continue
        scale = exact[name].abs() + exact[name].square().mean().sqrt()
        assert_close_to_fp64(value, eager[name], exact[name], scale=scale, ulps=64, what=name)
