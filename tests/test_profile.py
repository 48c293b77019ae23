"""The profile: counts against arithmetic and the published tables, times, the command, what it leaves."""

import json
import sys
import threading

import pytest
import torch
from support.commands import printed, refused
from support.models import PUBLISHED, SMALL, on_meta, unchanged
from support.peers import randomise, require
from torch import nn

import poolformer_kernels as pk
from poolformer_kernels import profiling
from poolformer_kernels.models import PoolFormer
from poolformer_kernels.profiling import limits as limits_module
from poolformer_kernels.profiling import paper_figures, profile
from poolformer_kernels.profiling.layers import layers
from poolformer_kernels.profiling.macs import eager_cost
from poolformer_kernels.profiling.throughput import Sample

S12_TORCH = 1_812_267_008  # convolutions and the classifier: fvcore's count less its norms
COUNTS = ("params", "macs_fvcore", "macs_flop_counter", "bytes_eager", "bytes_fused")


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    monkeypatch.setitem(limits_module._LARGEST_SIDE, "cpu", 256)


@pytest.fixture(scope="module")
def s12():
    return profile(on_meta(), measure=False)


def tiny(**options):
    """Like the released models, but timed in no time."""
    torch.manual_seed(0)
    return randomise(PoolFormer(SMALL, num_classes=9, **options))


def row(result, name):
    return next(r for r in result.layers if r.name == name)


# ---- counts ------------------------------------------------------------------------------------------------


def test_layers_sum_to_stages_and_to_the_model(s12):
    kinds = ["stem", *["mixer", "mlp"] * 2, "downsample", *["mixer", "mlp"] * 2, "downsample"]
    kinds += [*["mixer", "mlp"] * 6, "downsample", *["mixer", "mlp"] * 2, "norm", "pooling", "classifier"]
    assert [r.kind for r in s12.layers] == kinds
    stages = [(1, 3, 224, 224), (1, 64, 56, 56), (1, 128, 28, 28), (1, 320, 14, 14)]
    assert [r.input_shape for r in s12.stages] == stages
    head = [r for r in s12.layers if r.stage is None]
    for count in COUNTS:
        assert sum(getattr(r, count) for r in s12.layers) == getattr(s12.total, count)
        assert sum(getattr(r, count) for r in (*s12.stages, *head)) == getattr(s12.total, count)
    assert (s12.total.params, s12.total.macs_fvcore) == PUBLISHED["poolformer_s12"]
    assert s12.total.macs_flop_counter == S12_TORCH
    assert s12.limits is s12.backend is s12.total.time is s12.total.limit_s is s12.total.fraction is None


def test_macs_and_parameters_of_each_kind_of_layer(s12):
    pixels, c = 56 * 56, 64
    expected = {  # parameters, MACs of fvcore and of FlopCounterMode
        "patch_embed": (64 * 3 * 49 + 64, 64 * 3 * 49 * pixels, 64 * 3 * 49 * pixels),
        "network.0.1.mixer": (3 * c, 5 * c * pixels, 0),
        "network.0.1.mlp": (8 * c * c + 4 * c + c + 3 * c, (8 * c * c + 5 * c) * pixels, 8 * c * c * pixels),
        "network.1": (128 * 64 * 9 + 128, 128 * 64 * 9 * 28 * 28, 128 * 64 * 9 * 28 * 28),
        "norm": (2 * 512, 5 * 512 * 49, 0),
        "pooling": (0, 0, 0),
        "head": (513_000, 512_000, 512_000),
    }
    for name, figures in expected.items():
        r = row(s12, name)
        assert (r.params, r.macs_fvcore, r.macs_flop_counter) == figures, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_in_elements_of_the_residual_stream(dtype):
    """Eager: 13 E and 26 E, and the parameters; fused: 2 E (docs/algebra.md, "Traffic")."""
    batch, c, pixels = 3, 64, 56 * 56
    result = profile(on_meta(), batch=batch, dtype=dtype, measure=False)
    size, e, statistics = dtype.itemsize, batch * c * pixels, 2 * batch
    mixer, mlp = row(result, "network.0.0.mixer"), row(result, "network.0.0.mlp")
    assert mixer.bytes_eager == size * (13 * e + 3 * c + statistics)
    assert mlp.bytes_eager == size * (26 * e + mlp.params + statistics)
    assert mixer.bytes_fused == size * (2 * e + 3 * c)
    assert mlp.bytes_fused == size * (2 * e + mlp.params)
    stem, norm, pooling, head = (row(result, name) for name in ("patch_embed", "norm", "pooling", "head"))
    assert stem.bytes_eager == stem.bytes_fused == size * (batch * 3 * 224 * 224 + e + stem.params)
    last = batch * 512 * 49
    assert norm.bytes_eager == size * (3 * last + 2 * 512 + statistics)
    assert norm.bytes_fused == size * (2 * last + 2 * 512)
    assert pooling.bytes_eager == pooling.bytes_fused == size * (last + batch * 512)
    assert head.bytes_eager == head.bytes_fused == size * (batch * 1512 + 513_000)


