"""Builds the null GPU and runs tests/null_gpu on it, in a process of its own.

It is a stand-in for the CUDA driver and runtime, on which the host's part of every kernel runs without a GPU.
Every test there passes, or the one here fails and shows the output. It cannot tell values, time, races,
faults in kernels, nor what cuBLAS and cuDNN would launch.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from null_gpu.build import CAPABILITIES, LIBRARIES, build, environment, packages
from null_gpu.extension import extension_file, link_extension
from support.peers import require_null_gpu
from support.processes import ROOT, python, run_pytest

from poolformer_kernels.backends import cpp, cuda
from poolformer_kernels.cli.kernels import LIMITS

FOLDER = Path(__file__).parent / "null_gpu"
EVERY_CALL = FOLDER / "test_every_call.py"

# What torch has of these names from elsewhere: cuFile, and cuDNN's functions that need no device.
ELSEWHERE = re.compile(
    r"cuFile|cudnn(Create|Destroy|Set|Get).*Descriptor|cudnnSetConvolution(GroupCount|MathType)"
    r"|cudnnGet(Version|CudartVersion|Property|ErrorString|LastErrorString)"
)
# Names that torch looks up while it runs, in its libraries' text.
LOOKED_UP = re.compile(rb"\0(cu[A-Z][A-Za-z0-9_]{5,})(?=\0)")


@pytest.fixture(scope="module")
def folder() -> Path:
    require_null_gpu(triton=True)
    return build()


def symbols(file: Path, kind: str) -> set[str]:
    command = ["nm", "-D", f"--{kind}-only", str(file)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.split()[-1].split("@")[0] for line in lines if line}


def test_torch_finds_its_symbols(folder) -> None:
    """A new torch says here what it wants. Functions for features that are not there exist, and refuse."""
    ours = set().union(*(symbols(folder / name, "defined") for name in LIBRARIES.values()))
    wanted = set()
    for file in (packages() / "torch" / "lib").glob("*.so"):
        wanted |= symbols(file, "undefined")
    wanted = {name for name in wanted if re.match(r"_*cuda[A-Z]|cu[A-Z]|cublas|cudnn", name)}
    missing = {name for name in wanted - ours if not ELSEWHERE.match(name)}
    text = (packages() / "torch" / "lib" / "libc10_cuda.so").read_bytes()
    looked_up = {name.decode() for name in LOOKED_UP.findall(text)}
    assert len(wanted) > 300
    assert len(looked_up) > 30
    missing |= {name for name in looked_up if not {name, f"{name}_v2", f"{name}_v3"} & ours}
    linalg = symbols(packages() / "torch" / "lib" / "libtorch_cuda_linalg.so", "undefined")
    assert missing <= {name for name in linalg if name.startswith("cublas")}  # loaded for decompositions only


ATTRIBUTES = """
import ctypes, json, os
cuda = ctypes.CDLL("libcuda.so.1")
assert cuda.cuInit(0) == 0
value = ctypes.c_int()
def attribute(number):
    assert cuda.cuDeviceGetAttribute(ctypes.byref(value), number, 0) == 0
    return value.value
print(json.dumps([attribute(number) for number in (75, 76, 39, 106, 81, 97, 82, 8, 111, 120)]))
"""


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_device_has_the_limits_of_its_capability(folder, capability) -> None:
    done = python("-c", ATTRIBUTES, **environment(folder, capability))
    *number, threads, blocks, shared, of_block, registers, default, reserved, clusters = json.loads(
        done.stdout
    )
    assert number == [int(part) for part in capability.split(".")]
    assert (registers, default) == (65536, 48 << 10)
    assert reserved == shared - of_block == 1024
    assert clusters == (number[0] >= 9)
    limits = LIMITS.get(10 * number[0] + number[1])
    if limits is not None:  # those that the package knows
        assert (threads, blocks) == (32 * limits.warps, limits.blocks)
        assert (shared, of_block) == (limits.shared, limits.shared_of_block)


def test_a_device_that_is_none_of_the_models(folder) -> None:
    with pytest.raises(ValueError, match=r"capability is '9.1'; allowed are 8.0, 8.6"):
        environment(folder, "9.1")
    with pytest.raises(ValueError, match="count is 0; allowed are 1 to 8"):
        environment(folder, count=0)


COPIES = """
import torch
x = torch.arange(4.0).cuda()
y = torch.empty_like(x)
y.copy_(x)
print(x.tolist(), y.tolist())
"""


@pytest.mark.parametrize("data", [True, False])
def test_copies_inside_a_device_can_be_left_out(folder, data) -> None:
    """Of a benchmark of the host, which would wait for gigabytes of them; the host's own copies are made."""
    done = python("-c", COPIES, **environment(folder, data=data))
    moved = [0.0, 1.0, 2.0, 3.0]
    assert done.stdout.strip() == f"{moved} {moved if data else [0.0] * 4}"


