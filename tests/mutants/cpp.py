"""Mutants of the CPU's kernels: of those of every level, at AVX2, and of those of AMX tiles alone."""

from .mutant import Mutant

MIXER, MLP, CORE = "csrc/cpu/pool_mixer/", "csrc/cpu/mlp/", "csrc/cpu/core/"

POOL_MIXER = (
    Mutant(
        "nchw: the top row's windows count as whole ones", "cpp", "pool_mixer", f"{MIXER}nchw.h",
        "rows != p.pool", "rows != p.pool && h > 0",
    ),
    Mutant(
        "nchw: no row above at the start of a strip", "cpp", "pool_mixer", f"{MIXER}nchw.h",
        "if (begin > 0) previous = across(begin - 1, center);", ";",
    ),
    Mutant(
        "nchw: lanes behind a row keep minus the shift", "cpp", "pool_mixer", f"{MIXER}nchw.h",
        "v = head(v, p.width - w);", ";",
    ),
    Mutant(
        "nchw: the adjoint's weight of a column is not read", "cpp", "pool_mixer", f"{MIXER}nchw.h",
        "v * read<vf>(p.col_weight + w)", "v * splat(p.col_weight[0])",
    ),
    Mutant(
        "channels_last: the last column counts as an inner one", "cpp", "pool_mixer",
        f"{MIXER}channels_last.h",
        "emit(width - 1, sum, next_center, True{});", "emit(width - 1, sum, next_center, False{});",
    ),
    Mutant(
        "channels_last: lanes behind the last channel count in the statistics", "cpp", "pool_mixer",
        f"{MIXER}channels_last.h", "d = {d.a * used.a, d.b * used.b};", ";",
    ),
    Mutant(
        "channels_last: dx has a residual in the plain form", "cpp", "pool_mixer", f"{MIXER}channels_last.h",
        "splat(residual)", "splat(1)",
    ),
    Mutant(
        "epsilon is added outside the root", "cpp", "pool_mixer", f"{MIXER}pool_mixer.cpp",
        "1.0 / std::sqrt(m.m2 / m.count + args.eps)", "1.0 / (std::sqrt(m.m2 / m.count) + args.eps)",
    ),
    Mutant(
        "given statistics: every sample takes the first one's", "cpp", "pool_mixer", f"{MIXER}pool_mixer.cpp",
        "merged(stats.data + b * stats.tiles * 3, stats.tiles)", "merged(stats.data, stats.tiles)",
    ),
    Mutant(
        "returned statistics: the last partial is lost", "cpp", "pool_mixer", f"{MIXER}pool_mixer.cpp",
        "merged(p.y_partials + b * call.items * 3, call.items)",
        "merged(p.y_partials + b * call.items * 3, call.items > 1 ? call.items - 1 : 1)",
    ),
    Mutant(
        "statistics: the last element of a tail is lost", "cpp", "pool_mixer", f"{CORE}sample_stats.h",
        "first += plain_sum(tail, n - i);", "first += plain_sum(tail, n - i - 1);",
    ),
    Mutant(
        "an infinite weight or bias of the norm does not become NaN", "cpp", "pool_mixer",
        f"{MIXER}pool_mixer.cpp", "(gamma[c] + 0.0f * (gamma[c] + coef[c])) * layer[c]",
        "gamma[c] * layer[c]",
    ),
    Mutant(
        "the weight's gradient without layer_scale", "cpp", "pool_mixer", f"{MIXER}pool_mixer.cpp",
        "dw[c] = call.layer[c] * total;", "dw[c] = total;",
    ),
    Mutant(
        "parameter gradients with the first sample's drop_scale", "cpp", "pool_mixer",
        f"{MIXER}pool_mixer.cpp",
        "static_cast<double>(drop[b]) * q[b * channels + c]",
        "static_cast<double>(drop[0]) * q[b * channels + c]",
    ),
)  # fmt: skip