def test_operators_are_counted_and_views_are_not():
    x = torch.empty(2, 3, 4, 5, device="meta")
    cost, y = eager_cost(lambda x: x.transpose(2, 3).flatten(0, 1)[1:].mul(2).unsqueeze(0), x)
    assert y.shape == (1, 5, 5, 4)
    assert cost.moved == 4 * 2 * 5 * 20  # the product reads five of six images and writes as many
    assert (cost.macs_fvcore, cost.macs_flop_counter) == (0, 0)
    cost, _ = eager_cost(lambda x: x.add_(x), x)
    assert cost.moved == 4 * 3 * 120


def test_size_and_batch_and_both_heads_and_features():
    model = on_meta(num_classes=7, in_chans=5, head="timm")
    assert model.head_mode == "timm"
    result = profile(model, (65, 96), batch=2, measure=False)
    assert result.input_shape == (2, 5, 65, 96)
    assert [r.name for r in result.layers[-3:]] == ["pooling", "norm", "head"]
    assert row(result, "norm").macs_fvcore == 5 * 2 * 512
    macs = profiling.count_macs(model, (2, 5, 65, 96))
    assert result.total.macs_fvcore == macs.total()
    assert result.total.macs_flop_counter == macs["convolution"] + macs["linear"]
    features = on_meta(features_only=True)
    result = profile(features, 64, measure=False)
    assert [r.name for r in result.layers if r.stage is None] == ["norm0", "norm2", "norm4", "norm6"]
    assert row(result, "norm2").input_shape == (1, 128, 8, 8)
    assert result.total.macs_fvcore == profiling.count_macs(features, (1, 3, 64, 64)).total()
    assert result.total.params == sum(p.numel() for p in features.parameters())
    bare = profile(on_meta(num_classes=0), 64, measure=False)
    assert [r.kind for r in bare.layers[-2:]] == ["norm", "pooling"]


# ---- the paper's tables ------------------------------------------------------------------------------------

TABLES = {  # blocks, dims, parameters (M), MACs (G)
    "poolformer_s12": ((2, 2, 6, 2), (64, 128, 320, 512), "11.9", "1.8"),
    "poolformer_s24": ((4, 4, 12, 4), (64, 128, 320, 512), "21.4", "3.4"),
    "poolformer_s36": ((6, 6, 18, 6), (64, 128, 320, 512), "30.9", "5.0"),
    "poolformer_m36": ((6, 6, 18, 6), (96, 192, 384, 768), "56.2", "8.8"),
    "poolformer_m48": ((8, 8, 24, 8), (96, 192, 384, 768), "73.5", "11.6"),
}


@pytest.fixture(scope="module")
def figures():
    return paper_figures()


def test_the_papers_tables_are_counted_exactly(figures):
    assert list(figures) == list(TABLES)
    for name, (blocks, dims, params, macs) in TABLES.items():
        counted, stages = figures[name], figures[name]["stages"]
        assert (counted["params"], counted["macs"]) == PUBLISHED[name]
        assert (f"{counted['params'] / 1e6:.1f}", f"{counted['macs'] / 1e9:.1f}") == (params, macs)
        assert tuple(stage["blocks"] for stage in stages) == blocks
        assert tuple(stage["dim"] for stage in stages) == dims
        assert [stage["stride"] for stage in stages] == [4, 8, 16, 32]
        assert [(stage["patch_size"], stage["patch_stride"]) for stage in stages] == [(7, 4), *[(3, 2)] * 3]
        assert {(stage["pool_size"], stage["mlp_ratio"]) for stage in stages} == {(3, 4)}


