"""The launches of every kernel under compute-sanitizer.

    python tests/gpu/sanitizer.py [--tool memcheck racecheck] [--backend cuda triton] [--dry]

Where the tool is missing, or does not support the device, it says so and leaves with 77: skipped.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from part_runner import SKIPPED, parser_of

LAUNCHES = Path(__file__).resolve().parent / "launches.py"


def sanitizer_path() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("compute-sanitizer") or shutil.which(f"{home}/bin/compute-sanitizer")


def main() -> int:
    """0 where nothing was found, 1 where something was, `SKIPPED` where nothing could be watched."""
    parser = parser_of(__doc__)
    tools, backends = ("memcheck", "racecheck"), ("cuda", "triton")
    parser.add_argument("--tool", nargs="+", choices=tools, default=tools, help="default: both")
    parser.add_argument("--backend", nargs="+", choices=backends, default=backends, help="default: both")
    parser.add_argument("--dry", action="store_true", help="the launches without the tool")
    args = parser.parse_args()
    sanitizer = sanitizer_path()
    if sanitizer is None and not args.dry:
        print("compute-sanitizer: skipped, it is not installed")
        return SKIPPED
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # every tensor an allocation of its own
    failed = False
    for tool in args.tool:
        watched = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
        for backend in args.backend:
            launches = [sys.executable, str(LAUNCHES), backend, "--dry", "--first", "0"]
            process = subprocess.Popen(
                launches if args.dry else watched + launches,
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            output = []
            for line in process.stdout:  # as it comes: what was reached is seen when the time is up
                print(line, end="", flush=True)
                output.append(line)
            code = process.wait()
            if code != 0 and (refused := re.search(r"=+ .*not supported.*", "".join(output))):
                print(f"compute-sanitizer: skipped, {refused[0].strip('= ')}")
                return SKIPPED
            bad = code != 0 or any(line.startswith("failed") for line in output)
            print(f"compute-sanitizer, {tool}, {backend}: {'FAILED' if bad else 'ok'}", flush=True)
            failed |= bad
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
