"""The private parts of PyTorch that the package uses are there, and do what they are used for."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook

import poolformer_kernels as pk
from poolformer_kernels.ops import torch_private as private

PACKAGE = Path(pk.__file__).parent


def test_transforms_are_seen():
    seen = []

    def f(x):
        seen.append((private.in_transform(), private.differentiating_transform()))
        return x.sum()

    x = torch.ones(3)
    f(x)
    torch.func.vmap(f)(x)
    torch.func.grad(f)(x)
    torch.func.jvp(f, (x,), (x,))
    assert seen == [(False, False), (True, False), (True, True), (True, True)]


def test_forward_mode_is_seen():
    assert not private.forward_mode()
    with forward_ad.dual_level():
        assert private.forward_mode()
    assert not private.forward_mode()


def test_any_requires_grad():
    leaf = torch.ones(2, requires_grad=True)
    assert private.any_requires_grad(torch.ones(2), None, leaf, 3, 0.5, "gelu")
    assert private.any_requires_grad([torch.ones(2), leaf])
    assert not private.any_requires_grad(torch.ones(2), None, 3, [torch.ones(2)])


def test_below_autograd_nothing_is_recorded():
    leaf = torch.ones(2, requires_grad=True)
    assert (2 * leaf).requires_grad
    with private.below_autograd():
        assert not (2 * leaf).requires_grad


def test_constant_result_is_what_the_compiler_marks():
    ours, theirs = private.constant_result(lambda: 1), torch.compiler.assume_constant_result(lambda: 1)
    assert vars(ours) == vars(theirs) != {}


@pytest.fixture
def settings() -> Iterator[None]:
    yield
    for setting in (torch.backends, torch.backends.cudnn, torch.backends.cuda.matmul):
        setting.fp32_precision = "none"
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_tf32 = False


_CONV, _MATMUL = torch.backends.cudnn.conv, torch.backends.cuda.matmul
SETTINGS = (  # the setting that is made, and whether convolutions and matrix products may then use TF32
    (torch.backends.cudnn, "allow_tf32", False, (False, False)),
    (_MATMUL, "allow_tf32", True, (False, True)),
    (_CONV, "fp32_precision", "tf32", (True, True)),
    (_MATMUL, "fp32_precision", "ieee", (True, False)),
    (_CONV, "fp32_precision", "ieee", (False, False)),
    (torch.backends, "fp32_precision", "tf32", (False, False)),  # neither inherits it any more
)


def test_tf32_is_allowed_as_the_settings_say(settings):
    """The older and the newer settings mixed, and what one inherits from another."""
    assert (private.tf32_allowed.convolutions, private.tf32_allowed.matrix_products) == (True, False)
    for module, name, value, expected in SETTINGS:
        setattr(module, name, value)
        assert (private.tf32_allowed.convolutions, private.tf32_allowed.matrix_products) == expected
    with pytest.raises(RuntimeError):
        torch.backends.cudnn.allow_tf32  # noqa: B018  why that is not what we ask
    for module in (_CONV, _MATMUL, torch.backends.cudnn):
        module.fp32_precision = "none"
    for value in ("ieee", "tf32"):
        torch.backends.fp32_precision = value
        for allowed, module in (
            (private.tf32_allowed.convolutions, _CONV),
            (private.tf32_allowed.matrix_products, _MATMUL),
        ):
            assert allowed == (module.fp32_precision == "tf32") == (value == "tf32")


def test_a_changed_tf32_setting_recompiles(settings):
    compiled_graphs = []

    def compile_graph(graph, inputs):
        compiled_graphs.append(graph)
        return graph

    @torch.compile(backend=compile_graph, fullgraph=True)
    def f(x):
        allowed = private.tf32_allowed
        return x + 1 if allowed.convolutions else x + 2 if allowed.matrix_products else x

    x = torch.zeros(1)
    for precision, wanted in (("tf32", 1), ("ieee", 0), ("tf32", 1)):
        _CONV.fp32_precision = precision
        assert f(x).item() == wanted
    assert len(compiled_graphs) == 2
    _CONV.fp32_precision, _MATMUL.fp32_precision = "ieee", "tf32"
    assert f(x).item() == 2
    torch.compiler.reset()


def test_hooks_of_a_module():
    module = nn.Identity()
    assert not any(getattr(module, name) for name in private.HOOKS)
    module.register_forward_hook(lambda *_: None)
    module.register_forward_pre_hook(lambda *_: None)
    module.register_full_backward_hook(lambda *_: None)
    module.register_full_backward_pre_hook(lambda *_: None)
    assert all(len(getattr(module, name)) == 1 for name in private.HOOKS)


def test_hooks_of_all_modules():
    assert not private.has_global_hooks()
    hook = register_module_forward_hook(lambda *_: None)
    try:
        assert private.has_global_hooks()
    finally:
        hook.remove()
    assert not private.has_global_hooks()


def test_a_module_compiled_on_its_own():
    module = nn.Identity()
    assert not private.compiled_on_its_own(module)
    module.compile(backend="eager")
    assert private.compiled_on_its_own(module)


def test_parameters_that_an_export_traces():
    seen = []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x):
            seen.append(type(self.weight))
            return x * self.weight

    torch.export.export(Model(), (torch.ones(2),), strict=False)
    assert seen
    assert set(seen) <= {*private.TRACED_PARAMETERS, nn.Parameter}
    assert set(seen) & set(private.TRACED_PARAMETERS)


@pytest.mark.parametrize("mode", ["transform", "fake"])
def test_outside_transforms_and_modes(mode):
    values = []

    def inside(x):
        with private.outside_transforms_and_modes():
            values.append(torch.ones(2).sum().item())
            values.append(private.in_transform())
        return x.sum()

    if mode == "transform":
        torch.func.grad(inside)(torch.ones(3))
    else:
        with torch._subclasses.FakeTensorMode():
            inside(torch.ones(3))
    assert values == [2.0, False]


def draws() -> list[torch.Tensor]:
    x = torch.ones(3, 4)
    new = [torch.rand(3), torch.randn(2, 3), torch.rand_like(x), torch.randint(9, (5,)), torch.randperm(9)]
    return [*new, x.clone().bernoulli_(0.5), torch.bernoulli(x / 2), nn.functional.dropout(x), x.normal_()]


def test_random_numbers_of_their_own():
    state = torch.get_rng_state()
    seen = []
    for _ in range(2):
        with private.OwnRandomNumbers():
            seen.append([*draws(), *draws()])
    assert torch.equal(torch.get_rng_state(), state)
    first, second = seen
    assert all(map(torch.equal, first, second))
    half = len(first) // 2
    assert not any(map(torch.equal, first[:half], first[half:]))
    torch.manual_seed(0)
    assert all(map(torch.equal, draws(), first))  # what a generator of this seed gives


def test_the_rest_of_the_package_uses_none():
    """Neither ``torch._…`` nor ``from torch._…``, nor underscored names of torch's modules."""
    found = []
    for path in sorted([*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "benchmarks").glob("*.py")]):
        if path.name == "torch_private.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "torch":
                names = [*node.module.split("."), *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [p for a in node.names if a.name.startswith("torch.") for p in a.name.split(".")]
            elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch."):
                names = ast.unparse(node).split(".")
            if any(name.startswith("_") and not name.startswith("__") for name in names):
                found.append(f"{path.relative_to(PACKAGE.parent)}:{node.lineno} {ast.unparse(node)}")
    assert found == []


def test_a_dispatch_mode_sees_operators_and_leaves():
    seen = []

    class Mode(private.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append((str(function), len(private.tree_leaves(args))))
            return function(*args, **(kwargs or {}))

    with Mode():
        torch.cat([torch.ones(2, device="meta"), torch.ones(3, device="meta")])
    assert seen[-1] == ("aten.cat.default", 2)


def test_frozen_weights_are_constants_of_what_is_compiled():
    layer = nn.Linear(3, 2).eval()
    x = torch.ones(4, 3)
    with torch.no_grad(), private.frozen_weights():
        compiled = torch.compile(layer)
        before = compiled(x).clone()
        layer.weight.data = layer.weight + 1  # another tensor, which the constant is not
        torch.testing.assert_close(compiled(x), before)
    torch.compiler.reset()


def test_a_compiled_graph_can_be_differentiated_twice():
    import torch._functorch.config as config

    with config.patch(donated_buffer=True):
        private.allow_repeated_backward()
        assert config.donated_buffer is False  # torch 2.14 computes the same with it
        x, weight = torch.ones(4, 8, requires_grad=True), torch.ones(8, 8)
        y = torch.compile(lambda t: (t @ weight).sigmoid().matmul(weight).square().sum())(x)
        first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    torch.compiler.reset()
