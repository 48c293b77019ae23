"""The profile on a GPU: every layer is timed on the Triton kernels, beside the limits of the device."""

import torch

import poolformer_kernels as pk
from poolformer_kernels.profiling import profile


def test_times_limits_and_counts():
    model = pk.create_model("poolformer_s12")
    result = profile(model, batch=32, dtype=torch.bfloat16, device="cuda", rounds=5)
    assert (result.device, result.backend) == ("cuda", "triton")
    assert result.total.macs_fvcore == 32 * 1_822_678_528
    assert result.limits.copy > 1e11  # slower than this is no GPU's memory
    assert result.limits.matmul > 1e12
    for row in (*result.layers, *result.stages, result.total):
        assert row.time.median > 0
        assert 0 <= row.fraction < 2
    stages = sum(row.time.median for row in result.stages)
    assert 0.5 * result.total.time.median < stages < 2 * result.total.time.median
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
