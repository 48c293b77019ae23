"""The MLP operator: norm, fc1, activation, fc2, and the residual around them."""

import torch
from torch import Tensor

from .. import reference
from ..layout import memory_format_of
from .checks import (
    check_activation,
    check_bool,
    check_eps,
    check_input,
    check_stats,
    check_tensor,
    check_vectors,
)
from .dispatch import mlp_backend, mlp_of_cuda, registered, select_backend
from .library import call, refuse_forward_derivatives, register
from .torch_private import OpOverload, constant_result, tf32_allowed

__all__ = ["allows_tf32", "check_arguments", "mlp", "mlp_with_stats"]

_HALVES = (torch.bfloat16, torch.float16)
_ROUND = ("cpp", "triton")  # whose kernels take float32 weights under autocast
_AUTOCAST = ("cpu", "cuda")  # where kernels run; elsewhere the reference's own operators obey autocast
_PARAMETERS = (
    "Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? norm_weight, Tensor? norm_bias,"
    " Tensor? layer_scale, Tensor? drop_scale"
)
_FORWARD = (
    f"mlp_{{}}(Tensor x, {_PARAMETERS}, Tensor? stats, str activation, float eps, bool norm, bool residual,"
    " bool return_stats, bool save_hidden{})"
    " -> (Tensor y, Tensor mean_rstd, Tensor y_stats, Tensor hidden)"
)
_BACKWARD = (
    f"mlp_{{}}_backward(Tensor grad, Tensor x, Tensor mean_rstd, {_PARAMETERS}, Tensor? hidden,"
    " str activation, bool norm, bool residual, bool parameter_grads, bool drop_grad{})"
    " -> (Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2, Tensor dnorm_weight,"
    " Tensor dnorm_bias, Tensor dlayer_scale, Tensor ddrop_scale)"
)


def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "gelu",
    norm: bool | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    layer_scale: Tensor | None = None,
    drop_scale: Tensor | None = None,
    residual: bool = False,
    save_hidden: bool | None = False,
) -> Tensor:
    """The channel MLP; with ``norm_weight`` and ``residual=True`` the whole MLP sub-block.

    Equivalent PyTorch, with ``w1`` and ``w2`` as ``[out, in, 1, 1]``::

        n = F.group_norm(x, 1, norm_weight, norm_bias, eps) if norm else x
        m = F.conv2d(F.gelu(F.conv2d(n, w1, b1)), w2, b2)
        m = drop_scale[:, None, None, None] * layer_scale[:, None, None] * m   # each where given
        y = x + m if residual else m

    Args:
        x: ``[B, C, H, W]``, float32, bfloat16, float16 or (reference only) float64. contiguous and
            channels_last are computed as they are, any other strides at the price of one copy.
        w1, w2: ``[hidden, C]`` and ``[out, hidden]``, or the same with ``[..., 1, 1]``; any sizes. One dtype
            for both: x's, or float32 for a half x, or a half dtype for a float32 x.
        b1, b2: ``[hidden]``, ``[out]``, or None; of x's dtype, the weights' or float32.
        activation: ``"gelu"`` (exact, erf), ``"gelu_tanh"``, ``"relu"``, ``"relu_squared"`` (``relu(h)**2``;
            MetaFormer's StarReLU ``s relu(h)**2 + b`` with ``w2 s`` for w2 and ``b2 + b w2.sum(1)`` for b2)
            or ``"silu"``.
        norm: normalise x by GroupNorm of one group; None: iff ``norm_weight`` or ``norm_bias`` is given.
        norm_weight, norm_bias: GroupNorm's affine parameters ``[C]``, or None for 1 and 0.
        eps: added to the variance, not negative.
        layer_scale: ``[out]`` (LayerScale), or None for 1.
        drop_scale: ``[B]`` (stochastic depth: 0 or 1/keep per sample), or None for 1.
        residual: add x; ``out`` is then C.
        save_hidden: keep fc1's output for the backward instead of computing it again from x: faster where
            memory is plenty. It takes ``hidden / C`` times the memory of x in the operands' dtype, which is
            less than half of what eager PyTorch keeps. None: where that is faster and x is small: on CPUs
            from 256 channels on, unless a matrix unit computes the products (bfloat16 with AMX), on GPUs from
            320 on. False: never.

    Returns:
        y ``[B, out, H, W]``, of x's dtype; channels_last if x's channels are innermost, else contiguous.
        Accumulation, statistics and activation are float32 for half inputs; the operands of the matrix
        products are of the half dtype among x's and the weights'. Gradients have the dtype of what they
        belong to.

    float32 products on CUDA are TF32 where eager's are: with weights ``[out, in, 1, 1]`` as
    ``torch.backends.cudnn.allow_tf32`` or ``.conv.fp32_precision`` says (by default they are), with weights
    ``[out, in]`` as ``torch.backends.cuda.matmul.allow_tf32`` or ``.fp32_precision`` says (by default not).
    If the two weights differ in rank, both must allow it. The backward keeps what held in the forward. TF32
    ignores the operands' last 13 bits; all else, the activation too, stays float32.

    Under autocast the weights are cast to its dtype, by the kernels of "triton" and "cpp" themselves (where
    the CPU has no products of that dtype, "cpp" multiplies float32 weights as they are): their gradients are
    then float32 throughout. The plain form then returns that dtype; with ``residual`` the stream keeps x's,
    and on CUDA a half x is computed in, and returned as, float32.

    ``torch.vmap`` over x, with or without drop_scale, is one call on a larger batch; over parameters one
    call for each member.

    Raises:
        TypeError: an argument that is not a tensor, or of a dtype that is not supported.
        ValueError: a wrong rank, size, device, activation or eps; norm parameters with ``norm=False``.
        RuntimeError: the backend asked for cannot run this call; or a second derivative through a kernel
            backend.

    Source: MetaFormer (arXiv 2111.11418), equation 3 (``Z = sigma(Norm(Y) W1) W2 + Y``).
    """
    return mlp_with_stats(
        x,
        w1,
        b1,
        w2,
        b2,
        activation=activation,
        norm=norm,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        eps=eps,
        layer_scale=layer_scale,
        drop_scale=drop_scale,
        residual=residual,
        save_hidden=save_hidden,
        return_stats=False,
    )[0]


