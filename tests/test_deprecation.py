"""Names that have moved are still found, with a warning, until 0.3.0."""

import importlib
import re
from pathlib import Path

import pytest
from support.processes import python

import poolformer_kernels as pk
from poolformer_kernels import layout
from poolformer_kernels.ops import dispatch, torch_private
from poolformer_kernels.profiling import limits

OPS = ("BACKENDS", "available_backends", "constant_result", "explain_selection", "mlp_backend", "mlp_of_cuda")
OPS += ("select_backend", "unavailable_reason", "use_backend")
MOVED = {  # all that the old modules had in their __all__
    "poolformer_kernels.ops.backend": OPS,
    "poolformer_kernels.profiling.roofline": ("LimitProbes", "Limits", "measure_limits"),
    "poolformer_kernels.reference": ("memory_format_of",),
}
PLACES = (dispatch, torch_private, limits, layout)


@pytest.mark.parametrize(("module", "name"), [(module, name) for module in MOVED for name in MOVED[module]])
def test_the_old_name_warns(module, name):
    message = rf"^{module}\.{name} is now poolformer_kernels\.\S+\.{name};"
    with pytest.warns(DeprecationWarning, match=message):
        found = getattr(importlib.import_module(module), name)
    assert [place for place in PLACES if getattr(place, name, None) is found]


@pytest.mark.parametrize(
    "module", ["poolformer_kernels.ops.backend", "poolformer_kernels.profiling.roofline"]
)
def test_a_star_import(module):
    found = {}
    with pytest.warns(DeprecationWarning, match=r"goes in 0\.3\.0"):
        exec(f"from {module} import *", found)
    assert found.keys() - {"__builtins__", "__warningregistry__"} == set(MOVED[module])


@pytest.mark.parametrize("module", MOVED)
def test_other_names_are_missing(module):
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'nothing'"):
        importlib.import_module(module).nothing  # noqa: B018


def test_every_deprecation_names_the_version_that_ends_it():
    """And that version has not come: then the old names go, and this list with them."""
    root = Path(pk.__file__).parent
    lines = [line for path in root.rglob("*.py") for line in path.read_text().splitlines()]
    warned = [line for line in lines if "DeprecationWarning" in line and "warn" in line]
    ends = re.findall(r"goes in (\d+\.\d+)\.0", "\n".join(lines))
    assert len(warned) == len(ends) > 0
    now = tuple(map(int, pk.__version__.split(".")[:2]))
    assert all(now < tuple(map(int, end.split("."))) for end in ends)


def test_the_package_itself_uses_no_old_name():
    code = "import warnings; warnings.filterwarnings('error', message='.*goes in 0.3.0')\n"
    code += "import poolformer_kernels.cli.main, poolformer_kernels.cli.verify, poolformer_kernels.cli.info\n"
    code += "import torch; model = poolformer_kernels.create_model('poolformer_s12')\n"
    code += "model(torch.ones(1, 3, 32, 32)).sum().backward()"
    python("-c", code)


def test_the_old_name_of_the_weights_of_an_mlp():
    mlp = pk.nn.Mlp(8, 16)
    with pytest.warns(DeprecationWarning, match=r"Mlp\.operands is now Mlp\.operator_weights"):
        old = mlp.operands()
    assert all(a is b for a, b in zip(old, mlp.operator_weights(), strict=True))
