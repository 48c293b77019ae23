"""Every kernel of a CUDA backend on small inputs, forward and backward, held to the tests' error rule.

    python tests/gpu/launches.py cuda|triton [--dry]

A line for each case as it ends, with the kernels that it launched. The cases run in a process of their own: a
kernel that hangs or leaves its memory ends that process, and the next case begins in a new one.
"""

import queue
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from part_runner import parser_of

HERE = Path(__file__).resolve().parent
sys.path[0] = str(HERE.parent)  # the tests' modules

SILENT_S = {"cuda": 30, "triton": 60}  # a case that says nothing for so long hangs; Triton compiles

# ---- the process that runs them ----------------------------------------------------------------------------


def run_cases(backend: str, first: int, values: bool) -> int:
    """Run the cases from ``first`` on. Lines for `watch`: begin, kernels, then ok or failed."""
    import torch
    from contract.targets import TARGETS

    from gpu.launch_cases import cases

    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no CUDA device", flush=True)
        return 1
    with TARGETS[backend].use():
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
    # autograd's thread drops the nodes of a backward after its end, and those written in Python need the
    # interpreter, which must not end before; once another backward is over, they are gone
    last = torch.ones(1, device="cuda", requires_grad=True)
    last.sum().backward()
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
                number, _, name = text.partition(" ")
                at, outcome = int(number), ""
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
    parser = parser_of(__doc__)
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
