"""Triton's kernels of S12 compiled in parallel, so that a benchmark finds them in Triton's cache.

    python tests/gpu/precompile.py [--batch 256] [--jobs 12] [--dry]

A process for each stage and use: inference of the batch and of one image, forward and backward of the batch.
"""

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from part_runner import parser_of

STAGES, USES = (0, 1, 2, 3), ("inference", "one image", "training")


def run_stage(stage: int, use: str, batch: int) -> None:
    """One call of a stage as the model makes it, on Triton; stage 0 with the stem, the others with theirs."""
    import torch

    import poolformer_kernels as pk

    model = pk.create_model("poolformer_s12").to("cuda", memory_format=torch.channels_last)
    channels, side = (model.config.dims[stage - 1], 112 >> stage) if stage else (model.in_chans, 224)
    x = torch.randn(1 if use == "one image" else batch, channels, side, side, device="cuda")
    x = x.contiguous(memory_format=torch.channels_last)
    modules = (model.network[2 * stage - 1] if stage else model.patch_embed, model.network[2 * stage])
    with pk.use_backend("triton"):
        if use == "training":
            with torch.autocast("cuda", torch.bfloat16):
                y = modules[1](modules[0](x))
            y.sum().backward()
        else:
            with torch.inference_mode():
                first, second = (module.eval().bfloat16() for module in modules)
                second(first(x.bfloat16()))
    torch.cuda.synchronize()


def main() -> int:
    parser = parser_of(__doc__)
    jobs = min(12, os.cpu_count() or 1)
    parser.add_argument("--batch", type=int, default=256, metavar="N", help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=jobs, metavar="N", help="processes; default: %(default)s")
    parser.add_argument("--dry", action="store_true", help="inference of one image alone")
    parser.add_argument("--stage", type=int, choices=STAGES, help="run one stage in this process")
    parser.add_argument("--use", choices=USES, default=USES[0])
    args = parser.parse_args()
    if args.stage is not None:
        run_stage(args.stage, args.use, args.batch)
        return 0

    def compile_one(stage: int, use: str) -> int:
        command = [sys.executable, __file__, "--stage", str(stage), "--use", use, "--batch", str(args.batch)]
        code = subprocess.run(command).returncode
        print(f"stage {stage + 1}, {use}: {'ok' if code == 0 else f'failed, exit code {code}'}", flush=True)
        return code

    wanted = list(itertools.product(STAGES, USES[1:2] if args.dry else USES))
    with ThreadPoolExecutor(args.jobs) as pool:
        codes = list(pool.map(compile_one, *zip(*wanted, strict=True)))
    return 1 if any(codes) else 0


if __name__ == "__main__":
    sys.exit(main())
