"""The token mixer operator: norm, then average pool minus identity, and the residual around it."""

from numbers import Integral

import torch
from torch import Tensor

from .. import reference
from ..layout import memory_format_of
from .checks import check_bool, check_eps, check_input, check_stats, check_vectors
from .dispatch import registered, select_backend
from .library import call, empty_output, refuse_forward_derivatives, register
from .torch_private import OpOverload

__all__ = ["check_arguments", "pool_mixer"]

_FORWARD = (
    "pool_mixer_{}(Tensor x, Tensor? weight, Tensor? bias, Tensor? layer_scale, Tensor? drop_scale,"
    " Tensor? stats, int pool_size, float eps, bool residual, bool return_stats)"
    " -> (Tensor y, Tensor mean_rstd, Tensor y_stats)"
)
_BACKWARD = (
    "pool_mixer_{}_backward(Tensor grad, Tensor x, Tensor mean_rstd, Tensor? weight, Tensor? bias,"
    " Tensor? layer_scale, Tensor? drop_scale, int pool_size, bool residual)"
    " -> (Tensor dx, Tensor dweight,{} Tensor dlayer_scale, Tensor ddrop_scale)"
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

    ``torch.vmap`` over x, with or without drop_scale, is one call on a larger batch; over parameters one
    call for each member.

    Raises:
        TypeError: an argument that is not a tensor, or of a dtype that is not supported.
        ValueError: a wrong rank, size, device, pool size or eps.
        RuntimeError: the backend asked for cannot run this call; or a second derivative through a kernel
            backend.

    Source: MetaFormer (arXiv 2111.11418), equations 2 and 4 (``TokenMixer(Norm(X)) + X``) and Algorithm 1.
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
    check_arguments(x, weight, bias, layer_scale, drop_scale, stats, pool_size, eps, residual)
    pool_size = int(pool_size)  # numpy's, too
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and torch.is_autocast_enabled("cuda"):
        x = x.float()
    backend = select_backend(x.device, x.dtype)
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
    refuse_forward_derivatives("pool_mixer", backend, (x, weight, bias, layer_scale, drop_scale))
    y, _, y_stats = call(
        _FORWARD_OPS[backend],
        *(x, weight, bias, layer_scale, drop_scale, stats),
        *(pool_size, float(eps), residual, return_stats),
    )
    return y, y_stats if return_stats else None


def check_arguments(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    stats: Tensor | None,
    pool_size: int,
    eps: float,
    residual: bool,
) -> None:
    """Raises `pool_mixer`'s errors."""
    check_input(x)
    batch, channels = x.shape[:2]
    check_vectors(
        x,
        (
            ("weight", weight, "C", channels),
            ("bias", bias, "C", channels),
            ("layer_scale", layer_scale, "C", channels),
            ("drop_scale", drop_scale, "B", batch),
        ),
    )
    if stats is not None:
        check_stats(x, stats)
    if type(pool_size) is not int and (isinstance(pool_size, bool) or not isinstance(pool_size, Integral)):
        raise TypeError(f"pool_size must be an int, got {type(pool_size).__name__}")
    if pool_size < 1 or pool_size % 2 == 0:
        raise ValueError(f"pool_size must be odd and positive, got {pool_size}")
    if pool_size >= 2**31:
        raise ValueError(f"pool_size must be below 2**31, got {pool_size}")
    check_eps(eps)
    check_bool("residual", residual)


def _register(backend: str) -> None:
    """Schema, fakes and autograd of one backend's pair of ops; the backend registers the kernels.

    Triton's backward writes every gradient in the dtype of its parameter, and bias's zeros, too. For the
    others autograd casts and fills.
    """
    complete = backend == "triton"

    def forward_fake(
        x, weight, bias, layer_scale, drop_scale, stats, pool_size, eps, residual, return_stats
    ) -> tuple[Tensor, Tensor, Tensor]:
        y = empty_output(x)
        batch = x.shape[0]
        shape = (0,)
        if return_stats:
            channels_last = memory_format_of(x) == torch.channels_last
            shape = (batch, registered(backend).stats_tiles(x.shape, channels_last, pool_size), 3)
        return y, x.new_empty((batch, 2), dtype=torch.float32), x.new_empty(shape, dtype=torch.float32)

    def backward_fake(
        grad, x, mean_rstd, weight, bias, layer_scale, drop_scale, pool_size, residual
    ) -> tuple[Tensor, ...]:
        batch, channels = x.shape[:2]
        if complete:
            belong = (weight, channels), (bias, channels), (layer_scale, channels), (drop_scale, batch)
        else:
            belong = (None, channels), (None, channels), (None, batch)
        return empty_output(x), *(
            x.new_empty((size,), dtype=torch.float32 if p is None else p.dtype) for p, size in belong
        )

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
        computed = call(
            _BACKWARD_OPS[backend],
            *(grad, x, mean_rstd, weight, bias, layer_scale, drop_scale),
            *(ctx.pool_size, ctx.residual),
        )
        needed = ctx.needs_input_grad
        if not complete:
            dbias = torch.zeros_like(bias) if needed[2] else None  # (P - I) cancels constants
            computed = (*computed[:2], dbias, *computed[2:])
        for i, of in enumerate((x, weight, bias, layer_scale, drop_scale)):
            if needed[i]:
                grads[i] = computed[i] if complete else computed[i].to(of.dtype)
        return tuple(grads)

    _FORWARD_OPS[backend], _BACKWARD_OPS[backend] = register(
        "pool_mixer",
        backend,
        (_FORWARD.format(backend), _BACKWARD.format(backend, " Tensor dbias," if complete else "")),
        (forward_fake, backward_fake),
        setup_context,
        backward,
        per_sample=(0, 4, 5),  # x, drop_scale, stats
    )


_FORWARD_OPS: dict[str, OpOverload] = {}
_BACKWARD_OPS: dict[str, OpOverload] = {}
for _backend in ("cpp", "triton", "cuda"):
    _register(_backend)
