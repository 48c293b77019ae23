"""graphed on a GPU: replays against eager calls of the same model on the same backend, bit by bit."""

import pytest
import torch
from support.layouts import as_layout
from support.peers import randomise

import poolformer_kernels as pk

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(name="poolformer_s12", dtype=torch.bfloat16, device="cuda", **options):
    torch.manual_seed(0)
    model = randomise(pk.create_model(name, **options)).eval()
    return model.to(device, dtype, memory_format=torch.channels_last)


def images(batch, dtype=torch.bfloat16, size=64, seed=0, device="cuda"):
    generator = torch.Generator().manual_seed(seed)
    x = -0.3 + torch.randn(batch, 3, size, size, generator=generator)
    return x.to(device, dtype).contiguous(memory_format=torch.channels_last)


def eager(model, x):
    with torch.inference_mode():
        return model(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 8])
def test_replay_with_changed_input_equals_eager(batch, dtype):
    model = make(dtype=dtype)
    g = pk.graphed(model, images(batch, dtype))
    results = []
    for seed in (1, 2, 1):
        x = images(batch, dtype, seed=seed)
        y = g(x)
        assert torch.equal(y, eager(model, x))
        results.append(y.clone())
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])


def test_at_full_size():
    model = make()
    g = pk.graphed(model, images(8, size=224))
    x = images(8, size=224, seed=1)
    assert torch.equal(g(x), eager(model, x))


def test_the_result_is_the_same_memory_in_every_call():
    model = make()
    g = pk.graphed(model, images(2))
    first = g(images(2, seed=1))
    kept = first.clone()
    second = g(images(2, seed=2))
    assert second.data_ptr() == first.data_ptr()
    assert torch.equal(first, second)
    assert not torch.equal(kept, second)


def test_features():
    model = make(features_only=True)
    g = pk.graphed(model, images(2))
    for seed in (1, 2):
        x = images(2, seed=seed)
        maps = g(x)
        expected = eager(model, x)
        assert len(maps) == 4
        assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))


@pytest.mark.parametrize("layout", ["nchw", "sliced_hw", "transposed"])
def test_other_strides_are_copied(layout):
    model = make()
    g = pk.graphed(model, images(2))
    x = images(2, seed=1)
    assert torch.equal(g(as_layout(x, layout)), eager(model, x))


def test_parameters_updated_in_place_are_seen():
    model = make()
    g = pk.graphed(model, images(2))
    x = images(2, seed=1)
    before = g(x).clone()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.25)
    after = g(x)
    assert torch.equal(after, eager(model, x))
    assert not torch.equal(before, after)


def test_the_graph_keeps_the_weights_alive():
    model = make()
    g = pk.graphed(model, images(2))
    x = images(2, seed=1)
    expected = eager(model, x)
    del model
    torch.cuda.empty_cache()
    torch.full((2**26,), torch.nan, device="cuda")  # what was freed would be NaN
    assert torch.equal(g(x), expected)


def test_autocast_is_captured():
    model = make(dtype=torch.float32)
    x = images(2, torch.float32, seed=1)
    with torch.autocast("cuda", torch.bfloat16):
        g = pk.graphed(model, images(2, torch.float32))
        expected = eager(model, x)
    torch.full((2**26,), torch.nan, device="cuda")
    assert torch.equal(g(x), expected)


def test_on_another_stream():
    model = make()
    g = pk.graphed(model, images(2))
    x = images(2, seed=1)
    expected = eager(model, x)
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # a replay on another stream would read zeros
        late.copy_(x)
        got = g(late)
    stream.synchronize()
    assert torch.equal(got, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_device_that_is_not_current():
    pk.graphed(make(), images(1))  # torch's own capture stream now belongs to cuda:0
    model = make(device="cuda:1")
    g = pk.graphed(model, images(2, device="cuda:1"))
    x = images(2, seed=1, device="cuda:1")
    assert torch.equal(g(x), eager(model, x))
    assert torch.cuda.current_device() == 0
    with pytest.raises(ValueError, match="captured device cuda:1, got cuda:0"):
        g(x.to("cuda:0"))


@pytest.mark.host
def test_refusals():
    model = make()
    g = pk.graphed(model, images(2))
    with pytest.raises(ValueError, match=r"captured shape \[2, 3, 64, 64\], got \[3, 3, 64, 64\]"):
        g(images(3))
    with pytest.raises(TypeError, match=r"captured dtype torch.bfloat16, got torch.float32"):
        g(images(2).float())
    with pytest.raises(ValueError, match="captured device cuda:0, got cpu"):
        g(images(2).cpu())
    with pytest.raises(ValueError, match="example must be a CUDA tensor, got one on cpu"):
        pk.graphed(model, images(2).cpu())
    with pytest.raises(ValueError, match=r"example's device cuda:0, but patch_embed.proj.weight is on cpu"):
        pk.graphed(model.cpu(), images(2))
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        pk.graphed(model.train(), images(2))
