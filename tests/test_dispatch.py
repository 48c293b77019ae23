"""Which backend runs a call: explicit choices are kept or raise, ``auto`` falls back and says so once."""

import contextlib
import logging
import os
import subprocess
import threading

import pytest
import torch
from support.peers import require_backend
from support.pool_mixer import make_grad, make_inputs
from support.processes import python
from support.rule import assert_same, run

import poolformer_kernels as pk
from poolformer_kernels.backends import cpp
from poolformer_kernels.ops import dispatch as selection
from poolformer_kernels.ops import pool_mixer

VARIABLE = "POOLFORMER_KERNELS_BACKEND"


@pytest.fixture
def forget(monkeypatch, caplog) -> None:
    """As in a fresh process: nothing chosen, decided or logged, of which ``caplog`` has the warnings."""
    caplog.set_level(logging.WARNING, logger="poolformer_kernels")
    monkeypatch.setattr(selection, "_chosen", "auto")
    monkeypatch.setattr(selection, "_SELECTED", {})
    monkeypatch.setattr(selection, "_logged", set())


def test_available_backends():
    available, reasons = pk.available_backends(), pk.backend_reasons()
    assert available[0] == "reference"
    both = [*available, *reasons]  # each of them once
    assert sorted(both) == sorted(selection.BACKENDS)
    assert available == [name for name in selection.BACKENDS if name in available]  # in this order
    for name in available[1:]:
        assert selection.unavailable_reason(name) is None
    for name, reason in reasons.items():
        assert reason == selection.unavailable_reason(name)
        assert reason
        assert "\n" not in reason


def test_auto_takes_the_kernels(kernels):
    inputs = make_inputs((2, 5, 6, 7))
    grad = make_grad(inputs)
    expected = run(pool_mixer, inputs, grad)
    with pk.use_backend("auto"):
        assert selection.select_backend("cpu", torch.float32) == "cpp"
        assert_same(run(pool_mixer, inputs, grad), expected)
    with pk.use_backend("reference"):  # rounding noise: the kernels return zeros
        assert run(pool_mixer, inputs, grad)["dbias"].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_an_explicit_choice_never_falls_back(kernels, dtype):
    x = torch.ones(1, 2, 3, 3, dtype=dtype)
    if dtype != torch.float64:
        assert torch.equal(pool_mixer(x, None, None), torch.zeros_like(x))
        return
    message = "'cpp' was asked for and cannot run this call: .*float32, bfloat16 and float16, not float64"
    for _ in range(2):  # the failure is not remembered as a choice
        with pytest.raises(RuntimeError, match=message):
            pool_mixer(x, None, None)
    with pk.use_backend("auto"):
        assert torch.equal(pool_mixer(x, None, None), torch.zeros_like(x))


def test_triton_on_cpu_tensors_raises():
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter computes on the CPU")
    message = "backend 'triton' was asked for and cannot run"
    with pk.use_backend("triton"), pytest.raises(RuntimeError, match=message):
        pool_mixer(torch.ones(1, 2, 3, 3), None, None)


def test_a_missing_extension_raises_with_its_reason(forget, monkeypatch):
    monkeypatch.setattr(cpp, "UNAVAILABLE", "the extension was not built")
    assert pk.backend_reasons()["cpp"] == "the extension was not built"
    assert "cpp" not in pk.available_backends()
    message = r"'cpp'.*cannot run.*the extension was not built"
    with pk.use_backend("cpp"), pytest.raises(RuntimeError, match=message):
        pool_mixer(torch.ones(1, 2, 3, 3), None, None)


def test_fallback_is_logged_once_for_each_reason(forget, monkeypatch, caplog):
    monkeypatch.setattr(cpp, "UNAVAILABLE", "the extension was not built")
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        pool_mixer(torch.ones(1, 2, 3, 3, dtype=dtype), None, None)
    reason = "cpp: the extension was not built"
    assert [r.getMessage() for r in caplog.records] == [f"running the reference implementation: {reason}"]
    assert selection.explain_selection("cpu", torch.float32) == ("reference", reason)


def test_float64_falls_back_and_is_logged_once(forget, kernels, caplog):
    x = torch.ones(1, 2, 3, 3, dtype=torch.float64)
    with pk.use_backend("auto"):
        pool_mixer(x, None, None)
        pool_mixer(x, None, None)
    (record,) = caplog.records
    assert "running the reference implementation" in record.getMessage()
    assert "float64" in record.getMessage()


def test_an_explicit_reference_is_not_a_fallback(forget, caplog):
    with pk.use_backend("reference"):
        pool_mixer(torch.ones(1, 2, 3, 3), None, None)
    assert not caplog.records


