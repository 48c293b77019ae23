"""Calls of Triton's operators that are run again from C++: the launches and the memory of the first call."""

import threading
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from triton import knobs

import poolformer_kernels as pk
from poolformer_kernels.backends.triton.replay import Replayed

from .dataflow import dataflow
from .null_gpu import recorded

pytestmark = pytest.mark.host
LAST = torch.channels_last


@pytest.fixture(autouse=True)
def triton():
    with pk.use_backend("triton"):
        yield


@pytest.fixture
def first_calls(monkeypatch) -> list[str]:
    """The modules whose launchers in Python have run."""
    calls, record = [], Replayed._record

    def counted(self, *args):
        calls.append(self._function.__module__.rpartition(".")[2] + "." + self._function.__name__)
        return record(self, *args)

    monkeypatch.setattr(Replayed, "_record", counted)
    return calls


class Call:
    """An operator with tensors of its own, forward and backward."""

    def __init__(self, operator: str, channels: int, size: int, dtype=torch.bfloat16, **options) -> None:
        self.operator, self.options = operator, dict(options)
        self.batch = self.options.pop("batch", 4)
        parameters = self.options.pop("parameters", dtype)
        offset = self.options.pop("offset", 0)
        fmt = self.options.pop("fmt", LAST)
        self.autocast = self.options.pop("autocast", False)

        def make(*shape: int, dtype=parameters) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="cuda").requires_grad_()

        shape = (self.batch, channels, size, size)
        dense = torch.empty(shape, device="meta", memory_format=fmt)
        memory = torch.empty(dense.numel() + offset, dtype=dtype, device="cuda")
        self.tensors = {"x": memory.as_strided(shape, dense.stride(), offset).requires_grad_()}
        norm = operator != "mlp" or self.options.get("norm", True)
        names = ("weight", "bias") if operator == "pool_mixer" else ("norm_weight", "norm_bias")
        self.keywords = {name: make(channels) for name in (*names, "layer_scale")} if norm else {}
        if self.options.pop("drop", False):
            self.keywords["drop_scale"] = make(self.batch)
        self.weights = []
        if operator == "mlp":
            hidden = 4 * channels
            self.weights = [
                make(hidden, channels, 1, 1),
                make(hidden),
                make(channels, hidden, 1, 1),
                make(channels),
            ]
        self.tensors |= self.keywords | {f"w{i}": w for i, w in enumerate(self.weights)}
        self.grad = torch.empty(shape, dtype=dtype, device="cuda").to(memory_format=fmt)

    def run(self) -> list[tuple]:
        """The dataflow of a forward and a backward, then of their results."""
        x, *_ = self.tensors.values()
        context = torch.autocast("cuda", torch.bfloat16) if self.autocast else nullcontext()
        with recorded() as launches, context:
            if self.operator == "pool_mixer":
                positional = [self.keywords["weight"], self.keywords["bias"]]
                rest = {k: v for k, v in self.keywords.items() if k not in ("weight", "bias")}
                y = pk.ops.pool_mixer(x, *positional, residual=True, **rest, **self.options)
            else:
                y = pk.ops.mlp(x, *self.weights, residual=True, **self.keywords, **self.options)
            grads = torch.autograd.grad(y, [*self.tensors.values()], self.grad)
        self.results = [y, *grads]
        tensors = {name: t.detach() for name, t in self.tensors.items()} | {"grad": self.grad}
        return dataflow(launches, tensors, self.results)


FIRST = torch.contiguous_format
CASES = {
    "mixer": lambda: Call("pool_mixer", 64, 20),
    "mixer nchw, pool 5": lambda: Call(
        "pool_mixer", 40, 9, torch.float32, fmt=torch.contiguous_format, pool_size=5
    ),
    "mixer, drop": lambda: Call("pool_mixer", 64, 20, drop=True),
    "mixer, offset": lambda: Call("pool_mixer", 64, 20, offset=1),
    "narrow": lambda: Call("mlp", 64, 20),
    "narrow, drop, offset": lambda: Call("mlp", 64, 20, drop=True, offset=1),
    "narrow, autocast": lambda: Call("mlp", 64, 20, torch.float32, autocast=True),
    "narrow, no norm": lambda: Call("mlp", 64, 20, norm=False),
    "narrow, float32": lambda: Call("mlp", 64, 20, torch.float32),
    "wide": lambda: Call("mlp", 320, 14),
    "wide, kept, drop": lambda: Call("mlp", 320, 14, save_hidden=True, drop=True),
    "wide, autocast": lambda: Call("mlp", 320, 14, torch.float32, autocast=True, save_hidden=None),
    "wide, float16": lambda: Call("mlp", 320, 14, torch.float16, activation="silu"),
    "wide, float32": lambda: Call("mlp", 320, 14, torch.float32),
    "one pixel": lambda: Call("mlp", 320, 1),
}


