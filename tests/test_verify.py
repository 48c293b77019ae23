"""`poolformer-kernels verify`: the rule passes what is right and catches what is slightly wrong."""

import dataclasses
import json
import math

import pytest
import torch
from support.commands import printed, refused

from poolformer_kernels.cli.main import main
from poolformer_kernels.cli.verify import OPERATORS, Operator, verify
from poolformer_kernels.numerics import Errors, errors, tolerance

SHAPES = {"pool_mixer": ((2, 64, 14, 14), (3, 17, 5, 9)), "mlp": ((2, 32, 7, 7), (3, 17, 5, 9))}
SMALL = {name: dataclasses.replace(OPERATORS[name], shapes=shapes) for name, shapes in SHAPES.items()}
QUANTITIES = {
    ("pool_mixer", "plain"): {"y", "dx", "dweight", "dbias"},
    ("pool_mixer", "pool 5"): {"y", "dx", "dweight", "dbias"},
    ("pool_mixer", "residual"): {"y", "dx", "dweight", "dbias", "dlayer_scale", "ddrop_scale"},
    ("mlp", "no bias"): {"y", "dx", "dw1", "dw2"},
    ("mlp", "plain"): {"y", "dx", "dw1", "dw2", "db1", "db2"},
    ("mlp", "residual"): {
        *("y", "dx", "dw1", "dw2", "db1", "db2"),
        *("dnorm_weight", "dnorm_bias", "dlayer_scale", "ddrop_scale"),
    },
}


WRONG = {  # what an operator returns instead, made of its tensors and the right y
    "scaled": lambda tensors, y: 1.01 * y,
    "shifted": lambda tensors, y: y + 1e-2 * tensors["x"].detach().mean(),  # a mean is not subtracted
    "not a number": lambda tensors, y: y * math.nan,
    # The last two leave y as it is, and make the gradient of one parameter wrong.
    "biased": lambda tensors, y: y + 1e-4 * (tensors["bias"] - tensors["bias"].detach()).view(-1, 1, 1),
    "weighted": lambda tensors, y: y + 1e-2 * (tensors["w1"] - tensors["w1"].detach()).sum(),
}


def wrong_operator(name: str, wrong: str) -> Operator:
    """The small operator, which returns something ``WRONG``."""
    ours, change = OPERATORS[name].ours, WRONG[wrong]
    return dataclasses.replace(SMALL[name], ours=lambda tensors, form: change(tensors, ours(tensors, form)))


@pytest.mark.parametrize("operator", SMALL)
def test_every_backend_passes_all_quantities(backend: str, operator: str) -> None:
    cases = list(verify(backend, "cpu", operators={operator: SMALL[operator]}))
    assert len(cases) == 3 * 3 * 2 * 2  # forms, dtypes, layouts, shapes
    for case in cases:
        assert {c.quantity for c in case} == QUANTITIES[operator, case[0].form]
        assert [c.quantity for c in case if not c.passed] == []
    assert all(c.error_max > 0 and c.eager_max > 0 for case in cases for c in case if c.quantity == "y")


@pytest.mark.parametrize(
    ("operator", "wrong", "caught", "right"),
    [
        ("pool_mixer", "scaled", {"y", "dweight"}, set()),
        ("pool_mixer", "shifted", {"y"}, QUANTITIES["pool_mixer", "residual"] - {"y"}),
        ("pool_mixer", "biased", {"dbias"}, set()),
        ("pool_mixer", "not a number", {"y"}, set()),
        ("mlp", "scaled", {"y", "dx", "dw1", "dw2", "db1", "db2"}, set()),
        ("mlp", "shifted", {"y"}, set()),
        ("mlp", "weighted", {"dw1"}, set()),
        ("mlp", "not a number", {"y", "dw2"}, set()),
    ],
)
def test_catches_a_wrong_operator(operator, wrong, caught, right) -> None:
    cases = verify("reference", "cpu", operators={operator: wrong_operator(operator, wrong)})
    failed = {check.quantity for case in cases for check in case if not check.passed}
    assert caught <= failed
    assert not right & failed


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
    out = printed(capsys, "verify --backend reference --dtype float32 --json", file)
    written = json.loads(file.read_text())
    assert written["passed"] is True
    count = len(written["checks"])
    mixer, mlp = (2 * len(OPERATORS[name].shapes) for name in ("pool_mixer", "mlp"))  # layouts, shapes
    assert count == (4 + 4 + 6) * mixer + (6 + 4 + 10) * mlp
    assert f"{count} of {count} values" in out
    assert "pool_mixer (residual), float32, channels_last: reference on cpu" in out
    first = written["checks"][0]
    assert first["error_l2"] <= first["allowed_l2"] < 1e-6
    assert f"{first['error_l2']:.1e}|{first['eager_l2']:.1e}" in out


def test_command_fails_on_a_wrong_operator(monkeypatch, capsys) -> None:
    monkeypatch.setitem(OPERATORS, "pool_mixer", wrong_operator("pool_mixer", "scaled"))
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
    assert refused(capsys, "verify", *arguments).startswith(message)
