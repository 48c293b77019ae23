"""Inference as one operator call: it launches what the layers do, on the right memory, whatever changes."""

import copy
import gc
import threading
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import test_chain_cache
import torch
from support.chain import SMALL, make_model
from torch.utils.flop_counter import FlopCounterMode

import poolformer_kernels as pk
from poolformer_kernels.backends.triton import chain as cuda_chain
from poolformer_kernels.nn import chain_cache

from .dataflow import dataflow
from .null_gpu import recorded

pytestmark = pytest.mark.host
LAST = torch.channels_last
# two widths instead of four: half as many kernels to compile
ALIKE = replace(SMALL, layers=(1, 1, 1, 1), dims=(16, 16, 96, 96))


@pytest.fixture(params=["triton", "cuda", "auto"])
def backend(request: pytest.FixtureRequest):
    with pk.use_backend(request.param):
        yield request.param


@pytest.fixture
def triton():
    with pk.use_backend("triton"):
        yield


def small(seed: int = 0, device: str = "cuda:0", **options) -> torch.nn.Module:
    return make_model(seed=seed, **options).to(device, memory_format=LAST)


def images(*shape: int, device: str = "cuda:0", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=device, memory_format=LAST)


@pytest.fixture
def x() -> torch.Tensor:
    return images(2, 3, 41, 33)


def run(model: torch.nn.Module, x: torch.Tensor) -> tuple[list[tuple], torch.Tensor]:
    """(the dataflow of an inference, its result)"""
    with torch.inference_mode(), recorded() as launches:
        y = model(x)
    return dataflow(launches, {"x": x, **dict(model.named_parameters()), **dict(model.named_buffers())}), y


def assert_same(found: list[tuple], wanted: list[tuple]) -> None:
    """Equal dataflows; of others only the first difference is shown."""
    assert [step[0] for step in found] == [step[0] for step in wanted]
    for step, other in zip(found, wanted, strict=True):
        assert step == other


def forget(model: torch.nn.Module) -> None:
    for module in model.modules():
        chain_cache.forget_chain(module)


def plans(model: torch.nn.Module) -> list:
    cached = model.__dict__.get(chain_cache.PLACE)
    return [] if cached is None or cached.chain is None else [*cached.chain.plans.values()]


def assert_replays(model: torch.nn.Module, x: torch.Tensor) -> None:
    """The first call of a kind goes layer by layer, the next ones are what it has written down."""
    forget(model)
    first, y = run(model, x)
    assert [type(plan) for plan in plans(model)] == [cuda_chain._Plan]
    for _ in range(2):
        again, z = run(model, x)
        assert_same(again, first)
        assert (z.shape, z.stride(), z.dtype, z.device) == (y.shape, y.stride(), y.dtype, y.device)
        assert z.data_ptr() != y.data_ptr()
        assert z.is_inference()
    assert not [step for step in first if "nowhere" in str(step)]


@pytest.mark.parametrize("head", ["official", "timm"])
def test_a_replay_launches_what_the_layers_do(backend, head, x) -> None:
    assert_replays(small(head=head), x)


@pytest.mark.long
def test_whole_s12(backend) -> None:
    model = pk.create_model("poolformer_s12").cuda().to(torch.bfloat16, memory_format=LAST).eval()
    assert_replays(model, images(2, 3, 224, 224, dtype=torch.bfloat16))


def test_parts_of_a_model(triton) -> None:
    """A stage gives images, so its result is no operator's."""
    stage = small().network[2]
    assert_replays(stage, images(2, 33, 6, 5))
    assert_replays(stage, images(3, 33, 7, 5))


@pytest.mark.long
def test_a_half_model_with_float_vectors(triton) -> None:
    """A convolution's bias must be of its weight's dtype; the blocks' vectors need not."""
    model = small(config=ALIKE).bfloat16()
    for name, p in model.named_parameters():
        if p.dim() == 1 and not name.startswith("head") and ".proj." not in name:
            p.data = p.data.float()
    assert_replays(model, images(2, 3, 41, 33, dtype=torch.bfloat16))