AFTER_THE_IMPORT = """
import os, sys
from null_gpu import null_gpu
import torch, poolformer_kernels as pk

def run():
    x = torch.empty(2, 64, 8, 8, device="cuda", dtype=torch.bfloat16)
    for backend in ("cuda", "triton"):
        with pk.use_backend(backend), null_gpu.recorded() as launches:
            pk.ops.pool_mixer(x, None, None)
        print(torch.cuda.device_count(), backend, len(launches), flush=True)

child = os.fork()
if child == 0:
    os.environ["CUDA_VISIBLE_DEVICES"] = "1"
    run()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
run()
"""


def test_a_process_may_fork_and_choose_devices_after_the_import(folder) -> None:
    """In the child, too, CUDA starts with the first call: nothing of it was started by the import."""
    done = python("-c", AFTER_THE_IMPORT, **two_devices(folder, "9.0"))
    lines = [f"{count} {backend} 2" for count in (1, 2) for backend in ("cuda", "triton")]
    assert done.stdout.splitlines() == lines


def extension() -> Path:
    """The package's extension on the null GPU; a test needs one that was built with CUDA."""
    if extension_file() is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("the extension was built without CUDA")
    return link_extension()


def two_devices(folder: Path, capability: str) -> dict[str, str]:
    """The environment of a process that imports the package and the tests' modules."""
    env = environment(folder, capability, count=2, extension=extension())
    return env | {"PYTHONPATH": os.pathsep.join([env["PYTHONPATH"], str(ROOT), str(FOLDER.parent)])}


def run_tests(folder: Path, capability: str, *arguments: object) -> dict[str, int]:
    """`run_pytest` of tests in tests/null_gpu on two devices of this capability."""
    plugins = ("-p", "null_gpu.null_gpu", "-p", "no:faulthandler")
    return run_pytest(*plugins, *arguments, **two_devices(folder, capability))[0]


@pytest.mark.parametrize(
    ("tier", "least"), [("not long", 200), pytest.param("long", 10, marks=pytest.mark.long)]
)
def test_on_the_null_gpu(folder, tier, least) -> None:
    """All but test_values.py's, which says why, and every call, which the next test runs."""
    counts = run_tests(folder, "9.0", "-m", tier, FOLDER, f"--ignore={EVERY_CALL}")
    assert counts.keys() == {"passed", "deselected"}
    assert counts["passed"] >= least  # a file that collects nothing would pass, too


@pytest.mark.long
@pytest.mark.parametrize("capability", [name for name in CAPABILITIES if name not in ("8.9", "10.3")])
def test_every_call_on_the_null_gpu(folder, capability) -> None:
    """On a capability that the build has no image for, C++ is skipped, as not judged, and Triton is not.

    Launches of 8.9 are those of 8.6, and of 10.3 those of 10.0. Triton's of float16 are those of bfloat16,
    which one capability tells; its float32 runs on that and on the one with the least shared memory.
    """
    archs = cpp.build_info()["cuda_archs"]
    judged = cuda.code_for(archs, tuple(map(int, capability.split(".")))) is not None
    left_out = "float16 and not bfloat16" + ("" if capability == "12.0" else " or float32")
    left_out = f"triton and ({left_out})" if judged else left_out
    whole = capability == "9.0"
    counts = run_tests(folder, capability, EVERY_CALL, *([] if whole else ["-k", f"not ({left_out})"]))
    skipped = counts.get("skipped", 0)
    assert skipped == (0 if judged else counts["passed"])
    assert counts["passed"] + skipped >= (100 if whole else 60)
    assert ("deselected" in counts) != whole
