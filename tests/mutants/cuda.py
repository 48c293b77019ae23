"""Mutants of the CUDA C++ kernels; their source runs on the host (tests/cuda_executor)."""

from .mutant import Mutant

MIXER, MLP, CORE = "csrc/cuda/pool_mixer/", "csrc/cuda/mlp/", "csrc/cuda/core/"

POOL_MIXER = (
    Mutant(
        "the row at which windows shrink is one too low", "cuda", "pool_mixer", f"{MIXER}walk.cuh",
        "shrink = tiling.height > 2 && place.top < tiling.height - 1 ? tiling.height - 1 - place.top : -1;",
        "shrink = tiling.height > 2 && place.top < tiling.height - 1 ? tiling.height - place.top : -1;",
    ),
    Mutant(
        "other pools: the adjoint divides by the element's window, not its neighbour's", "cuda", "pool_mixer",
        f"{MIXER}any_pool.cuh",
        "neighbour / window_count_any(j, tiling.width, tiling.pool)",
        "neighbour / window_count_any(w, tiling.width, tiling.pool)",
    ),
    Mutant(
        "returned statistics: the last warp's sums are lost", "cuda", "pool_mixer", f"{MIXER}forward.cuh",
        "i < warps", "i < warps - 1",
    ),
    Mutant(
        "returned statistics: a variance that is NaN or infinite is clamped", "cuda", "pool_mixer",
        f"{MIXER}forward.cuh",
        "isnan(second) || isinf(second) ? second : fmaxf(second - first * mean, 0.0f)",
        "fmaxf(second - first * mean, 0.0f)",
    ),
    Mutant(
        "statistics: what lies behind a tail counts, too", "cuda", "pool_mixer", f"{CORE}norm_stats.cu",
        "(each * kThreads + threadIdx.x) * kWidth < count", "each < kLoads",
    ),
    Mutant(
        "statistics: samples that are not aligned take the path of vectors", "cuda", "pool_mixer",
        f"{CORE}norm_stats.cu",
        "reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.sample * sizeof(T) % 16 == 0",
        "reinterpret_cast<uintptr_t>(p.x) % 16 == 0",
    ),
    Mutant(
        "parameter gradients without drop_scale", "cuda", "pool_mixer", f"{MIXER}backward.cuh",
        "p.drop_scale.at(i, 1.0f) * p.q[i * channels + c]", "p.q[i * channels + c]",
    ),
    Mutant(
        "layer_scale's gradient times layer_scale instead of the weight", "cuda", "pool_mixer",
        f"{MIXER}backward.cuh", "p.dlayer_scale[c] = total * p.weight.at(c, 1.0f);",
        "p.dlayer_scale[c] = total * p.layer_scale.at(c, 1.0f);",
    ),
)  # fmt: skip

MLP_FORWARD = (
    Mutant(
        "epsilon is added outside the root", "cuda", "mlp", f"{CORE}device.cuh",
        "1.0f / sqrtf(m.m2 / m.count + eps)", "1.0f / (sqrtf(m.m2 / m.count) + eps)",
    ),
    Mutant(
        "a tile of several samples takes the first one's drop_scale", "cuda", "mlp", f"{MLP}forward_tile.cuh",
        "p.drop_scale.at(b, 1)", "p.drop_scale.at(first, 1)",
    ),
    Mutant(
        "layer_scale does not multiply fc2's bias", "cuda", "mlp", f"{MLP}forward_tile.cuh",
        "(acc[4 * i + e / 2][2 * half + e % 2] + table.b2()[c + e]) * table.scale()[c + e] * drop",
        "(acc[4 * i + e / 2][2 * half + e % 2] * table.scale()[c + e] + table.b2()[c + e]) * drop",
    ),
    Mutant(
        "returned statistics: slots behind the last whole tile are not emptied", "cuda", "mlp",
        f"{MLP}forward_tile.cuh", "next <= start + kUnit", "next < start + kUnit",
    ),
)  # fmt: skip

MLP_BACKWARD = (
    Mutant(
        "dx without the residual", "cuda", "mlp", f"{MLP}backward_dgrad.cuh",
        "for (int e = 0; e < 8; ++e) dx[e] += grad[e];", ";",
    ),
    Mutant(
        "dx without drop_scale", "cuda", "mlp", f"{MLP}backward_dgrad.cuh",
        "dp[t][i] *= slope[t][i] * drop[i / 2];", "dp[t][i] *= slope[t][i];",
    ),
    Mutant(
        "a wrong sign in the norm's backward", "cuda", "mlp", f"{MLP}backward_dgrad.cuh",
        "dx[e] = rstd * (gamma[e] * dn - k0 - xhat * k1);",
        "dx[e] = rstd * (gamma[e] * dn - k0 + xhat * k1);",
    ),
    Mutant(
        "drop_scale's gradient: the biases of the first eight channels for all", "cuda", "mlp",
        f"{MLP}backward_small.cuh", "total += grad[e] * bias[c + e];", "total += grad[e] * bias[e];",
    ),
    Mutant(
        "weight gradients: the last lane's splits of the tokens are lost", "cuda", "mlp",
        f"{MLP}backward_small.cuh", "other < kSumLanes", "other < kSumLanes - 1",
    ),
    Mutant(
        "sums over tiles: the last lane's are lost", "cuda", "mlp", f"{MLP}backward_small.cuh",
        "other < kLanes", "other < kLanes - 1",
    ),
    Mutant(
        "gelu's slope without 1 / sqrt(2 pi)", "cuda", "mlp", f"{MLP}backward_tile.cuh",
        "x * 0.39894228f * exp2_flushed(x * x * -0.72134752f) + phi",
        "x * exp2_flushed(x * x * -0.72134752f) + phi",
    ),
)  # fmt: skip

MUTANTS = (*POOL_MIXER, *MLP_FORWARD, *MLP_BACKWARD)
