"""Small models of every origin that `accelerate` knows, and what its tests compare."""

import copy
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from poolformer_kernels.accelerate import accelerate
from poolformer_kernels.accelerate.layouts import layout_of
from support import peers

DIMS, DEPTHS = (16, 24, 32, 40), (2, 1, 1, 1)
CALLS = ["pool_mixer", "mlp"] * sum(DEPTHS)  # of the operators in a call of a model
ALL = f"{len(CALLS)} of {len(CALLS)} on cpp"  # what explain says then
DIFFERENT = "computes something else than its modules' names say"  # a reason that is given for a forward
SOURCES = ("timm", "timm v2", "transformers", "official", "mmpretrain")


class DropPath(nn.Module):
    """Stochastic depth as mmcv and the first releases of timm draw it."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        mask = torch.rand((x.shape[0], 1, 1, 1), dtype=x.dtype, device=x.device) + keep
        return x.div(keep) * mask.floor()


class Pooling(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(
            **({"kernel_size": 3, "stride": 1, "padding": 1, "count_include_pad": False} | options)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x) - x


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, act: type[nn.Module], drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.act = act()
        self.fc2 = nn.Conv2d(hidden, dim, 1)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class BlockParts(nn.Module):
    """What the blocks of the official code and of mmpretrain have in common."""

    def __init__(
        self, dim=16, *, act=nn.GELU, norm=lambda dim: nn.GroupNorm(1, dim), drop=0.0, drop_path=0.0,
        use_layer_scale=True, **pool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1 = norm(dim)
        self.token_mixer = Pooling(**pool)
        self.norm2 = norm(dim)
        self.mlp = Mlp(dim, 4 * dim, act, drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        if use_layer_scale:
            self.layer_scale_1 = nn.Parameter(torch.full((dim,), 1e-5))
            self.layer_scale_2 = nn.Parameter(torch.full((dim,), 1e-5))


class PoolFormerBlock(BlockParts):
    """The block of the official code, by its description."""

    def __init__(self, dim: int = 16, *, use_layer_scale: bool = True, **options) -> None:
        super().__init__(dim, use_layer_scale=use_layer_scale, **options)
        self.use_layer_scale = use_layer_scale

    def forward(self, x: Tensor) -> Tensor:
        s1 = s2 = 1.0
        if self.use_layer_scale:
            s1, s2 = (s[:, None, None] for s in (self.layer_scale_1, self.layer_scale_2))
        x = x + self.drop_path(s1 * self.token_mixer(self.norm1(x)))
        return x + self.drop_path(s2 * self.mlp(self.norm2(x)))


class MmpretrainBlock(BlockParts):
    """The block of mmpretrain, by its description: it always has LayerScale, and no flag for it."""

    def __init__(self, dim: int = 16, *, drop_path: float = 0.0) -> None:
        super().__init__(dim, drop_path=drop_path)
        self.init_cfg = None

    def forward(self, x: Tensor) -> Tensor:
        scale = self.layer_scale_1.view(-1, 1, 1)
        x = x + self.drop_path(scale * self.token_mixer(self.norm1(x)))
        scale = self.layer_scale_2.view(-1, 1, 1)
        return x + self.drop_path(scale * self.mlp(self.norm2(x)))


class Official(nn.Module):
    """A model of such blocks: stem, stages in sequence, mean, head."""

    def __init__(
        self, num_classes: int = 7, drop_path: float = 0.0, block: type[nn.Module] = PoolFormerBlock
    ) -> None:
        super().__init__()
        layers, channels = [], 3
        for dim, depth in zip(DIMS, DEPTHS, strict=True):
            layers.append(nn.Conv2d(channels, dim, 3, 2, 1))
            layers.append(nn.Sequential(*(block(dim, drop_path=drop_path) for _ in range(depth))))
            channels = dim
        self.network = nn.ModuleList(layers)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.network:
            x = layer(x)
        return self.head(x.mean((2, 3)))


def make_model(source: str, drop_path: float = 0.0, **config) -> nn.Module:
    """A small model with random parameters, in eval mode; ``config`` is for transformers' configuration."""
    torch.manual_seed(0)
    if source in ("official", "mmpretrain"):
        block = PoolFormerBlock if source == "official" else MmpretrainBlock
        model = Official(drop_path=drop_path, block=block)
    elif source == "transformers":
        model = peers.poolformer_of_transformers(7, DEPTHS, DIMS, drop_path_rate=drop_path, **config)
    else:
        version = 1 if source == "timm" else 2
        model = peers.poolformer_of_timm(DEPTHS, DIMS, 7, version, drop_path_rate=drop_path)
    peers.randomise(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 4 and ("fc" in name or "output" in name):
                p.normal_(std=0.2)
            if "res_scale" in name or name.endswith("act.scale"):
                p.add_(0.9)
    return model.eval()


def metaformer(mixers: list[str]) -> nn.Module:
    """A small MetaFormer of timm's with these token mixers, a block each."""
    timm = peers.require("timm", "models.metaformer").models.metaformer
    sizes = {"depths": (1, 1, 1, 1), "dims": (32, 32, 32, 32), "num_classes": 3}
    layers = {"norm_layers": timm.GroupNorm1, "mlp_act": nn.GELU}
    return timm.MetaFormer(token_mixers=[getattr(timm, name) for name in mixers], **sizes, **layers).eval()


def make_block(**options) -> nn.Module:
    """An official block with random parameters, in eval mode."""
    torch.manual_seed(0)
    return peers.randomise(PoolFormerBlock(**options)).eval()


def features() -> Tensor:
    """What a block is called with."""
    return torch.randn((2, 16, 5, 6), generator=torch.Generator().manual_seed(1))


def image(size: tuple[int, int] = (64, 64), seed: int = 0) -> Tensor:
    return torch.randn((2, 3, *size), generator=torch.Generator().manual_seed(seed))


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if layout_of(module) is not None]


