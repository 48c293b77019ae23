"""Device functions of the MLP's backward: where a tile's tokens are, their normalised values, dx from dn.

Tokens are pixels, numbered through the batch. A tile of channels_last runs across samples; one of nchw stays
inside a sample, where its pixels are neighbours in memory.
"""

import triton
import triton.language as tl

from ..tile import rounded, vector

__all__ = ["finished", "image", "inside", "normalised", "sample_values", "token_tile"]


@triton.jit
def token_tile(tile, HW, T, TOKENS: tl.constexpr, LAST: tl.constexpr):
    """(number of the first token, which tokens exist, their samples) of a tile."""
    i = tl.arange(0, TOKENS)
    if LAST:
        start = tile.to(tl.int64) * TOKENS
        b = start // HW
        within = (start - b * HW).to(tl.int32)
        return start, i < T - start, b + (within + i) // HW
    else:
        tiles = tl.cdiv(HW, TOKENS)
        b = (tile // tiles).to(tl.int64)
        first = tile % tiles * TOKENS
        return b * HW + first, i < HW - first, b + tl.zeros([TOKENS], tl.int64)


@triton.jit
def image(ptr, start, c, HW, C: tl.constexpr, TOKENS: tl.constexpr, LAST: tl.constexpr):
    """Pointers ``[TOKENS, channels]`` to channels c of an image's tokens from ``start`` on."""
    i = tl.arange(0, TOKENS)
    if LAST:
        return ptr + start * C + i[:, None] * C + c[None, :]
    else:
        b = start // HW
        return ptr + b * HW * C + (start - b * HW) + i[:, None] + c[None, :].to(tl.int64) * HW


@triton.jit
def inside(ok, c, C: tl.constexpr, END: tl.constexpr):
    """The mask of a tile of tokens ``ok`` and channels c, which end before ``END``."""
    mask = ok[:, None]
    if END > C:
        mask = mask & (c < C)[None, :]
    return mask


@triton.jit
def sample_values(mean_rstd_ptr, drop_ptr, b, ok, NORM: tl.constexpr):
    """(mean, rstd, drop scale) of each token's sample; 0 for a token that does not exist."""
    mean = tl.zeros(b.shape, tl.float32)
    rstd = tl.zeros(b.shape, tl.float32)
    if NORM:
        mean = tl.load(mean_rstd_ptr + b * 2, mask=ok, other=0.0)
        rstd = tl.load(mean_rstd_ptr + b * 2 + 1, mask=ok, other=0.0)
    return mean, rstd, vector(drop_ptr, b, ok)


@triton.jit
def normalised(at, mask, mean, rstd, gamma, beta, NORM: tl.constexpr, DTYPE: tl.constexpr):
    """x as fc1 reads it: GroupNorm's output in the operands' dtype."""
    x = tl.load(at, mask=mask, other=0.0)
    if NORM:
        x = (x.to(tl.float32) - mean[:, None]) * (rstd[:, None] * gamma[None, :]) + beta[None, :]
    return x if x.dtype == DTYPE else rounded(x.to(tl.float32), DTYPE)


@triton.jit
def finished(
    dn, x_ptr, grad_ptr, dx_ptr, gamma_ptr, sums_ptr, start, ok, c, HW, mean, rstd, k0, k1,
    C: tl.constexpr, END: tl.constexpr, TOKENS: tl.constexpr, LAST: tl.constexpr, NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Stores dx of a tile, and its sums over tokens ``dn x_hat`` and ``dn`` where ``sums_ptr`` is given."""
    mask = inside(ok, c, C, END)
    dx = dn
    if NORM:
        x = tl.load(image(x_ptr, start, c, HW, C, TOKENS, LAST), mask=mask, other=0.0).to(tl.float32)
        xhat = (x - mean[:, None]) * rstd[:, None]
        if sums_ptr is not None:
            tl.store(sums_ptr + c, tl.sum(dn * xhat, 0), mask=c < C)
            tl.store(sums_ptr + C + c, tl.sum(dn, 0), mask=c < C)
        gamma = vector(gamma_ptr, c, c < C)
        dx = rstd[:, None] * (gamma[None, :] * dn - k0[:, None] - xhat * k1[:, None])
    if RESIDUAL:
        grad = tl.load(image(grad_ptr, start, c, HW, C, TOKENS, LAST), mask=mask, other=0.0)
        dx += grad.to(tl.float32)
    at = image(dx_ptr, start, c, HW, C, TOKENS, LAST)
    tl.store(at, rounded(dx, dx_ptr.dtype.element_ty), mask=mask)
