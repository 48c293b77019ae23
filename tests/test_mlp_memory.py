"""What a training step of the MLP sub-block needs in memory on the CPU, and when hidden activations are kept.

The peak is that of support.memory during one step, in a process for each size, the smallest peak first. x,
the gradient of y and the parameters exist before; y and all gradients count.
"""

from functools import cache

import pytest
import torch
from support.memory import MALLOC, require_peaks
from support.mlp import make_inputs
from support.processes import python

import poolformer_kernels as pk
from poolformer_kernels.ops import mlp

# C, H = W, batch. More samples than 16 at C = 320: there y, dx, the weights' gradients and their float32 sums
# alone are 27 % of eager's peak, most of it the same for any batch; see test_what_grows_with_the_batch.
PROVIDERS = ("ours", "hidden saved", "eager")
STEPS = ((64, 56, 16), (320, 14, 64))
SHARE = 0.30  # of eager's peak at most
CODE = """
import sys
import torch
import torch.nn.functional as F
import poolformer_kernels as pk
from support.memory import peak_of

def eager(x, norm, fc1, fc2, scale):
    return x + scale.view(-1, 1, 1) * fc2(F.gelu(fc1(norm(x))))

def ours(x, norm, fc1, fc2, scale):
    return pk.ops.mlp(
        x, fc1.weight, fc1.bias, fc2.weight, fc2.bias, norm_weight=norm.weight, norm_bias=norm.bias,
        layer_scale=scale, residual=True, save_hidden=provider == "hidden saved",
    )

def problem(channels, size, batch):
    image = lambda: torch.randn(batch, channels, size, size).bfloat16().to(memory_format=torch.channels_last)
    layers = torch.nn.ModuleList((
        torch.nn.GroupNorm(1, channels),
        torch.nn.Conv2d(channels, 4 * channels, 1),
        torch.nn.Conv2d(4 * channels, channels, 1),
    )).bfloat16()
    scale = torch.ones(channels, dtype=torch.bfloat16, requires_grad=True)
    return image().requires_grad_(), image(), (*layers, scale)

def step(x, grad, layers):
    y = (eager if provider == "eager" else ours)(x, *layers)
    y.backward(grad)

torch.set_num_threads(1)
with pk.use_backend("cpp"):
    for provider in sys.argv[4:]:
        step(*problem(16, 4, 1))  # loads the code; too small to leave buffers that the step could use
        given = problem(*map(int, sys.argv[1:4]))
        print(peak_of(lambda: step(*given)))
        del given
"""


@cache
def peaks_of(*step: int) -> dict[str, int]:
    """Bytes that one training step, (C, H = W, batch), needs at its peak, by provider."""
    require_peaks()
    done = python("-c", CODE, *step, *PROVIDERS, **MALLOC)
    return dict(zip(PROVIDERS, map(int, done.stdout.split()), strict=True))


def told(peaks: dict[str, int]) -> str:
    return ", ".join(f"{name} {peak / 2**20:.1f} MiB" for name, peak in peaks.items())


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_peak_of_a_training_step(kernels, step):
    """And hidden activations that are saved count once."""
    peaks = peaks_of(*step)
    assert peaks["ours"] <= SHARE * peaks["eager"], f"{peaks['ours'] / peaks['eager']:.1%}: {told(peaks)}"
    channels, size, batch = step
    hidden = 4 * channels * size**2 * batch * 2
    assert 0.9 * hidden <= peaks["hidden saved"] - peaks["ours"] <= 1.1 * hidden, told(peaks)
    assert peaks["hidden saved"] < peaks["eager"], told(peaks)


def test_what_grows_with_the_batch(kernels):
    """Per sample, where the weights are large beside the activations."""
    large, small = peaks_of(320, 14, 64), peaks_of(320, 14, 16)
    grown = {provider: (large[provider] - small[provider]) // 48 for provider in PROVIDERS}
    assert grown["ours"] <= SHARE * grown["eager"], f"{grown['ours'] / grown['eager']:.1%}: {told(grown)}"


@pytest.mark.parametrize(
    ("channels", "isa", "dtype", "kept"),
    [
        (256, "avx512", torch.float32, 72),
        (255, "avx512", torch.float32, 0),
        (256, "avx512", torch.bfloat16, 72),
        (256, "amx", torch.bfloat16, 0),
        (256, "amx", torch.float32, 72),  # the matrix unit multiplies bfloat16 only
        (256, "amx", torch.float16, 72),
    ],
    ids=str,
)
def test_hidden_activations_are_kept_where_that_is_faster(kernels, channels, isa, dtype, kept, monkeypatch):
    """What is kept where the caller says it is in contract/mlp_backward.py."""
    monkeypatch.setattr(pk.backends.cpp, "ISA", isa)
    inputs = {n: t.to(dtype).requires_grad_() for n, t in make_inputs((2, channels, 3, 3), 4).items()}
    y = mlp(**inputs, residual=True, save_hidden=None)
    assert sum(t.numel() for t in y.grad_fn.saved_tensors if t is not None and t.shape == (72,)) == kept
