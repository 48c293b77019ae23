"""Accelerated models in PyTorch's compilers and exporters, mixed precision, EMA, transformers' pipeline."""

import copy
import shutil
from operator import itemgetter

import pytest
import torch
from support.accelerate import CALLS, DEPTHS, SOURCES, PoolFormerBlock, blocks_of, logits, make_model
from support.chain import operators_of
from support.peers import assert_as_accurate, randomise, relative_error, require
from support.problems import seeded
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from poolformer_kernels.accelerate import accelerate

PEERS = ("timm", "timm v2", "transformers")
BATCHES = (3, 1, 6)
KERNELS = [f"{name}_cpp" for name in CALLS]
BATCH = ({0: torch.export.Dim("batch", min=1, max=64)},)  # any size, of the only argument
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def batch_of(size: int) -> Tensor:
    return torch.randn((size, 3, 64, 64), generator=torch.Generator().manual_seed(size))


def assert_right(given: Tensor, plain: nn.Module, x: Tensor) -> None:
    """No further from the modules' result in float64 than theirs in float32, by the L2 norm."""
    with torch.no_grad():
        assert_as_accurate(given, logits(plain, x), logits(copy.deepcopy(plain).double(), x.double()))


# ---- torch.compile, torch.export, AOTInductor, ONNX --------------------------------------------------------


CHAINS = {"timm": len(DEPTHS), "transformers": sum(DEPTHS)}  # StarReLU's blocks are of no chain


@pytest.mark.sampled(3)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("source", PEERS)
def test_compile_once_for_every_batch_size(source, training, kernels):
    """Drop paths are drawn as without the compiler."""
    plain = make_model(source, drop_path=0.9).train(training)
    model = accelerate(copy.deepcopy(plain))
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=backend)

    def step(function, x):
        y = seeded(logits, function, x)
        return y, *(torch.autograd.grad(y.square().sum(), [*model.parameters()]) if training else ())

    for size in (3, 2, 6):  # of one sample the compiler makes a case of its own
        x = batch_of(size)
        torch._dynamo.mark_dynamic(x, 0)
        with torch.set_grad_enabled(training):
            expected = step(model, x)
            with torch._dynamo.config.patch(error_on_recompile=True):
                given = step(compiled, x)
            torch.testing.assert_close(given[0], expected[0])
            torch.testing.assert_close(given[1:], expected[1:], rtol=1e-4, atol=1e-5)
            assert training == bool((logits(model, x) - expected[0]).abs().max() > 1e-3)  # other draws
        if not training:
            assert_right(given[0], plain, x)
    assert backend.frame_count == 1
    fused = not training and source in CHAINS
    expected = ["chain_cpp"] * CHAINS[source] if fused else KERNELS
    assert operators_of(backend.graphs[0].graph) == expected


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("source", "strict"), [*((source, False) for source in PEERS), ("timm", True)])
def test_export_save_load_and_run(source, strict, kernels, tmp_path):
    plain = make_model(source)
    program = torch.export.export(
        accelerate(copy.deepcopy(plain)), (batch_of(3),), dynamic_shapes=BATCH, strict=strict
    )
    assert operators_of(program.graph) == KERNELS
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for size in BATCHES:
        assert_right(logits(loaded, batch_of(size)), plain, batch_of(size))


@pytest.mark.long
def test_ahead_of_time_inductor(kernels, tmp_path):
    """The package calls the kernels: the process that loads it must have imported this one."""
    if shutil.which("g++") is None:
        pytest.skip("the code generator needs g++")
    torch.manual_seed(0)
    plain = randomise(nn.Sequential(PoolFormerBlock(), PoolFormerBlock())).eval()
    x = {size: torch.randn(size, 16, 9, 7) for size in BATCHES}
    with torch.no_grad():
        program = torch.export.export(accelerate(copy.deepcopy(plain)), (x[3],), dynamic_shapes=BATCH)
    assert operators_of(program.graph) == ["chain_cpp"]
    file = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "blocks.pt2"))
    loaded = torch._inductor.aoti_load_package(file)
    for given in x.values():
        assert_right(loaded(given), plain, given)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("source", ["timm", "transformers"])
def test_onnx(source, kernels, tmp_path):
    """ONNX has no operators of ours: the export sees the modules."""
    require("onnxscript")
    onnxruntime = require("onnxruntime")
    plain = make_model(source)
    model = accelerate(copy.deepcopy(plain))
    program = torch.onnx.export(model, (batch_of(3),), dynamo=True, dynamic_shapes=BATCH, verbose=False)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for size in BATCHES:
        x = batch_of(size)
        y = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        assert_right(torch.from_numpy(y), plain, x)


