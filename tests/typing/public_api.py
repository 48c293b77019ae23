"""The public API in use, for type checkers; what runs in a moment on a CPU is run, too.

Each name in the ``__all__`` of the package, of ``nn``, ``models``, ``ops`` and ``dense`` is used here; a test
compares. Results go into variables of the type that a user would write: one of no known type is seen.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import AdamW

import poolformer_kernels as pk
from poolformer_kernels import dense
from poolformer_kernels.explain import Call, Explanation
from poolformer_kernels.gradcam import grad_cam
from poolformer_kernels.graphs import GraphedModel, GraphedStep
from poolformer_kernels.models import CheckpointReport, PoolFormer
from poolformer_kernels.train.data import Data, open_data
from poolformer_kernels.train.loop import train
from poolformer_kernels.train.processes import Processes, start
from poolformer_kernels.train.recipe import Recipe, resolve


def backends() -> dict[str, str]:
    names: list[str] = pk.available_backends()
    chosen: str = pk.get_backend()
    with pk.use_backend("reference"), pk.ops.use_backend(chosen):
        inner: str = pk.ops.get_backend()
    isa: str | None = pk.backends.cpp.ISA
    devices: tuple[str, ...] = pk.backends.cuda.DEVICES + pk.backends.triton.DEVICES
    reasons: dict[str, str] = {**pk.backend_reasons(), **pk.ops.backend_reasons()}
    assert names == pk.ops.available_backends()
    assert inner == chosen
    assert isa is None or isa
    assert devices
    return reasons


def operators(x: Tensor) -> Tensor:
    channels = x.shape[1]
    gamma, beta, scale = torch.ones(channels), torch.zeros(channels), torch.ones(channels)
    shapes = (4 * channels, channels), (4 * channels,), (channels, 4 * channels), (channels,)
    weights = [torch.randn(shape) for shape in shapes]
    y: Tensor = pk.ops.pool_mixer(x, gamma, beta, pool_size=3, layer_scale=scale, residual=True)
    z: Tensor = pk.ops.mlp(
        y, *weights, activation="gelu", norm_weight=gamma, norm_bias=beta, layer_scale=scale, residual=True
    )
    modules: list[str] = [pk.ops.flops.__name__, pk.ops.norm_stats.__name__]
    assert modules == ["poolformer_kernels.ops.flops", "poolformer_kernels.ops.norm_stats"]
    plain: Tensor = pk.reference.pool_mixer(x, gamma, beta, layer_scale=scale, residual=True)
    torch.testing.assert_close(y, plain, rtol=1e-4, atol=1e-5)
    return z


def layers(x: Tensor) -> Tensor:
    dim, size = x.shape[1], (x.shape[2], x.shape[3])
    mixers: list[nn.Module] = [
        pk.nn.Attention(dim, head_dim=dim),
        pk.nn.Pooling(3),
        pk.nn.PoolMixer(dim, dtype=torch.float32),
        pk.nn.RandomMatrix(size),
        pk.nn.SpatialFC(size),
    ]
    others: list[nn.Module] = [
        pk.nn.ChannelLayerNorm(dim),
        pk.nn.DropPath(0.1),
        pk.nn.GroupNorm(dim),
        pk.nn.PositionEmbedding(dim, size),
        pk.nn.StarReLU(),
    ]
    mlp = pk.nn.Mlp(dim, 4 * dim, act_layer=nn.GELU, device="cpu")
    block = pk.nn.PoolFormerBlock(dim, drop_path=0.1, token_mixer=lambda channels: pk.nn.Pooling())
    other = pk.nn.MetaFormerBlock(dim, mlp=False, res_scale_init_value=1.0)
    stage = pk.nn.PoolFormerStage(block, other)
    y: Tensor = stage(mlp(nn.Sequential(*mixers, *others)(x)))
    return y


def models(image: Tensor, folder: Path) -> PoolFormer:
    names: list[str] = pk.list_models("poolformer_*") + pk.models.list_models()
    config: pk.models.ModelConfig = pk.models.model_config(names[0])
    heads: tuple[str, ...] = pk.models.HEADS
    model: PoolFormer = pk.create_model(names[0], num_classes=10, head=heads[0], drop_path_rate=0.1)
    same: PoolFormer = pk.models.PoolFormer(config, num_classes=10)
    second: PoolFormer = pk.models.create_model("poolformerv2_s12", features_only=True)
    third: PoolFormer = pk.create_model("metaformer_s12", token_mixers="convolution")
    assert isinstance(second, pk.models.PoolFormerV2)
    assert isinstance(third, pk.models.MetaFormer)
    assert isinstance(third.config, pk.models.MetaFormerConfig)
    info: pk.models.FeatureInfo = second.feature_info
    assert info.channels() == [64, 128, 320, 512]
    torch.save(model.state_dict(), folder / "model.pth")
    report: CheckpointReport = pk.load_checkpoint(same, folder / "model.pth")
    again: pk.models.CheckpointReport = pk.models.load_checkpoint(same, folder / "model.pth")
    assert report == again
    theirs: dict[str, Tensor] = pk.export_state_dict(model.state_dict(), "timm")
    ours: dict[str, Tensor] = pk.convert_state_dict(theirs)
    assert pk.models.convert_state_dict(theirs).keys() == ours.keys()
    assert pk.models.export_state_dict(ours, "timm").keys() == theirs.keys()
    logits: Tensor = model.eval()(image)
    assert torch.equal(logits, same.eval()(image))
    return model


def accelerated(model: PoolFormer) -> Explanation:
    faster: PoolFormer = pk.accelerate(model, mixer=True, mlp=True, inplace=False, strict=False)
    plain: PoolFormer = pk.restore(faster)
    explanation: Explanation = pk.explain(plain)
    calls: tuple[Call, ...] = explanation.calls
    places: list[str] = [f"{call.path}: {call.operator} on {call.backend}, {call.reason}" for call in calls]
    summary: str = explanation.summary
    assert len(places) == len(calls)
    assert summary in str(explanation)
    return explanation


def graphs(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[object, Tensor]:
    """Of a GPU: checked, not run."""
    fast: GraphedModel = pk.graphed(model.eval(), images)
    logits: object = fast(images)
    optimizer = AdamW(model.parameters(), capturable=True)
    loss: Callable[[object, Tensor], Tensor] = lambda found, wanted: (found, wanted)[1].sum()  # noqa: E731
    step: GraphedStep = pk.graphed_step(model.train(), optimizer, loss, images, labels)
    value: Tensor = step(images, labels)
    return logits, value


def detection(file: Path) -> tuple[dense.RetinaNet | dense.MaskRCNN, Tensor]:
    """Of large models: checked, not run."""
    detector: dense.RetinaNet | dense.MaskRCNN = dense.create_detector(
        dense.list_detectors()[0], num_classes=3
    )
    segmenter: dense.SemanticFPN = dense.create_segmenter(dense.list_segmenters()[0], num_classes=3)
    labels: Tensor = dense.segment(segmenter.eval(), torch.zeros(3, 64, 64))
    loss: Tensor = dense.segmentation_loss(segmenter(torch.zeros(1, 3, 64, 64)), labels[None])
    found, report, classes = dense.model_of_checkpoint(file)
    known: CheckpointReport = report
    names: tuple[str, ...] | None = classes
    assert known.source
    assert names is None or isinstance(found, nn.Module)
    return detector, loss


def training(run: Path) -> int:
    """A whole run: checked, not run."""
    data: Data = open_data("sample:digits")
    recipe: Recipe = resolve("small", {"epochs": 1})
    processes: Processes = start("cpu", timeout_s=600)
    code: int = train(recipe, data, run, processes, show=False)
    processes.end()
    return code


def looked_at(model: PoolFormer, image: Tensor) -> Tensor:
    heat: Tensor = grad_cam(model, image)
    return heat


if __name__ == "__main__":
    import tempfile

    x = torch.randn(2, 8, 6, 7)
    print(backends())
    print(operators(x).shape, layers(x).shape)
    with tempfile.TemporaryDirectory() as name:
        print(accelerated(models(torch.randn(1, 3, 64, 64), Path(name))).summary)
