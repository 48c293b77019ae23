"""MACs against the published figures (fvcore's count at 224 x 224)."""

import pytest
from support.models import PUBLISHED, on_meta, unchanged
from torch import nn

import poolformer_kernels as pk
from poolformer_kernels.profiling import count_macs


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures(name: str) -> None:
    assert count_macs(on_meta(name), (1, 3, 224, 224)).total() == PUBLISHED[name][1]


def test_the_figure_does_not_depend_on_the_backend_or_on_training(backend: str) -> None:
    macs = count_macs(on_meta().train(), (1, 3, 224, 224))
    assert macs.total() == PUBLISHED["poolformer_s12"][1]


def test_kinds_and_batch() -> None:
    model = on_meta(num_classes=10)
    one, three = count_macs(model, (1, 3, 64, 64)), count_macs(model, (3, 3, 64, 64))
    assert one["linear"] == 512 * 10  # fc1 and fc2 are convolutions
    # two norms a block and the head's, 5 an element, on 16 x 16 to 2 x 2 tokens
    elements = 2 * (2 * 64 * 256 + 2 * 128 * 64 + 6 * 320 * 16 + 2 * 512 * 4) + 512 * 4
    assert one["group_norm"] == 5 * elements
    assert three == {kind: 3 * macs for kind, macs in one.items()}


def test_timm_head_normalises_the_mean() -> None:
    official, timm = (on_meta(head=head) for head in ("official", "timm"))
    difference = count_macs(official, (1, 3, 224, 224)) - count_macs(timm, (1, 3, 224, 224))
    assert difference == {"group_norm": 5 * 512 * 49}
    assert count_macs(timm, (1, 3, 224, 224))["layer_norm"] == 5 * 512


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        (nn.Conv2d(6, 8, 3, stride=2, groups=2), (2, 6, 9, 7), {"convolution": 2 * 8 * 3 * 9 * 4 * 3}),
        (nn.ConvTranspose2d(6, 8, 3, stride=2), (2, 6, 4, 5), {"convolution": 2 * 6 * 8 * 9 * 4 * 5}),
        (nn.Linear(5, 7, bias=False), (2, 3, 5), {"linear": 2 * 3 * 5 * 7}),
        (nn.Linear(5, 7), (2, 3, 5), {"linear": 2 * 3 * 5 * 7}),
        (nn.GroupNorm(2, 6, affine=False), (2, 6, 3, 3), {"group_norm": 4 * 2 * 6 * 9}),
        (nn.Sequential(nn.GELU(), nn.AvgPool2d(3)), (2, 6, 9, 9), {}),
        (pk.nn.Mlp(6, 8, 5), (2, 6, 9, 7), {"convolution": 2 * 63 * 8 * (6 + 5)}),
        (pk.nn.Mlp(6, 8, 5, use_conv=False), (2, 3, 6), {"linear": 6 * 8 * (6 + 5)}),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else None,
)
def test_convention(module: nn.Module, shape: tuple[int, ...], expected: dict[str, int]) -> None:
    assert count_macs(module, shape) == expected


def test_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(0.5)))
    model[1].eval()
    with unchanged(model):
        count_macs(model, (2, 3, 4, 4))


def test_leaves_hooks_and_fusion_as_they_were() -> None:
    mlp = pk.nn.Mlp(6)
    count_macs(mlp, (1, 6, 2, 2))
    assert mlp.unfused_reason() is None
