"""`make gpu-check`: parts that pass, fail, hang and are killed, its time, signals, and what it leaves."""

import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from poolformer_kernels import cli

ROOT = Path(__file__).resolve().parents[1]
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
    script("unneeded", 9, "raise SystemExit(9)", only_after="good"),
    script("bad", 9, "print('the reason'); raise SystemExit(3)"),
    script("instead", 9, "print('made up for')", only_after="bad"),
    script("hangs", 0.7, {HANG!r}),
    script("late", 0.7, '''import time
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
    command = [sys.executable, str(driver), "--out", str(folder / "out"), "--commit", "abc1234", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def results(folder: Path) -> dict[str, str]:
    """By part how it ended, as the summary has it."""
    lines = (folder / "out" / "summary.md").read_text().splitlines()
    rows = [re.split(r" *\| *", line)[1:3] for line in lines if line.startswith("| ")]
    return dict(rows[2:])


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_every_kind_of_part(tmp_path) -> None:
    process = start(tmp_path, EVERY_KIND)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 1
    assert results(tmp_path) == {
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
    bad = [
        "bad (failed, exit code 3)",
        "hangs (late, killed, it ignored SIGINT)",
        "late (late, ended by SIGINT)",
    ]
    bad += ["killed (killed, by SIGKILL)", "no program (failed, /no/such/program: No such file or directory)"]
    assert output.splitlines()[-1] == f"gpu-check: not passed: {', '.join(bad)}"
    for text in ("commit abc1234", "the reason", "begun", "a report", "so far", "the end"):
        assert text in output.splitlines()

    out = tmp_path / "out"
    summary = (out / "summary.md").read_text()
    assert summary.startswith("# GPU check: Some GPU 9\n\nCommit abc1234, ")
    for title, tail in (
        ("bad: failed, exit code 3", "the reason"),
        ("late: late, ended by SIGINT", "a report"),
    ):
        assert f"\n## {title}\n\n```\n{tail}\n```\n" in summary
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
    parts = f"parts = [script(name, 60, {HANG!r}) for name in ('a', 'b', 'c')]\nclosing = [parts[2]]"
    began = time.monotonic()
    process = start(tmp_path, parts, "--total", "6")
    process.communicate(timeout=30)
    assert 4.5 < time.monotonic() - began < 6.5  # and Python's start; 1.5 are kept for the summary
    assert process.returncode == 1
    text = (tmp_path / "out" / "summary.md").read_text()
    assert re.search(r"\| a \| late, killed, it ignored SIGINT \| 4\.\d \|", text)
    assert text.count("| b | not run, no time was left |") == 1
    assert "| c | not run, no time was left |" in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_part_and_the_summary_is_written(number, tmp_path) -> None:
    parts = f"parts = [script('first', 9, 'pass'), script('long', 60, {HANG!r}), script('last', 9, 'pass')]\n"
    process = start(tmp_path, parts + "closing = [script('tables', 9, 'pass')]")
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
    process = start(
        tmp_path, "parts, closing = [script('a', 9, 'pass'), script('b', 9, 'raise SystemExit(77)')], []"
    )
    assert process.communicate(timeout=30)[0].splitlines()[-1] == "gpu-check: all passed"
    assert process.returncode == 0
    assert ", 0 s of 540. All passed.\n" in (tmp_path / "out" / "summary.md").read_text()
    assert not earlier.exists()


@pytest.mark.usefixtures("benchmark_process")
def test_the_parts_are_what_their_programs_take(monkeypatch, capsys, tmp_path) -> None:
    """``--help`` behind a part's arguments: argparse looks at those before it."""
    monkeypatch.syspath_prepend(str(GPU))
    import check

    real = check.Check(tmp_path, "abc1234", 540, dry=False)
    dry = check.Check(tmp_path, "abc1234", 540, dry=True)
    assert len({part.name for part in check.PARTS}) == len(check.PARTS)
    for part in (*check.PARTS, *check.CLOSING):
        assert part.only_after in ("", *(other.name for other in check.PARTS))
        command, wet = dry.command(part), real.command(part)
        assert not any("{" in text for text in command + wet)
        if "bench" in wet:
            assert wet[:4] == [sys.executable, "-m", "poolformer_kernels", "bench"]
            assert command == [sys.executable, str(GPU / "dry_bench.py"), *wet[4:], *part.dry]
            with pytest.raises(SystemExit, match=r"^0$"):
                cli.main(["bench", *command[2:], "--help"])
        else:
            assert command == [*wet, *part.dry]
            env = os.environ | {"PYTHONPATH": str(ROOT)}
            done = subprocess.run([*command, "--help"], cwd=ROOT, env=env, capture_output=True, text=True)
            assert done.returncode == 0, (command, done.stderr)
    assert "usage" in capsys.readouterr().out
