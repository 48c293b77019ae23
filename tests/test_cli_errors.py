"""What ends a command is one line: Ctrl-C, no memory, a full disk, a closed pipe, variables, packages."""

import contextlib
import csv
import errno
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch
from support.peers import require

import poolformer_kernels as pk
from poolformer_kernels.cli import startup
from poolformer_kernels.cli.errors import CommandError, report_errors
from poolformer_kernels.cli.extras import NEEDS
from poolformer_kernels.cli.main import main

ROOT = Path(__file__).resolve().parent.parent
MODULE = [sys.executable, "-m", "poolformer_kernels"]
SCRIPT = """
import sys
sys.argv[0] = "/somewhere/bin/poolformer-kernels"
from poolformer_kernels.cli.main import main
sys.exit(main())
"""  # what pip writes into bin/poolformer-kernels
COMMANDS = {"module": MODULE, "script": [sys.executable, "-c", SCRIPT]}


def run(command: list[str], *words: str, **options) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT)} | options.pop("env", {})
    options = {"stdout": subprocess.PIPE} | options
    return subprocess.run([*command, *words], env=env, stderr=subprocess.PIPE, text=True, **options)


# ---- in this process ---------------------------------------------------------------------------------------


def failing(error: BaseException):
    def command() -> int:
        raise error

    return command


CPU_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (CommandError("a\n b"), 2, "error: a b"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (CommandError("interrupted; rows are in x.csv", 130), 130, "interrupted; rows are in x.csv"),
        (MemoryError(), 2, "error: out of memory"),
        (MemoryError("std::bad_alloc"), 2, "error: out of memory: std::bad_alloc"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"),
            2,
            "error: out of memory: CUDA out of memory. Tried",
        ),
        (RuntimeError(CPU_MEMORY), 2, "error: out of memory: can't allocate memory: you tried"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: cannot write: No space left on device"),
        (OSError(errno.ENOSPC, "No space left", "a.csv"), 2, "error: cannot write to a.csv: No space left"),
        (BrokenPipeError(), 141, None),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_one_line_and_a_code(error, code, line, capfd) -> None:
    assert report_errors("p", failing(error)) == code
    assert capfd.readouterr().err == ("" if line is None else f"p: {line}\n")


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), OSError(errno.ENOENT, "x"), ValueError("POOLFORMER")]
)
def test_a_bug_keeps_its_traceback(error) -> None:
    with pytest.raises(type(error)):
        report_errors("p", failing(error))


def test_real_memory_errors_are_recognised(capfd) -> None:
    for allocate in (lambda: torch.empty(1 << 60), lambda: bytearray(1 << 60)):
        assert report_errors("p", allocate) == 2
        assert re.fullmatch(r"p: error: out of memory.*\n", capfd.readouterr().err)


# ---- Ctrl-C ------------------------------------------------------------------------------------------------


def interrupted(command: list[str], *words: str, when, folder: Path) -> tuple[int, str, str]:
    """The exit code and output of a command that gets Ctrl-C when ``when(process)`` is true."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*command, *words], env=env, cwd=folder, text=True, **pipes) as process:
        deadline = time.monotonic() + 200
        while not when(process):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=100)
    return process.returncode, out, err


def maps(process: subprocess.Popen) -> str:
    try:
        return Path(f"/proc/{process.pid}/maps").read_text()
    except OSError:
        return ""


@pytest.mark.parametrize("how", COMMANDS)
def test_ctrl_c_while_torch_is_imported(how, tmp_path) -> None:
    """The first file of torch is mapped: the package's own import has begun, and takes a second more."""
    code, out, err = interrupted(
        COMMANDS[how], "info", when=lambda process: "libtorch_cpu" in maps(process), folder=tmp_path
    )
    assert (code, out, err) == (130, "", "poolformer-kernels: interrupted\n")


def test_importing_the_package_elsewhere_changes_nothing() -> None:
    text = "import signal, sys; hook = sys.excepthook; import poolformer_kernels; "
    text += "print(sys.excepthook is hook, signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    assert run([sys.executable, "-c", text]).stdout == "True True\n"
    assert not startup.is_command()


def test_ctrl_c_before_the_first_row_leaves_no_file(tmp_path) -> None:
    require("rich")
    words = ("bench", "mlp", "--models", "s12", "--dtype", "float32", "--csv", "rows/mlp.csv")
    words += ("--json", "rows/mlp.json", "--rounds", "100000", "--threads", "1")
    seen = bytearray()

    def when(process) -> bool:  # the first case is announced
        os.set_blocking(process.stderr.fileno(), False)
        with contextlib.suppress(BlockingIOError):
            seen.extend(os.read(process.stderr.fileno(), 1 << 16))
        os.set_blocking(process.stderr.fileno(), True)
        return b"mlp: forward" in seen

    code, out, err = interrupted(MODULE, *words, when=when, folder=tmp_path)
    assert code == 130
    assert (out, err) == ("", "poolformer-kernels: interrupted\n")
    assert list(tmp_path.rglob("*.*")) == []


