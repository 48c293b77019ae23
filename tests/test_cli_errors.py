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
from setuptools.config.pyprojecttoml import read_configuration
from support.commands import ERROR, MODULE, printed, refused, run, small_disk
from support.peers import require
from support.processes import ROOT, python, started

import poolformer_kernels as pk
from poolformer_kernels.cli import startup
from poolformer_kernels.cli.errors import CommandError, report_errors
from poolformer_kernels.cli.extras import NEEDS
from poolformer_kernels.cli.main import main

SCRIPT = """
import sys
sys.argv[0] = "/somewhere/bin/poolformer-kernels"
from poolformer_kernels.cli.main import main
sys.exit(main())
"""  # what pip writes into bin/poolformer-kernels
COMMANDS = {"module": MODULE, "script": ("-c", SCRIPT)}


# ---- in this process ---------------------------------------------------------------------------------------


def failing(error: BaseException):
    def command() -> int:
        raise error

    return command


CPU_MEMORY = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you"
CUDA_MEMORY = "CUDA out of memory. Tried"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (CommandError("a\n b"), 2, "error: a b"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (CommandError("interrupted; rows are in x.csv", 130), 130, "interrupted; rows are in x.csv"),
        (MemoryError(), 2, "error: out of memory"),
        (MemoryError("std::bad_alloc"), 2, "error: out of memory: std::bad_alloc"),
        (torch.OutOfMemoryError(f"{CUDA_MEMORY}\nmore"), 2, f"error: out of memory: {CUDA_MEMORY}"),
        (RuntimeError(CPU_MEMORY), 2, "error: out of memory: can't allocate memory: you"),
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


def interrupted(*words: str, when, folder: Path) -> tuple[int, str, str]:
    """The exit code and output of a Python that gets Ctrl-C when ``when(process)`` is true."""
    with started(*words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            deadline = time.monotonic() + 200
            while not when(process):
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=100)
        finally:
            process.kill()  # the block waits for its end
    return process.returncode, out, err


def maps(process: subprocess.Popen) -> str:
    try:
        return Path(f"/proc/{process.pid}/maps").read_text()
    except OSError:
        return ""


@pytest.mark.parametrize("how", COMMANDS)
def test_ctrl_c_while_torch_is_imported(how, tmp_path) -> None:
    """The first file of torch is mapped: the package's own import has begun, and takes a second more."""
    ended = interrupted(
        *COMMANDS[how], "info", when=lambda process: "libtorch_cpu" in maps(process), folder=tmp_path
    )
    assert ended == (130, "", "poolformer-kernels: interrupted\n")


def test_importing_the_package_elsewhere_changes_nothing() -> None:
    text = "import signal, sys; hook = sys.excepthook; import poolformer_kernels; "
    text += "print(sys.excepthook is hook, signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    assert python("-c", text).stdout == "True True\n"
    assert not startup.is_command()


def test_ctrl_c_before_the_first_row_leaves_no_file(tmp_path) -> None:
    require("rich")
    command = "bench mlp --models s12 --dtype float32 --rounds 100000 --threads 1"
    words = f"{command} --csv rows/mlp.csv --json rows/mlp.json".split()
    seen = bytearray()

    def when(process) -> bool:  # the first case is announced
        os.set_blocking(process.stderr.fileno(), False)
        with contextlib.suppress(BlockingIOError):
            seen.extend(os.read(process.stderr.fileno(), 1 << 16))
        os.set_blocking(process.stderr.fileno(), True)
        return b"mlp: forward" in seen

    ended = interrupted(*MODULE, *words, when=when, folder=tmp_path)
    assert ended == (130, "", "poolformer-kernels: interrupted\n")
    assert list(tmp_path.rglob("*.*")) == []


def test_ctrl_c_keeps_the_rows_of_the_cases_before(tmp_path, monkeypatch, capsys, sandbox) -> None:
    require("rich")
    from poolformer_kernels.benchmarks import bench_mlp

    measured, real = [], bench_mlp.measure

    def measure(*args, **options):
        if measured:
            raise KeyboardInterrupt
        measured.append(real(*args, **options))
        return measured[0]

    monkeypatch.setattr(bench_mlp, "measure", measure)
    file = tmp_path / "mlp.csv"
    command = "bench mlp --models s12 --dtype float32 --batch 1 --rounds 3 --device cpu --providers ours"
    results = ["--csv", file, "--json", tmp_path / "mlp.json"]
    assert run(f"{command} --directions forward", *results) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"poolformer-kernels: interrupted; what was measured before is in {file}"
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["provider"] for row in rows} == {"ours", "copy", "matmul"}
    assert {row["stage"] for row in rows} == {"1"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlp.csv"]


def test_rows_of_a_full_disk_are_whole_cases(tmp_path, sandbox) -> None:
    from poolformer_kernels.benchmarks.rows import Results, Row

    values = dict.fromkeys(Row.__dataclass_fields__, "x") | {"batch": 8}
    results = Results(tmp_path / "a.csv")
    results.add([Row(**values)])
    before = results.path.read_bytes()
    message = r"cannot write to .*a\.csv: File too large"
    with small_disk(len(before) + 10), pytest.raises(CommandError, match=message):
        results.add([Row(**values)])
    assert results.path.read_bytes() == before


# ---- pipes and full disks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["info", "--help", "--version", "info --models --json"])
def test_a_closed_pipe_ends_quietly(words) -> None:
    read, write = os.pipe()
    os.close(read)
    code = 0 if words == "--help" else 141  # argparse drops what it cannot write
    done = python(*MODULE, *words.split(), stdout=write, code=code)
    os.close(write)
    assert done.stderr == ""


def test_a_full_disk_behind_stdout_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = python(*MODULE, "info", stdout=full, code=2)
    assert done.stderr == "poolformer-kernels: error: cannot write: No space left on device\n"


def test_a_full_disk_behind_json_is_one_line(capsys) -> None:
    require("rich")
    assert run("profile --paper --json /dev/full") == 2
    error = f"{ERROR}cannot write to /dev/full: No space left on device\n"
    assert capsys.readouterr().err == error


# ---- variables ---------------------------------------------------------------------------------------------

WRONG = {"POOLFORMER_KERNELS_BACKEND": "fast"}


@pytest.mark.parametrize("how", COMMANDS)
def test_a_wrong_variable_is_one_line(how) -> None:
    done = python(*COMMANDS[how], "info", code=2, **WRONG)
    (line,) = done.stderr.splitlines()
    assert done.stdout == ""
    assert line.startswith(f"{ERROR}POOLFORMER_KERNELS_BACKEND is 'fast'; allowed: auto, reference, cpp")


def test_a_wrong_variable_raises_on_import_elsewhere() -> None:
    done = python("-c", "import poolformer_kernels", code=1, **WRONG)
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("ValueError: POOLFORMER_KERNELS_BACKEND is 'fast'")


def test_another_error_of_the_import_keeps_its_traceback(tmp_path) -> None:
    (tmp_path / "torch.py").write_text("raise ValueError('a broken torch')")
    done = python(*MODULE, "info", code=1, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.stderr.splitlines()[-1] == "ValueError: a broken torch"


@pytest.mark.long
def test_torchrun_runs_the_module() -> None:
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "1")
    done = python(*torchrun, *MODULE, "info", "--json")
    assert f'"poolformer-kernels": "{pk.__version__}"' in done.stdout
    done = python(*torchrun, *MODULE, "info", code=1, **WRONG)
    assert f"\n{ERROR}POOLFORMER_KERNELS_BACKEND" in f"\n{done.stderr}"


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


PACKAGE = Path(pk.__file__).parent
EDITABLE = '{"url": "file://%s", "dir_info": {"editable": true}}'


@pytest.mark.parametrize(
    ("direct_url", "how"),
    [
        (EDITABLE % PACKAGE.parent, f"editable, from {PACKAGE.parent}"),
        ('{"url": "file:///tmp/a.whl", "archive_info": {}}', "a wheel made from /tmp/a.whl"),
        (None, "a wheel"),
        (EDITABLE % "/elsewhere", "a source tree on the path, before the installed package"),
        (LookupError, "not installed: a source tree on the path"),
    ],
    ids=["editable", "wheel", "index", "other", "none"],
)
def test_info_says_how_it_was_installed(direct_url, how, monkeypatch) -> None:
    from poolformer_kernels.cli import info

    class Distribution:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return direct_url

        def locate_file(self, name: str) -> Path:
            return PACKAGE.parent / name

    def distribution(name: str) -> Distribution:
        if direct_url is LookupError:
            raise info.metadata.PackageNotFoundError
        return Distribution()

    monkeypatch.setattr(info.metadata, "distribution", distribution)
    assert info.installation() == {"how": how, "package": str(PACKAGE), "python": sys.executable}


def test_info_prints_the_variables_that_are_set(monkeypatch, capsys) -> None:
    for name in [name for name in os.environ if name.startswith("POOLFORMER_KERNELS_")]:
        monkeypatch.delenv(name)
    assert "\nenvironment: none\n" in printed(capsys, "info")
    monkeypatch.setenv("POOLFORMER_KERNELS_ISA", "avx2")
    assert re.search(r"\nenvironment\n  POOLFORMER_KERNELS_ISA +avx2\n", printed(capsys, "info"))


def extras() -> dict[str, set[str]]:
    """The packages of each extra."""
    lists = read_configuration(ROOT / "pyproject.toml")["project"]["optional-dependencies"]
    return {name: {re.split(r"[<>=]", package)[0] for package in found} for name, found in lists.items()}


def test_a_command_without_its_packages_names_the_smallest_extra(monkeypatch, capsys) -> None:
    packages = {"PIL": "pillow", "yaml": "pyyaml", "captum.attr": "captum"}
    known = extras()
    for module in sorted({module for _, modules in NEEDS.values() for module in modules}):
        require(module)  # whole, before one of what it imports itself is hidden
    for command, (extra, modules) in NEEDS.items():
        needed = {packages.get(module, module) for module in modules}
        enough = {name: found for name, found in known.items() if needed <= found}
        assert extra in enough, command
        assert len(known[extra]) == min(map(len, enough.values())), f"{command}: {enough}"
        words = {"predict": "a.png --checkpoint a", "validate": "a --checkpoint a", "train": "a --out b"}
        words |= {"cam": "a.png"}
        for module in modules:
            with monkeypatch.context() as patch:
                patch.setitem(sys.modules, module, None)
                error = refused(capsys, f"{command} {words.get(command, '')}")
            assert error.startswith(f"packages for {command} are missing (")
            assert error.endswith(f"): pip install 'poolformer_kernels[{extra}]'")


def test_commands_that_need_nothing_import_no_extra() -> None:
    text = """
import sys
from poolformer_kernels.cli.main import main
for words in (["info", "--models"], ["profile", "--no-time"]):
    assert main(words) == 0
print(sorted({"timm", "torchvision", "matplotlib", "PIL", "sklearn", "transformers"} & set(sys.modules)))
"""
    require("rich")
    assert python("-c", text).stdout.splitlines()[-1] == "[]"


def test_the_script_that_pip_installs_is_the_command() -> None:
    """`startup` knows it by its name."""
    text = (ROOT / "pyproject.toml").read_text()
    assert f'\n{startup.PROGRAM} = "{startup.MODULE}.cli.main:main"\n' in text
    script = Path(sysconfig.get_path("scripts"), startup.PROGRAM)
    if script.is_file():
        done = subprocess.run([script, "--version"], capture_output=True, text=True)
        assert done.stdout.startswith(f"{startup.PROGRAM} {pk.__version__}")