# Changes that compute something first, which the null GPU does not.
COMPUTED = ("optimizer step", "classifier reset")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.long] if name == "stride" else [])  # of other kernels
        for name in test_chain_cache.CHANGES
    ],
)
def test_a_change_is_seen(name, x, triton) -> None:
    model = small()
    before, _ = run(model, x)
    assert_same(run(model, x)[0], before)
    if name in COMPUTED:
        model.cpu()
    with pk.use_backend("auto"):
        test_chain_cache.CHANGES[name](model)
    model.to("cuda:0")  # and what the change has put on the CPU
    after, y = run(model, x)
    forget(model)
    fresh, z = run(model, x)
    assert_same(after, fresh)
    assert y.shape == z.shape


def test_weights_that_move_are_followed(x, triton) -> None:
    """Their addresses are asked for in each call."""
    model = small()
    flow, _ = run(model, x)
    cached = model.__dict__[chain_cache.PLACE]
    for p in model.parameters():
        p.data = p.data.clone(memory_format=torch.preserve_format)
    assert_same(run(model, x)[0], flow)
    assert model.__dict__[chain_cache.PLACE] is cached
    assert len(plans(model)) == 1


@pytest.mark.long
def test_a_vector_that_loses_its_alignment(triton) -> None:
    """Kernels that were compiled for addresses of 16 bytes are not launched on others."""
    model, x = small(config=ALIKE).bfloat16(), images(2, 3, 41, 33, dtype=torch.bfloat16)
    run(model, x)
    for name in ("network.2.0.norm2.bias", "network.0.0.norm1.weight"):
        p = model.get_parameter(name)
        p.data = torch.empty(p.numel() + 1, dtype=p.dtype, device=p.device)[1:]
        shifted, _ = run(model, x)
        assert plans(model) != [None]
        forget(model)
        assert_same(run(model, x)[0], shifted)


def test_a_matrix_that_loses_its_alignment(triton) -> None:
    """It is copied in each call, which is no kernel's launch, so there is no plan."""
    model, x = small(config=ALIKE).bfloat16(), images(2, 3, 41, 33, dtype=torch.bfloat16)
    run(model, x)
    p = model.get_parameter("network.2.0.mlp.fc1.weight")
    p.data = torch.empty(p.numel() + 1, dtype=p.dtype, device=p.device)[1:].view(p.shape)
    run(model, x)
    assert plans(model) == [None]
    run(model, x)  # in the first call, stages have tried it for themselves
    assert_same(run(model, x)[0], run(model, x)[0])


def test_another_dtype_layout_and_device_of_weights(x, triton) -> None:
    model = small()
    flow, _ = run(model, x)
    half = x.bfloat16()
    assert run(model.bfloat16(), half)[0] != flow
    assert_same(run(model.float(), x)[0], flow)
    with pytest.raises(RuntimeError):  # torch's own error
        run(model.bfloat16(), x)
    model.float()
    model.patch_embed.proj.weight.data = model.patch_embed.proj.weight.data.contiguous()
    relaid = run(model, x)[0]
    assert_same(run(model, x)[0], relaid)
    forget(model)
    assert_same(run(model, x)[0], relaid)
    other = model.to("cuda:1")
    moved, y = run(other, x.to("cuda:1"))
    assert y.device == torch.device("cuda:1")
    assert [step[0] for step in moved] == [step[0] for step in relaid]


def test_float32_products_follow_torchs_settings(x, triton, monkeypatch) -> None:
    """A plan belongs to the settings that it was made under."""
    model = small()
    run(model, x)
    flow = {}
    for allowed in (True, False, True):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        flow[allowed] = run(model, x)[0]
        forget(model)
        assert_same(run(model, x)[0], flow[allowed])
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not allowed)
        assert run(model, x)[0] != flow[allowed]


def test_a_copy_is_a_model_of_its_own(x, triton) -> None:
    model = small()
    flow, _ = run(model, x)
    twin = copy.deepcopy(model)
    assert not plans(twin)
    assert_same(run(twin, x)[0], flow)
    assert_same(run(twin, x)[0], flow)
    assert_same(run(model, x)[0], flow)