def test_ctrl_c_keeps_the_rows_of_the_cases_before(tmp_path, monkeypatch, capsys, benchmark_process) -> None:
    from poolformer_kernels.benchmarks import bench_mlp

    measured, real = [], bench_mlp.measure

    def measure(*args, **options):
        if measured:
            raise KeyboardInterrupt
        measured.append(real(*args, **options))
        return measured[0]

    monkeypatch.setattr(bench_mlp, "measure", measure)
    file = tmp_path / "mlp.csv"
    words = ["--models", "s12", "--dtype", "float32", "--batch", "1", "--rounds", "3", "--device", "cpu"]
    words += ["--providers", "ours", "--directions", "forward", "--csv", str(file)]
    assert main(["bench", "mlp", *words, "--json", str(tmp_path / "mlp.json")]) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"poolformer-kernels: interrupted; what was measured before is in {file}"
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["provider"] for row in rows} == {"ours", "copy", "matmul"}
    assert {row["stage"] for row in rows} == {"1"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlp.csv"]


def test_rows_of_a_full_disk_are_whole_cases(tmp_path, monkeypatch, benchmark_process) -> None:
    from poolformer_kernels.benchmarks.rows import Results, Row

    values = dict.fromkeys(Row.__dataclass_fields__, "x") | {"batch": 8}
    results = Results(tmp_path / "a.csv")
    results.add([Row(**values)])
    before = results.path.read_bytes()
    real = Path.open

    class Full:
        """A file that takes ten bytes, then none."""

        def __init__(self, file) -> None:
            self.file, self.taken = file, 0

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *_) -> None:
            self.file.close()

        def __getattr__(self, name: str):
            return getattr(self.file, name)

        def write(self, data) -> int:
            if self.taken:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.taken = self.file.write(bytes(data)[:10])
            return self.taken

    monkeypatch.setattr(Path, "open", lambda path, *args, **options: Full(real(path, *args, **options)))
    with pytest.raises(CommandError, match=r"cannot write to .*a\.csv: No space left on device"):
        results.add([Row(**values)])
    monkeypatch.undo()
    assert results.path.read_bytes() == before


# ---- pipes and full disks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["info"], ["--help"], ["--version"], ["info", "--models", "--json"]], ids=" ".join
)
def test_a_closed_pipe_ends_quietly(words) -> None:
    read, write = os.pipe()
    os.close(read)
    done = run(MODULE, *words, stdout=write)
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == (0 if words == ["--help"] else 141)  # argparse drops what it cannot write


def test_a_full_disk_behind_stdout_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = run(MODULE, "info", stdout=full)
    assert (done.returncode, done.stderr) == (
        2,
        "poolformer-kernels: error: cannot write: No space left on device\n",
    )


def test_a_full_disk_behind_json_is_one_line(capsys) -> None:
    require("rich")
    assert main(["profile", "--paper", "--json", "/dev/full"]) == 2
    error = "poolformer-kernels: error: cannot write to /dev/full: No space left on device\n"
    assert capsys.readouterr().err == error


# ---- variables ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", COMMANDS)
def test_a_wrong_variable_is_one_line(how) -> None:
    done = run(COMMANDS[how], "info", env={"POOLFORMER_KERNELS_BACKEND": "fast"})
    line = "poolformer-kernels: error: POOLFORMER_KERNELS_BACKEND is 'fast'; allowed: auto, reference, cpp"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1


def test_a_wrong_variable_raises_on_import_elsewhere() -> None:
    env = {"POOLFORMER_KERNELS_BACKEND": "fast"}
    done = run([sys.executable, "-c", "import poolformer_kernels"], env=env)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("ValueError: POOLFORMER_KERNELS_BACKEND is 'fast'")


