"""The blocks that other packages build a PoolFormer from, and why a sub-block of one is no operator call."""

from dataclasses import dataclass, replace
from numbers import Integral

import torch
from torch import Tensor, nn

from ..nn.checks import hooked
from ..nn.fusion import MIXER, MLP, BlockParts, MlpOperands
from ..nn.layers import fold_star_relu
from ..nn.mlp import activation_name, pointwise_reason
from ..nn.names import class_path, more_than_forward
from ..ops.torch_private import TRACED_PARAMETERS
from ..reference import ACTIVATIONS

__all__ = [
    "ACT",
    "FC1",
    "FC2",
    "LAYOUTS",
    "PLAIN",
    "STAR_RELU",
    "BlockLayout",
    "activation_of",
    "layout_of",
    "layout_with",
]

NORM, DROP_PATH, BODY, POOL = range(4)  # indices into what BlockLayout.parts returns
FC1, ACT, FC2 = range(3, 6)
PLAIN = (Tensor, nn.Parameter)  # subclasses may be quantised, sharded or fake
_SHARDED = "torch.distributed.tensor.DTensor"
STAR_RELU = "star_relu"  # runs as relu_squared, its scale and bias folded into the next layer


@dataclass(frozen=True)
class BlockLayout(BlockParts):
    """The names of the modules of another package's block; of two, the second belongs to the MLP."""

    name: str
    norms: tuple[str, str]
    bodies: tuple[str, str]
    drop_paths: tuple[str, str]
    scales: tuple[str, str]
    layers: tuple[str, str, str]
    noop_modules: tuple[str, ...] = ()  # modules of the MLP that must do nothing
    inner_drop_path: str | None = None  # in the MLP, called after the activation and after the second layer
    residual_scales: tuple[str, str] | None = None  # where there are any, LayerScale is a module, too
    returns_tuple: bool = False
    keeps_hidden: bool | None = None  # ``save_hidden`` of the MLP's operator calls
    widens = True  # in these packages a float32 LayerScale makes a half-precision stream float32

    def matches(self, block: nn.Module) -> bool:
        """Whether a module has these names; scales that are parameters may be absent where a flag says so."""
        names = [*self.norms, *self.bodies, *self.drop_paths]
        if self.residual_scales is not None:
            names += [*self.scales, *self.residual_scales]
        if any(block._modules.get(name) is None for name in names):
            return False
        flagged = self.residual_scales is not None or "use_layer_scale" in vars(block)
        return flagged or all(isinstance(getattr(block, name, None), Tensor) for name in self.scales)

    def parts(self, block: nn.Module, which: int) -> list[nn.Module]:
        """The modules that a sub-block's operator call stands for, in the order of the constants above.

        Raises:
            KeyError: one of them is missing.
        """
        modules = block._modules  # an attribute of a module costs nearly 1 us, and every call asks for this
        body = modules[self.bodies[which]]
        inner = body._modules
        names = ("pool",) if which == MIXER else self.layers + self.noop_modules
        parts = [modules[self.norms[which]], modules[self.drop_paths[which]], body]
        parts += [inner[name] for name in names]
        if which == MLP and self.inner_drop_path is not None:
            parts.append(inner[self.inner_drop_path])
        if self.residual_scales is not None:
            parts += [modules[self.scales[which]], modules[self.residual_scales[which]]]
        return parts

    def paths(self, which: int) -> list[str]:
        """Where the block has what `parts` returns."""
        body = self.bodies[which]
        inner = ["pool"] if which == MIXER else [*self.layers, *self.noop_modules]
        if which == MLP and self.inner_drop_path is not None:
            inner.append(self.inner_drop_path)
        paths = [self.norms[which], self.drop_paths[which], body, *(f"{body}.{name}" for name in inner)]
        if self.residual_scales is not None:
            paths += [self.scales[which], self.residual_scales[which]]
        return paths

    def layer_scale(self, block: nn.Module, which: int) -> Tensor | None:
        """The LayerScale vector ``[C]``."""
        if self.residual_scales is None:
            scaled = vars(block).get("use_layer_scale", True)  # mmpretrain's blocks have no such flag
            return getattr(block, self.scales[which]) if scaled else None
        return _scale(block._modules[self.scales[which]])

    def shortcut(self, block: nn.Module, which: int) -> Tensor | bool:
        if self.residual_scales is None:
            return True
        scale = _scale(block._modules[self.residual_scales[which]])
        return True if scale is None else scale

    def norm(self, block: nn.Module, which: int) -> nn.GroupNorm:
        return block._modules[self.norms[which]]

    def pool_size(self, block: nn.Module) -> int:
        size = block._modules[self.bodies[MIXER]]._modules["pool"].kernel_size
        return int(size if isinstance(size, Integral) else size[0])

    def mlp_operands(self, block: nn.Module, activation: str | None) -> MlpOperands:
        inner = block._modules[self.bodies[MLP]]._modules
        fc1, act, fc2 = (inner[name] for name in self.layers)
        if activation == STAR_RELU:
            w2, b2 = fold_star_relu(act.scale, act.bias, fc2.weight, fc2.bias)
            return MlpOperands(fc1.weight, fc1.bias, w2, b2, "relu_squared")
        return MlpOperands(fc1.weight, fc1.bias, fc2.weight, fc2.bias, activation)

    def folds_star_relu(self, block: nn.Module) -> bool:
        return is_star_relu(block._modules[self.bodies[MLP]]._modules[self.layers[1]])

    def save_hidden(self, block: nn.Module) -> bool | None:
        return self.keeps_hidden

    def drops(self, block: nn.Module) -> bool:
        inner = self._inner_drop_path(block)
        outer = [block._modules[name] for name in self.drop_paths]
        return any(map(drops_paths, outer if inner is None else [*outer, inner]))

    def drop_scale(self, block: nn.Module, which: int, x: Tensor) -> Tensor | None:
        return _drawn(block._modules[self.drop_paths[which]], x)

    def mlp_drop_scale(
        self, block: nn.Module, x: Tensor, b2: Tensor | None, layer_scale: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, tuple[Tensor, Tensor] | None]:
        inner = self._inner_drop_path(block)
        if inner is None or not drops_paths(inner):
            return self.drop_scale(block, MLP, x), b2, None
        # Three draws d of stochastic depth, h the activations, s LayerScale:
        # d3 s (d2 (W2 (d1 h) + b2)) = (d1 d2 d3) s W2 h + (d2 d3) s b2
        d1, d2, d3 = _drawn(inner, x), _drawn(inner, x), self.drop_scale(block, MLP, x)
        d2 = d2 if d3 is None else d2 * d3
        constant = None
        if b2 is not None:
            shift = b2 if layer_scale is None else layer_scale * b2
            constant = d2.view(-1, 1, 1, 1), shift.view(-1, 1, 1)
        return d1 * d2, None, constant

    def run_modules(self, block: nn.Module, which: int, x: Tensor, shortcut: Tensor | bool) -> Tensor:
        modules = block._modules
        y = modules[self.bodies[which]](modules[self.norms[which]](x))
        drop_path = modules[self.drop_paths[which]]
        if self.residual_scales is not None:
            scale, residual = self.scales[which], self.residual_scales[which]
            return modules[residual](x) + modules[scale](drop_path(y))
        scale = self.layer_scale(block, which)
        return x + drop_path(y if scale is None else scale.unsqueeze(-1).unsqueeze(-1) * y)

    def _inner_drop_path(self, block: nn.Module) -> nn.Module | None:
        name = self.inner_drop_path
        return None if name is None else block._modules[self.bodies[MLP]]._modules[name]

    def unsupported_reason(self, block: nn.Module, which: int, activation: str | None = None) -> str | None:
        """Why no operator computes a sub-block, whatever its modules are set to, or None.

        Modules are named by their paths in the block. ``activation`` is the operator's name for the MLP's,
        where it was found earlier.
        """
        try:
            parts = self.parts(block, which)
        except KeyError as missing:
            body = block._modules[self.bodies[which]]
            return f"{self.bodies[which]} is {class_path(body)}, without {missing}"
        reason = self._around_reason(parts, which)
        if reason is not None:
            return reason
        return (
            _pool_reason(f"{self.bodies[MIXER]}.pool", parts[POOL])
            if which == MIXER
            else self._mlp_reason(parts, activation)
        )

    def temporary_reason(self, block: nn.Module, which: int, gathered: bool = False) -> str | None:
        """Why a sub-block that an operator computes must run its modules now, or None.

        ``gathered``: FSDP replaces sharded weights by plain ones for the time of a call.
        """
        parts, body = self.parts(block, which), self.bodies[which]
        if which == MLP:
            for name, module in zip(self.noop_modules, parts[FC2 + 1 :], strict=False):
                if type(module) is nn.Dropout and module.p > 0 and module.training:
                    return f"{body}.{name} is active (p = {module.p})"
            for name, fc in ((self.layers[0], parts[FC1]), (self.layers[2], parts[FC2])):
                kind = type(fc.weight)
                if (
                    kind not in PLAIN
                    and not (torch.compiler.is_compiling() and kind in TRACED_PARAMETERS)
                    and not (gathered and class_path(kind) == _SHARDED)
                ):
                    return f"{body}.{name} has a weight of {class_path(kind)}, not a plain parameter"
            for name, module in [*parts[ACT]._modules.items()]:
                if module is not None and hooked(module):
                    return more_than_forward(f"{body}.{self.layers[1]}.{name}", module)
        for i, part in enumerate(parts):
            if hooked(part):
                return more_than_forward(self.paths(which)[i], part)
        return "forward was set on the block itself" if "forward" in vars(block) else None

    def _around_reason(self, parts: list[nn.Module], which: int) -> str | None:
        norm, drop_path = parts[NORM], parts[DROP_PATH]
        if not isinstance(norm, nn.GroupNorm):
            return f"{self.norms[which]} is {class_path(norm)}, not GroupNorm"
        if norm.num_groups != 1:
            return f"{self.norms[which]} has {norm.num_groups} groups, not 1"
        if type(drop_path) is not nn.Identity and "drop_prob" not in vars(drop_path):
            return f"{self.drop_paths[which]} is {class_path(drop_path)}, not DropPath or Identity"
        if self.residual_scales is not None:
            for name, scale in ((self.scales[which], parts[-2]), (self.residual_scales[which], parts[-1])):
                if type(scale) is not nn.Identity and not _has_vectors(scale, {"scale"}):
                    return f"{name} is {class_path(scale)}, not a scale of channels or Identity"
        return None

    def _mlp_reason(self, parts: list[nn.Module], activation: str | None) -> str | None:
        body = self.bodies[MLP]
        for name, fc in ((self.layers[0], parts[FC1]), (self.layers[2], parts[FC2])):
            if type(fc) is not nn.Conv2d:
                return f"{body}.{name} is {class_path(fc)}, not Conv2d"
            reason = pointwise_reason(f"{body}.{name}", fc)
            if reason is not None:
                return reason
        act = parts[ACT]
        if activation is None and activation_of(act) is None:
            known = f"{', '.join(ACTIVATIONS)} or StarReLU with one scale and bias"
            return f"{body}.{self.layers[1]} is {class_path(act)}, which computes none of {known}"
        for name, module in zip(self.noop_modules, parts[FC2 + 1 :], strict=False):
            if type(module) not in (nn.Dropout, nn.Identity):
                return f"{body}.{name} is {class_path(module)}, not Dropout or Identity"
        if self.inner_drop_path is not None:
            drop_path = parts[FC2 + 1 + len(self.noop_modules)]
            if "drop_prob" not in vars(drop_path):
                return f"{body}.{self.inner_drop_path} is {class_path(drop_path)}, not DropPath"
        return None