def test_shapes_are_kept_apart_and_are_not_kept_for_ever(triton, monkeypatch) -> None:
    monkeypatch.setattr(cuda_chain, "PLANS", 2)
    model = small()
    flows = []
    for batch in (1, 2, 3, 1):
        x = images(batch, 3, 41, 33)
        flows.append(run(model, x)[0])
        assert run(model, x)[0] == flows[-1]
    assert flows[0] == flows[3] != flows[1]
    assert len(plans(model)) == 2


def test_plans_die_with_the_model(x, triton) -> None:
    model = small()
    run(model, x)
    (plan,) = plans(model)
    number, dead = plan.number, weakref.ref(plan)
    parameters = [p.detach() for p in model.parameters()]
    del plan, model
    gc.collect()
    assert dead() is None
    with pytest.raises(RuntimeError, match=f"there is no plan {number}"):
        torch.ops.poolformer_kernels.chain_cuda(x, parameters, number)


def test_two_threads_on_two_streams(backend, x) -> None:
    """Each thread's launches are on its stream, in the order and of the memory of its own call."""
    model = small()
    flow, _ = run(model, x)
    run(model, x)
    tensors = {"x": x, **dict(model.named_parameters())}
    streams = [torch.cuda.Stream() for _ in range(2)]

    def work(stream: torch.cuda.Stream) -> None:
        with torch.inference_mode(), torch.cuda.stream(stream):
            for _ in range(20):
                model(x)

    with recorded() as launches:
        threads = [threading.Thread(target=work, args=(stream,)) for stream in streams]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for stream in streams:
        own = [launch for launch in launches if launch.stream == stream.cuda_stream]
        assert len(own) == 20 * len(flow)
        for i in range(20):
            assert_same(dataflow(own[i * len(flow) : (i + 1) * len(flow)], tensors), flow)
    assert len(launches) == 40 * len(flow)


def test_a_thread_that_never_used_cuda(x, triton) -> None:
    """A new thread has no context; the launch makes the device's current."""
    model, failed = small(), []
    run(model, x)

    def work() -> None:
        try:
            for _ in range(2):
                run(model, x)
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed


def test_another_device_than_the_current_one(backend) -> None:
    model, x = small(device="cuda:1"), images(2, 3, 41, 33, device="cuda:1")
    stream = torch.cuda.Stream("cuda:1")
    with torch.inference_mode(), torch.cuda.stream(stream), torch.cuda.device(0), recorded() as launches:
        for _ in range(3):
            model(x)
    assert {(launch.device, launch.stream) for launch in launches} == {(1, stream.cuda_stream)}
    assert plans(model)


def test_the_first_call_inside_a_capture(backend, x) -> None:
    """Compiled, loaded and written down while a graph is captured; the graph has what the layers launch."""
    model = small(seed=3)
    with torch.inference_mode():
        torch.nn.functional.conv2d(x, model.patch_embed.proj.weight, stride=4)  # cuDNN starts outside
        model.head.weight @ model.head.weight.T
        graph = torch.cuda.CUDAGraph()
        with recorded() as launches, torch.cuda.graph(graph):
            model(x)
            model(x)
    names = [launch.name for launch in launches if launch.captured]
    assert names[: len(names) // 2] == names[len(names) // 2 :]
    assert names


def test_what_watches_operators_sees_them(x, triton) -> None:
    """Under a dispatch mode layers are called one by one."""
    model = small()
    run(model, x)
    with torch.inference_mode(), FlopCounterMode(display=False) as flops:
        model(x)
    assert flops.get_total_flops() > 0
    seen = Counter()

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen[op._schema.name] += 1
            return op(*args, **(kwargs or {}))

    with torch.inference_mode(), Count():
        model(x)
    assert seen["poolformer_kernels::pool_mixer_triton"] == 5
    assert "poolformer_kernels::chain_cuda" not in seen
