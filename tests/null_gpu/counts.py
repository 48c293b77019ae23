"""What S12 and each operator launch: the one place to edit where a change makes them fewer."""

# The package's own kernels, exactly. A block is two kernels, and four where its MLP is wide.
_BLOCKS = {
    "triton": {"pool_mixer_fwd": 12, "mlp_fwd": 4, "mlp_prepare": 8, "mlp_fc1": 8, "mlp_fc2": 8},
    "cuda": {
        "pool_mixer_fwd": 12, "mlp_pack": 4, "mlp_fwd_sm90": 4, "mlp_prepare": 8, "mlp_fc1": 8, "mlp_fc2": 8,
    },
}  # fmt: skip
INFERENCE = {name: {"bias_stats": 4, **blocks, "pool_head": 1} for name, blocks in _BLOCKS.items()}
FORWARD = {"triton": {"sample_stats": 4, **_BLOCKS["triton"]}, "cuda": {"norm_stats": 4, **_BLOCKS["cuda"]}}
# A training step casts the narrow MLPs' weights in Triton too. Of the wide MLPs cuBLAS computes two products.
_WIDE = {
    "mlp_bwd_prepare": 12,
    "mlp_bwd_hidden": 8,
    "mlp_bwd_sample": 12,
    "mlp_bwd_dn": 8,
    "mlp_bwd_finish": 12,
}
TRAINING = {
    "triton": {
        **FORWARD["triton"], **_WIDE, "mlp_prepare": 12, "mlp_bwd_wgrad": 4, "mlp_bwd_dx": 4,
        "pool_mixer_bwd_reduce": 12, "pool_mixer_bwd_sample": 12, "pool_mixer_bwd_dx": 12,
    },
    "cuda": {
        **FORWARD["cuda"], **_WIDE, "mlp_bwd_wgrad": 4, "mlp_bwd_dgrad": 4, "mlp_bwd_tokens": 4,
        "mlp_bwd_columns": 4, "mlp_bwd_weights": 4,
        "pool_mixer_bwd_reduce": 12, "pool_mixer_bwd_q": 12, "pool_mixer_bwd_finish": 12,
        "pool_mixer_bwd_apply": 12,
    },
}  # fmt: skip
# At batch 256 the narrow MLPs have so many partials that they are added in one step more.
AT_256 = {
    "triton": {**TRAINING["triton"], "mlp_bwd_columns": 4},
    "cuda": {**TRAINING["cuda"], "mlp_bwd_columns": 8},
}
# Launches of torch and its libraries, at most: their number is theirs. In a training step 30 are cuDNN's and
# cuBLAS's, about 40 casts of the convolutions and the head.
OTHERS = {"inference": 5, "triton": 100, "cuda": 128}


# ---- one call of an operator: (forward, backward), on any capability, in any dtype and layout --------------

MIXER_CALL = {
    "triton": (
        {"sample_stats": 1, "pool_mixer_fwd": 1},
        {"pool_mixer_bwd_reduce": 1, "pool_mixer_bwd_sample": 1, "pool_mixer_bwd_dx": 1},
    ),
    "cuda": (
        {"norm_stats": 1, "pool_mixer_fwd": 1},
        {
            "pool_mixer_bwd_reduce": 1, "pool_mixer_bwd_q": 1, "pool_mixer_bwd_finish": 1,
            "pool_mixer_bwd_apply": 1,
        },
    ),
}  # fmt: skip
# One kernel prepares all operands, one makes the samples' sums, one adds up all gradients' partials. Besides
# them: of a narrow MLP the weights and x; of a wide one the activations, two products for the weights, and x.
_BACKWARD = {"mlp_bwd_prepare": 1, "mlp_bwd_sample": 1, "mlp_bwd_finish": 1}
_NARROW = (
    {"sample_stats": 1, "mlp_fwd": 1},
    {**_BACKWARD, "mlp_bwd_wgrad": 1, "mlp_bwd_dx": 1},
)


def mlp_call(
    backend: str, dtype: str, channels: int, capability: tuple[int, int]
) -> tuple[dict[str, int], dict[str, int]]:
    """C++ has a kernel for few widths, of half operands; the others are Triton's on both backends."""
    if channels >= 320:
        products = {} if dtype == "bfloat16" else {"mlp_bwd_outer": 2}  # of bfloat16 they are cuBLAS's
        forward = {"sample_stats": 1, "mlp_prepare": 1, "mlp_fc1": 1, "mlp_fc2": 1}
        return forward, {**_BACKWARD, "mlp_bwd_hidden": 1, **products, "mlp_bwd_dn": 1}
    if backend == "cuda" and dtype != "float32" and channels in (64, 96, 128):
        fused = {"mlp_pack": 1, "mlp_fwd_sm90": 1} if capability == (9, 0) else {"mlp_fwd": 1}
        names = ("prepare", "tokens", "wgrad", "sample", "dgrad", "columns", "weights", "finish")
        return {"norm_stats": 1, **fused}, {f"mlp_bwd_{name}": 1 for name in names}
    return _NARROW


# No samples: nothing but the parameters' gradients, which are zero, may take a kernel.
EMPTY_CALL = {("cuda", "pool_mixer"): {"pool_mixer_bwd_finish": 1}}