def classes_and_attributes(model: nn.Module) -> list[tuple[type, list[str]]]:
    """Of every module."""
    return [(type(module), [*vars(module)]) for module in model.modules()]


def logits(model: Callable, x: Tensor) -> Tensor:
    y = model(x)
    return y if isinstance(y, Tensor) else y.logits


def results(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The logits, dx and the gradient of every parameter, after the same seed."""
    torch.manual_seed(0)
    x = x.detach().requires_grad_()
    y = logits(model, x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(y, [x, *parameters], weights)
    return dict(zip(("logits", "dx", *names), (y.detach(), *grads), strict=True))


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.0) -> None:
    """Everything in `results`, within ``tolerance`` of the largest value of a tensor."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.dtype == expected[name].dtype, name
        allowed = tolerance * max(expected[name].abs().max().item(), 1e-3)
        assert (value - expected[name]).abs().max().item() <= allowed, name


def joined(*found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values of one kind in all blocks and all results together, in float64: errors of a few are luck."""
    kinds: dict[str, list[Tensor]] = {}
    for values in found:
        for name, value in values.items():
            kinds.setdefault(re.sub(r"\d", "", name), []).append(value.double().flatten())
    return {kind: torch.cat(values) for kind, values in kinds.items()}


def assert_right(model: nn.Module, images: list[Tensor], *, autocast: bool = False) -> None:
    """The error rule of the accelerated model's results beside its modules' in the same dtype.

    Rounding errors of two ways to compute a model are independent draws, and of a few numbers either may be
    lucky. So the rule holds in the L2 norm for the gradients of a parameter in all blocks and for all images
    together, and in the maximum for all results together, relative to the root mean square of their kind.
    """
    accelerated = accelerate(model, inplace=False)
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    exact = copy.deepcopy(plain).double()
    found = []
    for x in images:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ours, eager = results(accelerated, x), results(plain, x.contiguous())
        for name, value in ours.items():
            assert value.dtype == eager[name].dtype, name
        found.append((ours, eager, results(exact, x.double().contiguous())))
    ours, eager, exact = (joined(*each) for each in zip(*found, strict=True))
    precision = torch.finfo(torch.bfloat16 if autocast else images[0].dtype).eps / 2
    floor, largest = precision + 4 * torch.finfo(torch.float32).eps, [0.0, 0.0, 0.0]
    for name, right in exact.items():
        peers.assert_as_accurate(ours[name], eager[name], right, floor, name)
        size = right.square().mean().sqrt().item()
        if size > 1e-9:  # the gradient of the mixer's norm bias is zero, and eager's is noise
            errors = ours[name] - right, eager[name] - right, floor * right
            largest = [max(old, e.abs().max().item() / size) for old, e in zip(largest, errors, strict=True)]
    error, other, least = largest
    assert error <= 1.5 * other + least, f"largest error {error:.3e}, eager {other:.3e}, floor {least:.3e}"
