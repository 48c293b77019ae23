"""Installing: what the source distribution holds, and a package without its extension."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from setuptools import Distribution

from poolformer_kernels.backends import cpp

ROOT = Path(__file__).parents[1]


KERNEL_SOURCES = ("csrc/common", "csrc/cuda")


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def setup_script():
    """setup.py as a module, without a build."""
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def setup(*arguments, check=True, **env):
    command = [sys.executable, "setup.py", "--quiet", *arguments]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.fixture
def folders(tmp_path):
    return ["--build-base", str(tmp_path / "base"), "--build-lib", str(tmp_path / "lib")]


def test_source_distribution_holds_every_source(tmp_path):
    egg = ["egg_info", "--egg-base", str(tmp_path)]
    setup(*egg, "sdist", "--dist-dir", str(tmp_path), POOLFORMER_KERNELS_SKIP_EXT="1")
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    command = [
        "git",
        "ls-files",
        "csrc",
        "poolformer_kernels",
        "tests",
        "benchmarks",
        "setup.py",
        "README.md",
        "LICENSE",
    ]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split()
    wanted = listed or [str(path.relative_to(ROOT)) for path in files(ROOT / "csrc")]
    assert "csrc/cuda/pool_mixer/pool_mixer.cu" in wanted
    assert set(wanted) - held == set()


@pytest.mark.parametrize("env", [{"POOLFORMER_KERNELS_SKIP_EXT": "1"}, {"CXX": "no-such-compiler"}])
def test_without_the_extension_the_package_runs_and_says_so_once(env, folders):
    done = setup("build", *folders, **env)
    assert done.stderr.count("installing without the C++ extension") == 1
    code = (
        "import sys\n"  # an editable install would lend its extension to this copy
        "sys.meta_path = [f for f in sys.meta_path if 'Editable' not in repr(f)]\n"
        "import torch, poolformer_kernels as pk\n"
        "x = torch.randn(2, 3, 5, 5)\n"
        "a, b = (pk.ops.pool_mixer(x, None, None) for _ in range(2))\n"
        "with pk.use_backend('reference'): assert torch.equal(a, pk.ops.pool_mixer(x, None, None))\n"
        "assert 'was not built' in pk.available_backends()['cpp']\n"
        "try:\n"
        "    with pk.use_backend('cpp'): pk.ops.pool_mixer(x, None, None)\n"
        "except RuntimeError as error: print(error)\n"
    )
    path = {**os.environ, "PYTHONPATH": folders[3]}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=folders[3], env=path, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert "backend 'cpp' was asked for and cannot run this call" in ran.stdout
    assert ran.stderr.count("no C++ backend") == 1
    assert ran.stderr.count("running the reference implementation") == 1


def test_a_compiler_that_cannot_build_is_named(folders):
    done = setup("build", *folders, CXX="false")
    assert "false cannot build the extension" in done.stderr
    assert "installing without the C++ extension" in done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_a_wrong_arch_list_is_refused(folders):
    done = setup("build", *folders, check=False, TORCH_CUDA_ARCH_LIST="8.0;hopper")
    assert done.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST has 'hopper'" in done.stderr


def test_the_extension_is_linked_to_torchs_stream_function():
    """Without libtorch.so among its libraries the weak name is null, and no CUDA operator can run."""
    info = cpp.build_info()
    if not info.get("cuda_archs"):
        (pytest.fail if os.environ.get("CI") and shutil.which("nvcc") else pytest.skip)("built without CUDA")
    from poolformer_kernels import _C

    command = ["readelf", "--dynamic", _C.__file__]
    needed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Shared library: [libtorch.so]" in needed
    assert "libcudart" not in needed  # nor is CUDA needed for the import
    assert info["cuda_stream_bound"] == (torch.version.cuda is not None)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_a_wrong_runtime_is_refused(folders):
    done = setup("build", *folders, check=False, POOLFORMER_KERNELS_CUDART="dynamic")
    assert done.returncode != 0
    assert "POOLFORMER_KERNELS_CUDART is 'dynamic'; allowed: static, shared" in done.stderr


def test_the_digest_is_of_all_that_kernels_are_made_from(tmp_path, monkeypatch):
    script = setup_script()
    monkeypatch.setattr(script, "ROOT", tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copy(ROOT / "setup.py", tmp_path)
    seen = {script.cuda_digest()}
    inputs = [
        tmp_path / "setup.py",
        *(path for folder in KERNEL_SOURCES for path in files(tmp_path / folder)),
    ]
    assert {path.parent.name for path in inputs} >= {"common", "core", "pool_mixer", "mlp"}
    for path in inputs:
        with path.open("a") as file:
            file.write("\n")
        seen.add(script.cuda_digest())
    assert len(seen) == 1 + len(inputs)
    shutil.rmtree(tmp_path / "csrc" / "cpu")
    assert script.cuda_digest() in seen
    assert script.cuda_digest() == script.cuda_digest()


def test_what_ptxas_says_is_told_from_warnings():
    said = [
        "ptxas info    : Compiling entry function '_Zf' for 'sm_80'\n",
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n",
        "ptxas info    : Used 59 registers, used 1 barriers, 32 bytes smem\n",
    ]
    warning = "a.cu(3): warning #177-D: variable was declared but never referenced\n    int x;\n"
    text = said[0] + said[1] + warning + said[2]
    pattern = setup_script().PTXAS_LINE
    assert pattern.findall(text) == said
    assert pattern.sub("", text) == warning


NVCC = """#!/bin/sh
case "$*" in
*--version*) echo "Cuda compilation tools, release 13.0, V13.0.0";;
*--dryrun*) echo "#$ TOP={top}" >&2;;
*) echo "$*" >> {top}/calls
   echo "ptxas info    : Used 59 registers" >&2
   while [ "$1" != -o ]; do shift; done
   echo made > "$2";;
