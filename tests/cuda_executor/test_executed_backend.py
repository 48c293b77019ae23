"""The "cuda" backend as a whole, in the executor: what it is asked, and blocks of a model on it."""

import copy

import pytest
import torch
from support.rule import assert_close_to_fp64

import poolformer_kernels as pk
from poolformer_kernels.ops import dispatch as selection


def lines(module) -> dict[str, list[str]]:
    return {call.path: [call.backend, call.reason] for call in pk.explain(module).calls}


def test_explain_says_what_stays_with_triton(monkeypatch) -> None:
    wide = torch.nn.Sequential(pk.nn.Mlp(192, 768)).half()
    backend, reason = lines(wide)["0"]
    assert backend == "cuda"
    assert reason.startswith("asked for; with gradients none: no cuda kernel for the backward of 192 to 192")
    backend, reason = lines(torch.nn.Sequential(pk.nn.Mlp(320, 1280)).half())["0"]
    assert backend == "none"
    assert reason.endswith("triton: it runs on cuda tensors, not cpu")
    monkeypatch.setattr(pk.backends.triton, "DEVICES", ("cuda", "cpu"))
    model = pk.create_model("poolformer_s12").bfloat16()
    of = lines(model)
    mixers = [row for place, row in of.items() if place.endswith("token_mixer")]
    assert mixers == [["cuda", "asked for"]] * 12
    assert of["network.0.0.mlp"] == of["network.2.0.mlp"] == ["cuda", "asked for"]
    backend, reason = of["network.4.0.mlp"]
    assert backend == "triton"
    assert reason.startswith("asked for; cuda has no kernel for 320 to 320 channels")
    backend, reason = lines(wide)["0"]
    assert backend == "cuda"
    assert reason.startswith("asked for; backward in triton: no cuda kernel for 192 to 192 channels")
    narrow = lines(torch.nn.Sequential(pk.nn.Mlp(64, 256)))
    assert narrow["0"] == ["triton", "asked for; cuda has no kernel for products of float32"]


@pytest.mark.parametrize(
    ("archs", "capability", "expected"),
    [
        ("8.0 9.0a 10.0+PTX", (8, 0), "sm_80"),
        ("8.0 9.0a 10.0+PTX", (8, 9), "sm_80"),
        ("8.0 8.6 9.0a", (8, 9), "sm_86"),
        ("8.0 9.0a 10.0+PTX", (9, 0), "sm_90a"),
        ("8.0 9.0a 10.0+PTX", (10, 3), "sm_100"),
        ("8.0+PTX 9.0a 10.0+PTX", (12, 0), "compute_100"),
        ("8.0 9.0a 10.0+PTX 12.0", (12, 1), "sm_120"),
        ("8.0 9.0a 10.0+PTX", (7, 5), None),
        ("8.0", (8, 7), None),  # Tegra
        ("8.0 8.7", (8, 7), "sm_87"),
        ("8.0+PTX", (8, 7), "compute_80"),
        ("10.0f", (10, 3), "sm_100f"),
        ("10.0f", (12, 0), None),
        ("9.0a", (10, 0), None),
        ("9.0a+PTX", (10, 0), None),
        ("8.9", (8, 6), None),
        ("8.0", (9, 0), None),
    ],
)
def test_code_that_a_device_runs(archs, capability, expected) -> None:
    assert pk.backends.cuda.code_for(archs.split(), capability) == expected


def test_a_backward_that_only_triton_has_is_refused_at_once_without_triton(monkeypatch) -> None:
    monkeypatch.setattr(pk.backends.triton, "UNAVAILABLE", "no CUDA device")
    mlp = pk.nn.Mlp(192, 768).half()
    x = torch.ones(1, 192, 2, 2, dtype=torch.float16)
    with torch.no_grad():
        assert mlp(x).shape == x.shape
    with pytest.raises(
        RuntimeError, match=r"no kernel for this call: the backward of 192 to 192 channels.*; triton: no"
    ):
        mlp(x)
    for of in (mlp.fc1.weight, mlp.fc2.weight, mlp.fc1.bias):  # a bias alone has a gradient
        of.requires_grad_(False)
    with pytest.raises(RuntimeError, match="the backward of 192 to 192 channels"):
        mlp(x)


