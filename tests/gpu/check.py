"""Everything that is worth an hour with a GPU, in nine minutes: `make gpu-check`.

    python tests/gpu/check.py [--out DIR] [--commit NAME] [--total 540] [--only PART ...] [--dry]

The parts of `PARTS` run one after another, the important first. One that fails, hangs or is killed stops no
other: see `part_runner`. What they say is streamed. Rows of benchmarks are in OUT/results as soon as they are
measured; OUT/summary.md is written anew after each part. At the end, whatever happened, OUT also has plots
and gpu-check-<device>-<commit>.tar.gz with all of it. The exit code is 1 unless every part passed or was
skipped. It needs no network and no git. ``--dry`` runs the same on the null GPU (tests/null_gpu): values are
not looked at and nothing is built.
"""

import importlib.util
import os
import re
import shutil
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

from part_runner import GRACE_S, ROOT, Outcome, Part, Stop, parser_of, run_part

sys.path.insert(1, str(ROOT))  # before installed packages: one of them may have a folder called benchmarks

from benchmarks.commit import commit_of

GPU = ROOT / "tests" / "gpu"
TOTAL_S = 540.0
SUMMARY_S = 30.0  # kept for the summary, the plots and the archive
LEAST_S = 3.0  # with less left a part does not begin
DRY_SCALE = (
    4  # of all limits in a dry run: its machine is small, and compiles what a GPU's has compiled before
)


def ours(program: str, *arguments: str) -> tuple[str, ...]:
    """A program of this folder; {out} is the folder of the results."""
    return ("{python}", str(GPU / program), *arguments)


def bench(name: str, *arguments: str, file: str = "") -> tuple[str, ...]:
    """A benchmark of S12 in bfloat16 whose rows go to {out}/results."""
    path = f"{{out}}/results/{file or name.replace('-', '_')}.csv"
    options = ("--device", "cuda", "--models", "s12", "--dtype", "bfloat16", "--csv", path)
    return ("{bench}", name, *options, *arguments)


MARK = ".gpu-check"  # a file in every folder of results
IDENTIFY = "import and link"  # runs in any case: it says which device this is
SMALL = ("--rounds", "1", "--batch", "1")
PEERS = ("eager", "compile")
PARTS = (
    Part("build", 150, ours("extension.py", "build"), ("--dry",)),
    Part(IDENTIFY, 40, ours("extension.py", "check", "--out", "{out}"), ("--dry",)),
    Part("info", 20, ("{python}", "-m", "poolformer_kernels", "info")),
    Part("kernels", 20, ("{python}", "-m", "poolformer_kernels", "info", "--kernels")),
    Part("launches, C++", 60, ours("launches.py", "cuda"), ("--dry",)),
    Part("compile Triton's kernels", 60, ours("precompile.py"), ("--dry",)),
    Part("launches, Triton", 100, ours("launches.py", "triton"), ("--dry",)),
    Part(
        "bench model",
        130,
        bench(
            *("model", "--batch", "256", "1", "--providers", "ours triton", "ours cuda"),
            *("ours triton graphed", "ours cuda graphed", *PEERS),
        ),
        (*SMALL, "--image-size", "32"),
    ),
    Part(
        "bench model without C++",
        60,
        bench(
            *("model", "--batch", "256", "1", "--providers", "ours triton", "ours triton graphed", "eager"),
            file="model_without_cuda",
        ),
        (*SMALL, "--image-size", "32"),
        only_without="results/model.csv",
    ),
    Part("values, C++", 60, ours("values.py", "cuda", "--jobs=4", "--out", "{out}/pytest"), ("--dry",)),
    Part("values, Triton", 120, ours("values.py", "triton", "--out", "{out}/pytest"), ("--dry",)),
    Part("memcheck, C++", 45, ours("sanitizer.py", "--tool", "memcheck", "--backend", "cuda"), ("--dry",)),
    Part(
        "bench pool-mixer",
        40,
        bench("pool-mixer", "--layout", "channels_last", "--providers", "ours triton", "ours cuda", "eager"),
        SMALL,
    ),
    Part("bench mlp", 40, bench("mlp", "--providers", "ours triton", "ours cuda", "eager"), SMALL),
    Part(
        "bench training",
        60,
        bench("training", "--batch", "256", "--providers", "ours", "eager"),
        (*SMALL, "--image-size", "32"),
    ),
    Part("slowest kernels", 45, ours("slowest.py", "--out", "{out}"), ("--dry",)),
)
# These run at the end, in the time that is kept for them
CLOSING = (
    Part("tables", 15, ("{python}", "-m", "benchmarks.gpu_summary", "--results", "{out}/results")),
    Part(
        "plots",
        15,
        ("{python}", "-m", "benchmarks.plots", "--results", "{out}/results", "--out", "{out}/plots"),
        needs="matplotlib",
    ),
)


