"""`poolformer-kernels verify`: the rule passes what is right and catches what is slightly wrong."""

import dataclasses
import json
import math

import pytest
import torch

from poolformer_kernels.cli.main import main
from poolformer_kernels.cli.verify import OPERATORS, verify
from poolformer_kernels.numerics import Errors, errors, tolerance

POOL_MIXER = OPERATORS["pool_mixer"]
SMALL = dataclasses.replace(POOL_MIXER, shapes=((2, 64, 14, 14), (3, 17, 5, 9)))


MLP = OPERATORS["mlp"]
SMALL_MLP = dataclasses.replace(MLP, shapes=((2, 32, 7, 7), (3, 17, 5, 9)))


def failures(operator, backend: str = "reference") -> set[str]:
    cases = verify(backend, "cpu", operators={"operator": operator})
    return {check.quantity for case in cases for check in case if not check.passed}


def changed(ours) -> object:
    """The operator with another implementation."""
    return dataclasses.replace(SMALL, ours=ours)


def test_every_backend_passes_all_quantities(backend: str) -> None:
    cases = list(verify(backend, "cpu", operators={"pool_mixer": SMALL}))
    assert len(cases) == 3 * 3 * 2 * 2  # forms, dtypes, layouts, shapes
    assert {c.quantity for case in cases for c in case} == {
        "y", "dx", "dweight", "dbias", "dlayer_scale", "ddrop_scale",
    }  # fmt: skip
    assert all(check.passed for case in cases for check in case)
    assert all(c.error_max > 0 and c.eager_max > 0 for case in cases for c in case if c.quantity == "y")


def test_every_backend_passes_all_quantities_of_the_mlp(backend: str) -> None:
    cases = list(verify(backend, "cpu", operators={"mlp": SMALL_MLP}))
    assert len(cases) == 3 * 3 * 2 * 2  # forms, dtypes, layouts, shapes
    without_bias = {"y", "dx", "dw1", "dw2"}
    plain = without_bias | {"db1", "db2"}
    residual = plain | {"dnorm_weight", "dnorm_bias", "dlayer_scale", "ddrop_scale"}
    wanted = {"plain": plain, "no bias": without_bias, "residual": residual}
    for case in cases:
        assert {c.quantity for c in case} == wanted[case[0].form]
        assert [c.quantity for c in case if not c.passed] == []
    assert all(c.error_max > 0 and c.eager_max > 0 for case in cases for c in case if c.quantity == "y")


@pytest.mark.parametrize(
    ("wrong", "caught"),
    [
        (lambda t, y: 1.01 * y, {"y", "dx", "dw1", "dw2", "db1", "db2"}),
        (lambda t, y: y + 1e-2 * t["x"].detach().mean(), {"y"}),
        (lambda t, y: y + 1e-2 * (t["w1"] - t["w1"].detach()).sum(), {"dw1"}),
        (lambda t, y: y * float("nan"), {"y", "dw2"}),
    ],
    ids=["scaled", "shifted", "a gradient", "NaN"],
)
def test_catches_a_wrong_mlp(wrong, caught) -> None:
    ours = lambda tensors, form: wrong(tensors, MLP.ours(tensors, form))  # noqa: E731
    assert caught <= failures(dataclasses.replace(SMALL_MLP, ours=ours))


def test_catches_a_wrong_value() -> None:
    def ours(tensors, form):
        return POOL_MIXER.ours(tensors, form) * 1.01

    assert {"y", "dweight"} <= failures(changed(ours))


def test_catches_a_mean_that_is_not_subtracted() -> None:
    def ours(tensors, form):
        y = POOL_MIXER.ours(tensors, form)
        return y + 1e-2 * tensors["x"].detach().mean()

    assert failures(changed(ours)) == {"y"}


def test_catches_a_bias_gradient_that_is_not_zero() -> None:
    def ours(tensors, form):
        return POOL_MIXER.ours(tensors, form) + 1e-4 * (tensors["bias"] - tensors["bias"].detach()).view(
            -1, 1, 1
        )

    assert "dbias" in failures(changed(ours))


def test_catches_nan() -> None:
    def ours(tensors, form):
        return POOL_MIXER.ours(tensors, form) * float("nan")

    assert "y" in failures(changed(ours))


def test_errors_and_tolerance_by_hand() -> None:
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    error = errors(torch.tensor([3.0, 4.5]), exact)
    assert error == pytest.approx((0.5, 0.5))
    assert error.relative_l2(exact) == pytest.approx(0.1)
    eps = 2.0**-7  # of bfloat16
    allowed = tolerance(Errors(0.1, 0.5), exact, torch.bfloat16)
    assert allowed == pytest.approx((0.15 + 5 * eps / 2, 0.75 + 4 * eps / 2), rel=1e-12)
    none = Errors(0.0, 0.0)
    summed = tolerance(none, exact, torch.float32, ulps=10)
    assert summed == pytest.approx((5 * 10.5 * 2.0**-23, 4 * 10.5 * 2.0**-23), rel=1e-12)
    zero = torch.zeros(4, dtype=torch.float64)  # a float16 result may be the smallest subnormal, 2^-24
    assert tolerance(none, zero, torch.float16) == pytest.approx((2 * 2.0**-24, 2.0**-24), abs=0)
    assert not Errors(math.nan, 0.0).within(Errors(1.0, 1.0))
    assert not Errors(0.0, math.nan).within(Errors(1.0, 1.0))
    assert Errors(1.0, 2.0).within(Errors(1.0, 2.0))
    assert not Errors(1.0, 2.0).within(Errors(1.0, 1.9))


def test_command_prints_and_writes_every_value(tmp_path, capsys) -> None:
    file = tmp_path / "verify.json"
    assert main(["verify", "--backend", "reference", "--dtype", "float32", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    written = json.loads(file.read_text())
    assert written["passed"] is True
    count = len(written["checks"])
    assert count == (4 + 4 + 6) * 2 * len(POOL_MIXER.shapes) + (6 + 4 + 10) * 2 * len(MLP.shapes)
    assert f"{count} of {count} values" in out
    assert "pool_mixer (residual), float32, channels_last: reference on cpu" in out
    first = written["checks"][0]
    assert first["error_l2"] <= first["allowed_l2"] < 1e-6
    assert f"{first['error_l2']:.1e}|{first['eager_l2']:.1e}" in out


def test_command_fails_on_a_wrong_operator(monkeypatch, capsys) -> None:
    wrong = changed(lambda tensors, form: POOL_MIXER.ours(tensors, form) * 1.01)
    monkeypatch.setitem(OPERATORS, "pool_mixer", wrong)
    assert main(["verify", "--backend", "reference", "--dtype", "float32"]) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out
    assert "! " in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a CUDA device")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "triton"], "backend 'triton' was asked for and cannot run this call: "),
        (["--device", "cuda"], "--device cuda: torch sees no CUDA device; allowed here: cpu"),
    ],
)
def test_command_says_why_it_cannot_run(arguments, message, capsys) -> None:
    assert main(["verify", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"poolformer-kernels: error: {message}")
    assert captured.err.count("\n") == 1