def test_explain_selection(forget, kernels):
    assert selection.explain_selection("cpu", torch.float32) == ("cpp", "asked for")
    name, reason = selection.explain_selection("cpu", torch.float64)
    assert name == "none"
    assert "'cpp' was asked for" in reason
    with pk.use_backend("auto"):
        assert selection.explain_selection("cpu", torch.bfloat16) == ("cpp", "the fastest on cpu")
        expected = ("reference", "no kernel backend runs on mps tensors")
        assert selection.explain_selection("mps", torch.float32) == expected


# ---- CUDA devices, on stand-ins: which there are, and of what compute capability ---------------------------


@pytest.fixture
def devices(forget, monkeypatch):
    """Sets the compute capabilities of the CUDA devices, for an extension with code for 8.x and 9.0."""

    def set_devices(*capabilities: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])

    for backend in (pk.backends.cuda, pk.backends.triton):
        monkeypatch.setattr(backend, "UNAVAILABLE", None)
        monkeypatch.setattr(backend, "_unavailable", backend._unavailable.__wrapped__)  # judge anew
    monkeypatch.setattr(pk.backends.cuda, "_BUILD", {"cuda_archs": ["8.0", "9.0a"]})
    return set_devices


def selected(device: str) -> tuple[str, str]:
    return selection.explain_selection(torch.device(device), torch.bfloat16)


def test_auto_takes_triton_then_cuda_then_the_reference(devices, monkeypatch):
    devices((9, 0))
    assert selected("cuda:0") == selected("cuda") == ("triton", "the fastest on cuda")
    monkeypatch.setattr(pk.backends.triton, "UNAVAILABLE", "triton is not installed")
    assert selected("cuda:0") == ("cuda", "instead of triton: triton is not installed")
    monkeypatch.setattr(pk.backends.cuda, "UNAVAILABLE", "the extension was built without CUDA")
    reason = "triton: triton is not installed; cuda: the extension was built without CUDA"
    assert selected("cuda:0") == ("reference", reason)


def test_devices_are_judged_each_for_itself(devices):
    devices((9, 0), (7, 5), (10, 0))
    assert selected("cuda:0")[0] == selected("cuda:2")[0] == "triton"
    backend, reason = selected("cuda:1")
    assert backend == "reference"
    assert "needs compute capability 8.0 or newer, this device has 7.5" in reason
    assert "the extension was built for 8.0, 9.0a, not for this device's 7.5" in reason
    with pk.use_backend("cuda"):
        assert [selected(f"cuda:{i}")[0] for i in range(3)] == ["cuda", "none", "none"]
        for _ in range(2):  # the second time it is known
            assert selection.select_backend(torch.device("cuda", 0), torch.float16) == "cuda"
        with pytest.raises(RuntimeError, match=r"built for 8\.0, 9\.0a, not for this device's 10\.0"):
            selection.select_backend(torch.device("cuda", 2), torch.float16)
    assert "cuda" in pk.available_backends()  # one of them can
    assert "cuda" not in pk.backend_reasons()
    devices((7, 5), (7, 0))
    reason = pk.backend_reasons()["cuda"]
    assert "this device's 7.5" in reason
    assert "this device's 7.0" in reason
    devices()
    assert pk.backend_reasons()["triton"] == pk.backend_reasons()["cuda"] == "no CUDA device"
    assert selected("cuda") == ("reference", "triton: no CUDA device; cuda: no CUDA device")


def test_a_triton_that_cannot_be_imported_is_not_taken(devices, monkeypatch):
    def fail(name, package):
        raise ImportError("cannot import name 'jit'")

    devices((9, 0))
    monkeypatch.setattr(pk.backends.triton, "import_module", fail)
    reason = "triton cannot be imported: cannot import name 'jit'"
    assert selected("cuda:0") == ("cuda", f"instead of triton: {reason}")


def test_the_current_device_is_asked_for_anew(devices, monkeypatch):
    devices((9, 0), (7, 5))
    assert selection.select_backend("cuda", torch.float32) == "triton"
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert selection.select_backend("cuda", torch.float32) == "reference"


def test_mlps_that_cuda_has_no_kernel_for(devices, monkeypatch):
    devices((9, 0))
    device, narrow, wide = torch.device("cuda", 0), (64, 256, 64), (320, 1280, 320)
    half = torch.bfloat16
    assert selection.mlp_of_cuda(device, narrow, half, True) == "cuda"
    assert selection.mlp_of_cuda(device, wide, half, True) == "triton"
    assert selection.mlp_of_cuda(device, (192, 768, 192), half, True) == "cuda"  # Triton has the backward
    monkeypatch.setattr(pk.backends.triton, "UNAVAILABLE", "triton is not installed")
    assert selection.mlp_of_cuda(device, wide, half, False) == "reference"
    assert selection.mlp_of_cuda(device, (192, 768, 192), half, True) == "reference"
    assert selection.mlp_of_cuda(device, (192, 768, 192), half, False) == "cuda"
    message = "'cuda' was asked for and has no kernel for this call: 320 to"
    with pk.use_backend("cuda"), pytest.raises(RuntimeError, match=message):
        selection.mlp_of_cuda(device, wide, half, False)