MLP_ALL_LEVELS = (
    Mutant(
        "every token takes the first sample's drop_scale", "cpp", "mlp", f"{MLP}forward.h",
        "drop[t] = p.drop[b];", "drop[t] = p.drop[0];",
    ),
    Mutant(
        "layer_scale does not multiply fc2's bias of even channels", "cpp", "mlp", f"{MLP}forward.h",
        "(load(row_a + l) + bias_a) * scale_a", "load(row_a + l) * scale_a + bias_a",
    ),
    Mutant(
        "few tokens: the last part of the hidden channels is lost", "cpp", "mlp", f"{MLP}forward.h",
        "part < p.parts", "part < p.parts - 1",
    ),
    Mutant(
        "saved hidden: an infinity is clamped in float16", "cpp", "mlp", f"{MLP}forward.h",
        "store(in + l, v - v == 0.0f ? clamped : v);", "store(in + l, clamped);",
    ),
    Mutant(
        "channels_last: an odd last channel of half precision is not stored", "cpp", "mlp",
        "csrc/cpu/product/token_tile.h",
        "__builtin_memcpy(rows + t * step + channels - 1, tile.data + whole * tile.row + t, sizeof(T));", ";",
    ),
    Mutant(
        "returned statistics: an odd last channel counts in M2 alone", "cpp", "mlp",
        "csrc/cpu/product/token_tile.h", "sum += a;", ";",
    ),
    Mutant(
        "the variance is that of a sample, divided by n - 1", "cpp", "mlp", f"{MLP}forward.cpp",
        "1.0 / std::sqrt(m.m2 / m.count + eps)", "1.0 / std::sqrt(m.m2 / (m.count - 1) + eps)",
    ),
    Mutant(
        "gelu's slope in float32 without 1 / sqrt(2 pi)", "cpp", "mlp", "csrc/common/activation_math.h",
        "x * bell * 0.39894228f + phi", "x * bell + phi",
    ),
    Mutant(
        "gelu's slope in half precision: the polynomial is not cut off on the left", "cpp", "mlp",
        "csrc/common/activation_math.h", "return x < -4.4f ? V{} : above;", "return above;",
    ),
    Mutant(
        "relu of NaN is 0", "cpp", "mlp", "csrc/common/activation_math.h",
        "return {x < 0.0f ? V{} : x, x <= 0.0f ? V{} : one};",
        "return {x > 0.0f ? x : V{}, x <= 0.0f ? V{} : one};",
    ),
    Mutant(
        "dh of even hidden channels without drop_scale", "cpp", "mlp", f"{MLP}backward.h",
        "dp_a * d * a.slope", "dp_a * a.slope",
    ),
    Mutant(
        "w1's gradient without the norm's bias", "cpp", "mlp", f"{MLP}backward.h",
        "m * load(p.gamma + c + at) + db1 * load(p.beta + c + at)", "m * load(p.gamma + c + at)",
    ),
    Mutant(
        "b2's gradient without layer_scale", "cpp", "mlp", f"{MLP}backward.h",
        "p.db2[c + i] = p.scale[c + i] * p.t[c + i];", "p.db2[c + i] = p.t[c + i];",
    ),
    Mutant(
        "the norm's backward loses the tail of a sample", "cpp", "mlp", f"{MLP}backward.h",
        "second += v * (load(in + i, n - i) - mean);", ";",
    ),
    Mutant(
        "b2's gradient has the last tile of a block alone", "cpp", "mlp", f"{MLP}backward.cpp",
        "t[c] += own.g_sums[i * p.out + c];", "t[c] = own.g_sums[i * p.out + c];",
    ),
    Mutant(
        "drop_scale's gradient: groups of samples begin with the first sample", "cpp", "mlp",
        f"{MLP}backward.cpp", "(first + at + l) / p.pixels", "(at + l) / p.pixels",
    ),
)  # fmt: skip

MLP_TILES = (
    Mutant(
        "tokens as rows: every sample takes the first one's drop_scale", "amx", "mlp",
        f"{MLP}rows_forward.h", "splat(p.drop[b])", "splat(p.drop[0])",
    ),
    Mutant(
        "tokens as rows: sums of former hidden chunks are lost", "amx", "mlp", f"{MLP}rows_forward.h",
        "begin == 0", "begin >= 0",
    ),
    Mutant(
        "few tokens: sums of former hidden chunks are lost", "amx", "mlp", f"{MLP}shared_forward.h",
        "j > 0", "j > p.hidden",
    ),
    Mutant(
        "backward: the second token of a pair takes the first one's drop_scale", "amx", "mlp",
        f"{MLP}rows_backward.h", "dh[i] *= splat(w.drop[i / 2]);", "dh[i] *= splat(w.drop[0]);",
    ),
    Mutant(
        "backward: sums of former hidden channels are lost", "amx", "mlp", f"{MLP}rows_backward.h",
        "k > 0", "k > all",
    ),
    Mutant(
        "backward: a wrong sign in the norm's backward", "amx", "mlp", f"{MLP}rows_parameters.h",
        "v = (v * rstd - k0) - (load(x + i) - mean) * k1;",
        "v = (v * rstd - k0) + (load(x + i) - mean) * k1;",
    ),
)  # fmt: skip

MUTANTS = (*POOL_MIXER, *MLP_ALL_LEVELS, *MLP_TILES)
