"""The MLP's activations and their derivatives as device functions, on fp32 values.

ACTIVATION is an activation's name. With EXACT the error of gelu is one of fp32: 3.9e-7 at most, and 2.3e-7
for its derivative. Without it gelu is a polynomial, for results that are rounded to bfloat16 or float16
anyway: its normal cdf is off by 1.6e-4 at most, and exactly 0 or 1 beyond 4 standard deviations.
"""

import triton
import triton.language as tl

__all__ = ["activate", "activate_with_derivative"]


@triton.jit
def activate(h, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """The activation of fp32 values."""
    if ACTIVATION == "relu":
        return tl.where(h < 0.0, 0.0, h)  # NaN stays
    elif ACTIVATION == "relu_squared":
        relu = tl.where(h < 0.0, 0.0, h)
        return relu * relu
    elif ACTIVATION == "gelu":
        return h * (_cdf_exact(h, _gaussian(h)) if EXACT else _cdf_half(h))
    elif ACTIVATION == "gelu_tanh":
        return h * _sigmoid(_tanh_argument(h, h * h))
    else:
        tl.static_assert(ACTIVATION == "silu")
        return h * _sigmoid(h)


@triton.jit
def activate_with_derivative(h, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """(activation, its derivative) of fp32 values."""
    if ACTIVATION == "relu":
        return tl.where(h < 0.0, 0.0, h), tl.where(h <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "relu_squared":
        relu = tl.where(h < 0.0, 0.0, h)
        return relu * relu, relu + relu
    elif ACTIVATION == "gelu":
        gaussian = _gaussian(h)
        cdf = _cdf_exact(h, gaussian) if EXACT else _cdf_half(h)
        return h * cdf, cdf + h * (gaussian * 0.3989422804014327)  # 1 / sqrt(2 pi)
    elif ACTIVATION == "gelu_tanh":
        square = h * h
        sigmoid, slope = _sigmoid_with_derivative(_tanh_argument(h, square))
        return h * sigmoid, sigmoid + h * slope * (0.21406444881780073 * square + 1.5957691216057308)
    else:
        tl.static_assert(ACTIVATION == "silu")
        sigmoid, slope = _sigmoid_with_derivative(h)
        return h * sigmoid, sigmoid + h * slope


@triton.jit
def _sigmoid(h):
    return 1.0 / (1.0 + tl.exp2(h * -1.4426950408889634))  # log2(e)


@triton.jit
def _sigmoid_with_derivative(h):
    """(s, s (1 - s)) of the sigmoid s. 1 - s is not computed: it has no digits left where s is near 1."""
    e = tl.exp2(tl.abs(h) * -1.4426950408889634)
    r = 1.0 / (1.0 + e)
    return tl.where(h < 0.0, e * r, r), e * r * r


@triton.jit
def _tanh_argument(h, square):
    """The argument of the sigmoid: gelu's tanh form is ``h sigmoid(2 sqrt(2 / pi) (h + 0.044715 h^3))``."""
    return h * (0.07135481627260025 * square + 1.5957691216057308)


@triton.jit
def _gaussian(h):
    """``exp(-h^2 / 2)``"""
    return tl.exp2(h * h * -0.7213475204444817)


@triton.jit
def _cdf_exact(h, gaussian):
    """The normal cdf: its tail is ``exp(-h^2 / 2)`` times a minimax polynomial in t, which falls with |h|."""
    t = 1.0 / (1.0 + 0.28284271247461901 * tl.abs(h))
    q = -0.10242169349385666 * t + 0.3639315366744995
    q = q * t - 0.20063431560993195
    q = q * t + 0.2463647872209549
    q = q * t + 0.07602232694625854
    q = q * t + 0.11673732101917267
    tail = q * t * gaussian
    return tl.where(h < 0.0, tail, 1.0 - tail)


@triton.jit
def _cdf_half(h):
    """Normal cdf: 0.5 plus an odd minimax polynomial of h clamped to [-4, 4], +-0.5 exactly at its ends."""
    c = tl.clamp(h, -4.0, 4.0)
    u = c * c
    q = 2.6109233886018046e-08 * u - 1.783815264388977e-06
    q = q * u + 5.1977400289615616e-05
    q = q * u - 0.0008568619377911091
    q = q * u + 0.009002392180263996
    q = q * u - 0.06513845920562744
    q = q * u + 0.39834415912628174
    return c * q + 0.5
