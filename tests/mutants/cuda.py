"""Mutants of the CUDA C++ kernels; their source runs on the host (tests/cuda_executor)."""

from .mutant import mutants_of

MIXER, MLP, CORE = "csrc/cuda/pool_mixer/", "csrc/cuda/mlp/", "csrc/cuda/core/"

POOL_MIXER = mutants_of("cuda", "pool_mixer", {
    f"{MIXER}walk.cuh": [
        ("the row at which windows shrink is one too low",
         "shrink = tiling.height > 2 && place.top < tiling.height - 1 ? tiling.height - 1 - place.top : -1;",
         "shrink = tiling.height > 2 && place.top < tiling.height - 1 ? tiling.height - place.top : -1;"),
    ],
    f"{MIXER}any_pool.cuh": [
        ("other pools: the adjoint divides by the element's window, not its neighbour's",
         "neighbour / window_count_any(j, tiling.width, tiling.pool)",
         "neighbour / window_count_any(w, tiling.width, tiling.pool)"),
        ("other pools: returned statistics have no sums", "moments.add(element(rounded, 0), origin);", ";"),
    ],
    f"{MIXER}forward.cuh": [
        ("returned statistics: the last warp's sums are lost", "i < warps", "i < warps - 1"),
        ("returned statistics: a variance that is NaN or infinite is clamped",
         "isnan(second) || isinf(second) ? second : fmaxf(second - first * mean, 0.0f)",
         "fmaxf(second - first * mean, 0.0f)"),
    ],
    f"{CORE}norm_stats.cu": [
        ("statistics: what lies behind a tail counts, too",
         "(each * kThreads + threadIdx.x) * kWidth < count", "each < kLoads"),
        ("statistics: samples that are not aligned take the path of vectors",
         "reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.sample * sizeof(T) % 16 == 0",
         "reinterpret_cast<uintptr_t>(p.x) % 16 == 0"),
    ],
    f"{MIXER}backward.cuh": [
        ("parameter gradients without drop_scale",
         "p.drop_scale.at(i, 1.0f) * p.q[i * channels + c]", "p.q[i * channels + c]"),
        ("layer_scale's gradient times layer_scale instead of the weight",
         "p.dlayer_scale[c] = total * p.weight.at(c, 1.0f);",
         "p.dlayer_scale[c] = total * p.layer_scale.at(c, 1.0f);"),
    ],
})  # fmt: skip

MLP_FORWARD = mutants_of("cuda", "mlp", {
    f"{CORE}device.cuh": [
        ("epsilon is added outside the root",
         "1.0f / sqrtf(m.m2 / m.count + eps)", "1.0f / (sqrtf(m.m2 / m.count) + eps)"),
    ],
    f"{MLP}forward_tile.cuh": [
        ("a tile of several samples takes the first one's drop_scale",
         "p.drop_scale.at(b, 1)", "p.drop_scale.at(first, 1)"),
        ("layer_scale does not multiply fc2's bias",
         "(acc[4 * i + e / 2][2 * half + e % 2] + table.b2()[c + e]) * table.scale()[c + e] * drop",
         "(acc[4 * i + e / 2][2 * half + e % 2] * table.scale()[c + e] + table.b2()[c + e]) * drop"),
        ("returned statistics: slots behind the last whole tile are not emptied",
         "next <= start + kUnit", "next < start + kUnit"),
    ],
})  # fmt: skip

MLP_BACKWARD = mutants_of("cuda", "mlp", {
    f"{MLP}backward_dgrad.cuh": [
        ("dx without the residual", "for (int e = 0; e < 8; ++e) dx[e] += grad[e];", ";"),
        ("dx without drop_scale", "dp[t][i] *= slope[t][i] * drop[i / 2];", "dp[t][i] *= slope[t][i];"),
        ("a wrong sign in the norm's backward", "dx[e] = rstd * (gamma[e] * dn - k0 - xhat * k1);",
         "dx[e] = rstd * (gamma[e] * dn - k0 + xhat * k1);"),
    ],
    f"{MLP}backward_small.cuh": [
        ("drop_scale's gradient: the biases of the first eight channels for all",
         "total += grad[e] * bias[c + e];", "total += grad[e] * bias[e];"),
        ("weight gradients: half of the lanes' splits of the tokens are lost",
         "other < kSumLanes", "other < kSumLanes / 2"),
        ("sums over tiles: the last lane's are lost", "other < kLanes", "other < kLanes - 1"),
    ],
    f"{MLP}backward_tile.cuh": [
        ("gelu's slope without 1 / sqrt(2 pi)", "x * 0.39894228f * exp2_flushed(x * x * -0.72134752f) + phi",
         "x * exp2_flushed(x * x * -0.72134752f) + phi"),
    ],
})  # fmt: skip

MUTANTS = (*POOL_MIXER, *MLP_FORWARD, *MLP_BACKWARD)
