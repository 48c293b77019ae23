"""The list of cases: a computed call has the row that describes it, and a comparison finds what is lost."""

import subprocess
from pathlib import Path

import pytest
import torch
from support import cases, recorder
from support.layouts import as_layout, as_vector_layout, as_weight_layout
from support.mlp import make_inputs as make_mlp_inputs
from support.peers import require_backend
from support.pool_mixer import make_inputs
from support.processes import python

import poolformer_kernels as pk

TESTS = Path(__file__).parent
LAYOUTS = {
    "nchw": "nchw",
    "sliced_c": "nchw cut c misaligned",
    "sliced_hw": "nchw cut hw",
    "transposed": "permuted bcwh",
    "expanded": "expanded b",
    "expanded_hw": "expanded hw",
    "offset": "nchw misaligned",
    "channels_last": "channels_last",
    "sliced_c_last": "channels_last cut c misaligned",
}
RECORDED = """
import warnings
import pytest
import torch
import poolformer_kernels as pk

def test_calls():
    x = torch.full((2, 3, 4, 5), 2.0, dtype=torch.float64, requires_grad=True)
    with pk.use_backend("reference"):
        pk.ops.pool_mixer(x, None, None, residual=True).sum().backward()
    {body}
"""


def call(**changes) -> dict:
    """The row of a call of the mixer's forward."""
    options = {"stats": None, "pool_size": 3, "eps": 1e-5, "residual": True}
    values = make_inputs((3, 5, 6, 7)) | options | changes
    return dict(recorder.row_of("pool_mixer", "forward", "reference", values))