def dry_environment() -> dict[str, str]:
    """Where the null GPU takes the device's place."""
    sys.path.append(str(ROOT / "tests"))
    from null_gpu.build import build, environment, unavailable
    from null_gpu.extension import extension_file, link_extension

    if reason := unavailable():
        raise SystemExit(f"gpu-check: --dry needs the null GPU: {reason}")
    if extension_file() is None:
        raise SystemExit("gpu-check: --dry needs an extension that was built with CUDA")
    return environment(build(), "9.0", extension=link_extension())


def emptied(out: Path) -> Path:
    """The folder without what an earlier run left in it; SystemExit where it is not such a run's."""
    if out.exists() and not (out / MARK).exists() and (not out.is_dir() or any(out.iterdir())):
        raise SystemExit(f"gpu-check: --out {out} is not a check's folder; a new or an empty one is allowed")
    shutil.rmtree(out, ignore_errors=True)
    return out


class Check:
    """One run: its folder, its clock, and what has happened so far."""

    def __init__(self, out: Path, commit: str, total_s: float, dry: bool) -> None:
        self.out, self.commit, self.dry = out.resolve(), commit, dry
        self.scale = DRY_SCALE if dry else 1
        self.began, self.total_s = time.monotonic(), total_s * self.scale
        self.stop, self.outcomes = Stop(), []
        self.env = os.environ | {"POOLFORMER_KERNELS_COMMIT": commit}
        self.env |= dry_environment() if dry else {}
        paths = [str(ROOT), self.env.get("PYTHONPATH", "")]
        self.env["PYTHONPATH"] = os.pathsep.join(filter(None, reversed(paths) if dry else paths))
        self.env["PYTHONUNBUFFERED"] = "1"
        for folder in ("results", "logs", "plots"):
            (self.out / folder).mkdir(parents=True)
        (self.out / MARK).touch()

    @property
    def device(self) -> str:
        file = self.out / "device.txt"
        return file.read_text().strip() if file.is_file() else "unknown device"

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def run(self, part: Part, reserve_s: float) -> None:
        """Run one part in what is left of the time without ``reserve_s``; note how it ended."""
        left_s = self.total_s - self.seconds() - reserve_s - GRACE_S
        if reason := self.reason_against(part, left_s):
            self.outcomes.append(Outcome(part.name, part.limit_s, "not run", detail=reason))
            return
        if part.needs and importlib.util.find_spec(part.needs) is None:
            reason = f"{part.needs} is not installed"
            self.outcomes.append(Outcome(part.name, part.limit_s, "skipped", detail=reason))
            return
        limit_s = min(part.limit_s * self.scale, left_s)
        print(f"\ngpu-check: {part.name}, {limit_s:.0f} s at the most", flush=True)
        env = self.env | dict(part.env)
        outcome = run_part(part, self.command(part), limit_s, env, self.out, self.stop)
        self.outcomes.append(outcome)
        print(f"gpu-check: {part.name}: {describe(outcome)}, {outcome.seconds:.1f} s", flush=True)

    def reason_against(self, part: Part, left_s: float) -> str:
        """Why a part does not begin, or nothing."""
        if self.stop.signal is not None:
            return f"stopped by {self.stop.signal.name}"
        return "" if left_s >= min(LEAST_S, part.limit_s) else "no time was left"

    def command(self, part: Part) -> list[str]:
        bench = [str(GPU / "dry_bench.py")] if self.dry else ["-m", "poolformer_kernels", "bench"]
        arguments = [*part.command, *(part.dry if self.dry else ())]
        filled = [
            text.replace("{python}", sys.executable).replace("{out}", str(self.out)) for text in arguments
        ]
        return [sys.executable, *bench, *filled[1:]] if filled[0] == "{bench}" else filled

    def is_due(self, part: Part) -> bool:
        """Whether a part that only makes up for another's rows has to."""
        file = self.out / part.only_without
        return not part.only_without or not file.is_file() or file.stat().st_size == 0

    # ---- what is left of it --------------------------------------------------------------------------------

    def write_summary(self) -> None:
        """OUT/summary.md, of what has happened so far."""
        bad = [outcome for outcome in self.outcomes if outcome.is_bad]
        lines = [f"# GPU check: {self.device}", ""]
        lines += [f"Commit {self.commit}, {self.seconds():.0f} s of {self.total_s:.0f}. "]
        lines[-1] += f"Not passed: {', '.join(o.name for o in bad)}." if bad else "All passed."
        if self.dry:
            lines += [
                "",
                "A dry run on the null GPU: nothing was computed, and no figure here means anything.",
            ]
        lines += ["", "| part | result | seconds | at the most |", "| --- | --- | ---: | ---: |"]
        lines += [f"| {o.name} | {describe(o)} | {o.seconds:.1f} | {o.limit_s:.0f} |" for o in self.outcomes]
        for outcome in bad:
            if outcome.tail:
                lines += ["", f"## {outcome.name}: {describe(outcome)}", "", "```", *outcome.tail, "```"]
        missing = sorted((self.out / "results").glob("*.missing.txt"))
        if missing:
            lines += ["", "## Providers that were not timed", ""]
            lines += [f"- {file.name}: {line}" for file in missing for line in file.read_text().splitlines()]
        tables = self.out / "results" / "summary.md"
        if tables.is_file():
            lines += ["", tables.read_text(encoding="utf-8").replace("\n#", "\n##").replace("# ", "## ", 1)]
        (self.out / "summary.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")

    def write_archive(self) -> Path:
        device = re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")
        commit = re.sub(r"[^A-Za-z0-9.-]+", "-", self.commit)
        path = self.out / f"gpu-check-{device}-{commit}.tar.gz"
        files = [file for file in sorted(self.out.rglob("*")) if file.is_file()]
        with tarfile.open(path, "w:gz") as archive:
            for file in files:
                archive.add(
                    file, arcname=str(Path(path.name.removesuffix(".tar.gz")) / file.relative_to(self.out))
                )
        return path


