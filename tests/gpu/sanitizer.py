"""Small calls of every operator and CUDA backend under compute-sanitizer: memcheck, then racecheck.

    python tests/gpu/sanitizer.py

Where the tool is missing, or does not support the device, it says so and leaves with 0.
"""

import os
import re
import shutil
import subprocess
import sys

BACKENDS = ("cuda", "triton")
CASES = (  # shape, channels_last, dtype
    ((2, 64, 7, 9), True, "bfloat16"),
    ((3, 96, 5, 13), True, "float16"),
    ((1, 17, 6, 5), False, "float32"),
    ((2, 64, 8, 8), False, "bfloat16"),
)


def calls(device: str, backends: tuple[str, ...]) -> None:
    """Forward and backward of both operators on the cases."""
    import torch

    import poolformer_kernels as pk

    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).mul_(0.1).to(dtype)

    for shape, channels_last, name in CASES:
        dtype, channels = getattr(torch, name), shape[1]
        x = randn(*shape, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        sizes = [(channels,)] * 3 + [
            (4 * channels, channels),
            (4 * channels,),
            (channels, 4 * channels),
            (channels,),
        ]
        params = [randn(*size, dtype=dtype).requires_grad_() for size in sizes]
        weight, bias, layer_scale, *mlp = params
        x.requires_grad_()
        options = {"layer_scale": layer_scale, "residual": True}
        for backend in backends:
            with pk.use_backend(backend):
                y = pk.ops.pool_mixer(x, weight, bias, **options)
                z = pk.ops.mlp(y, *mlp, norm_weight=weight, norm_bias=bias, **options)
                gradients = torch.autograd.grad(z, [x, *params], torch.ones_like(z))
            assert all(t.isfinite().all() for t in (z, *gradients)), (backend, shape, name)


def main() -> int:
    """0 where nothing was found or nothing could be watched, else 1."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(f"{home}/bin/compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer: skipped, it is not installed")
        return 0
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor an allocation of its own
    failed = False
    for tool in ("memcheck", "racecheck"):
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
        done = subprocess.run(
            [*command, sys.executable, __file__, "calls"], env=env, capture_output=True, text=True
        )
        output = done.stdout + done.stderr
        if done.returncode != 0 and (refused := re.search(r"=+ .*not supported.*", output)):
            print(f"compute-sanitizer: skipped, {refused[0].strip('= ')}")
            return 0
        failed |= done.returncode != 0
        print(f"compute-sanitizer, {tool}: {'FAILED' if done.returncode else 'ok'}", flush=True)
        if done.returncode != 0:
            print(output[-8000:], flush=True)
    return int(failed)


if __name__ == "__main__":
    if sys.argv[1:] == ["calls"]:
        calls("cuda", BACKENDS)
    else:
        sys.exit(main())
