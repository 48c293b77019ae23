"""accelerate's comparison of forwards: what it notices, may remember and leaves untouched; and runs later."""

import copy
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from support.accelerate import (
    DIFFERENT,
    DropPath,
    Mlp,
    MmpretrainBlock,
    PoolFormerBlock,
    Pooling,
    features,
    image,
    logits,
    make_block,
    make_model,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.utils import remove_weight_norm, weight_norm

from poolformer_kernels.accelerate import accelerate, equivalence, restore, unfused_reasons

pytestmark = pytest.mark.filterwarnings("ignore:accelerate made nothing faster")


@pytest.fixture(autouse=True)
def compared(monkeypatch):
    """What is remembered, empty before each test."""
    monkeypatch.setattr(equivalence, "_compared", {})
    return equivalence._compared


def outputs(block: nn.Module) -> list[Tensor]:
    """y, dx and the gradient of every parameter, zero where there is none."""
    x = features().requires_grad_()
    y = block(x)
    grads = torch.autograd.grad(y.square().sum(), [x, *block.parameters()], materialize_grads=True)
    return [y.detach(), *grads]


def assert_same(block: nn.Module, expected: list[Tensor], *, exact: bool = False) -> None:
    size = 0.0 if exact else 1e-5 * max(t.abs().max().item() for t in expected)
    assert all((a - b).abs().max() <= size for a, b in zip(outputs(block), expected, strict=True))


# ---- what it notices ---------------------------------------------------------------------------------------


def block_with(forward: Callable) -> nn.Module:
    """A block of a class that has this structure and a forward of its own."""
    block = type("Other", (nn.Module,), {"forward": forward})()
    vars(block).update(vars(make_block()))
    return block


def block_of(mixer: Callable, mlp: Callable) -> nn.Module:
    """A block whose forward adds these two branches."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(mixer(self, x))
        return x + self.drop_path(mlp(self, x))

    return block_with(forward)


def mixer(self, x, norm="norm1", scale="layer_scale_1"):
    return getattr(self, scale)[:, None, None] * self.token_mixer(getattr(self, norm)(x))


def mlp(self, x, norm="norm2", scale="layer_scale_2"):
    return getattr(self, scale)[:, None, None] * self.mlp(getattr(self, norm)(x))


def bias_as_weight(self, x):
    norm = self.norm1
    y = F.group_norm(x, 1, norm.bias, norm.bias, norm.eps)
    return self.layer_scale_1[:, None, None] * self.token_mixer(y)


def post_norm(self, x):
    x = self.norm1(x + self.layer_scale_1[:, None, None] * self.token_mixer(x))
    return self.norm2(x + self.layer_scale_2[:, None, None] * self.mlp(x))


FORWARD = "the forward of test_accelerate_equivalence.Other"
BRANCHES = {
    "scales swapped": (partial(mixer, scale="layer_scale_2"), partial(mlp, scale="layer_scale_1")),
    "one scale": (mixer, partial(mlp, scale="layer_scale_1")),
    "one norm": (mixer, partial(mlp, norm="norm1")),
    "norms swapped": (partial(mixer, norm="norm2"), partial(mlp, norm="norm1")),
    "bias as weight": (bias_as_weight, mlp),
    "detached input": (mixer, lambda s, x: mlp(s, x.detach())),
    "detached branch": (lambda s, x: mixer(s, x).detach(), mlp),
    "more while recording": (mixer, lambda s, x: (2 if torch.is_grad_enabled() else 1) * mlp(s, x)),
    "less while recording": (mixer, lambda s, x: (1 if torch.is_grad_enabled() else 2) * mlp(s, x)),
    "branch dropped twice": (lambda s, x: s.drop_path(mixer(s, x)), mlp),
}
FORWARDS = {
    "post norm": (post_norm, DIFFERENT),
    "dropped twice": (lambda s, x: x + s.drop_path(PoolFormerBlock.forward(s, x) - x), DIFFERENT),
    "two arguments": (lambda s, x, mask=None: PoolFormerBlock.forward(s, x), "does not take one tensor"),
    "raises": (lambda s, x: x.no_such_method(), "could not be compared with ours: 'Tensor' object has no"),
}


def assert_left_alone(block: nn.Module, reason: str) -> None:
    kind = type(block)
    accelerate(block)
    assert type(block) is kind
    for why in unfused_reasons(block):
        assert why.startswith(f"{FORWARD} {reason}")


@pytest.mark.parametrize("drop_prob", [0.0, 0.5])
@pytest.mark.parametrize("branches", BRANCHES.values(), ids=BRANCHES)
def test_other_uses_of_the_same_parts(branches, drop_prob):
    block = block_of(*branches)
    block.drop_path = DropPath(drop_prob)
    assert_left_alone(block, DIFFERENT)


@pytest.mark.parametrize(("forward", "reason"), FORWARDS.values(), ids=FORWARDS)
def test_other_forwards(forward, reason):
    block = block_with(forward)
    block.drop_path = DropPath(0.5)
    assert_left_alone(block, reason)


def test_the_same_forward_in_other_words(kernels):
    block = block_of(mixer, mlp)
    expected = outputs(block)
    assert unfused_reasons(accelerate(block)) == (None, None)
    assert_same(block, expected)


def test_scales_without_a_flag_must_both_be_there():
    block = MmpretrainBlock()
    assert unfused_reasons(accelerate(block)) == (None, None)
    block = MmpretrainBlock()
    block.layer_scale_2 = None
    with pytest.raises(ValueError, match=r"no block to accelerate in support\.accelerate\.MmpretrainBlock"):
        accelerate(block)


# ---- what it remembers -------------------------------------------------------------------------------------


class GainNorm(nn.GroupNorm):
    def __init__(self, gain) -> None:
        super().__init__(1, 16)
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        gain = self.gain[0] if isinstance(self.gain, (tuple, list)) else self.gain
        return gain * super().forward(x)


class BufferNorm(GainNorm):
    def __init__(self, gain) -> None:
        super().__init__(None)
        del self.gain
        self.register_buffer("gain", torch.tensor(gain))


GAINS = {
    "number": GainNorm,
    "tuple": lambda gain: GainNorm((gain,)),
    "list": lambda gain: GainNorm([gain]),
    "tensor": lambda gain: GainNorm(torch.tensor(gain)),
    "buffer": BufferNorm,
}


@pytest.mark.parametrize("kind", GAINS)
def test_settings_inside_modules_count(kind, kernels):
    for gain in (1.0, 2.0, 1.0):
        block = make_block(norm=lambda _, gain=gain: GAINS[kind](gain))
        expected = outputs(block)
        accelerate(block)
        assert (type(block) is PoolFormerBlock) == (gain != 1)
        assert_same(block, expected, exact=gain != 1)


@pytest.mark.parametrize("made", [PoolFormerBlock, Pooling, Mlp])
def test_forwards_replaced_between_two_calls_count(made, monkeypatch, kernels):
    assert unfused_reasons(accelerate(make_block())) == (None, None)
    forward = made.forward
    monkeypatch.setattr(made, "forward", lambda self, x: 2 * forward(self, x))
    block = make_block()
    expected = outputs(block)
    accelerate(block)
    assert type(block) is PoolFormerBlock
    assert_same(block, expected, exact=True)


def test_equal_blocks_are_compared_once(monkeypatch, compared):
    compare, seen = equivalence._compare, []
    monkeypatch.setattr(equivalence, "_compare", lambda *args: seen.append(args) or compare(*args))
    blocks = [PoolFormerBlock(dim, drop_path=p) for dim in (16, 24) for p in (0.0, 0.1, 0.2, 0.3)]
    model = nn.Sequential(*blocks)
    accelerate(accelerate(model))
    assert len(seen) == len(compared) == 4  # two widths, with and without drop paths


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_modules_with_hooks_that_set_tensors_poison_no_others(kernels):
    block = make_block()
    weight_norm(block.mlp.fc1)
    expected = outputs(block)
    accelerate(block)
    assert unfused_reasons(block) == (None, "mlp.fc1 has hooks")
    assert_same(block, expected)
    other = accelerate(make_block())
    assert unfused_reasons(other) == (None, None)
    remove_weight_norm(block.mlp.fc1)
    assert unfused_reasons(block) == (None, None)
    assert_same(block, outputs(restore(copy.deepcopy(block))))


# ---- what it leaves untouched ------------------------------------------------------------------------------


class Counting(Pooling):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def test_buffers_and_generators_stay(monkeypatch):
    block, seeded = make_block(), []
    block.token_mixer = Counting()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    state = torch.get_rng_state()
    assert unfused_reasons(accelerate(block)) == (None, None)
    assert block.token_mixer.calls == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert not seeded


@pytest.mark.parametrize("drop_prob", [0.0, 0.3])
def test_the_generator_is_never_seeded(drop_prob, monkeypatch):
    """Not even for a moment, which another thread would see."""
    seeded = []
    for name in ("set_rng_state", "manual_seed"):
        monkeypatch.setattr(torch.random, name, seeded.append)
    monkeypatch.setattr(torch, "default_generator", None)
    assert unfused_reasons(accelerate(PoolFormerBlock(drop_path=drop_prob))) == (None, None)
    assert not seeded


def test_a_passing_error_is_not_remembered(compared, monkeypatch):
    def full(*args):
        raise MemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(equivalence, "_run", full)
        block = accelerate(PoolFormerBlock())
        reason = "the forward of support.accelerate.PoolFormerBlock could not be compared with ours"
        assert unfused_reasons(block)[0] == f"{reason}: no memory"
    assert not compared
    assert unfused_reasons(accelerate(PoolFormerBlock())) == (None, None)


def test_threads_take_turns(monkeypatch, compared):
    inside, most = [], []
    compare = equivalence._compare

    def slow(*args):
        inside.append(args)
        most.append(len(inside))
        time.sleep(0.002)
        wrong = compare(*args)
        inside.pop()
        return wrong

    monkeypatch.setattr(equivalence, "_compare", slow)
    with ThreadPoolExecutor(3) as pool:
        [*pool.map(accelerate, [PoolFormerBlock(dim) for dim in (8, 16, 24)])]
    assert len(compared) == 3
    assert most == [1] * 3


def test_inside_of_modes(compared):
    with FakeTensorMode():
        fake = accelerate(PoolFormerBlock())
        assert fake(torch.zeros(1, 16, 4, 4)).shape == (1, 16, 4, 4)
    assert [*compared.values()] == [None]
    for around in (FakeTensorMode(), torch.inference_mode(), torch.no_grad(), torch.device("meta")):
        compared.clear()
        block = make_block()
        with around:
            accelerate(block)
        assert unfused_reasons(block) == (None, None)
    compared.clear()
    block = make_block()
    torch.vmap(lambda x: accelerate(block) and x)(torch.zeros(2))
    assert unfused_reasons(block) == (None, None)


# ---- what runs afterwards ----------------------------------------------------------------------------------


class Int8(Tensor):
    """A weight of integers and a scale that compilers trace through, as quantisation packages make them."""

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor):
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype, device=values.device)

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        self.values, self.scale = values, scale

    __repr__ = object.__repr__  # the compiler's traces ask for it

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, meta, size, stride):
        return cls(inner["values"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        if function is not torch.ops.aten.convolution.default:
            raise NotImplementedError(function)
        plain = [a.values.to(a.scale.dtype) * a.scale if isinstance(a, cls) else a for a in args]
        return function(*plain, **(kwargs or {}))


def test_compiled_with_weights_of_another_type(fresh_dynamo, kernels):
    block = make_block().requires_grad_(False)
    for layer in (block.mlp.fc1, block.mlp.fc2):
        scale = layer.weight.abs().max() / 127
        values = (layer.weight / scale).round().to(torch.int8)
        layer.weight = nn.Parameter(Int8(values, scale), requires_grad=False)
    expected = block(features())
    accelerate(block)
    reason = "mlp.fc1 has a weight of test_accelerate_equivalence.Int8, not a plain parameter"
    assert unfused_reasons(block) == (None, reason)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(features()), expected)


def test_forward_mode_derivatives_are_the_modules(kernels):
    block = make_block()
    tangents = []
    for each in (block, accelerate(copy.deepcopy(block))):
        with forward_ad.dual_level():
            y = each(forward_ad.make_dual(features(), features().sin()))
            tangents.append(forward_ad.unpack_dual(y).tangent)
    assert tangents[0].abs().max() > 0.1
    assert torch.equal(*tangents)


def test_the_kind_of_gelu_changed_afterwards(kernels):
    block = accelerate(make_block())
    erf = outputs(block)
    block.mlp.act.approximate = "tanh"
    expected = outputs(restore(copy.deepcopy(block)))
    assert (erf[0] - expected[0]).abs().max() > 1e-5
    assert unfused_reasons(block) == (None, None)
    assert_same(block, expected)
    block.mlp.act.approximate = "none"
    assert unfused_reasons(block) == (None, None)
    assert (outputs(block)[0] - expected[0]).abs().max() > 1e-5
    assert_same(block, erf)


def test_the_star_of_star_relu_is_not_forgotten(kernels):
    model, x = make_model("timm v2"), image()
    accelerate(model)
    act = model.stages[0].blocks[0].mlp.act
    del act.scale
    act.scale = torch.tensor([3.0])  # an attribute like any other now
    expected = logits(restore(copy.deepcopy(model)), x)
    assert unfused_reasons(model.stages[0].blocks[0]) == (None, None)
    torch.testing.assert_close(logits(model, x), expected, atol=1e-5, rtol=1e-4)
    act.scale = torch.tensor(3.0)
    reason = unfused_reasons(model.stages[0].blocks[0])[1]
    assert reason.startswith("mlp.act is timm.models.metaformer.StarReLU, which computes none of gelu")
    torch.testing.assert_close(logits(model, x), expected, atol=1e-5, rtol=1e-4)