def test_paper_command(figures, capsys, monkeypatch, tmp_path):
    require("rich")
    monkeypatch.setattr("poolformer_kernels.cli.profile.paper_figures", lambda: figures)
    path = tmp_path / "paper.json"
    text = printed(capsys, "profile --paper --json", path)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for expected in (
        "stage tokens layer specification S12 S24 S36 M36 M48",
        "1 H/4 x W/4 patch embedding patch size, stride 7x7, 4 7x7, 4 7x7, 4 7x7, 4 7x7, 4",
        "3 H/16 x W/16 patch embedding patch size, stride 3x3, 2 3x3, 2 3x3, 2 3x3, 2 3x3, 2",
        "embedding dim 320 320 320 384 384",
        "PoolFormer block pool size, stride 3x3, 1 3x3, 1 3x3, 1 3x3, 1 3x3, 1",
        "MLP ratio 4 4 4 4 4",
        "blocks 6 12 18 18 24",
        "parameters (M) 11.9 21.4 30.9 56.2 73.5",
        "MACs (G) 1.8 3.4 5.0 8.8 11.6",
        "S12 224 12 1.8 11,915,176 1,822,678,528",
        "M48 224 73 11.6 73,473,448 11,590,708,992",
    ):
        assert expected in lines
    assert json.loads(path.read_text()) == {"schema": 1, "paper": figures}


# ---- times -------------------------------------------------------------------------------------------------


def test_the_timed_layers_are_the_models(backend):
    """What is timed, chained, computes what the model does; so does what is counted."""
    for head in ("official", "timm"):
        model = tiny(head=head).eval()
        x = torch.randn(2, 3, 48, 64).contiguous(memory_format=torch.channels_last)
        ours, eager, stats = x, x, None
        with torch.inference_mode():
            for layer in layers(model):
                ours, stats = layer.ours(ours, stats)
                assert (stats is not None) <= (layer.kind in ("mixer", "mlp"))
                eager = layer.eager(eager)
            expected = model(x)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(eager, expected, rtol=1e-4, atol=1e-4)


def test_statistics_are_handed_on_while_timed(kernels):
    model = tiny().eval()
    x, stats, handed = torch.randn(1, 3, 32, 32), None, []
    with torch.inference_mode():
        for layer in layers(model):
            y, left = layer.ours(x, stats)
            if stats is not None:  # they are used: wrong ones show
                wrong = stats * torch.tensor([1.0, 1.0, 4.0])
                assert not torch.allclose(layer.ours(x, wrong)[0], y, rtol=1e-3)
            x, stats = y, left
            handed.append(stats is not None)
    stages = [[False, *[True] * (2 * blocks - 1), False] for blocks in (1, 2, 1, 1)]
    assert handed == [*(given for stage in stages for given in stage), False, False, False]


def test_times_limits_and_fractions():
    model = tiny()
    result = profile(model, 32, dtype=torch.bfloat16, rounds=1)
    limits = result.limits
    assert 1e8 < limits.copy < 1e14
    assert 1e8 < limits.matmul < 1e16
    for r in (*result.layers, *result.stages, result.total):
        assert r.time.rounds == 1
        assert r.fraction == r.limit_s / r.time.median
    for r in result.layers:
        assert r.limit_s == max(r.bytes_fused / limits.copy, 2 * r.macs_flop_counter / r.rate)
        assert 0 < r.rate <= limits.matmul  # that of the moment, and the best
    total = result.total
    at_once = [max(r.bytes_fused / limits.copy, 2 * r.macs_flop_counter / total.rate) for r in result.layers]
    assert total.limit_s == pytest.approx(sum(at_once))
    assert (result.dtype, result.device) == (torch.bfloat16, "cpu")
    counted = profile(model, 32, dtype=torch.bfloat16, measure=False)
    assert [getattr(counted.total, c) for c in COUNTS] == [getattr(result.total, c) for c in COUNTS]
    assert json.loads(json.dumps(result.to_dict()))["total"]["fraction"] == result.total.fraction


