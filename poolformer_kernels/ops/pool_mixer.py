"""The token mixer operator: norm, then average pool minus identity, and the residual around it."""

import sys
from importlib import import_module

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import reference
from .backend import select_backend
from .library import LIBRARY, NAMESPACE

__all__ = ["pool_mixer"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FORWARD = (
    "pool_mixer_{}(Tensor x, Tensor? weight, Tensor? bias, Tensor? layer_scale, Tensor? drop_scale,"
    " Tensor? stats, int pool_size, float eps, bool residual, bool return_stats)"
    " -> (Tensor y, Tensor mean_rstd, Tensor y_stats)"
)
_BACKWARD = (
    "pool_mixer_{}_backward(Tensor grad, Tensor x, Tensor mean_rstd, Tensor? weight, Tensor? bias,"
    " Tensor? layer_scale, Tensor? drop_scale, int pool_size, bool residual)"
    " -> (Tensor dx, Tensor dweight, Tensor dlayer_scale, Tensor ddrop_scale)"
)


def pool_mixer(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    pool_size: int = 3,
    eps: float = 1e-5,
    layer_scale: Tensor | None = None,
    drop_scale: Tensor | None = None,
    residual: bool = False,
) -> Tensor:
    """Norm, then average pool minus identity; with ``residual=True`` the whole token mixer sub-block.

    Equivalent PyTorch::

        n = F.group_norm(x, 1, weight, bias, eps)
        m = F.avg_pool2d(n, pool_size, 1, pool_size // 2, count_include_pad=False) - n
        m = drop_scale[:, None, None, None] * layer_scale[:, None, None] * m   # each where given
        y = x + m if residual else m

    Args:
        x: ``[B, C, H, W]``, float32, bfloat16, float16 or (reference only) float64. contiguous and
            channels_last are computed as they are, any other strides at the price of one copy.
        weight, bias: GroupNorm's affine parameters ``[C]``, or None for 1 and 0. Their dtype is x's or
            float32.
        pool_size: odd and positive; the stride is 1 and borders average the pixels that exist.
        eps: added to the variance, not negative.
        layer_scale: ``[C]`` (LayerScale), or None for 1.
        drop_scale: ``[B]`` (stochastic depth: 0 or 1/keep per sample), or None for 1.
        residual: add x.

    Returns:
        y, of x's shape and dtype; channels_last if x's channels are innermost, else contiguous. Statistics
        and accumulation are float32 for half inputs. Gradients have the dtype of what they belong to. The
        gradient of ``bias`` is exactly zero: pool minus identity cancels it.

    Under autocast the operator follows GroupNorm's rule: on CUDA a half x is computed in, and returned as,
    float32 (the residual stream of eager AMP); on the CPU x keeps its dtype.

    Raises:
        TypeError: an argument that is not a tensor, or of a dtype that is not supported.
        ValueError: a wrong rank, size, device, pool size or eps.
        RuntimeError: the backend asked for cannot run this call; or a second derivative through a kernel
            backend.

    Source: MetaFormer (arXiv 2111.11418), equations 1 and 3 (``TokenMixer(Norm(X)) + X``) and Algorithm 1.
    """
    return pool_mixer_with_stats(
        x,
        weight,
        bias,
        pool_size=pool_size,
        eps=eps,
        layer_scale=layer_scale,
        drop_scale=drop_scale,
        residual=residual,
        return_stats=False,
    )[0]


def pool_mixer_with_stats(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    pool_size: int = 3,
    eps: float = 1e-5,
    layer_scale: Tensor | None = None,
    drop_scale: Tensor | None = None,
    residual: bool = False,
    stats: Tensor | None = None,
    return_stats: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """`pool_mixer` that takes x's statistics where the caller has them and returns y's.

    Statistics are partials ``[B, T, 3]`` float32 (float64 for float64 x), any T, of (count, mean, M2); see
    `poolformer_kernels.reference.sample_stats`. They are not differentiable: the backward differentiates
    through the normalisation of x itself.

    Returns:
        (y, partials of y or None).
    """
    _check(x, weight, bias, layer_scale, drop_scale, stats, pool_size, eps, residual)
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and torch.is_autocast_enabled("cuda"):
        x = x.float()
    backend = select_backend(x.device.type, x.dtype)
    if backend == "reference":
        y = reference.pool_mixer(
            x,
            weight,
            bias,
            pool_size=pool_size,
            eps=eps,
            layer_scale=layer_scale,
            drop_scale=drop_scale,
            residual=residual,
            stats=stats,
        )
        return y, reference.sample_stats(y.detach()) if return_stats else None
    _refuse_forward_derivatives(backend, (x, weight, bias, layer_scale, drop_scale))
    y, _, y_stats = _call(
        _FORWARD_OPS[backend],
        *(x, weight, bias, layer_scale, drop_scale, stats),
        *(pool_size, float(eps), residual, return_stats),
    )
    return y, y_stats if return_stats else None


def _refuse_forward_derivatives(backend: str, tensors: tuple[Tensor | None, ...]) -> None:
    """Kernels have a backward only: where a transform would drop or zero tangents, raise."""
    if torch.compiler.is_compiling():
        return
    transforms = torch._C._functorch
    if forward_ad._current_level < 0 and transforms.peek_interpreter_stack() is None:
        return
    kinds = {interpreter.key() for interpreter in transforms.get_interpreter_stack() or ()}
    dual = forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(t).tangent is not None for t in tensors if t is not None
    )
    if dual or kinds & {transforms.TransformType.Grad, transforms.TransformType.Jvp}:
        raise RuntimeError(
            f"pool_mixer on the {backend!r} backend has no forward-mode derivative and no torch.func"
            " gradient; use poolformer_kernels.use_backend('reference')"
        )


def _call(op, *args):
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():  # nothing to record: skip the Python autograd kernel (4 us)
        return op(*args)


def _check(x, weight, bias, layer_scale, drop_scale, stats, pool_size, eps, residual) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    dtype = x.dtype
    if dtype not in _FLOATS:
        raise TypeError(f"x must be float32, bfloat16, float16 or float64, got {dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"x must be a dense tensor (torch.strided), got {x.layout}")
    if x.dim() != 4:
        raise ValueError(f"x must have 4 dimensions [B, C, H, W], got shape {tuple(x.shape)}")
    batch, channels, height, width = x.shape
    if channels == 0 or height == 0 or width == 0:
        raise ValueError(f"x must have at least one channel and one pixel, got shape {tuple(x.shape)}")
    device = x.device
    for name, p, size in (
        ("weight", weight, channels),
        ("bias", bias, channels),
        ("layer_scale", layer_scale, channels),
        ("drop_scale", drop_scale, batch),
    ):
        if p is None:
            continue
        if not isinstance(p, Tensor):
            raise TypeError(f"{name} must be a tensor or None, got {type(p).__name__}")
        if p.dtype != dtype and (p.dtype != torch.float32 or dtype == torch.float64):
            raise TypeError(f"{name} must be {_dtype_rule(dtype)} for x of {dtype}, got {p.dtype}")
        if p.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor (torch.strided), got {p.layout}")
        if p.dim() != 1 or p.shape[0] != size:
            what = "B" if name == "drop_scale" else "C"
            raise ValueError(f"{name} must have shape [{what}] = [{size}], got {list(p.shape)}")
        if p.device != device:
            raise ValueError(f"{name} must be on x's device {device}, got {p.device}")
    if stats is not None:
        _check_stats(x, stats)
    if type(pool_size) is not int:
        raise TypeError(f"pool_size must be an int, got {type(pool_size).__name__}")
    if pool_size < 1 or pool_size % 2 == 0:
        raise ValueError(f"pool_size must be odd and positive, got {pool_size}")
    if pool_size >= 2**31:
        raise ValueError(f"pool_size must be below 2**31, got {pool_size}")
    if not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a number, got {type(eps).__name__}")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    if eps > sys.float_info.max:
        raise ValueError(f"eps must be a finite float, got {eps}")
    if type(residual) is not bool:
        raise TypeError(f"residual must be a bool, got {type(residual).__name__}")


def _check_stats(x: Tensor, stats: Tensor) -> None:
    if not isinstance(stats, Tensor):
        raise TypeError(f"stats must be a tensor or None, got {type(stats).__name__}")
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    if stats.dtype != wanted:
        raise TypeError(f"stats must be {wanted} for x of {x.dtype}, got {stats.dtype}")
    if stats.dim() != 3 or stats.shape[0] != x.shape[0] or stats.shape[1] == 0 or stats.shape[2] != 3:
        raise ValueError(f"stats must have shape [B, T, 3] = [{x.shape[0]}, T, 3], got {list(stats.shape)}")
    if stats.device != x.device:
        raise ValueError(f"stats must be on x's device {x.device}, got {stats.device}")


def _dtype_rule(dtype: torch.dtype) -> str:
    return f"{dtype}" if dtype in (torch.float32, torch.float64) else f"{dtype} or torch.float32"


def _empty_output(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=reference.memory_format_of(x))


def _register(backend: str) -> None:
    """Schema, fakes and autograd of one backend's pair of ops; the backend registers the kernels."""
    name = f"{NAMESPACE}::pool_mixer_{backend}"
    LIBRARY.define(_FORWARD.format(backend))
    LIBRARY.define(_BACKWARD.format(backend))

    def forward_fake(
        x, weight, bias, layer_scale, drop_scale, stats, pool_size, eps, residual, return_stats
    ) -> tuple[Tensor, Tensor, Tensor]:
        y = _empty_output(x)
        batch = x.shape[0]
        shape = (0,)
        if return_stats:
            channels_last = reference.memory_format_of(x) == torch.channels_last
            kernels = import_module(f"..backends.{backend}", __package__)
            shape = (batch, kernels.stats_tiles(x.shape, channels_last, pool_size), 3)
        return y, x.new_empty((batch, 2), dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)

    def backward_fake(
        grad, x, mean_rstd, weight, bias, layer_scale, drop_scale, pool_size, residual
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        batch, channels = x.shape[:2]
        vectors = (x.new_empty((size,), dtype=torch.float32) for size in (channels, channels, batch))
        return _empty_output(x), *vectors

    def setup_context(ctx, inputs, output) -> None:
        x, weight, bias, layer_scale, drop_scale, _, ctx.pool_size, _, ctx.residual, _ = inputs
        _, mean_rstd, y_stats = output
        ctx.mark_non_differentiable(mean_rstd, y_stats)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, mean_rstd, weight, bias, layer_scale, drop_scale)

    def backward(ctx, grad, *_):
        x, mean_rstd, weight, bias, layer_scale, drop_scale = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * 10
        if grad is None:
            return tuple(grads)
        dx, dweight, dlayer_scale, ddrop_scale = _call(
            _BACKWARD_OPS[backend],
            *(grad, x, mean_rstd, weight, bias, layer_scale, drop_scale),
            *(ctx.pool_size, ctx.residual),
        )
        needed = ctx.needs_input_grad
        if needed[0]:
            grads[0] = dx
        if needed[1]:
            grads[1] = dweight.to(weight.dtype)
        if needed[2]:
            grads[2] = torch.zeros_like(bias)  # (P - I) cancels constants
        if needed[3]:
            grads[3] = dlayer_scale.to(layer_scale.dtype)
        if needed[4]:
            grads[4] = ddrop_scale.to(drop_scale.dtype)
        return tuple(grads)

    def double_backward(ctx, *_):
        raise RuntimeError(
            f"pool_mixer on the {backend!r} backend has no second derivative;"
            " use poolformer_kernels.use_backend('reference') for double backward"
        )

    torch.library.register_fake(name, forward_fake, lib=LIBRARY)
    torch.library.register_fake(f"{name}_backward", backward_fake, lib=LIBRARY)
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=LIBRARY)
    torch.library.register_autograd(f"{name}_backward", double_backward, lib=LIBRARY)


_FORWARD_OPS = {}
_BACKWARD_OPS = {}
for _backend in ("cpp", "triton"):
    _register(_backend)
    _FORWARD_OPS[_backend] = getattr(torch.ops.poolformer_kernels, f"pool_mixer_{_backend}").default
    _BACKWARD_OPS[_backend] = getattr(torch.ops.poolformer_kernels, f"pool_mixer_{_backend}_backward").default
