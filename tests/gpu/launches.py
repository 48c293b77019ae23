"""Every kernel of a CUDA backend on small inputs, forward and backward, held to the tests' error rule.

    python tests/gpu/launches.py cuda|triton [--dry]

A line for each case as it ends, with the kernels that it launched. The cases run in a process of their own: a
kernel that hangs or leaves its memory ends that process, and the next case begins in a new one.
"""

import argparse
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent)  # the tests' modules
sys.path.append(str(HERE.parents[1]))  # the package, where PYTHONPATH has none

SILENT_S = {"cuda": 30, "triton": 60}  # a case that says nothing for so long hangs; Triton compiles
FORMATS = ("nchw", "channels_last")

# ---- the cases ---------------------------------------------------------------------------------------------

F32, BF16, F16 = "float32", "bfloat16", "float16"
# (shape, pool size, dtypes). Kernels of the C++ mixer: one element at a time; 8 or 4 channels; along rows 8
# or 4 at a time; other pools; partials of statistics that are merged beforehand
MIXERS = {
    "cuda": (
        ((2, 17, 13, 29), 3, (F32, BF16, F16)),
        ((2, 64, 8, 8), 3, (F32, BF16, F16)),
        ((2, 16, 6, 4), 3, (F32, BF16, F16)),
        ((2, 16, 7, 9), 5, (F32, BF16, F16)),
        ((1, 64, 96, 96), 3, (BF16,)),
    ),
    "triton": (
        ((2, 64, 14, 14), 3, (BF16, F32, F16)),
        ((2, 17, 13, 29), 3, (BF16,)),
        ((2, 16, 7, 9), 5, (F32,)),
    ),
}
# (x, hidden, activation, whether fc1's output is saved, whether the parameters are float32, dtypes). C++ has
# halves alone; Triton's kernels are one for narrow streams, a pair for wide ones
MLPS = {
    "cuda": tuple(
        ((3, channels, 9, 7), hidden, *rest, (BF16, F16))
        for channels, hidden in ((64, 256), (96, 384), (128, 512), (192, 768))
        for rest in (
            *(("gelu", False, False), ("gelu", True, False)),
            *(("relu", False, True), ("gelu", False, True)),
        )
    ),
    "triton": (
        ((4, 96, 14, 14), 384, "gelu", False, False, (BF16, F32)),
        ((4, 320, 14, 14), 640, "gelu", False, False, (BF16,)),
        ((4, 320, 14, 14), 640, "gelu", True, False, (BF16,)),
        ((3, 17, 13, 29), 70, "relu", False, True, (F16,)),
    ),
}


