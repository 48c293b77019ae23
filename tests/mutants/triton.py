"""Mutants of the Triton kernels, which run in Triton's interpreter."""

from .mutant import mutants_of

TRITON = "poolformer_kernels/backends/triton/"

POOL_MIXER = mutants_of("triton", "pool_mixer", {
    f"{TRITON}tile.py": [
        ("a window at the right and lower border counts one too many",
         "tl.minimum(size - 1 - position, REACH)", "tl.minimum(size - position, REACH)"),
        ("the adjoint divides the right neighbour by the element's window",
         "right * (vertical / window_count(w + j, W, REACH))",
         "right * (vertical / window_count(w, W, REACH))"),
        ("outside of the image there is minus the mean instead of 0",
         "tl.load(ptr, mask=ok, other=shift)", "tl.load(ptr, mask=ok, other=0.0)"),
    ],
    f"{TRITON}pool_mixer.py": [
        ("epsilon is added outside the root",
         "1.0 / tl.sqrt_rn(variance + eps)", "1.0 / (tl.sqrt_rn(variance) + eps)"),
        ("returned statistics: rows below the image count",
         "value = tl.where(exists, value, 0.0)", "value = value"),
        ("returned statistics: a variance that is NaN becomes 0",
         "tl.where(square < 0.0, 0.0, square)", "tl.where(square > 0.0, square, 0.0)"),
        ("parameter gradients without drop_scale",
         "q += row * load_or_one(drop_ptr, b, b < B)[:, None]", "q += row"),
        ("dx without layer_scale", "\n        * load_or_one(scale_ptr, c, c_ok)\n", "\n"),
    ],
    f"{TRITON}statistics.py": [
        ("given statistics: what the partials' means differ by is lost",
         "tl.sum(m2 + count * (mean - offset) * (mean - offset)) / total", "tl.sum(m2) / total"),
    ],
})  # fmt: skip

MLP = mutants_of("triton", "mlp", {
    f"{TRITON}mlp/tile.py": [
        ("layer_scale does not multiply fc2's bias",
         "(acc + load_or_zero(b2_ptr, c, c_ok)[None, :]) * load_or_one(scale_ptr, c, c_ok)[None, :]",
         "acc * load_or_one(scale_ptr, c, c_ok)[None, :] + load_or_zero(b2_ptr, c, c_ok)[None, :]"),
        ("returned statistics: what the rows' means differ by is lost",
         "tl.sum(tl.where(mine, m2, 0.0)) + count * tl.sum(deviation * deviation)",
         "tl.sum(tl.where(mine, m2, 0.0))"),
        ("the norm's backward subtracts the same mean twice",
         "gamma[None, :] * dn - k0[:, None] - xhat * k1[:, None]",
         "gamma[None, :] * dn - k0[:, None] - xhat * k0[:, None]", "backward"),
    ],
    f"{TRITON}mlp/forward.py": [
        ("a token takes the mean of the sample before it",
         "mean_ptrs = mean_rstd_ptr + (first + (before + row) // HW) * 2",
         "mean_ptrs = mean_rstd_ptr + (first + row // HW) * 2"),
    ],
    f"{TRITON}activation.py": [
        ("gelu's slope with a wrong sign", "cdf + h * (gaussian * 0.3989422804014327)",
         "cdf - h * (gaussian * 0.3989422804014327)", "backward"),
    ],
    f"{TRITON}mlp/backward_gemm.py": [
        ("large C: the norm's sums are not of the centred h",
         "dh * (h.to(tl.float32) - v[None, :])", "dh * h.to(tl.float32)"),
    ],
    f"{TRITON}mlp/backward_fused.py": [
        ("small C: activations are not multiplied by drop_scale for w2's gradient",
         "scaled = p if drop_ptr is None else p * drop[None, :]", "scaled = p", "backward"),
    ],
    f"{TRITON}mlp/backward_finish.py": [
        ("layer_scale's gradient without fc2's bias",
         "dscale += tl.load(b2_ptr + o).to(tl.float32) * total", "dscale += 0.0 * total", "backward"),
        ("b2's gradient without layer_scale", "round_to(scale * total, db2_ptr.dtype.element_ty)",
         "round_to(total, db2_ptr.dtype.element_ty)", "backward"),
    ],
})  # fmt: skip

MUTANTS = (*POOL_MIXER, *MLP)
