"""PyTorch's FlopCounterMode counts our operators as it counts the eager ones they stand for."""

import pytest
import torch
from support.peers import require
from support.processes import python
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import poolformer_kernels as pk
from poolformer_kernels.ops.chain import Chain
from poolformer_kernels.profiling import count_macs, profile


def flops(call, x: torch.Tensor) -> int:
    """What FlopCounterMode counts in ``call(x)`` while nothing is computed."""
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, FlopCounterMode(display=False) as counter:
        call(fake.from_tensor(x))
    return counter.get_total_flops()


def of_inference(model) -> int:
    with torch.no_grad():
        return flops(model.eval(), torch.zeros(2, 3, 64, 64))


def of_a_step(model) -> int:
    return flops(lambda x: model.train()(x).sum().backward(), torch.zeros(2, 3, 64, 64))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("of", [of_inference, of_a_step])
@pytest.mark.parametrize("name", ["poolformer_s12", "poolformerv2_s12"])
def test_models_count_as_timms(name, of, backend) -> None:
    timm = require("timm")
    theirs = timm.create_model(name)
    wanted = of(theirs)
    assert of(pk.create_model(name, head="timm")) == wanted
    assert of(pk.accelerate(theirs)) == wanted


def test_the_figure_of_s12() -> None:
    """1.81 G multiply-accumulates, which fvcore counts, too, without its normalisations."""
    model = pk.create_model("poolformer_s12")
    with torch.no_grad():
        counted = flops(model.eval(), torch.zeros(1, 3, 224, 224))
    macs = count_macs(model, (1, 3, 224, 224))
    assert counted == 2 * (macs["convolution"] + macs["linear"]) == 3_624_534_016


def test_the_profile_has_the_same_figure(kernels: str) -> None:
    model = pk.create_model("poolformer_s12").requires_grad_(False)
    counted = flops(model, torch.zeros(2, 3, 64, 64))
    assert counted == 2 * profile(model, 64, batch=2, measure=False).total.macs_flop_counter


def test_the_inference_operator_is_known() -> None:
    """By itself: `FlopCounterMode` hooks all modules, and hooked modules are called one by one."""
    chain = Chain()
    assert pk.create_model("poolformer_s12").eval().add_to(chain)
    with torch.no_grad():
        counted = flops(lambda x: chain.run(x, True), torch.zeros(2, 3, 64, 96))
    macs = count_macs(pk.create_model("poolformer_s12"), (2, 3, 64, 96))
    assert counted == 2 * (macs["convolution"] + macs["linear"])


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("save_hidden", [False, True])
def test_what_is_computed_again_is_not_counted(save_hidden: bool, frozen: bool, kernels: str) -> None:
    """A step counts the same whether fc1's output is kept or not; of frozen weights there is no gradient."""
    mlp = pk.nn.Mlp(12, 40, 9, save_hidden=save_hidden).requires_grad_(not frozen)
    x = torch.zeros(3, 12, 5, 7, requires_grad=True)
    counted = flops(lambda x: mlp(x).sum().backward(), x)
    with pk.use_backend("reference"):
        assert counted == flops(lambda x: mlp(x).sum().backward(), x)
    assert counted == 2 * 3 * 35 * 40 * (12 + 9) * (2 if frozen else 3)


IMPORTS = {
    "counter first": "import torch.utils.flop_counter, poolformer_kernels as pk",
    "package first": "import poolformer_kernels as pk",
    "looked up first": "import poolformer_kernels as pk; find_spec('torch.utils.flop_counter')",
}
COUNT = """import sys, torch
from importlib.util import find_spec
{}
print('torch.utils.flop_counter' in sys.modules)
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter: pk.nn.Mlp(4, 6)(torch.ones(2, 4, 3, 5))
print(counter.get_total_flops())
"""


@pytest.mark.sampled(3)
@pytest.mark.parametrize("first", IMPORTS)
def test_whichever_is_imported_first(first: str) -> None:
    """The formulas are registered when the counter is imported, and the package does not import it."""
    done = python("-c", COUNT.format(IMPORTS[first]))
    assert done.stdout == f"{first == 'counter first'}\n{2 * 2 * 15 * 6 * 8}\n"


@pytest.mark.parametrize("name", ["cpp", "triton", "cuda"])
@pytest.mark.parametrize("parameter_grads", [False, True])
def test_each_backends_operators_are_counted(name, parameter_grads) -> None:
    """On meta tensors, whatever can run here."""
    ours = torch.ops.poolformer_kernels
    forward, backward = (getattr(ours, f"mlp_{name}{end}").default for end in ("", "_backward"))
    more = {"cpp": (None,), "triton": (torch.float32, False), "cuda": ()}[name]
    x, w1, w2 = (torch.empty(shape, device="meta") for shape in ((3, 12, 5, 7), (40, 12, 1, 1), (9, 40)))
    parameters = (w1, None, w2, None, *[None] * 4)
    with FlopCounterMode(display=False) as counter:
        y, mean_rstd, *_ = forward(x, *parameters, None, "gelu", 1e-5, True, False, False, False, *more)
    assert counter.get_total_flops() == 2 * 3 * 35 * 40 * (12 + 9)
    with FlopCounterMode(display=False) as counter:
        backward(y, x, mean_rstd, *parameters, None, "gelu", True, False, parameter_grads, False, *more)
    assert counter.get_total_flops() == 2 * 3 * 35 * 40 * (12 + 9) * (1 + parameter_grads)