def test_the_products_rate_is_that_of_the_faster_dtype(monkeypatch):
    """float16 of most CPUs is emulated by PyTorch; ours compute it in float32."""
    seconds = {torch.float16: 1.0, torch.bfloat16: 1e-3, torch.float32: 2e-3}
    monkeypatch.setattr(limits_module, "_seconds", lambda call, _: seconds[call.args[0].dtype])
    for dtype, chosen in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        probes = limits_module.LimitProbes("cpu", dtype)
        assert probes.calls["matmul"].args[0].dtype == chosen
        limits = probes.limits({"copy": [Sample(2.0)], "matmul": [Sample(4.0)]})
        flops = 2 * 256**3 * torch.get_num_threads()  # each thread has a product
        assert (limits.copy, limits.matmul) == (2**21, flops / 4)  # 2 MiB read, 2 MiB written in 2 s
        assert limits.seconds(2**22, 2**22) == 2.0
        assert limits.seconds(2, flops // 2) == 2.0


@pytest.mark.parametrize("faster", [torch.mm, torch.nn.functional.conv2d])
def test_the_products_rate_is_that_of_the_faster_library(faster, monkeypatch):
    monkeypatch.setattr(limits_module, "_seconds", lambda call, _: 1.0 if call.func is faster else 2.0)
    probes = limits_module.LimitProbes("cpu", torch.float32)
    product = probes.calls["matmul"]
    assert product.func is faster
    flops = 2 * product.args[1].numel() * product().numel() // 256
    assert flops == probes.flops == 2 * 256**3 * torch.get_num_threads()


def test_both_libraries_compute_the_same_product(monkeypatch):
    monkeypatch.setattr(limits_module, "_seconds", lambda call, _: 1.0)
    product = limits_module.LimitProbes("cpu", torch.float32).calls["matmul"]
    tokens = limits_module._as_convolution(product)().permute(0, 2, 3, 1).reshape(product.args[0].shape)
    torch.testing.assert_close(tokens, product.args[0] @ product.args[1].T, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("tensor_bytes", "copied"), [(0, 2**21), (2**20, 2**21), (3 * 2**20, 3 * 2**20)])
def test_the_copy_is_as_large_as_the_tensor(tensor_bytes, copied, monkeypatch):
    monkeypatch.setattr(limits_module, "_seconds", lambda call, _: 1.0)
    for dtype in (torch.float32, torch.bfloat16):
        probes = limits_module.LimitProbes("cpu", dtype, tensor_bytes)
        assert probes.copied == 2 * copied
        assert probes.calls["copy"]().nbytes == copied


def test_the_profiles_copy_is_as_large_as_the_stems_result(monkeypatch):
    made = []

    class Probes(limits_module.LimitProbes):
        def __init__(self, *args):
            made.append(args)
            super().__init__(*args)

    # the package has a function of the module's name
    monkeypatch.setattr(sys.modules["poolformer_kernels.profiling.profile"], "LimitProbes", Probes)
    model = tiny()
    profile(model, 32, batch=2, dtype=torch.bfloat16, rounds=1)
    assert made == [(torch.device("cpu"), torch.bfloat16, 2 * 2 * model.config.dims[0] * 8 * 8)]


def test_unfused_blocks_run_module_by_module():
    model = tiny().eval()
    model.network[2][0].mlp.act = nn.Hardswish()
    x = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        expected = model(x)
        for layer in layers(model):
            x = layer.ours(x, None)[0]
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)
    macs = profiling.count_macs(model, (1, 3, 32, 32))
    counted = profile(model, 32, measure=False).total.macs_flop_counter
    assert counted == macs["convolution"] + macs["linear"]