def layout_of(block: nn.Module) -> BlockLayout | None:
    """The layout whose names a module has, or None."""
    if type(block) is nn.Module or isinstance(block, torch.jit.ScriptModule):
        return None  # what is left of a block in a graph, or compiled code
    return next((s for s in LAYOUTS.values() if s.matches(block)), None)


def layout_with(name: str, save_hidden: bool | None) -> BlockLayout:
    """The layout of a name, with ``save_hidden`` for the MLP's operator calls."""
    return _LAYOUTS_WITH[name, save_hidden]


def is_star_relu(act: nn.Module) -> bool:
    """StarReLU, ``scale * relu(x) ** 2 + bias``."""
    return (
        type(act._modules.get("relu")) is nn.ReLU
        and _has_vectors(act, {"scale", "bias"})
        and act.scale.shape == act.bias.shape == (1,)
    )


def activation_of(act: nn.Module) -> str | None:
    """The operator's name for an activation, STAR_RELU, or None where it has none.

    A module that is not PyTorch's own is recognised by its values.
    """
    name = activation_name(act)
    if name is not None or type(act) is nn.GELU:
        return name
    if is_star_relu(act):
        return STAR_RELU
    if any(True for _ in act.parameters()):
        return None
    x = torch.linspace(-8, 8, 129, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        try:
            y = act.forward(x.clone())
        except Exception:  # it is somebody else's module
            return None
        for name, function in ACTIVATIONS.items():
            if isinstance(y, Tensor) and y.shape == x.shape and torch.allclose(y, function(x), 1e-9, 1e-9):
                return name
    return None


def drops_paths(drop_path: nn.Module) -> bool:
    """Whether a call of a DropPath (or Identity) drops samples now."""
    return drop_path.training and bool(vars(drop_path).get("drop_prob"))


def _drawn(drop_path: nn.Module, x: Tensor) -> Tensor | None:
    """What a DropPath multiplies each sample by, ``[B]``: its own draw, the same as without us."""
    if not drops_paths(drop_path):
        return None
    scale = drop_path(x.new_ones((x.shape[0], 1, 1, 1))).flatten()
    return scale if scale.dtype == torch.float64 else scale.float()


def _pool_reason(path: str, pool: nn.Module) -> str | None:
    if type(pool) is not nn.AvgPool2d:
        return f"{path} is {class_path(pool)}, not AvgPool2d"
    size, stride, padding = (
        (v, v) if isinstance(v, Integral) else tuple(v) for v in (pool.kernel_size, pool.stride, pool.padding)
    )
    if size[0] != size[1] or size[0] % 2 == 0:
        return f"{path} has kernel_size {pool.kernel_size}, not odd and square"
    if stride != (1, 1):
        return f"{path} has stride {pool.stride}, not 1"
    if padding != (size[0] // 2, size[0] // 2):
        return f"{path} has padding {pool.padding}, not half its size"
    if pool.count_include_pad:
        return f"{path} has count_include_pad=True"
    if pool.divisor_override is not None:
        return f"{path} has divisor_override {pool.divisor_override}"
    return None


def _has_vectors(module: nn.Module, names: set[str]) -> bool:
    """Whether the attributes are vectors, and there is no other parameter.

    In replicas of DataParallel and units of FSDP, what was a parameter is an attribute like any other.
    """
    given = [getattr(module, name, None) for name in names]
    return module._parameters.keys() <= names and all(isinstance(t, Tensor) and t.dim() == 1 for t in given)


def _scale(module: nn.Module) -> Tensor | None:
    return None if type(module) is nn.Identity else module.scale


_MLP = ("fc1", "act", "fc2")
LAYOUTS = {
    s.name: s
    for s in (
        BlockLayout(
            "timm MetaFormerBlock",
            norms=("norm1", "norm2"),
            bodies=("token_mixer", "mlp"),
            drop_paths=("drop_path1", "drop_path2"),
            scales=("layer_scale1", "layer_scale2"),
            residual_scales=("res_scale1", "res_scale2"),
            layers=_MLP,
            noop_modules=("drop1", "norm", "drop2"),
        ),
        BlockLayout(
            "Hugging Face PoolFormerLayer",
            norms=("before_norm", "after_norm"),
            bodies=("pooling", "output"),
            drop_paths=("drop_path", "drop_path"),
            scales=("layer_scale_1", "layer_scale_2"),
            layers=("conv1", "act_fn", "conv2"),
            inner_drop_path="drop",
            returns_tuple=True,
        ),
        BlockLayout(
            "official or mmpretrain PoolFormerBlock",
            norms=("norm1", "norm2"),
            bodies=("token_mixer", "mlp"),
            drop_paths=("drop_path", "drop_path"),
            scales=("layer_scale_1", "layer_scale_2"),
            layers=_MLP,
            noop_modules=("drop",),
        ),
    )
}
_LAYOUTS_WITH = {
    (name, hidden): replace(layout, keeps_hidden=hidden)
    for name, layout in LAYOUTS.items()
    for hidden in (None, False, True)
}
