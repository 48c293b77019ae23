"""Names that have moved are still found, with a warning, until 0.3.0."""

import importlib

import pytest

import poolformer_kernels as pk

MOVED = {
    ("poolformer_kernels.ops.backend", "use_backend"): pk.use_backend,
    ("poolformer_kernels.ops.backend", "available_backends"): pk.available_backends,
    ("poolformer_kernels.profiling.roofline", "Limits"): importlib.import_module(
        "poolformer_kernels.profiling"
    ).Limits,
    ("poolformer_kernels.reference", "memory_format_of"): importlib.import_module(
        "poolformer_kernels.layout"
    ).memory_format_of,
}


@pytest.mark.parametrize(("module", "name"), MOVED)
def test_the_old_name_warns(module, name):
    with pytest.warns(
        DeprecationWarning, match=rf"^{module}\.{name} is now poolformer_kernels\.\S+\.{name};"
    ):
        assert getattr(importlib.import_module(module), name) is MOVED[module, name]


@pytest.mark.parametrize("module", sorted({module for module, _ in MOVED}))
def test_other_names_are_missing(module):
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'nothing'"):
        importlib.import_module(module).nothing  # noqa: B018


def test_the_package_itself_uses_no_old_name(recwarn):
    for name in ("backends", "cli.main", "cli.verify", "profiling", "explain", "graphs"):
        importlib.import_module(f"poolformer_kernels.{name}")
    assert not [
        w for w in recwarn if issubclass(w.category, DeprecationWarning) and "0.3.0" in str(w.message)
    ]


def test_the_old_name_of_the_weights_of_an_mlp():
    mlp = pk.nn.Mlp(8, 16)
    with pytest.warns(DeprecationWarning, match=r"Mlp\.operands is now Mlp\.operator_weights"):
        old = mlp.operands()
    assert all(a is b for a, b in zip(old, mlp.operator_weights(), strict=True))