def recorded(folder: Path, body: str = "") -> list[dict]:
    """The rows of a process of pytest that runs one test, in this folder."""
    test = folder / "test_recorded.py"
    test.write_text(RECORDED.format(body=body))
    options = ("-q", "-p", "no:cacheprovider", "-p", "support.cases")
    variables = {cases.VARIABLE: str(folder / "rows"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    python("-m", "pytest", *options, test, cwd=folder, **variables)
    return [row for of in cases.read(folder / "rows").values() for row in of]


@pytest.mark.parametrize(("layout", "expected"), LAYOUTS.items())
def test_layouts_of_images(layout, expected):
    assert recorder.layout_of(as_layout(make_inputs((3, 5, 6, 7))["x"], layout)) == expected


def test_images_of_one_pixel_or_one_channel_have_two_layouts():
    assert recorder.layout_of(torch.empty(2, 8, 1, 1)) == "nchw and channels_last"
    assert recorder.layout_of(torch.empty(2, 1, 4, 4)) == "nchw and channels_last"
    assert recorder.layout_of(torch.empty(0, 3, 4, 4)) == "empty"


def test_layouts_of_weights_and_vectors():
    inputs = make_mlp_inputs((1, 8, 2, 2), 16)
    kinds = {
        name: recorder.layout_of_weight(as_weight_layout(inputs["w1"], name))
        for name in ("transposed", "padded")
    }
    assert kinds == {"transposed": "permuted cr conv", "padded": "dense cut c misaligned conv"}
    assert recorder.layout_of_weight(inputs["w1"].flatten(1)) == "dense"
    vectors = {name: as_vector_layout(torch.ones(6), name) for name in ("strided", "expanded", "offset")}
    kinds = {name: recorder.layout_of(vector, "c") for name, vector in vectors.items()}
    assert kinds == {"strided": "dense strided", "expanded": "expanded c", "offset": "dense misaligned"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [(float("nan"), ("nan",)), (float("-inf"), ("inf",)), (1e30, ("huge",)), (0.0, ())],
)
def test_one_hard_value(value, expected):
    x = make_inputs((2, 5, 6, 7))["x"]
    x[1, 2, 3, 4] = value
    assert call(x=x)["special x"] == expected
    assert call()["special x"] == ()


def test_samples_of_one_value_or_far_from_zero():
    x = make_inputs((2, 5, 6, 7))["x"]
    x[0] += 100
    assert call(x=x)["special x"] == ("mean > 50 sigma",)
    x[1] = 2
    assert call(x=x)["special x"] == ("constant", "mean > 50 sigma")
    assert call(bias=torch.full((5,), float("inf")))["special parameters"] == ("inf",)


def test_a_process_of_pytest_adds_its_calls(tmp_path):
    forward, backward = sorted(recorded(tmp_path), key=lambda row: row["direction"], reverse=True)
    expected = {
        "operator": "pool_mixer",
        "target": "reference",
        "x": [2, 3, 4, 5],
        "dtype": "float64",
        "vector dtypes": [],
        "layout of x": "nchw",
        "layouts of vectors": [],
        "given": "nothing",
        "pool_size": 3,
        "eps": 1e-5,
        "residual": True,
        "special x": ["constant"],
        "special parameters": [],
    }
    more = {"gradients": "x", "stats given": "none", "return_stats": False}
    assert forward == expected | more | {"direction": "forward"}
    more = {"layout of grad": "expanded bchw", "special grad": ["constant"]}
    assert backward == expected | more | {"direction": "backward"}


def test_kernels_and_compiled_calls_are_recorded(tmp_path):
    require_backend("cpp")
    body = """
    with pk.use_backend("cpp"):
        x = torch.randn(1, 8, 2, 3).bfloat16()
        compiled = torch.compile(pk.ops.pool_mixer, backend="aot_eager", fullgraph=True)
        with torch.inference_mode():
            compiled(x, None, None, pool_size=5)
        w1, w2 = (torch.randn(shape, dtype=torch.bfloat16) for shape in ((4, 8), (8, 4)))
        with torch._subclasses.FakeTensorMode() as mode:
            pk.ops.pool_mixer(mode.from_tensor(x), None, None, pool_size=7)
        with pytest.raises(ValueError):
            pk.ops.mlp(x, w2, None, w1, None)
        y, stats = pk.ops.mlp.__globals__["mlp_with_stats"](x.requires_grad_(), w1, None, w2, None)
        y.backward(torch.ones_like(y))
    """
    rows = [row for row in recorded(tmp_path, body) if row["operator"] == "mlp" or row["pool_size"] != 3]
    order = [("pool_mixer", "forward"), ("mlp", "forward"), ("mlp", "backward")]
    rows.sort(key=lambda row: order.index((row["operator"], row["direction"])))
    assert [(row["operator"], row["direction"]) for row in rows] == order
    assert {row["target"] for row in rows} == {f"cpp {pk.backends.cpp.build_info()['isa_chosen']}"}
    mixer, mlp, backward = rows
    assert (mixer["pool_size"], mixer["dtype"], mixer["gradients"]) == (5, "bfloat16", "none")
    assert (mlp["hidden"], mlp["out"], mlp["activation"], mlp["return_stats"]) == (4, 8, "gelu", True)
    assert (mlp["layout of w1"], mlp["weight dtype"], mlp["gradients"]) == ("dense", "bfloat16", "x")
    assert (backward["layout of grad"], backward["special grad"]) == ("nchw", ["constant"])


def compared(tmp_path, before: list[dict], after: list[dict]) -> subprocess.CompletedProcess:
    for name, rows in (("before", before), ("after", after)):
        cases.write(rows, tmp_path / name)
    return python(TESTS / "support" / "cases.py", "compare", "before", "after", cwd=tmp_path, code=None)


def test_a_lost_value_and_a_lost_pair(tmp_path):
    inputs = make_inputs((3, 5, 6, 7))
    last = as_layout(inputs["x"], "channels_last")
    plain, wide = call(), call(x=last, pool_size=5)
    half = call(**{name: None if t is None else t.bfloat16() for name, t in (inputs | {"x": last}).items()})
    done = compared(tmp_path, [plain, wide, half], [plain, half, call(pool_size=7)])
    assert done.returncode == 1, done.stderr
    lost = [line for line in done.stdout.splitlines() if line.startswith("lost")]
    name = "lost: pool_mixer forward reference |"
    assert lost == [f"{name} layout of x: channels_last, with float32", f"{name} pool_size: 5"]


def test_nothing_is_lost_where_cases_are_added_or_sizes_change(tmp_path):
    smaller = make_inputs((2, 3, 6, 7))
    done = compared(tmp_path, [call()], [call(**smaller), call(residual=False)])
    assert done.returncode == 0, done.stdout
    assert "lost:" not in done.stdout


def test_a_target_is_lost(tmp_path):
    other = call() | {"target": "cpp avx2"}
    done = compared(tmp_path, [call(), other], [call()])
    assert done.returncode == 1
    assert "lost: pool_mixer forward cpp avx2 | dtype: float32" in done.stdout


def test_gaps_are_of_fields_and_dtypes_that_a_target_has(tmp_path, capsys):
    inputs = make_inputs((3, 5, 6, 7))
    whole, half = {"target": "reference"}, {"target": "cpp avx2"}
    other = call(x=as_layout(inputs["x"], "transposed"), residual=False) | half
    double = call(**{name: t.double() for name, t in inputs.items()}) | whole
    cases.write([call() | whole, double, other | {"allow_tf32": True}], tmp_path)
    cases.gaps(cases.read(tmp_path))
    assert capsys.readouterr().out.splitlines() == [
        "pool_mixer forward cpp avx2 | layout of x: nchw",
        "pool_mixer forward cpp avx2 | residual: True",
        "pool_mixer forward reference | layout of x: permuted",
        "pool_mixer forward reference | residual: False",
    ]
