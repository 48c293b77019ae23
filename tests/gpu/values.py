"""The value tests of one backend: the operators' contract on it and its tests in tests/gpu, in parallel.

    python tests/gpu/values.py cuda|triton [--jobs 12] [--out DIR] [--dry]

With pytest-xdist in one run, without it a process for each file. It fails where a test did, where no test
passed, and where either CUDA backend cannot run: a skipped test proves nothing. ``--dry`` runs the
tests that look at no values.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from part_runner import ROOT, parser_of

HERE = Path(__file__).resolve().parent
NO_TESTS = 5  # pytest's exit code where none was selected


def pytest_commands(backend: str, jobs: int, reports: Path, dry: bool) -> list[list[str]]:
    """One run with xdist, else one for each file."""
    mark = f"{backend} and {'host' if dry else 'not large'}"
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-m", mark]
    if importlib.util.find_spec("xdist"):
        print(f"pytest-xdist runs them in {jobs} processes", flush=True)
        parallel = ["-n", str(jobs), "--dist", "worksteal", f"--junitxml={reports / f'{backend}.xml'}"]
        return [[*command, *parallel, str(HERE), *contract(dry)]]
    print(f"pytest-xdist is not installed: a process for each file, {jobs} at a time", flush=True)
    files = [*map(str, sorted(HERE.glob("test_*.py"))), *contract(dry)]
    return [[*command, f"--junitxml={reports / f'{backend}-{Path(file).stem}.xml'}", file] for file in files]


def contract(dry: bool) -> list[str]:
    """The contract's files; all its tests look at values."""
    if dry:
        return []
    folder = HERE.parent / "contract"
    return [str(path) for name in ("pool_mixer", "mlp", "both") for path in folder.glob(f"{name}*.py")]


def count_passed(reports: Path, backend: str) -> int:
    """How many tests passed, by pytest's own reports, which an interrupted run writes, too."""
    passed = 0
    for file in reports.glob(f"{backend}*.xml"):
        for suite in ElementTree.parse(file).iter("testsuite"):
            total, *others = (int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped"))
            passed += total - sum(others)
    return passed


def unavailable() -> list[str]:
    """A line for each CUDA backend that cannot run."""
    import poolformer_kernels as pk

    reasons = pk.backend_reasons()
    return [f"backend {name} cannot run: {reasons[name]}" for name in ("triton", "cuda") if name in reasons]


def run(backend: str, jobs: int, reports: Path, dry: bool) -> int:
    """0 where everything passed, else 1."""
    for file in reports.glob(f"{backend}*.xml"):
        file.unlink()
    commands = pytest_commands(backend, jobs, reports, dry)
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])
    # the package is that of PYTHONPATH
    env = os.environ | {"PYTHONPATH": path, "POOLFORMER_TEST_TARGETS": backend}
    pool = ThreadPoolExecutor(jobs)
    futures = [pool.submit(subprocess.run, command, cwd=HERE, env=env) for command in commands]
    try:
        codes = [future.result().returncode for future in futures]
    except KeyboardInterrupt:  # pytest has got it, too, and reports
        pool.shutdown(cancel_futures=True)
        codes = [1]
    problems = unavailable()
    if any(code not in (0, NO_TESTS) for code in codes):
        problems.append("pytest failed, see above")
    passed = count_passed(reports, backend)
    print(f"{backend}: {passed} tests passed")
    problems += [] if passed else ["no test passed"]
    print(*problems, sep="\n")
    return 1 if problems else 0


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("backend", choices=("cuda", "triton"))
    parser.add_argument("--jobs", type=int, default=12, metavar="N", help="processes; default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="DIR", help="pytest's reports go there")
    parser.add_argument("--dry", action="store_true", help="only tests that look at no values")
    args = parser.parse_args()
    if args.out is None:
        with tempfile.TemporaryDirectory() as folder:
            return run(args.backend, args.jobs, Path(folder), args.dry)
    args.out.mkdir(parents=True, exist_ok=True)
    return run(args.backend, args.jobs, args.out, args.dry)


if __name__ == "__main__":
    sys.exit(main())
