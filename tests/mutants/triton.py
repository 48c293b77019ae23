"""Mutants of the Triton kernels, which run in Triton's interpreter (tests/triton_interpreter)."""

from .mutant import Mutant

TRITON = "poolformer_kernels/backends/triton/"

POOL_MIXER = (
    Mutant(
        "a window at the right and lower border counts one too many", "triton", "pool_mixer",
        f"{TRITON}tile.py", "tl.minimum(size - 1 - position, REACH)", "tl.minimum(size - position, REACH)",
    ),
    Mutant(
        "the adjoint divides the right neighbour by the element's window", "triton", "pool_mixer",
        f"{TRITON}tile.py", "right * (vertical / window_count(w + j, W, REACH))",
        "right * (vertical / window_count(w, W, REACH))",
    ),
    Mutant(
        "outside of the image there is minus the mean instead of 0", "triton", "pool_mixer",
        f"{TRITON}tile.py", "tl.load(ptr, mask=ok, other=shift)", "tl.load(ptr, mask=ok, other=0.0)",
    ),
    Mutant(
        "epsilon is added outside the root", "triton", "pool_mixer", f"{TRITON}pool_mixer.py",
        "1.0 / tl.sqrt_rn(variance + eps)", "1.0 / (tl.sqrt_rn(variance) + eps)",
    ),
    Mutant(
        "given statistics: what the partials' means differ by is lost", "triton", "pool_mixer",
        f"{TRITON}statistics.py", "tl.sum(m2 + count * (mean - offset) * (mean - offset)) / total",
        "tl.sum(m2) / total",
    ),
    Mutant(
        "returned statistics: rows below the image count", "triton", "pool_mixer", f"{TRITON}pool_mixer.py",
        "value = tl.where(exists, value, 0.0)", "value = value",
    ),
    Mutant(
        "returned statistics: a variance that is NaN becomes 0", "triton", "pool_mixer",
        f"{TRITON}pool_mixer.py", "tl.where(square < 0.0, 0.0, square)",
        "tl.where(square > 0.0, square, 0.0)",
    ),
    Mutant(
        "parameter gradients without drop_scale", "triton", "pool_mixer", f"{TRITON}pool_mixer.py",
        "q += row * load_or_one(drop_ptr, b, b < B)[:, None]", "q += row",
    ),
    Mutant(
        "dx without layer_scale", "triton", "pool_mixer", f"{TRITON}pool_mixer.py",
        "\n        * load_or_one(scale_ptr, c, c_ok)\n", "\n",
    ),
)  # fmt: skip

MLP = (
    Mutant(
        "layer_scale does not multiply fc2's bias", "triton", "mlp", f"{TRITON}mlp/tile.py",
        "(acc + load_or_zero(b2_ptr, c, c_ok)[None, :]) * load_or_one(scale_ptr, c, c_ok)[None, :]",
        "acc * load_or_one(scale_ptr, c, c_ok)[None, :] + load_or_zero(b2_ptr, c, c_ok)[None, :]",
    ),
    Mutant(
        "returned statistics: what the rows' means differ by is lost", "triton", "mlp",
        f"{TRITON}mlp/tile.py", "tl.sum(tl.where(mine, m2, 0.0)) + count * tl.sum(deviation * deviation)",
        "tl.sum(tl.where(mine, m2, 0.0))",
    ),
    Mutant(
        "a token takes the mean of the sample before it", "triton", "mlp", f"{TRITON}mlp/forward.py",
        "mean_ptrs = mean_rstd_ptr + (first + (before + row) // HW) * 2",
        "mean_ptrs = mean_rstd_ptr + (first + row // HW) * 2",
    ),
    Mutant(
        "gelu's slope with a wrong sign", "triton", "mlp", f"{TRITON}activation.py",
        "cdf + h * (gaussian * 0.3989422804014327)", "cdf - h * (gaussian * 0.3989422804014327)",
        "backward",
    ),
    Mutant(
        "the norm's backward subtracts the same mean twice", "triton", "mlp", f"{TRITON}mlp/tile.py",
        "gamma[None, :] * dn - k0[:, None] - xhat * k1[:, None]",
        "gamma[None, :] * dn - k0[:, None] - xhat * k0[:, None]", "backward",
    ),
    Mutant(
        "large C: the norm's sums are not of the centred h", "triton", "mlp", f"{TRITON}mlp/backward_gemm.py",
        "dh * (h.to(tl.float32) - v[None, :])", "dh * h.to(tl.float32)", "backward",
    ),
    Mutant(
        "small C: activations are not multiplied by drop_scale for w2's gradient", "triton", "mlp",
        f"{TRITON}mlp/backward_fused.py", "scaled = p if drop_ptr is None else p * drop[None, :]",
        "scaled = p", "backward",
    ),
    Mutant(
        "layer_scale's gradient without fc2's bias", "triton", "mlp", f"{TRITON}mlp/backward_finish.py",
        "dscale += tl.load(b2_ptr + o).to(tl.float32) * total", "dscale += 0.0 * total", "backward",
    ),
    Mutant(
        "b2's gradient without layer_scale", "triton", "mlp", f"{TRITON}mlp/backward_finish.py",
        "round_to(scale * total, db2_ptr.dtype.element_ty)", "round_to(total, db2_ptr.dtype.element_ty)",
        "backward",
    ),
)  # fmt: skip

MUTANTS = (*POOL_MIXER, *MLP)