def describe(outcome: Outcome) -> str:
    return f"{outcome.result}, {outcome.detail}" if outcome.detail else outcome.result


def main(
    argv: Sequence[str] | None = None, parts: Sequence[Part] = PARTS, closing: Sequence[Part] = CLOSING
) -> int:
    """Run the parts; 0 where all passed or were skipped, else 1."""
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / "build" / "gpu-check", metavar="DIR", help="default: %(default)s")
    add("--commit", default="", metavar="NAME", help="default: git's, else unknown")
    add("--total", type=float, default=TOTAL_S, metavar="S", help="seconds in all; default: %(default)g")
    add("--dry", action="store_true", help="on the null GPU: values are not looked at, nothing is built")
    names = [part.name for part in parts]
    add("--only", nargs="+", choices=names, default=names, metavar="NAME", help=f"of: {'; '.join(names)}")
    args = parser.parse_args(argv)
    check = Check(emptied(args.out), args.commit or commit_of(ROOT), args.total, args.dry)
    check.stop.listen()
    reserve_s = min(SUMMARY_S, check.total_s / 4)
    for part in parts:
        if part.name in (*args.only, IDENTIFY) and check.is_due(part):
            check.run(part, reserve_s)
            check.write_summary()
    stopped, check.stop.signal = check.stop.signal, None  # the summary is written all the same
    measured = any(file.stat().st_size for file in (check.out / "results").glob("*.csv"))
    for part in closing if measured else ():
        check.run(part, 0)
    check.write_summary()
    archive = check.write_archive()
    bad = [f"{outcome.name} ({describe(outcome)})" for outcome in check.outcomes if outcome.is_bad]
    print(f"\ngpu-check: {check.seconds():.0f} s, summary in {check.out / 'summary.md'}, all in {archive}")
    if stopped is not None:
        print(f"gpu-check: stopped by {stopped.name}")
    print(f"gpu-check: not passed: {', '.join(bad)}" if bad else "gpu-check: all passed", flush=True)
    return 1 if bad or stopped is not None else 0


if __name__ == "__main__":
    sys.exit(main())