def mlp_with_stats(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "gelu",
    norm: bool | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    layer_scale: Tensor | None = None,
    drop_scale: Tensor | None = None,
    residual: bool = False,
    save_hidden: bool | None = False,
    stats: Tensor | None = None,
    return_stats: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """`mlp` that takes x's statistics where the caller has them and returns y's; see `pool_mixer_with_stats`.

    Returns:
        (y, partials of y ``[B, T, 3]`` or None).
    """
    if norm is None:
        norm = norm_weight is not None or norm_bias is not None
    check_input(x)
    device = x.device.type
    narrow = cast_to = None
    if device in _AUTOCAST and x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        x, (w1, b1, w2, b2), cast_to, narrow = _autocast(device, x, (w1, b1, w2, b2), norm, residual)
        if narrow is not None:
            return_stats = False  # y is rounded once more below, so these would not be its statistics
    operand = check_arguments(
        *(x, w1, b1, w2, b2, activation, norm, norm_weight, norm_bias, eps),
        *(layer_scale, drop_scale, residual, save_hidden, stats, cast_to),
    )
    tensors = (x, w1, b1, w2, b2, norm_weight, norm_bias, layer_scale, drop_scale)
    backend = select_backend(x.device, x.dtype)
    if backend == "cuda":
        backend = mlp_of_cuda(x.device, _sizes(x, w1, w2), operand, _differentiates(tensors))
    if cast_to is not None and backend not in _ROUND and w1.dtype != cast_to:
        w1, w2 = w1.to(cast_to), w2.to(cast_to)
        tensors = (x, w1, b1, w2, b2, norm_weight, norm_bias, layer_scale, drop_scale)
    if backend == "reference":
        y = reference.mlp(
            x,
            w1,
            b1,
            w2,
            b2,
            activation=activation,
            norm=norm,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            eps=eps,
            layer_scale=layer_scale,
            drop_scale=drop_scale,
            residual=residual,
            stats=stats,
        )
        y_stats = reference.sample_stats(y.detach()) if return_stats else None
    else:
        refuse_forward_derivatives("mlp", backend, tensors)
        if save_hidden is None:
            save_hidden = w1.shape[1] >= _hidden_kept_from(backend, operand)
        if save_hidden:
            save_hidden = _differentiates(tensors)
        rounds_to = operand if backend == "triton" else cast_to  # None: "cpp" follows its weights
        tf32 = backend == "triton" and allows_tf32(x, w1, w2)
        y, _, y_stats, _ = call(
            _FORWARD_OPS[backend],
            *(*tensors, stats, activation, float(eps), norm, residual, return_stats, save_hidden),
            *_more(backend, rounds_to, tf32),
        )
    return y if narrow is None else y.to(narrow), y_stats if return_stats else None


@constant_result
def _hidden_kept_from(backend: str, operand: torch.dtype) -> float:
    return registered(backend).hidden_kept_from(operand)


def _differentiates(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether a backward may follow a call on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _more(backend: str, operand: torch.dtype | None, allow_tf32: bool) -> tuple:
    """The last arguments of a backend's operators; those of "cuda" have none of them."""
    if backend == "triton":
        return operand, allow_tf32
    return (operand,) if backend == "cpp" else ()


def _sizes(x: Tensor, w1: Tensor, w2: Tensor) -> tuple[int, int, int]:
    """(C, hidden, out)."""
    return x.shape[1], w1.shape[0], w2.shape[0]


def allows_tf32(x: Tensor, w1: Tensor, w2: Tensor) -> bool:
    """Whether the products are float32 on CUDA and both weights' settings allow TF32."""

    def allowed(w: Tensor) -> bool:
        return tf32_allowed.convolutions if w.dim() == 4 else tf32_allowed.matrix_products

    return x.is_cuda and x.dtype == w1.dtype == torch.float32 and allowed(w1) and allowed(w2)


def _autocast(
    device: str, x: Tensor, layers: tuple[Tensor | None, ...], norm: bool, residual: bool
) -> tuple[Tensor, tuple[Tensor | None, ...], torch.dtype, torch.dtype | None]:
    """x and (w1, b1, w2, b2) as eager AMP computes them, with two dtypes.

    The first is that of the products' operands: float32 weights are left as they are, for the kernel that
    reads them, or for `mlp_with_stats`, to cast. The second is that of the result where it is not x's.
    """
    half = torch.get_autocast_dtype(device)
    if not (norm or residual):
        x = x.to(half)
    elif x.is_cuda:
        x = x.float()
    operand = half if x.dtype == torch.float32 else x.dtype

    def cast(p: Tensor | None, kept: torch.dtype | None) -> Tensor | None:
        narrow = isinstance(p, Tensor) and p.is_floating_point() and p.dtype != kept
        return p.to(operand) if narrow else p

    w1, b1, w2, b2 = layers
    both = (isinstance(w, Tensor) and w.dtype == torch.float32 for w in (w1, w2))
    kept = torch.float32 if all(both) else None
    layers = cast(w1, kept), cast(b1, torch.float32), cast(w2, kept), cast(b2, torch.float32)
    return x, layers, operand, None if residual or x.dtype != torch.float32 else half


def check_arguments(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    norm: bool,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    layer_scale: Tensor | None,
    drop_scale: Tensor | None,
    residual: bool,
    save_hidden: bool | None,
    stats: Tensor | None,
    cast_to: torch.dtype | None,
) -> torch.dtype:
    """Raises `mlp`'s errors; returns the dtype of the products' operands: ``cast_to`` under autocast."""
    batch, channels = x.shape[:2]
    dtype = x.dtype
    hidden = _check_weight("w1", w1, x, "hidden, C", None, channels)
    out = _check_weight("w2", w2, x, "out, hidden", channels if residual is True else None, hidden)
    if w2.dtype != w1.dtype:
        raise TypeError(f"w2 must be of w1's dtype {w1.dtype}, got {w2.dtype}")
    operand = cast_to
    if operand is None:
        operand = w1.dtype if dtype == torch.float32 else dtype
    vectors = (dtype,) if dtype == torch.float64 else (dtype, w1.dtype, operand, torch.float32)
    check_vectors(
        x,
        (
            ("b1", b1, "hidden", hidden),
            ("b2", b2, "out", out),
            ("norm_weight", norm_weight, "C", channels),
            ("norm_bias", norm_bias, "C", channels),
            ("layer_scale", layer_scale, "out", out),
            ("drop_scale", drop_scale, "B", batch),
        ),
        vectors,
    )
    check_activation(activation)
    check_bool("norm", norm, optional=True)
    if not norm:
        for name, p in (("norm_weight", norm_weight), ("norm_bias", norm_bias), ("stats", stats)):
            if p is not None:
                raise ValueError(f"{name} must be None where norm is False, got a tensor")
    elif stats is not None:
        check_stats(x, stats)
    check_eps(eps)
    check_bool("residual", residual)
    check_bool("save_hidden", save_hidden, optional=True)
    return operand


def _check_weight(name: str, w: Tensor, x: Tensor, what: str, rows: int | None, columns: int) -> int:
    """Checks a weight ``[rows, columns]`` or ``[rows, columns, 1, 1]``, any rows where None; returns rows."""
    if x.dtype == torch.float64:
        dtypes = (torch.float64,)
    else:
        dtypes = (x.dtype, torch.float32) if x.dtype in _HALVES else (torch.float32, *_HALVES)
    check_tensor(name, w, x, x.device, dtypes, False)
    shape = w.shape
    if (
        (len(shape) == 2 or (len(shape) == 4 and shape[2] == 1 and shape[3] == 1))
        and shape[1] == columns
        and (shape[0] == rows or (rows is None and shape[0] > 0))
    ):
        return shape[0]
    first = "any" if rows is None else rows
    raise ValueError(
        f"{name} must have shape [{what}] = [{first}, {columns}], or [{first}, {columns}, 1, 1],"
        f" got {list(shape)}"
    )


def _register(backend: str) -> None:
    """Schema, fakes and autograd of one backend's pair of ops; the backend registers the kernels.

    Those in `_ROUND` have an argument more, the dtype of the products' operands: they round float32 weights
    themselves, so that autograd need not cast gradients back. Triton's write every gradient in its
    parameter's dtype, and have `allow_tf32`: the other backends have no float32 products on CUDA.
    """
    casts = backend == "triton"
    more = {"triton": ", ScalarType operand, bool allow_tf32", "cpp": ", ScalarType? operand=None"}.get(
        backend, ""
    )

    def forward_fake(
        x, w1, b1, w2, b2, norm_weight, norm_bias, layer_scale, drop_scale, stats, activation, eps, norm,
        residual, return_stats, save_hidden, operand=None, allow_tf32=False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        batch, _, height, width = x.shape
        hidden, out = w1.shape[0], w2.shape[0]
        fmt = memory_format_of(x)
        y = torch.empty((batch, out, height, width), dtype=x.dtype, device=x.device, memory_format=fmt)
        shape = (0,)
        if return_stats:
            tiles = registered(backend).mlp_stats_tiles(y.shape, fmt == torch.channels_last, hidden)
            shape = (batch, tiles, 3)
        if operand is None:
            operand = w1.dtype if x.dtype == torch.float32 else x.dtype
        saved = (batch * height * width * hidden,) if save_hidden else (0,)
        return (
            y,
            x.new_empty((batch, 2) if norm else (0,), dtype=torch.float32),
            x.new_empty(shape, dtype=torch.float32),
            x.new_empty(saved, dtype=operand),
        )

    def backward_fake(
        grad, x, mean_rstd, w1, b1, w2, b2, norm_weight, norm_bias, layer_scale, drop_scale, hidden,
        activation, norm, residual, parameter_grads, drop_grad, operand=None, allow_tf32=False,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        dx = torch.empty_like(x, memory_format=memory_format_of(x))
        channels, width, out = x.shape[1], w1.shape[0], w2.shape[0]
        dw1, dw2 = (w.new_empty(w.shape if parameter_grads else (0,)) for w in (w1, w2))
        vectors = (b1, width), (b2, out), (norm_weight, channels), (norm_bias, channels), (layer_scale, out)
        db1, db2, dnorm_weight, dnorm_bias, dlayer_scale = (
            x.new_empty((size if parameter_grads else 0,), dtype=dtype_of_gradient(p)) for p, size in vectors
        )
        ddrop_scale = x.new_empty((x.shape[0] if drop_grad else 0,), dtype=dtype_of_gradient(drop_scale))
        return dx, dw1, db1, dw2, db2, dnorm_weight, dnorm_bias, dlayer_scale, ddrop_scale

    def dtype_of_gradient(p: Tensor | None) -> torch.dtype:
        return p.dtype if casts and p is not None else torch.float32

    def setup_context(ctx, inputs, output) -> None:
        x, *parameters = inputs[:9]
        ctx.activation, _, ctx.norm, ctx.residual, _, saved = inputs[10:16]
        operand = inputs[16] if len(inputs) > 16 else None
        ctx.operand = operand or (parameters[0].dtype if x.dtype == torch.float32 else x.dtype)
        ctx.allow_tf32 = casts and inputs[17]
        _, mean_rstd, y_stats, hidden = output
        ctx.mark_non_differentiable(mean_rstd, y_stats, hidden)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, mean_rstd, *parameters, hidden if saved else None)

    def backward(ctx, grad, *_):
        grads: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if grad is None:
            return tuple(grads)
        needed = ctx.needs_input_grad[:9]
        saved = ctx.saved_tensors
        x, w1, w2 = saved[0], saved[2], saved[4]
        runs, _ = mlp_backend(backend, x.device, _sizes(x, w1, w2), ctx.operand, backward=True)
        computed = call(
            _BACKWARD_OPS[runs],
            *(grad, *saved, ctx.activation, ctx.norm, ctx.residual, any(needed[1:8]), needed[8]),
            *_more(runs, ctx.operand, ctx.allow_tf32),
        )
        for i, (gradient, of) in enumerate(zip(computed, (saved[0], *saved[2:10]), strict=True)):
            if needed[i]:
                grads[i] = gradient if gradient.dtype == of.dtype else gradient.to(of.dtype)
        return tuple(grads)

    _FORWARD_OPS[backend], _BACKWARD_OPS[backend] = register(
        "mlp",
        backend,
        tuple(schema.format(backend, more) for schema in (_FORWARD, _BACKWARD)),
        (forward_fake, backward_fake),
        setup_context,
        backward,
        per_sample=(0, 8, 9),  # x, drop_scale, stats
    )


_FORWARD_OPS: dict[str, OpOverload] = {}
_BACKWARD_OPS: dict[str, OpOverload] = {}
for _backend in ("cpp", "triton", "cuda"):
    _register(_backend)