def assert_same(found: list[tuple], wanted: list[tuple]) -> None:
    assert [step[0] for step in found] == [step[0] for step in wanted]
    for step, other in zip(found, wanted, strict=True):
        assert step == other


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", CASES)
def test_a_replay_is_the_first_call_again(name, first_calls) -> None:
    """On the first call's tensors, and on others like them; no launcher in Python runs."""
    call = CASES[name]()
    first = call.run()
    made = [
        f"{'pool_mixer' if call.operator == 'pool_mixer' else way}.{way}" for way in ("forward", "backward")
    ]
    assert first_calls == made
    if name != "narrow, drop, offset":  # it copies its operands, which the null GPU does not show
        assert not [step for step in first if "nowhere" in str(step)]
    results = call.results
    assert_same(call.run(), first)
    assert not {t.data_ptr() for t in results if t.numel()} & {t.data_ptr() for t in call.results}
    assert_same(CASES[name]().run(), first)
    assert first_calls == made


OTHERS = {
    "batch": {"batch": 5},
    "size": {"size": 13},
    "dtype": {"dtype": torch.float16},
    "parameters": {"parameters": torch.float32},
    "layout": {"fmt": torch.contiguous_format},
    "alignment": {"offset": 4},
    "missing tensor": {"drop": True},
    "pool size": {"pool_size": 5},
    "eps": {"eps": 1e-3},
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("what", OTHERS)
def test_what_decides_about_a_plan(what, first_calls) -> None:
    """Each has launches of its own, but for eps, which the backward does not see."""
    first = {"size": 12, "batch": 17 + list(OTHERS).index(what)}  # no other test's
    calls = [Call("pool_mixer", 48, **first | options) for options in ({}, OTHERS[what])]
    flows = [call.run() for call in calls]
    own = 3 if what == "eps" else 4
    assert len(first_calls) == own
    for call, flow in zip(reversed(calls), reversed(flows), strict=True):
        assert_same(call.run(), flow)
    assert len(first_calls) == own


def test_an_expanded_gradient(first_calls) -> None:
    """As of a mean over pixels: it is copied, then the call is a replay."""
    call = Call("mlp", 320, 13)
    call.run()
    call.grad = torch.empty(4, 320, 1, 1, dtype=torch.bfloat16, device="cuda").expand(4, 320, 13, 13)
    call.run()
    assert len(first_calls) == 2


def test_only_the_gradient_of_x(first_calls) -> None:
    call = Call("mlp", 320, 14)
    call.tensors = {"x": call.tensors["x"]}
    for t in call.keywords.values():
        t.requires_grad_(False)
    for w in call.weights:
        w.requires_grad_(False)
    first = call.run()
    assert "cublasGemmEx" not in {step[0] for step in first}
    assert_same(call.run(), first)


def test_threads_on_streams_of_their_own() -> None:
    call = Call("mlp", 320, 14)
    call.run()
    with recorded() as alone, torch.no_grad():
        pk.ops.mlp(call.tensors["x"], *call.weights, residual=True, **call.keywords)
    with recorded() as launches:
        streams = [torch.cuda.Stream() for _ in range(2)]

        def work(stream: torch.cuda.Stream) -> None:
            with torch.cuda.stream(stream), torch.no_grad():
                for _ in range(30):
                    pk.ops.mlp(call.tensors["x"], *call.weights, residual=True, **call.keywords)

        threads = [threading.Thread(target=work, args=(stream,)) for stream in streams]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    names = [launch.name for launch in alone]
    tensors = {name: t.detach() for name, t in call.tensors.items()}
    flow = dataflow(alone, tensors)
    for stream in streams:
        own = [launch for launch in launches if launch.stream == stream.cuda_stream]
        assert [launch.name for launch in own] == 30 * names
        for i in range(30):
            assert_same(dataflow(own[i * len(names) : (i + 1) * len(names)], tensors), flow)


def test_exhausted_memory(first_calls) -> None:
    """A replay that gets no memory is left to the launcher, whose error is torch's; the next has enough."""
    call = Call("mlp", 320, 14, batch=64)
    first = call.run()
    call.results = None
    torch.cuda.empty_cache()
    used, total = torch.cuda.memory_allocated(), torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction((used + (4 << 20)) / total)
        with pytest.raises(torch.OutOfMemoryError):
            call.run()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(first_calls) == 3
    assert_same(call.run(), first)


def test_a_dispatch_mode_sees_the_operators() -> None:
    call, seen = Call("pool_mixer", 64, 20), []

    class See(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.append(op._schema.name)
            return op(*args, **(kwargs or {}))

    call.run()
    with See():
        call.run()
    assert "poolformer_kernels::pool_mixer_triton" in seen
    assert "poolformer_kernels::replay" not in seen


def test_a_profiler_of_triton_sees_each_launch(first_calls) -> None:
    call, seen = Call("pool_mixer", 64, 20), []
    call.run()
    before = len(first_calls)
    hook = seen.append
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        flow = call.run()
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert len(seen) == sum(step[0] != "result" for step in flow) == 5
    assert len(first_calls) == before


@pytest.mark.long
def test_float16_products_are_tritons() -> None:
    """cuBLAS refuses a float32 result of float16 operands where PyTorch lets it accumulate in float16."""
    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    try:
        names = [step[0] for step in Call("mlp", 320, 14, torch.float16).run()]
    finally:
        torch.backends.cuda.matmul.allow_fp16_accumulation = False
    assert names.count("mlp_bwd_outer") == 2
    assert "cublasGemmEx" not in names
