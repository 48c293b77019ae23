"""The slowest kernels of S12's inference in bfloat16, and what Nsight Compute says of them.

    python tests/gpu/slowest.py [--out DIR] [--batch 256] [--dry]

The times of all kernels go to DIR/kernels.txt, ncu's figures of the slowest five to DIR/ncu.csv. Without ncu
it leaves with 77: skipped, as where this user may not read the device's counters.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from part_runner import SKIPPED, parser_of

COUNT = 5

REFUSALS = {  # what ncu says where it cannot profile
    "ERR_NVGPUCTRPERM": "this user may not read the device's performance counters",
    "Failed to initialize the profiler": "its library does not load on this machine",
}


def inference(batch: int):
    """One call of the model, everything compiled."""
    import torch

    import poolformer_kernels as pk

    options = {"dtype": torch.bfloat16, "memory_format": torch.channels_last}
    model = pk.create_model("poolformer_s12").eval().to("cuda", **options)
    x = torch.randn(batch, 3, 224, 224).to("cuda", **options)

    def call() -> None:
        with torch.inference_mode():
            model(x)
        torch.cuda.synchronize()

    for _ in range(3):
        call()
    return call


def kernel_times(batch: int) -> list[tuple[str, float, int]]:
    """(kernel, microseconds, launches) of one call, the slowest first."""
    from torch.profiler import ProfilerActivity, profile

    from poolformer_kernels.cli.kernels import short_name

    call = inference(batch)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
    events = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    times = [(short_name(event.key), event.self_device_time_total, event.count) for event in events]
    return sorted(times, key=lambda row: -row[1])


def run_ncu(ncu: str, names: list[str], batch: int, file: Path) -> int:
    """Profile the first launches of these kernels in one call."""
    functions = "|".join(dict.fromkeys(re.escape(name.partition("<")[0]) for name in names))
    command = [ncu, "--csv", "--log-file", str(file), "--profile-from-start", "off", "--launch-count", "60"]
    command += ["--kernel-name", f"regex:^({functions})$"]
    done = subprocess.run([*command, sys.executable, __file__, "--once", "--batch", str(batch)])
    text = file.read_text() if file.exists() else ""
    print(text[-6000:])
    for said, reason in REFUSALS.items():
        if said in text:
            print(f"ncu: skipped, {reason}")
            return SKIPPED
    return done.returncode


def call_once(batch: int) -> int:
    """What ncu watches."""
    import torch

    call = inference(batch)
    torch.cuda.profiler.start()
    call()
    torch.cuda.profiler.stop()
    return 0


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="default: this folder")
    parser.add_argument("--batch", type=int, default=256, metavar="N", help="default: %(default)s")
    parser.add_argument("--once", action="store_true", help="one call alone, for ncu")
    parser.add_argument("--dry", action="store_true", help="batch 1, and no kernel need be seen")
    args = parser.parse_args()
    batch = 1 if args.dry else args.batch
    if args.once:
        return call_once(batch)
    times = kernel_times(batch)
    lines = [f"{us:10.1f} us {count:4d} launches  {name}" for name, us, count in times]
    lines.append(f"{sum(us for _, us, _ in times):10.1f} us in all, S12, bfloat16, batch {batch}")
    print(*lines, sep="\n", flush=True)
    (args.out / "kernels.txt").write_text("\n".join(lines) + "\n")
    if not times:
        print("the profiler saw no kernel")
        return SKIPPED if args.dry else 1
    ncu = shutil.which("ncu") or shutil.which("/usr/local/cuda/bin/ncu")
    if ncu is None:
        print("ncu: skipped, it is not installed")
        return SKIPPED
    return run_ncu(ncu, [name for name, _, _ in times[:COUNT]], batch, args.out / "ncu.csv")


if __name__ == "__main__":
    sys.exit(main())