# ---- training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
def test_autocast_and_grad_scaler(source, kernels):
    """A step of float16 training: no further from float64's than without us, and none where it overflows."""
    plain = make_model(source).train()
    start, x = nn.utils.parameters_to_vector(plain.parameters()).detach(), batch_of(6)
    steps = []
    for model in (copy.deepcopy(plain), accelerate(copy.deepcopy(plain))):
        optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for factor in (1.0, 1e30):  # which a float16 gradient cannot hold
            optimiser.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = logits(model, x).float().square().mean()
            scaler.scale(loss * factor).backward()
            scaler.step(optimiser)
            scaler.update()
            if factor == 1.0:
                steps.append(nn.utils.parameters_to_vector(model.parameters()).detach() - start)
                assert scaler.get_scale() == 1024.0
        assert scaler.get_scale() == 512.0
        after = nn.utils.parameters_to_vector(model.parameters()).detach() - start
        assert torch.equal(after, steps[-1])
    model = copy.deepcopy(plain).double()
    loss = logits(model, x.double()).square().mean()
    grads = torch.autograd.grad(loss, list(model.parameters()))
    right = -torch.cat([g.flatten() for g in grads])
    eager, ours = steps
    assert_as_accurate(ours, eager, right, torch.finfo(torch.float16).eps / 2)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("source", SOURCES)
def test_checkpoints_change_no_gradient(source, reentrant, kernels):
    """Nor are other drop paths drawn when a block is computed again."""
    blocks = blocks_of(accelerate(make_model(source, drop_path=0.9).train()))[:2]
    parameters = [p for block in blocks for p in block.parameters()]
    x, runs = torch.randn((8, 16, 8, 8), requires_grad=True), []
    for block in blocks:
        block.register_forward_pre_hook(lambda module, _: runs.append(module))

    def gradients(call):
        torch.manual_seed(0)
        y = x
        for block in blocks:
            y = call(block, y)
            y = y if isinstance(y, Tensor) else y[0]
        for t in (x, *parameters):
            t.grad = None
        y.square().sum().backward()  # autograd.grad is not for reentrant checkpoints
        return [y.detach(), *(t.grad for t in (x, *parameters))]

    expected = gradients(lambda block, y: block(y))
    assert len(runs) == 2
    given = gradients(lambda block, y: checkpoint(block, y, use_reentrant=reentrant))
    assert len(runs) == 6
    assert all(map(torch.equal, given, expected))
    assert (gradients(lambda block, y: block.eval()(y))[0] - expected[0]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["AveragedModel", "ModelEmaV3"])
def test_moving_averages(kind, kernels):
    """The average is an accelerated copy; its numbers are those of the same average without us."""
    plain, x = make_model("timm").train(), batch_of(3)
    averages = []
    for model in (plain, accelerate(copy.deepcopy(plain))):
        if kind == "AveragedModel":
            average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
            average.update_parameters(model)
        else:
            average = require("timm").utils.ModelEmaV3(model, decay=0.9)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            optimiser.zero_grad()
            logits(model, x).square().mean().backward()
            optimiser.step()
            (average.update_parameters if kind == "AveragedModel" else average.update)(model)
        averages.append(average.module.eval())
        assert [*map(type, blocks_of(averages[-1]))] == [*map(type, blocks_of(model))]
    assert type(blocks_of(averages[0])[0]) is not type(blocks_of(averages[1])[0])
    assert_right(logits(averages[1], x), averages[0], x)
    assert relative_error(logits(plain.eval(), x), logits(averages[0], x)) > 1e-3


# ---- transformers ------------------------------------------------------------------------------------------


def test_transformers_folder_and_pipeline(kernels, tmp_path):
    transformers = require("transformers", "models.poolformer.modeling_poolformer")
    image_module = require("PIL", "Image").Image
    plain = make_model("transformers")
    plain.config.id2label = {i: f"label {i}" for i in range(7)}
    accelerate(copy.deepcopy(plain)).save_pretrained(tmp_path)
    processor = transformers.PoolFormerImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}
    )
    processor.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    pictures = [
        image_module.fromarray(torch.randint(0, 256, (80, 70, 3), dtype=torch.uint8).numpy())
        for _ in range(3)
    ]
    scores = []
    for model in (plain.double(), accelerate(loaded)):
        classify = transformers.pipeline(
            "image-classification", model=model, image_processor=str(tmp_path), device="cpu", top_k=7
        )
        answers = [sorted(answer, key=itemgetter("label")) for answer in classify(pictures, batch_size=3)]
        scores.append(torch.tensor([[label["score"] for label in answer] for answer in answers]))
    assert scores[1].std() > 1e-3
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-5, atol=1e-6)
