"""`make gpu-check`: parts that pass, fail, hang and are killed, its time, signals, and what it leaves."""

import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from support.peers import require_null_gpu
from support.processes import ROOT, python, started

import poolformer_kernels as pk
from poolformer_kernels.cli import main as cli
from poolformer_kernels.cli.main import load_benchmarks

GPU = ROOT / "tests" / "gpu"
# A check of other parts. `script(name, seconds, text)` is a part that runs Python; sys.argv[1] is the folder
DRIVER = f"""
import sys
sys.path.insert(0, {str(GPU)!r})
import check, part_runner
from part_runner import Part
check.GRACE_S = part_runner.GRACE_S = 0.5

def script(name, seconds, text, **options):
    return Part(name, seconds, ("{{python}}", "-S", "-c", text, "{{out}}"), **options)

{{parts}}
sys.exit(check.main(sys.argv[1:], parts=parts, closing=closing))
"""
HANG = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('begun', flush=True)"
HANG += "; time.sleep(60)"
EVERY_KIND = f"""
parts = [
    script("good", 9, '''import os, sys
open(sys.argv[1] + "/device.txt", "w").write("Some GPU 9")
open(sys.argv[1] + "/results/model.csv", "w").write("provider,img_per_s\\\\nours,{{os.getpid()}}\\\\n")
print("commit", os.environ["POOLFORMER_KERNELS_COMMIT"])'''.replace("{{os.getpid()}}", "7")),
    script("unneeded", 9, "raise SystemExit(9)", only_without="results/model.csv"),
    script("bad", 9, "print('the reason'); raise SystemExit(3)"),
    script("instead", 9, "print('made up for')", only_without="results/other.csv"),
    script("hangs", 3, {HANG!r}),
    script("late", 3, '''import time
try: time.sleep(60)
except KeyboardInterrupt: print("a report", flush=True)'''),
    script("killed", 9, "import os; print('so far', flush=True); os.kill(os.getpid(), 9)"),
    script("leaves a child", 9, '''import subprocess, sys
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
open(sys.argv[1] + "/child", "w").write(str(child.pid))'''),
    script("not here", 9, "raise SystemExit(77)"),
    script("without a module", 9, "raise SystemExit(9)", needs="no_such_module"),
    Part("no program", 9, ("/no/such/program",)),
    script("last", 9, "print('the end')"),
]
closing = [
    script("tables", 9, "import sys; open(sys.argv[1] + '/results/summary.md', 'w').write('# Rows\\\\n')"),
]
"""


