"""Installing: what the source distribution holds, and a package without its extension."""

import os
import shlex
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from setuptools import Distribution
from support.processes import ROOT, python
from support.variants import setup_script

import poolformer_kernels as pk
from poolformer_kernels.backends import cpp

KERNEL_SOURCES = ("csrc/common", "csrc/cuda")


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def tracked(*places: str) -> list[str]:
    """The files of the repository there; of an unpacked sdist, which has no git, all that are there."""
    command = ["git", "ls-files", *places]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split()
    found = [path for place in places for path in (files(ROOT / place) or ROOT.glob(place))]
    kept = [str(path.relative_to(ROOT)) for path in found if path.suffix not in (".pyc", ".so")]
    return listed or kept


def setup(*arguments, code=0, source=ROOT, **env):
    return python("setup.py", "--quiet", *arguments, cwd=source, code=code, **env)


@pytest.fixture
def folders(tmp_path):
    return ["--build-base", str(tmp_path / "base"), "--build-lib", str(tmp_path / "lib")]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = str(tmp_path_factory.mktemp("sdist"))
    setup("egg_info", "--egg-base", folder, "sdist", "--dist-dir", folder, POOLFORMER_KERNELS_SKIP_EXT="1")
    return next(Path(folder).glob("*.tar.gz"))


def test_source_distribution_holds_every_source(sdist):
    with tarfile.open(sdist) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = tracked("csrc", "poolformer_kernels", "tests", "benchmarks", "docs", "examples")
    wanted += ["setup.py", "pyproject.toml", "Makefile", "LICENSE", "CITATION.cff", *tracked("*.md")]
    assert "csrc/cuda/pool_mixer/pool_mixer.cu" in wanted
    assert {path for path in wanted if not path.startswith("benchmarks/results/")} - held == set()


def test_a_wheel_of_an_sdist_holds_the_modules_and_nothing_else(sdist, tmp_path, folders):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    source = tmp_path / f"poolformer_kernels-{pk.__version__}"
    env = {"POOLFORMER_KERNELS_SKIP_EXT": "1", "POOLFORMER_KERNELS_LOCAL_VERSION": "cu13"}
    wheel = ["bdist_wheel", "--dist-dir", str(tmp_path), "--bdist-dir", str(tmp_path / "files")]
    setup("egg_info", "--egg-base", str(tmp_path), "build", *folders, *wheel, source=source, **env)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        held = set(archive.namelist())
        metadata = archive.read(next(name for name in held if name.endswith("/METADATA"))).decode()
    info = {name for name in held if ".dist-info/" in name}
    assert {name.partition("/")[2] for name in info} >= {"licenses/LICENSE", "entry_points.txt"}
    modules = [path for path in tracked("poolformer_kernels") if path.endswith((".py", ".pyi", "py.typed"))]
    modules += [f"poolformer_kernels/{path}" for path in tracked("benchmarks") if path.endswith(".py")]
    some = ("__init__.py", "py.typed", "_C.pyi", "benchmarks/harness.py")
    assert {f"poolformer_kernels/{path}" for path in some} <= set(modules)
    assert held - info == set(modules)
    assert f"\nVersion: {pk.__version__}+cu13\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"POOLFORMER_KERNELS_SKIP_EXT": "1"}, "POOLFORMER_KERNELS_SKIP_EXT is set"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler can build it"),
    ],
)
def test_without_the_extension_the_package_runs_and_says_so_once(env, reason, folders):
    done = setup("build", *folders, **env)
    assert done.stderr.count("installing without the C++ extension") == 1
    assert {"py.typed", "_C.pyi"} <= {path.name for path in Path(folders[3], "poolformer_kernels").iterdir()}
    assert f"installing without the C++ extension: {reason}\n" in done.stderr
    code = (
        "import sys\n"  # an editable install would lend its extension to this copy
        "sys.meta_path = [f for f in sys.meta_path if 'Editable' not in repr(f)]\n"
        "import torch, poolformer_kernels as pk\n"
        "x = torch.randn(2, 3, 5, 5)\n"
        "a, b = (pk.ops.pool_mixer(x, None, None) for _ in range(2))\n"
        "with pk.use_backend('reference'): assert torch.equal(a, pk.ops.pool_mixer(x, None, None))\n"
        "assert 'cpp' not in pk.available_backends()\n"
        "assert 'was not built' in (reason := pk.backend_reasons()['cpp'])\n"
        "assert 'C++ compiler' in reason and 'POOLFORMER_KERNELS_SKIP_EXT' in reason\n"
        "try:\n"
        "    with pk.use_backend('cpp'): pk.ops.pool_mixer(x, None, None)\n"
        "except RuntimeError as error: print(error)\n"
    )
    ran = python("-c", code, cwd=folders[3], PYTHONPATH=folders[3])
    assert "backend 'cpp' was asked for and cannot run this call" in ran.stdout
    assert ran.stderr.count("no C++ backend") == 1
    assert ran.stderr.count("running the reference implementation") == 1
    wrong = python("-c", code, cwd=folders[3], PYTHONPATH=folders[3], POOLFORMER_KERNELS_ISA="avx1", code=1)
    assert wrong.stderr.endswith(
        "ValueError: POOLFORMER_KERNELS_ISA is 'avx1'; allowed: baseline, avx2, avx512, avx512_bf16, amx\n"
    )


def test_a_compiler_that_cannot_build_is_named(folders):
    done = setup("build", *folders, CXX="false")
    assert "false cannot build the extension" in done.stderr
    assert "installing without the C++ extension" in done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"TORCH_CUDA_ARCH_LIST": "8.0;hopper"}, "TORCH_CUDA_ARCH_LIST has 'hopper'"),
        (
            {"POOLFORMER_KERNELS_CUDART": "dynamic"},
            "POOLFORMER_KERNELS_CUDART is 'dynamic'; allowed: static, shared",
        ),
    ],
    ids=["arch list", "runtime"],
)
def test_a_wrong_setting_is_refused(env, message, folders):
    done = setup("build", *folders, code=1, **env)
    assert done.returncode != 0
    assert message in done.stderr


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


def test_the_extension_says_nothing_of_the_machine_that_built_it(monkeypatch, tmp_path):
    """torch's headers name themselves in error messages, by the path that the compiler was given."""
    module = setup_script().extension()["ext_modules"][0]
    command = [*shlex.split(os.environ.get("CXX", "g++")), "-xc++", "-c", "-", "-o", str(tmp_path / "one.o")]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", *(f"-I{path}" for path in module.include_dirs)]
    source = "#include <torch/csrc/stable/tensor.h>\n"
    source += "void one(const torch::stable::Tensor& x) { STD_TORCH_CHECK(x.dim() == 1, __FILE__); }\n"
    include = str(Path(torch.__file__).parent)

    def paths(flags: list[str]) -> bool:
        subprocess.run([*command, *flags], input=source, text=True, check=True, cwd=ROOT)
        return include.encode() in (tmp_path / "one.o").read_bytes()

    assert paths(["-std=c++20"])
    assert not paths(module.extra_compile_args)


def test_the_digest_is_of_all_that_kernels_are_made_from(tmp_path, monkeypatch):
    script = setup_script()
    monkeypatch.setattr(script, "ROOT", tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copy(ROOT / "setup.py", tmp_path)
    seen = {script.cuda_digest()}
    inputs = [tmp_path / "setup.py", *(path for part in KERNEL_SOURCES for path in files(tmp_path / part))]
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