# ---- what it leaves alone, and what it refuses -------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(monkeypatch, fails):
    model = tiny(drop_path_rate=0.1).train()
    model.network[0][0].eval()
    lock, called = threading.Lock(), []  # a hook that cannot be copied, and must not run

    def hook(*_):
        with lock:
            called.append(1)

    for module in (model, model.network[0][0].token_mixer, model.network[2][0].mlp.fc1):
        module.register_forward_hook(hook)
    model.network[4].register_forward_pre_hook(hook)
    with unchanged(model):
        if fails:
            monkeypatch.setattr(pk.nn.PoolFormerStage, "forward", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                profile(model, 32, dtype=torch.bfloat16, rounds=1)
        else:
            result = profile(model, 32, dtype=torch.bfloat16, rounds=1)
            assert result.total.time.median > 0
    assert called == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": nn.Linear(2, 2)}, TypeError, "model must be a poolformer_kernels.models.PoolFormer, got"),
        ({"model": on_meta("metaformer_id_s12")}, TypeError, "got MetaFormer; count_macs"),
        ({"model": pk.nn.PoolFormerBlock(4)}, TypeError, "model must be .*, got PoolFormerBlock"),
        ({"size": "224"}, TypeError, "size must be an int or a tuple of two ints, got '224'"),
        ({"size": (64, 2)}, ValueError, "size must be at least 3 pixels"),
        ({"batch": 0}, ValueError, "batch must be positive, got 0"),
        ({"batch": 1.0}, TypeError, "batch must be an int, got float"),
        ({"rounds": 0}, ValueError, "rounds must be positive, got 0"),
        ({"dtype": torch.int8}, TypeError, "dtype must be a floating torch.dtype or None, got torch.int8"),
        ({"memory_format": torch.preserve_format}, ValueError, "memory_format must be torch.channels_last o"),
        ({"measure": 1}, TypeError, "measure must be a bool, got int"),
        ({"device": "tpu"}, ValueError, "device must be a CPU or CUDA device, got 'tpu'"),
        ({"device": "xpu"}, ValueError, "device must be a CPU or CUDA device, got 'xpu'"),
        ({"measure": True}, ValueError, "model is on the meta device and has no weights to time"),
    ],
)
def test_refusals(arguments, error, message):
    with pytest.raises(error, match=message):
        profile(**({"model": on_meta(), "measure": False} | arguments))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a CUDA device")
def test_cuda_where_there_is_none():
    message = "device is 'cuda', but torch sees no CUDA device; allowed here: cpu"
    with pytest.raises(ValueError, match=message):
        profile(on_meta(), device="cuda", measure=False)


# ---- the command -------------------------------------------------------------------------------------------


def test_command_counts(capsys, tmp_path):
    require("rich")
    path = tmp_path / "profile.json"
    command = "profile --no-time --model poolformer_m36 --batch-size 256 --image-size 1024 --dtype bfloat16"
    text = printed(capsys, f"{command} --json", path)
    assert max(map(len, text.splitlines())) <= 120
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "poolformer_m36, 256x3x1024x1024, bfloat16" in lines
    assert "56,172,520 parameters" in lines
    e = 256 * 96 * 256 * 256
    eager = f"{2 * (13 * e + 3 * 96 + 512) / 1e6:,.0f}"
    fused = f"{2 * (2 * e + 3 * 96) / 1e6:,.2f}"
    assert f"network.0.0.mixer 96x256x256 288 {5 * e / 1e6:,.2f} 0.00 {eager} {fused}" in lines
    saved = json.loads(path.read_text())["profile"]
    assert saved["total"]["params"] == 56_172_520
    assert saved["limits"] is None
    assert len(saved["layers"]) == 2 * 36 + 4 + 3


def test_command_times(capsys, monkeypatch):
    require("rich")
    from poolformer_kernels.cli import profile as profile_command

    monkeypatch.setattr(profile_command, "create_model", lambda name: tiny())
    monkeypatch.setattr(profile_command, "profile", lambda *a, **k: profile(*a, **k, rounds=1))
    text = printed(capsys, "profile --image-size 32 --device cpu --dtype bfloat16")
    assert max(map(len, text.splitlines())) <= 120
    head = next(line for line in text.splitlines() if line.split()[:1] == ["head"])
    assert head.rstrip().endswith("%")
    assert "GB/s, products" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has a CUDA device")
def test_command_without_a_gpu(capsys):
    require("rich")
    with pk.use_backend("triton"):
        error = refused(capsys, "profile --device cpu")
    assert error.startswith("backend 'triton' was asked for and cannot run this call: ")