def test_auto_takes_it_where_triton_cannot_run(monkeypatch, caplog) -> None:
    """Kernels where there are some, the reference for the rest of a model, which the log names once."""
    monkeypatch.setattr(pk.backends.triton, "UNAVAILABLE", "triton is not installed")
    monkeypatch.setattr(selection, "_PREFERENCE", {"cpu": ("triton", "cuda")})
    monkeypatch.setattr(selection, "_logged", set())
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        pk.nn.PoolFormerBlock(64, layer_scale_init_value=0.3),
        torch.nn.Conv2d(64, 48, 1),
        pk.nn.PoolFormerBlock(48),
    ).bfloat16()
    x = torch.randn(1, 64, 4, 4).bfloat16()
    with pk.use_backend("auto"):
        assert lines(model) == {
            "0.token_mixer": ["cuda", "instead of triton: triton is not installed"],
            "0.mlp": ["cuda", "instead of triton: triton is not installed"],
            "2.token_mixer": ["cuda", "instead of triton: triton is not installed"],
            "2.mlp": [
                "reference",
                "instead of triton: triton is not installed; cuda has no kernel for 48 to 48 channels, not"
                " 64, 96, 128, 192 to as many; triton: triton is not installed",
            ],
        }
        with caplog.at_level("WARNING", logger="poolformer_kernels"):
            ours = model(x)
            ours.sum().backward()
            model(x)
    (record,) = caplog.records
    assert "reference implementation: cuda: no kernel for 48 to 48 channels" in record.getMessage()
    with pk.use_backend("reference"):
        expected = copy.deepcopy(model).double()(x.double())
    torch.testing.assert_close(ours.double(), expected, rtol=0.05, atol=0.05)


def test_auto_runs_the_reference_where_the_backward_has_no_kernel(monkeypatch) -> None:
    monkeypatch.setattr(pk.backends.triton, "UNAVAILABLE", "triton is not installed")
    monkeypatch.setattr(selection, "_PREFERENCE", {"cpu": ("triton", "cuda")})
    mlp = pk.nn.Mlp(192, 768).half()
    x = torch.ones(1, 192, 2, 2, dtype=torch.float16)
    with pk.use_backend("auto"):
        assert type(mlp(x).grad_fn).__name__ != "mlp_cuda"
        mlp(x).sum().backward()
    assert mlp.fc1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_stage_with_its_gradients(dtype, layout) -> None:
    """Two blocks, statistics handed on between all four operators, against the reference in float64."""
    torch.manual_seed(0)
    stage = pk.nn.PoolFormerStage(*(pk.nn.PoolFormerBlock(64, layer_scale_init_value=0.3) for _ in range(2)))
    stage = stage.to(dtype)
    x = (torch.randn(2, 64, 9, 10) - 0.7).to(dtype).contiguous(memory_format=layout)
    grad = torch.randn_like(x)

    def values(backend, dtype):
        module, leaf = copy.deepcopy(stage).to(dtype), x.to(dtype, copy=True).requires_grad_()
        with pk.use_backend(backend):
            y = module(leaf)
            y.backward(grad.to(dtype))
        return {"y": y.detach(), "dx": leaf.grad} | {name: p.grad for name, p in module.named_parameters()}

    ours, eager, exact = values("cuda", dtype), values("reference", dtype), values("reference", torch.double)
    for name, value in ours.items():
        if name.endswith("norm1.bias"):  # exactly zero, and rounding noise in eager
            assert torch.equal(value, torch.zeros_like(value))
            continue
        scale = exact[name].abs() + exact[name].square().mean().sqrt()
        assert_close_to_fp64(value, eager[name], exact[name], scale=scale, ulps=64, what=name)
