"""Mutants of the CPU's kernels: of those of every level, at AVX2, and of those of AMX tiles alone."""

from .mutant import mutants_of

MIXER, MLP, CORE = "csrc/cpu/pool_mixer/", "csrc/cpu/mlp/", "csrc/cpu/core/"

POOL_MIXER = mutants_of("cpp", "pool_mixer", {
    f"{MIXER}nchw.h": [
        ("nchw: the top row's windows count as whole ones", "rows != p.pool", "rows != p.pool && h > 0"),
        ("nchw: no row above at the start of a strip",
         "if (begin > 0) previous = across(begin - 1, center);", ";"),
        ("nchw: lanes behind a row keep minus the shift", "v = head(v, p.width - w);", ";"),
        ("nchw: the adjoint's weight of a column is not read",
         "v * read<vf>(p.col_weight + w)", "v * splat(p.col_weight[0])"),
    ],
    f"{MIXER}channels_last.h": [
        ("channels_last: the last column counts as an inner one",
         "emit(width - 1, sum, next_center, True{});", "emit(width - 1, sum, next_center, False{});"),
        ("channels_last: lanes behind the last channel count in the statistics",
         "d = {d.a * used.a, d.b * used.b};", ";"),
        ("channels_last: dx has a residual in the plain form", "splat(residual)", "splat(1)"),
    ],
    f"{MIXER}pool_mixer.cpp": [
        ("epsilon is added outside the root",
         "1.0 / std::sqrt(m.m2 / m.count + args.eps)", "1.0 / (std::sqrt(m.m2 / m.count) + args.eps)"),
        ("given statistics: every sample takes the first one's",
         "merged(stats.data + b * stats.tiles * 3, stats.tiles)", "merged(stats.data, stats.tiles)"),
        ("returned statistics: the last partial is lost",
         "merged(p.y_partials + b * call.items * 3, call.items)",
         "merged(p.y_partials + b * call.items * 3, call.items > 1 ? call.items - 1 : 1)"),
        ("an infinite weight or bias of the norm does not become NaN",
         "(gamma[c] + 0.0f * (gamma[c] + coef[c])) * layer[c]", "gamma[c] * layer[c]"),
        ("the weight's gradient without layer_scale", "dw[c] = call.layer[c] * total;", "dw[c] = total;"),
        ("parameter gradients with the first sample's drop_scale",
         "static_cast<double>(drop[b]) * q[b * channels + c]",
         "static_cast<double>(drop[0]) * q[b * channels + c]"),
    ],
    f"{CORE}sample_stats.h": [
        ("statistics: the last element of a tail is lost",
         "first += plain_sum(tail, n - i);", "first += plain_sum(tail, n - i - 1);"),
    ],
})  # fmt: skip

MLP_ALL_LEVELS = mutants_of("cpp", "mlp", {
    f"{MLP}forward.h": [
        ("every token takes the first sample's drop_scale", "drop[t] = p.drop[b];", "drop[t] = p.drop[0];"),
        ("layer_scale does not multiply fc2's bias of even channels",
         "(load(row_a + l) + bias_a) * scale_a", "load(row_a + l) * scale_a + bias_a"),
        ("few tokens: the last part of the hidden channels is lost", "part < p.parts", "part < p.parts - 1"),
        ("saved hidden: an infinity is clamped in float16",
         "store(in + l, v - v == 0.0f ? clamped : v);", "store(in + l, clamped);"),
    ],
    "csrc/cpu/isa/vec.h": [
        ("bfloat16 is cut off instead of rounded", "u + 0x7fffu + ((u >> 16) & 1u)", "u"),
    ],
    "csrc/cpu/product/token_tile.h": [
        ("channels_last: an odd last channel of half precision is not stored",
         "__builtin_memcpy(rows + t * step + channels - 1, tile.data + whole * tile.row + t, sizeof(T));",
         ";"),
        ("returned statistics: an odd last channel counts in M2 alone", "sum += a;", ";"),
    ],
    f"{MLP}forward.cpp": [
        ("the variance is that of a sample, divided by n - 1",
         "1.0 / std::sqrt(m.m2 / m.count + eps)", "1.0 / std::sqrt(m.m2 / (m.count - 1) + eps)"),
    ],
    "csrc/common/activation_math.h": [
        ("gelu's slope in float32 without 1 / sqrt(2 pi)", "x * bell * 0.39894228f + phi", "x * bell + phi"),
        ("gelu's slope in half precision: the polynomial is not cut off on the left",
         "return x < -4.4f ? V{} : above;", "return above;"),
        ("relu of NaN is 0", "return {x < 0.0f ? V{} : x, x <= 0.0f ? V{} : one};",
         "return {x > 0.0f ? x : V{}, x <= 0.0f ? V{} : one};"),
    ],
    f"{MLP}backward.h": [
        ("dh of even hidden channels without drop_scale", "dp_a * d * a.slope", "dp_a * a.slope"),
        ("w1's gradient without the norm's bias",
         "m * load(p.gamma + c + at) + db1 * load(p.beta + c + at)", "m * load(p.gamma + c + at)"),
        ("b2's gradient without layer_scale",
         "p.db2[c + i] = p.scale[c + i] * p.t[c + i];", "p.db2[c + i] = p.t[c + i];"),
        ("the norm's backward loses the tail of a sample",
         "second += v * (load(in + i, n - i) - mean);", ";"),
    ],
    f"{MLP}backward.cpp": [
        ("b2's gradient has the last tile of a block alone",
         "t[c] += own.g_sums[i * p.out + c];", "t[c] = own.g_sums[i * p.out + c];"),
        ("drop_scale's gradient: groups of samples begin with the first sample",
         "(first + at + l) / p.pixels", "(at + l) / p.pixels"),
    ],
})  # fmt: skip

MLP_TILES = mutants_of("amx", "mlp", {
    f"{MLP}rows_forward.h": [
        ("tokens as rows: every sample takes the first one's drop_scale",
         "splat(p.drop[b])", "splat(p.drop[0])"),
        ("tokens as rows: sums of former hidden chunks are lost", "begin == 0", "begin >= 0"),
    ],
    f"{MLP}shared_forward.h": [
        ("few tokens: sums of former hidden chunks are lost", "j > 0", "j > p.hidden"),
    ],
    f"{MLP}rows_backward.h": [
        ("backward: the second token of a pair takes the first one's drop_scale",
         "dh[i] *= splat(w.drop[i / 2]);", "dh[i] *= splat(w.drop[0]);"),
        ("backward: sums of former hidden channels are lost", "k > 0", "k > all"),
    ],
    f"{MLP}rows_parameters.h": [
        ("backward: a wrong sign in the norm's backward", "v = (v * rstd - k0) - (load(x + i) - mean) * k1;",
         "v = (v * rstd - k0) + (load(x + i) - mean) * k1;"),
    ],
})  # fmt: skip

MUTANTS = (*POOL_MIXER, *MLP_ALL_LEVELS, *MLP_TILES)