def start(folder: Path, parts: str, *options: str) -> subprocess.Popen:
    driver = folder / "driver.py"
    driver.write_text(DRIVER.replace("{parts}", parts))
    words = [driver, "--out", folder / "out", "--commit", "abc1234", *options]
    return started(*words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run_check(folder: Path, parts: str, *options: str) -> tuple[int, str]:
    """(exit code, output) of a check of these parts."""
    process = start(folder, parts, *options)
    output = process.communicate(timeout=300)[0]
    return process.returncode, output


def results(folder: Path) -> dict[str, str]:
    """By part how it ended, as the summary has it."""
    text = (folder / "out" / "summary.md").read_text()
    table = text[text.index("| part |") :].partition("\n\n")[0]
    return dict(re.split(r" *\| *", line)[1:3] for line in table.splitlines()[2:])


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_every_kind_of_part(tmp_path) -> None:
    code, output = run_check(tmp_path, EVERY_KIND)
    assert code == 1
    ended = results(tmp_path)
    assert ended == {
        "good": "passed",
        "bad": "failed, exit code 3",
        "instead": "passed",
        "hangs": "late, killed, it ignored SIGINT",
        "late": "late, ended by SIGINT",
        "killed": "killed, by SIGKILL",
        "leaves a child": "passed",
        "not here": "skipped",
        "without a module": "skipped, no_such_module is not installed",
        "no program": "failed, /no/such/program: No such file or directory",
        "last": "passed",
        "tables": "passed",
    }
    bad = [f"{name} ({how})" for name, how in ended.items() if not how.startswith(("passed", "skipped"))]
    assert output.splitlines()[-1] == f"gpu-check: not passed: {', '.join(bad)}"
    for text in ("commit abc1234", "the reason", "begun", "a report", "so far", "the end"):
        assert text in output.splitlines()

    out = tmp_path / "out"
    summary = (out / "summary.md").read_text()
    assert summary.startswith("# GPU check: Some GPU 9\n\nCommit abc1234, ")
    assert "\n## bad: failed, exit code 3\n\n```\nthe reason\n```\n" in summary
    assert "\n## late: late, ended by SIGINT\n\n```\na report\n```\n" in summary
    assert "\n## Rows\n" in summary
    assert (out / "results" / "model.csv").read_text() == "provider,img_per_s\nours,7\n"
    name = "gpu-check-some-gpu-9-abc1234"
    with tarfile.open(out / f"{name}.tar.gz") as archive:
        held = {member.name for member in archive.getmembers()}
        assert archive.extractfile(f"{name}/summary.md").read().decode() == summary
    assert held >= {f"{name}/results/model.csv", f"{name}/logs/bad.txt", f"{name}/logs/leaves-a-child.txt"}
    deadline = time.monotonic() + 5  # a killed process is gone when its parent has been told
    while is_alive(int((out / "child").read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(int((out / "child").read_text()))


def test_the_total_is_kept(tmp_path) -> None:
    parts = f"parts = [script(name, 60, {HANG!r}) for name in ('a', 'b', 'c')]\nclosing = []"
    began = time.monotonic()
    code, _ = run_check(tmp_path, parts, "--total", "6")
    assert 4.5 < time.monotonic() - began < 12  # and Python's starts; 1.5 are kept for the summary
    assert code == 1
    text = (tmp_path / "out" / "summary.md").read_text()
    assert re.search(r"\| a \| late, killed, it ignored SIGINT \| [4-6]\.\d \|", text)
    assert "| b | not run, no time was left |" in text
    assert "| c | not run, no time was left |" in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_part_and_the_summary_is_written(number, tmp_path) -> None:
    rows = "import sys; open(sys.argv[1] + '/results/mlp.csv', 'w').write('rows')"
    parts = f"""
parts = [script('first', 9, {rows!r}), script('long', 60, {HANG!r}), script('last', 9, 'pass')]
closing = [script('tables', 9, 'pass')]
"""
    process = start(tmp_path, parts)
    while "begun" not in process.stdout.readline():
        pass
    process.send_signal(number)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 1
    assert f"gpu-check: stopped by {number.name}" in output
    assert results(tmp_path) == {
        "first": "passed",
        "long": "stopped, killed, it ignored SIGINT",
        "last": f"not run, stopped by {number.name}",
        "tables": "passed",
    }
    assert (tmp_path / "out" / "gpu-check-unknown-device-abc1234.tar.gz").exists()


def test_all_passed(tmp_path) -> None:
    earlier = tmp_path / "out" / "results" / "model.csv"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("of an earlier run")
    refusal = f"gpu-check: --out {tmp_path}/out is not a check's folder; a new or an empty one is allowed\n"
    assert run_check(tmp_path, "parts, closing = [], []") == (1, refusal)
    assert earlier.read_text() == "of an earlier run"
    (tmp_path / "out" / ".gpu-check").touch()
    parts = "parts, closing = [script('a', 9, 'pass'), script('b', 9, 'raise SystemExit(77)')], []"
    code, output = run_check(tmp_path, parts)
    assert output.splitlines()[-1] == "gpu-check: all passed"
    assert code == 0
    assert " s of 540. All passed.\n" in (tmp_path / "out" / "summary.md").read_text()
    assert not earlier.exists()


def test_only_some_parts(tmp_path) -> None:
    parts = "parts = [script(name, 9, 'pass') for name in ('a', 'import and link', 'b')]\nclosing = []"
    assert run_check(tmp_path, parts, "--only", "b")[0] == 0
    assert results(tmp_path) == {"import and link": "passed", "b": "passed"}
    assert "argument --only: invalid choice: 'c' (choose from" in run_check(tmp_path, parts, "--only", "c")[1]


# ---- on the null GPU ---------------------------------------------------------------------------------------


@pytest.fixture
def null_gpu() -> None:
    """The check's own parts run, on an extension with CUDA."""
    require_null_gpu(extension=True)


@pytest.mark.long
def test_a_dry_run_of_some_parts(null_gpu, tmp_path) -> None:
    parts = """
names = ("import and link", "info", "slowest kernels")
parts = [part for part in check.PARTS if part.name in names] + [script("bad", 9, "raise SystemExit(3)")]
closing = []
"""
    code, output = run_check(tmp_path, parts, "--dry")
    assert code == 1, output
    assert results(tmp_path) == {
        **dict.fromkeys(("import and link", "info"), "passed"),
        "slowest kernels": "skipped",  # there is nothing to profile
        "bad": "failed, exit code 3",
    }, output
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "\nA dry run on the null GPU: nothing was computed" in summary
    assert (tmp_path / "out" / "gpu-check-null-h200-abc1234.tar.gz").exists()


@pytest.mark.long
def test_a_dry_run(null_gpu, tmp_path) -> None:
    """All of it, as `make gpu-check DRY=1` runs it."""
    python(GPU / "check.py", "--dry", "--out", tmp_path / "out", timeout=None)
    ended = results(tmp_path)
    assert ended.pop("slowest kernels") == "skipped"
    assert set(ended.values()) == {"passed"}, ended
    tables = {file.stem: file.read_text() for file in (tmp_path / "out/results").glob("*.csv")}
    assert tables.keys() >= {"model", "pool_mixer", "mlp", "training"}
    assert all(len(table.splitlines()) > 1 for table in tables.values())


# ---- the programs of the parts -----------------------------------------------------------------------------


@pytest.fixture
def program(monkeypatch) -> Callable[[str], ModuleType]:
    """Imports one, as Python does that runs it: from its folder."""
    monkeypatch.syspath_prepend(str(GPU))
    return import_module


CASES = """
import os, sys, time
for i, case in enumerate(["good", "hangs", "aborts", "wrong", "loses the device", "last"]):
    if i < int(sys.argv[4]): continue
    print("begin", i, "case " + case, flush=True)
    if case == "hangs": time.sleep(60)
    if case == "aborts": os.abort()
    if case in ("wrong", "loses the device"): print("failed AssertionError: y", flush=True)
    if case == "loses the device": sys.exit(1)
    if case in ("good", "last"): print("kernels f<bf16>; " + case + "\\nok", flush=True)
"""


def test_launches_go_on_after_a_case_that_hangs_or_dies(program, tmp_path, monkeypatch, capfd) -> None:
    launches = program("launches")
    (tmp_path / "launches.py").write_text(CASES)
    monkeypatch.setattr(launches, "HERE", tmp_path)
    monkeypatch.setattr(launches, "SILENT_S", {"cuda": 4})
    failed, launched, count = launches.watch("cuda", dry=True)
    assert failed == ["case hangs", "case aborts", "case wrong", "case loses the device"]
    assert (launched, count) == ({"f<bf16>", "good", "last"}, 6)
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "cuda: case good [f<bf16>; good]: ok"
    assert lines[1:3] == [
        "cuda: case hangs: failed: it hangs, nothing for 4 s",
        "cuda: case aborts: failed, the process ended with exit code -6",
    ]
    (tmp_path / "launches.py").write_text("raise SystemExit(3)")
    assert launches.watch("cuda", dry=True) == (["no case began"], set(), 0)


@pytest.mark.parametrize(
    ("test", "xdist", "passed"),
    [("assert True", True, 1), ("assert False", False, 0), ("pytest.skip('no')", False, 0)],
)
def test_value_tests_must_pass(test, xdist, passed, program, tmp_path, monkeypatch, capfd) -> None:
    values = program("values")
    folder = tmp_path / "tests" / "gpu"
    folder.mkdir(parents=True)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  cuda\n  triton\n  large\n")
    text = f"import pytest\n@pytest.mark.cuda\ndef test():\n    {test}\n"
    (folder / "test_a.py").write_text(text + "@pytest.mark.triton\ndef test_other():\n    assert False\n")
    monkeypatch.setattr(values, "HERE", folder)
    monkeypatch.setattr(values, "unavailable", list)
    if not xdist:
        monkeypatch.setattr(values.importlib.util, "find_spec", lambda name: None)
    assert values.run("cuda", 1, tmp_path, dry=False) == 1 - passed
    out = capfd.readouterr().out
    assert ("pytest-xdist runs them in 1 processes" in out) == xdist
    assert f"cuda: {passed} tests passed" in out


def test_values_of_a_backend_that_cannot_run_do_not_count(program, tmp_path, monkeypatch, capsys) -> None:
    values = program("values")
    monkeypatch.setattr(values, "pytest_commands", lambda *args: [[sys.executable, "-S", "-c", "pass"]])
    monkeypatch.setattr(values, "count_passed", lambda *args: 9)
    reasons = {"cuda": "built without CUDA"}
    monkeypatch.setattr(pk, "backend_reasons", lambda: reasons)
    assert values.run("triton", 1, tmp_path, dry=False) == 1
    assert "backend cuda cannot run: built without CUDA" in capsys.readouterr().out.splitlines()
    reasons.clear()
    assert values.run("triton", 1, tmp_path, dry=False) == 0


def test_the_extension_is_built_for_the_devices_own_architecture(program) -> None:
    names = {(8, 0): "8.0", (8, 9): "8.9", (9, 0): "9.0a", (10, 3): "10.3", (12, 0): "12.0"}
    own = program("extension").own_architecture
    assert {capability: own(capability) for capability in names} == names


def test_a_commit_without_git(tmp_path, monkeypatch) -> None:
    load_benchmarks()
    from poolformer_kernels.benchmarks.commit import commit_of

    monkeypatch.delenv("POOLFORMER_KERNELS_COMMIT", raising=False)
    assert commit_of(tmp_path) == "unknown"
    monkeypatch.setenv("PATH", "")
    assert commit_of(ROOT) == "unknown"
    monkeypatch.setenv("POOLFORMER_KERNELS_COMMIT", "abc1234")
    assert commit_of(ROOT) == "abc1234"


def test_the_parts_are_what_their_programs_take(program, capsys, tmp_path) -> None:
    """``--help`` behind a part's arguments: argparse looks at those before it."""
    check = program("check")
    run = check.Check(tmp_path / "out", "abc1234", 540, dry=False)
    assert len({part.name for part in check.PARTS}) == len(check.PARTS)
    for part in (*check.PARTS, *check.CLOSING):
        run.dry = False
        real = run.command(part)
        run.dry = True
        dry = run.command(part)
        assert real[0] == dry[0] == sys.executable
        assert not any("{" in text for text in real + dry)
        if real[1:3] == ["-m", "poolformer_kernels"]:  # in a dry run benchmarks are another program
            assert dry[1:] == [str(GPU / "dry_bench.py"), *real[4:], *part.dry] or dry == real
            with pytest.raises(SystemExit, match=r"^0$"):
                cli.main([*real[3:], *part.dry, "--help"])
        else:
            assert Path(real[1]).parent == GPU or part in check.CLOSING
            assert "usage" in python(*dry[1:], "--help", cwd=tmp_path, **run.env).stdout
    made = {text for part in check.PARTS for text in part.command}
    assert {f"{{out}}/{part.only_without}" for part in check.PARTS if part.only_without} <= made
    assert "usage" in capsys.readouterr().out
