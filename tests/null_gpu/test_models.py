"""S12 on both backends: launches of an inference and of a training step, captured, and of two devices."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
import triton

import poolformer_kernels as pk

from .counts import AT_256, INFERENCE, OTHERS, TRAINING
from .null_gpu import Launch, graph_launches, recorded, take_complaints

pytestmark = [pytest.mark.host, pytest.mark.long]  # it compiles all kernels of a whole model


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest):
    with pk.use_backend(request.param):
        yield request.param


def s12(device: str = "cuda:0") -> torch.nn.Module:
    return pk.create_model("poolformer_s12").to(device, memory_format=torch.channels_last)


def images(device: str = "cuda:0", dtype: torch.dtype = torch.float32, batch: int = 2) -> torch.Tensor:
    shape = (batch, 3, 224, 224)
    return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)


def count(launches: list[Launch]) -> tuple[dict[str, int], int]:
    """(the package's kernels by name without template arguments, the number of the other launches)"""
    ours = Counter(launch.name.split("<")[0] for launch in launches if launch.ours)
    assert all(launch.known for launch in launches if launch.ours)
    return dict(ours), len(launches) - ours.total()


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    labels = torch.zeros(len(x), dtype=torch.long, device=x.device)
    with torch.autocast("cuda", torch.bfloat16):
        loss = F.cross_entropy(model(x), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_inference(backend) -> None:
    """Eager and captured; a replay launches what the capture did, in one graph."""
    model, x = s12().bfloat16().eval(), images(dtype=torch.bfloat16)
    with torch.inference_mode(), recorded() as launches:
        model(x)
    ours, others = count(launches)
    assert ours == INFERENCE[backend]
    assert others <= OTHERS["inference"]
    assert {(launch.device, launch.stream) for launch in launches} == {(0, 0)}

    with recorded() as launches:
        graph = pk.graphed(model, x)
    captured = [launch for launch in launches if launch.captured]
    assert count(captured)[0] == INFERENCE[backend]
    replays = graph_launches()
    with recorded() as launches:
        graph(x)
    assert graph_launches() == replays + 1
    replayed = [launch for launch in launches if launch.replayed]
    assert [launch.name for launch in replayed] == [launch.name for launch in captured]


@pytest.mark.parametrize("batch", [2, 256])
def test_training_step(backend, batch, monkeypatch) -> None:
    """Autocast to bfloat16 and fused AdamW; the second step goes by Triton's own launcher nowhere."""
    model, x = s12().train(), images(batch=batch)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    train(model, optimizer, x)
    monkeypatch.setattr(triton.JITFunction, "run", None)
    with recorded() as launches:
        train(model, optimizer, x)
    ours, others = count(launches)
    assert ours == (AT_256 if batch == 256 else TRAINING)[backend]
    assert others <= OTHERS[backend]
    assert {(launch.device, launch.stream) for launch in launches} == {(0, 0)}


def saved_bytes(model: torch.nn.Module, x: torch.Tensor) -> int:
    """Of what autograd keeps of a training step's forward, but for the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cuda", torch.bfloat16):
        model(x)
    return sum(storage.nbytes() for storage in kept.values())


def test_what_a_training_step_keeps(backend) -> None:
    """fc1's output of the wide MLPs is kept: less than half of eager's activations remains to be kept."""
    model, x = s12().train(), images(batch=8)
    ours = saved_bytes(model, x)
    with pk.use_backend("reference"):
        eager = saved_bytes(model, x)
    hidden = 8 * 2 * (6 * 14 * 14 * 1280 + 2 * 7 * 7 * 2048)
    assert hidden < ours < 0.5 * eager, (hidden, ours, eager)


def test_a_captured_training_step(backend) -> None:
    """One legal capture of the launches of a step; a call replays it as one graph, and does nothing else."""
    model, x = s12().train(), images()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, capturable=True)
    labels, random = torch.zeros(len(x), dtype=torch.long, device="cuda"), torch.cuda.get_rng_state()
    with recorded() as launches, torch.autocast("cuda", torch.bfloat16):
        step = pk.graphed_step(model, optimizer, F.cross_entropy, x, labels)
    captured = [launch for launch in launches if launch.captured]
    ours, others = count(captured)
    assert ours == TRAINING[backend]
    assert others <= OTHERS[backend] + 4  # AdamW's counts of steps are on the device
    assert len({(launch.device, launch.stream) for launch in captured}) == 1
    assert torch.equal(random, torch.cuda.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    replays = graph_launches()
    with recorded() as launches:
        step(x, labels)
    assert graph_launches() == replays + 1
    replayed = [launch.name for launch in launches if launch.replayed]
    assert replayed == [launch.name for launch in captured]
    assert len(launches) - len(replayed) <= 2  # x and labels, where a copy is a kernel


def test_random_numbers_of_a_captured_step() -> None:
    """The capture draws none of the generator's; a replay draws as many as the step does without a graph."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, capturable=True)
    x, labels = torch.empty(4, 8, device="cuda"), torch.zeros(4, dtype=torch.long, device="cuda")
    before = torch.cuda.get_rng_state()
    step = pk.graphed_step(model, optimizer, F.cross_entropy, x, labels)
    # torch's own, in any capture with random numbers: it fills the place of their seed at once
    assert all("work in the legacy stream" in text for text in take_complaints())
    assert torch.equal(before, torch.cuda.get_rng_state())
    step(x, labels)
    after = torch.cuda.get_rng_state()
    torch.cuda.set_rng_state(before)
    train(model, optimizer, x)
    assert not torch.equal(before, after)
    assert torch.equal(after, torch.cuda.get_rng_state())


def test_a_model_on_another_device(backend) -> None:
    """Nothing of an inference is on the current device, or on another stream than the one asked for."""
    model, x = s12("cuda:1").bfloat16().eval(), images("cuda:1", torch.bfloat16)
    stream = torch.cuda.Stream("cuda:1")
    with torch.inference_mode(), torch.cuda.stream(stream), torch.cuda.device(0), recorded() as launches:
        model(x)
    assert count(launches)[0] == INFERENCE[backend]
    assert {(launch.device, launch.stream) for launch in launches} == {(1, stream.cuda_stream)}
