"""Where the one-call inference ends: watchers, shared memory, what operators refuse, exhausted memory."""

import pytest
import torch
from support.peers import randomise_all
from triton import knobs

import poolformer_kernels as pk

from .dataflow import WRITTEN
from .test_chain import ALIKE, LAST, assert_replays, assert_same, images, plans, run, small

pytestmark = pytest.mark.host


@pytest.fixture(params=["triton", "cuda", "auto"])
def backend(request: pytest.FixtureRequest):
    with pk.use_backend(request.param):
        yield request.param


@pytest.fixture
def triton():
    with pk.use_backend("triton"):
        yield


@pytest.fixture
def x() -> torch.Tensor:
    return images(2, 3, 41, 33)


def test_no_chain_where_gradients_or_autocast_are_on(x, triton) -> None:
    model = small(config=ALIKE)
    assert model(x).requires_grad
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        model(x)
    assert not plans(model)


@pytest.mark.long
def test_memory_of_a_replay(triton) -> None:
    """Layers use the workspace again that others have used before; a convolution's result is not in it."""
    model = pk.create_model("poolformer_s12").cuda().to(torch.bfloat16, memory_format=LAST).eval()
    x = images(16, 3, 224, 224, dtype=torch.bfloat16)

    def peak() -> int:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.inference_mode():
            model(x)
        return torch.cuda.max_memory_allocated() - before

    layers, replay = peak(), peak()
    result = 16 * 64 * 56 * 56 * x.element_size()  # of the stem, the largest
    assert replay <= 1.02 * (layers + result)


def test_weights_that_share_memory_have_no_plan(x, triton, caplog) -> None:
    """One of them could be replaced without the other."""
    model = small()
    blocks = model.network[2]
    with torch.no_grad():
        blocks[1].mlp.fc1.weight.data = blocks[0].mlp.fc1.weight.data
    with caplog.at_level("INFO", "poolformer_kernels"):
        run(model, x)
    assert "two of the parameters share memory" in caplog.text
    assert plans(model) == [None]
    run(model, x)  # in the first call, stages have tried it for themselves
    assert_same(run(model, x)[0], run(model, x)[0])


def test_a_parameter_of_two_blocks(x, triton) -> None:
    """The very same one is replaced for both, so there is a plan."""
    model = small()
    blocks = model.network[2]
    blocks[1].mlp.fc1 = blocks[0].mlp.fc1
    assert_replays(model, x)


def test_a_profiler_of_triton_sees_the_layers(x, triton) -> None:
    """While a hook is set nothing is written down or replayed: each launch is Triton's."""
    model, seen = small(), []
    hook = seen.append
    for known in (False, True):
        if known:
            run(model, x)
        knobs.runtime.launch_enter_hook.add(hook)
        try:
            flow, _ = run(model, x)
        finally:
            knobs.runtime.launch_enter_hook.remove(hook)
        assert len(seen) == sum(step[0] in WRITTEN for step in flow) > 0
        assert len(plans(model)) == known
        seen.clear()
    assert_replays(model, x)


def test_without_cudnn(x, triton) -> None:
    """A convolution's result is contiguous then: it is copied, so there is no plan, but the right bias."""
    model = small()
    with torch.backends.cudnn.flags(enabled=False):
        run(model, x)
        assert plans(model) == [None]
        run(model, x)
        assert_same(run(model, x)[0], run(model, x)[0])


def no_weight(model):
    model.network[2][0].norm1.weight = torch.nn.Parameter(torch.empty(5, device="cuda"))


def other_dtype(model):
    model.network[2][0].norm1.weight.data = model.network[2][0].norm1.weight.data.half()


def conv_bias(model):
    model.patch_embed.proj.bias = torch.nn.Parameter(torch.empty(3, device="cuda"))


def head_norm(model):
    model.norm.weight = torch.nn.Parameter(torch.empty(5, device="cuda"))


def negative_eps(model):
    model.network[2][0].norm2.eps = -1.0


def other_width(model):
    model.network[2][0] = randomise_all(pk.nn.PoolFormerBlock(32)).cuda()


def double(model):
    model.network[2][0].norm1.weight.data = model.network[2][0].norm1.weight.data.double()


@pytest.mark.parametrize(
    "spoil",
    [no_weight, other_dtype, conv_bias, head_norm, negative_eps, other_width, double],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("known", [False, True])
def test_what_the_operators_refuse_is_refused(backend, x, spoil, known) -> None:
    model = small()
    if known:
        run(model, x)
    spoil(model)
    for _ in range(2):
        with pytest.raises((TypeError, ValueError, RuntimeError)) as raised:
            run(model, x)
        assert "API call failed" not in str(raised.value)


@pytest.mark.long
def test_exhausted_memory(triton) -> None:
    """The error is torch's own, and the next call has enough."""
    model = pk.create_model("poolformer_s12").cuda().to(torch.bfloat16, memory_format=LAST).eval()
    x = images(64, 3, 224, 224, dtype=torch.bfloat16)
    flow, _ = run(model, x)
    torch.cuda.empty_cache()
    used, total = torch.cuda.memory_allocated(), torch.cuda.get_device_properties(0).total_memory
    try:
        for spare in (8 << 20, 48 << 20):
            torch.cuda.set_per_process_memory_fraction((used + spare) / total)
            with pytest.raises(torch.OutOfMemoryError):
                run(model, x)
            torch.cuda.empty_cache()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert_same(run(model, x)[0], flow)