esac
"""


@pytest.fixture
def fake_nvcc(tmp_path, monkeypatch):
    """A compiler that writes down its calls; returns how often it was called since."""
    for folder in ("bin", "lib64"):
        (tmp_path / folder).mkdir()
    (tmp_path / "lib64" / "libcudart_static.a").touch()
    program = tmp_path / "bin" / "nvcc"
    program.write_text(NVCC.replace("{top}", str(tmp_path)))
    program.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    calls = tmp_path / "calls"

    def count() -> int:
        found = len(calls.read_text().splitlines()) if calls.exists() else 0
        calls.unlink(missing_ok=True)
        return found

    return count


def test_objects_of_the_same_sources_and_command_are_kept(fake_nvcc, tmp_path, monkeypatch):
    def compiled(digest: str) -> int:
        script = setup_script()
        command = script.extension()["cmdclass"]["build_ext"](Distribution())
        command.build_temp = str(tmp_path / "objects")
        target, report = command.compile_cuda(Path("csrc/cuda/core/norm_stats.cu"), digest)
        assert Path(target).read_text() == "made\n"
        assert report == "ptxas info    : Used 59 registers\n"
        return fake_nvcc()

    assert [compiled("one") for _ in range(2)] == [1, 0]
    assert [compiled("another") for _ in range(2)] == [1, 0]  # the sources
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    assert [compiled("another") for _ in range(2)] == [1, 0]
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-lineinfo")
    assert [compiled("another") for _ in range(2)] == [1, 0]
    monkeypatch.setattr(torch, "__version__", "9.9")  # whose headers they would not be of
    assert [compiled("another") for _ in range(2)] == [1, 0]
    next((tmp_path / "objects").rglob("*.o")).unlink()
    assert compiled("another") == 1


def test_files_of_one_name_in_two_folders_have_their_own_objects(fake_nvcc, tmp_path):
    command = setup_script().extension()["cmdclass"]["build_ext"](Distribution())
    command.build_temp = str(tmp_path / "objects")
    sources = [Path("csrc/cuda", folder, "forward.cu") for folder in ("mlp", "pool_mixer")]
    objects = {command.compile_cuda(source, "digest")[0] for source in sources}
    assert len(objects) == len(list(tmp_path.rglob("*.ptxas"))) == fake_nvcc() == 2