def cases(backend: str, values: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, call) of each; without ``values`` nothing is compared."""
    import torch
    from support import mlp as mlp_problems
    from support import pool_mixer as mixer_problems

    from gpu import mixer_cases, mlp_cases
    from poolformer_kernels.ops import mlp, pool_mixer

    for shape, pool_size, dtypes in MIXERS[backend]:
        for dtype in (getattr(torch, name) for name in dtypes):
            inputs, options = (
                mixer_problems.make_inputs(shape, dtype),
                {"pool_size": pool_size, "residual": True},
            )
            compare = partial(mixer_cases.check, inputs, layouts=FORMATS, **options)
            launch = partial(launch_only, pool_mixer, inputs, mixer_problems.make_grad(inputs), **options)
            yield f"mixer, pool {pool_size}, {_text(shape, dtype)}", compare if values else launch
    for shape, hidden, activation, save_hidden, mixed, dtypes in MLPS[backend]:
        for dtype in (getattr(torch, name) for name in dtypes):
            kind = torch.float32 if mixed else dtype
            inputs = mlp_problems.make_inputs(shape, hidden, dtype, weight_dtype=kind, vector_dtype=kind)
            options = {"activation": activation, "residual": True, "save_hidden": save_hidden}
            compare = partial(mlp_cases.check, inputs, layouts=FORMATS, **options)
            launch = partial(launch_only, mlp, inputs, mlp_problems.make_grad(inputs), **options)
            what = f"{activation}{', fc1 saved' * save_hidden}{', float32 parameters' * mixed}"
            yield f"mlp, hidden {hidden}, {what}, {_text(shape, dtype)}", compare if values else launch


def launch_only(function: Callable, inputs: dict, grad, **options) -> set[str]:
    """The operator and its gradients in both layouts; on the null GPU, the kernels that it recorded."""
    from null_gpu import null_gpu
    from support.devices import like_on, on
    from support.layouts import as_layout
    from support.rule import run

    if null_gpu.ACTIVE:
        null_gpu.take()
    for layout in FORMATS:
        tensors = on("cuda", {**inputs, "x": as_layout(inputs["x"], layout)})
        run(function, tensors, like_on("cuda", as_layout(grad, layout)), **options)
    return {launch.name for launch in null_gpu.take() if launch.ours} if null_gpu.ACTIVE else set()


def _text(shape: tuple[int, ...], dtype) -> str:
    return f"{'x'.join(map(str, shape))}, {str(dtype).removeprefix('torch.')}"


# ---- the process that runs them ----------------------------------------------------------------------------


def run_cases(backend: str, first: int, values: bool) -> int:
    """Run the cases from ``first`` on. Lines for `watch`: begin, kernels, then ok or failed."""
    import torch

    import poolformer_kernels as pk

    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no CUDA device", flush=True)
        return 1
    torch.backends.cudnn.allow_tf32 = False  # eager's float32 convolutions have it by default
    with pk.use_backend(backend):
        for i, (name, call) in enumerate(cases(backend, values)):
            if i < first:
                continue
            print(f"begin {i} {name}", flush=True)
            try:
                launched = profiled(call) if values else call()
                torch.cuda.synchronize()
            except Exception as error:  # the other cases run all the same
                lines = str(error).strip().splitlines() or ["no message"]
                print(f"failed {type(error).__name__}: {lines[0]}", flush=True)
                torch.cuda.synchronize()  # raises where the device is lost: the next case needs a new process
                continue
            if launched:
                print("kernels " + "; ".join(sorted(launched)), flush=True)
            print("ok", flush=True)
    return 0


def profiled(call: Callable[[], None]) -> set[str]:
    """The kernels that a call launches, by `short_name`; empty where the profiler sees none."""
    from torch.profiler import ProfilerActivity, profile

    from poolformer_kernels.cli.kernels import short_name

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
    return {short_name(event.key) for event in profiler.key_averages()}


# ---- the process that watches ------------------------------------------------------------------------------


def watch(backend: str, dry: bool) -> tuple[list[str], set[str], int]:
    """(the cases that failed, the kernels launched, how many cases ran)"""
    command = [sys.executable, str(HERE / "launches.py"), backend, *(["--dry"] if dry else [])]
    failed, launched, at, ended = [], set(), -1, False
    while not ended:
        process = subprocess.Popen([*command, "--first", str(at + 1)], stdout=subprocess.PIPE, text=True)
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
        name, before, outcome = "", at, ""
        while True:
            try:
                line = lines.get(timeout=SILENT_S[backend])
            except queue.Empty:
                line = f"failed: it hangs, nothing for {SILENT_S[backend]} s"
                process.kill()
            if line is None:
                break
            kind, _, text = line.partition(" ")
            if kind == "begin":
                outcome = ""
                at, _, name = int(text.partition(" ")[0]), *text.partition(" ")[1:]
            elif kind == "kernels":
                launched |= set(text.split("; "))
                name += f" [{text}]" if len(text) < 400 else ""
            elif kind in ("ok", "failed", "failed:"):
                print(f"{backend}: {name}: {line}", flush=True)
                failed += [] if kind == "ok" else [name]
                name, outcome = "", kind
            else:
                print(line, flush=True)
            if kind == "failed:":
                break
        try:
            code = process.wait(10)
        except subprocess.TimeoutExpired:  # the driver holds it
            return [*failed, "a process that was killed did not end"], launched, at + 1
        ended = code == 0
        if not ended and name:
            print(f"{backend}: {name}: failed, the process ended with exit code {code}", flush=True)
            failed.append(name)
        if not ended and outcome == "ok":
            failed.append(f"the process ended with exit code {code} between two cases")
        if not ended and at == before:
            return [*failed, "no case began"], launched, at + 1
    return failed, launched, at + 1


def _read(pipe, lines: queue.Queue) -> None:
    for line in pipe:
        lines.put(line.rstrip("\n"))
    lines.put(None)


def never_launched(launched: set[str]) -> list[str]:
    """The extension's kernels for this device that no case launched."""
    import torch

    from poolformer_kernels.cli.kernels import kernels

    major, minor = torch.cuda.get_device_capability()
    here = {kernel.name for kernel in kernels() if re.sub(r"\D", "", kernel.arch) == f"{major}{minor}"}
    return sorted(here - launched)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("backend", choices=("cuda", "triton"))
    parser.add_argument("--dry", action="store_true", help="launch only: values are not looked at")
    parser.add_argument("--first", type=int, metavar="N", help="run the cases from N on in this process")
    args = parser.parse_args()
    if args.first is not None:
        return run_cases(args.backend, args.first, values=not args.dry)
    failed, launched, count = watch(args.backend, args.dry)
    print(f"{args.backend}: {count - len(failed)} of {count} cases passed")
    if args.backend == "cuda" and not launched:
        failed.append("the profiler saw no kernel: whether every one was launched is not known")
    elif args.backend == "cuda":
        missing = never_launched(launched)
        print(f"kernels of the extension that no case launched: {', '.join(missing) or 'none'}")
        failed += [f"no case launched {name}" for name in missing]
    print(*(f"failed: {name}" for name in failed), sep="\n")
    return 1 if failed or not count else 0


if __name__ == "__main__":
    sys.exit(main())