def test_the_import_touches_neither_cuda_nor_triton_nor_the_compiler():
    """A process can fork, or set CUDA_VISIBLE_DEVICES, after it has imported the package."""
    code = (
        "import sys, torch\n"
        "def touched(*_, **__): raise AssertionError('the import touched CUDA')\n"
        "for name in ('is_available', 'device_count', 'current_device', 'get_device_capability',"
        " 'get_device_properties', '_lazy_init', 'init'):\n"
        "    setattr(torch.cuda, name, touched)\n"
        "for name in ('_cuda_getDeviceCount', '_cuda_init'):\n"
        "    if hasattr(torch._C, name): setattr(torch._C, name, touched)\n"
        "import poolformer_kernels as pk\n"
        "print('triton' in sys.modules, 'torch._dynamo' in sys.modules,"
        " pk.ops.pool_mixer(torch.ones(1, 2, 3, 3), None, None).sum().item())\n"
    )
    done = in_a_process(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "False False 0.0\n"


def test_use_backend_nests_and_is_restored_after_exceptions(forget):
    with pk.use_backend("reference"):
        with pk.use_backend("auto"):
            with contextlib.suppress(KeyError), pk.use_backend("cpp"):
                assert pk.get_backend() == "cpp"
                raise KeyError
            assert pk.get_backend() == "auto"
        assert pk.get_backend() == "reference"
        with pytest.raises(ValueError), pk.use_backend("cuda13"):
            pytest.fail("the block of an unknown backend runs")
        assert pk.get_backend() == "reference"
    assert pk.get_backend() == "auto"


@pytest.mark.parametrize("name", ["", "Reference", "nonsense", None])
def test_unknown_backend(name):
    before = pk.get_backend()
    with pytest.raises(ValueError, match=f"backend is {name!r}; allowed: auto, reference, cpp, triton, cuda"):
        pk.use_backend(name).__enter__()
    assert pk.get_backend() == before


def test_all_threads_follow_the_choice(forget):
    """Of one process there is one choice, whichever thread has made it."""
    seen = []

    def look() -> None:
        seen.append((pk.get_backend(), selection.explain_selection("cpu", torch.float32)[0]))

    with pk.use_backend("reference"):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert seen == [("reference", "reference")]
    assert pk.get_backend() == "auto"


def in_a_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    """The backend is chosen only where ``environment`` has the variable."""
    return python("-W", "ignore", "-c", code, code=None, **{VARIABLE: ""} | environment)


def test_environment_variable_chooses():
    code = (
        "import os, torch, poolformer_kernels as pk\n"
        "from poolformer_kernels.ops.dispatch import explain_selection\n"
        "print(*explain_selection('cpu', torch.float32), sep='|')\n"
        f"os.environ['{VARIABLE}'] = 'nonsense'\n"  # read once, at import
        "with pk.use_backend('auto'): pass\n"
        "print(pk.ops.pool_mixer(torch.ones(1, 2, 3, 3), None, None).abs().max().item())\n"
    )
    done = in_a_process(code, **{VARIABLE: "reference"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["reference|asked for", "0.0"]


@pytest.mark.parametrize(("value", "choice"), [("", "auto"), ("Reference", "reference"), ("AUTO", "auto")])
def test_an_empty_variable_is_unset_and_case_does_not_count(value, choice):
    done = in_a_process("import poolformer_kernels as pk; print(pk.get_backend())", **{VARIABLE: value})
    assert done.stdout == f"{choice}\n", done.stderr


def test_a_wrong_backend_variable_fails_the_import():
    done = in_a_process("import poolformer_kernels", **{VARIABLE: "nonsense' is not one"})
    allowed = "auto, reference, cpp, triton, cuda"
    assert_import_fails(done, f"""{VARIABLE} is "nonsense' is not one"; allowed: {allowed}""")


def test_a_wrong_level_variable_fails_the_import():
    require_backend("cpp")
    done = in_a_process("import poolformer_kernels", POOLFORMER_KERNELS_ISA="sse9")
    info = cpp.build_info()
    compiled, supported = (", ".join(info[f"isa_{which}"]) for which in ("compiled", "supported"))
    allowed = f"allowed: {compiled}; of these this processor runs {supported}"
    assert_import_fails(done, f"POOLFORMER_KERNELS_ISA is 'sse9'; {allowed}")


def assert_import_fails(done: subprocess.CompletedProcess, message: str) -> None:
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"ValueError: {message}"
    assert "another exception" not in done.stderr


def test_meta_tensors_are_not_logged(forget, caplog):
    """Of them nothing is computed, so nothing is slow."""
    x = torch.ones(1, 2, 3, 3, device="meta")
    assert pool_mixer(x, None, None).is_meta
    pk.create_model("poolformer_s12").to("meta")(torch.ones(1, 3, 32, 32, device="meta"))
    assert not caplog.records