def test_another_error_of_the_import_keeps_its_traceback(tmp_path) -> None:
    (tmp_path / "torch.py").write_text("raise ValueError('a broken torch')")
    done = run(MODULE, "info", env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ValueError: a broken torch"


@pytest.mark.long
def test_torchrun_runs_the_module() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1"]
    done = run([*torchrun, "-m", "poolformer_kernels"], "info", "--json")
    assert done.returncode == 0, done.stderr
    assert f'"poolformer-kernels": "{pk.__version__}"' in done.stdout
    done = run([*torchrun, "-m", "poolformer_kernels"], "info", env={"POOLFORMER_KERNELS_BACKEND": "fast"})
    assert done.returncode != 0
    assert "\npoolformer-kernels: error: POOLFORMER_KERNELS_BACKEND" in f"\n{done.stderr}"


# ---- versions, installation, packages ----------------------------------------------------------------------


def test_version_is_one_line(capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"poolformer-kernels {pk.__version__}, torch {torch.__version__}, ")
    build = pk.backends.cpp.build_info()
    assert line.endswith("no extension") == (not build)
    assert all(arch in line for arch in build.get("cuda_archs", []))


@pytest.mark.parametrize("kind", ["editable", "wheel", "index", "other", "none"])
def test_info_says_how_it_was_installed(kind, tmp_path, monkeypatch) -> None:
    from poolformer_kernels.cli import info

    package = Path(pk.__file__).parent
    texts = {
        "editable": f'{{"url": "file://{package.parent}", "dir_info": {{"editable": true}}}}',
        "wheel": '{"url": "file:///tmp/a.whl", "archive_info": {}}',
        "index": None,
        "other": '{"url": "file:///elsewhere", "dir_info": {"editable": true}}',
    }

    class Distribution:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return texts[kind]

        def locate_file(self, name: str) -> Path:
            return package.parent / name

    def distribution(name: str) -> Distribution:
        if kind == "none":
            raise info.metadata.PackageNotFoundError
        return Distribution()

    monkeypatch.setattr(info.metadata, "distribution", distribution)
    expected = {
        "editable": f"editable, from {package.parent}",
        "wheel": "a wheel made from /tmp/a.whl",
        "index": "a wheel",
        "other": "a source tree on the path, before the installed package",
        "none": "not installed: a source tree on the path",
    }
    facts = info.installation()
    assert facts == {"how": expected[kind], "package": str(package), "python": sys.executable}


def test_info_prints_the_variables_that_are_set(monkeypatch, capsys) -> None:
    for name in [name for name in os.environ if name.startswith("POOLFORMER_KERNELS_")]:
        monkeypatch.delenv(name)
    assert main(["info"]) == 0
    assert "\nenvironment: none\n" in capsys.readouterr().out
    monkeypatch.setenv("POOLFORMER_KERNELS_ISA", "avx2")
    assert main(["info"]) == 0
    assert re.search(r"\nenvironment\n  POOLFORMER_KERNELS_ISA +avx2\n", capsys.readouterr().out)


def extras() -> dict[str, set[str]]:
    """The packages of each extra, those of others that it names included."""
    text = (ROOT / "pyproject.toml").read_text()
    table = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\[", text, re.DOTALL)[1]
    lists = {
        name: set(re.findall(r'"([^"]+)"', body))
        for name, body in re.findall(r"^(\w+) = \[(.*?)\]", table, re.M | re.S)
    }
    return {name: {re.split(r"[<>=]", package)[0] for package in found} for name, found in lists.items()}


def test_a_command_without_its_packages_names_the_smallest_extra(monkeypatch, capsys) -> None:
    packages = {"PIL": "pillow", "yaml": "pyyaml", "captum.attr": "captum"}
    known = extras()
    for command, (extra, modules) in NEEDS.items():
        needed = {packages.get(module, module) for module in modules}
        enough = {name: found for name, found in known.items() if needed <= found}
        assert extra in enough, command
        assert len(known[extra]) == min(map(len, enough.values())), f"{command}: {enough}"
        monkeypatch.setitem(sys.modules, modules[0], None)
        words = {"predict": ["a.png", "--checkpoint", "a"], "validate": ["a", "--checkpoint", "a"]}
        words |= {"train": ["a", "--out", "b"], "cam": ["a.png"]}
        assert main([*command.split(), *words.get(command, [])]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"poolformer-kernels: error: packages for {command} are missing (")
        assert error.endswith(f"): pip install 'poolformer_kernels[{extra}]'\n")
        monkeypatch.undo()


def test_commands_that_need_nothing_import_no_extra() -> None:
    text = """
import sys
from poolformer_kernels.cli.main import main
for words in (["info", "--models"], ["profile", "--no-time"]):
    assert main(words) == 0
print(sorted({"timm", "torchvision", "matplotlib", "PIL", "sklearn", "transformers"} & set(sys.modules)))
"""
    require("rich")
    assert run([sys.executable, "-c", text]).stdout.splitlines()[-1] == "[]"


def test_the_script_that_pip_installs_is_the_command() -> None:
    """`startup` knows it by its name."""
    text = (ROOT / "pyproject.toml").read_text()
    assert f'\n{startup.PROGRAM} = "{startup.MODULE}.cli.main:main"\n' in text
    script = Path(sysconfig.get_path("scripts"), startup.PROGRAM)
    if script.is_file():
        assert run([str(script)], "--version").stdout.startswith(f"{startup.PROGRAM} {pk.__version__}")
