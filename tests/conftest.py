"""Fixtures for every test. The operator tests run once per backend that computes on the CPU."""

import gc
import os
import signal
import sys
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from support import graphs
from support.nn import OperatorCall
from support.peers import require_backend
from support.problems import BACKENDS
from support.sandbox import Sandbox

import poolformer_kernels as pk
from poolformer_kernels.cli.main import load_benchmarks
from poolformer_kernels.nn import fusion

NOT_RUN = pytest.StashKey[dict]()  # by target and reason


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "accelerated models at real sizes: all fifteen, at full depth (minutes)"
    parser.addoption("--full-depth", action="store_true", help=text)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "large: needs many gigabytes of memory")
    config.addinivalue_line("markers", "host: looks at no computed values; runs on the null GPU, too")
    config.addinivalue_line("markers", "long: full products of parameters, run by `make test-long`")
    text = "sampled(n): all but the first of its cases and about one in n of the others are long"
    config.addinivalue_line("markers", text)
    for backend in ("cuda", "triton"):
        config.addinivalue_line("markers", f"{backend}: of tests/gpu, on this backend")
    if os.environ.get("POOLFORMER_TEST_CASES"):  # a folder for the cases that are computed: see the module
        config.pluginmanager.import_plugin("support.cases")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a run in the background; processes inherit that
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "PYTEST_XDIST_WORKER" in os.environ:  # processes that share the cores; determinism tests set their own
        torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """What is long, before ``-m`` selects; afterwards what runs here, and in which order.

    Tests that take a while come at the start of both workers' halves: none is left alone with one at the end.
    On the null GPU kernels are not run: a test of values would compare what nobody wrote, so there is none.
    """
    seen = set()
    for item in items:
        sampled = item.get_closest_marker("sampled")
        again = sampled and (item.path, item.originalname) in seen
        if again and zlib.crc32(item.name.encode()) % sampled.args[0]:
            item.add_marker("long")
        seen.add((item.path, item.originalname))
    yield
    if os.environ.get("NULL_GPU"):
        config.hook.pytest_deselected(items=[i for i in items if not i.get_closest_marker("host")])
        items[:] = [item for item in items if item.get_closest_marker("host")]
    names = ("test_triton_interpreter", "test_isa", "test_amx", "test_cuda_executor", "test_null_gpu")
    names += ("test_contract", "test_gpu_check.py::test_a_dry_run")
    slow = [i for i in items if i.get_closest_marker("large") or any(name in i.nodeid for name in names)]
    first = set(slow)
    amx = [i for i in slow if "test_amx" in i.nodeid]  # they share what the first of them compiles
    others = [i for i in slow if "test_amx" not in i.nodeid]
    halves = [*amx, *others[::2]], others[1::2]
    rest = [item for item in items if item not in first]
    half = (len(rest) + len(halves[1]) - len(halves[0])) // 2
    items[:] = [*halves[0], *rest[:half], *halves[1], *rest[half:]]


def pytest_collection_finish() -> None:
    """Modules and tests stay until the end: garbage collection need not look at them again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs on this backend, in it alone: an explicit choice never falls back."""
    require_backend(request.param)
    with pk.use_backend(request.param):
        yield request.param


@pytest.fixture
def kernels() -> Iterator[str]:
    """The CPU's kernel backend, for what only holds for kernels."""
    require_backend("cpp")
    with pk.use_backend("cpp"):
        yield "cpp"


@pytest.fixture
def operator_calls(monkeypatch) -> list[OperatorCall]:
    """The calls of operators that blocks make from now on, of this package's or accelerated ones."""
    made: list[OperatorCall] = []

    def call(operator, name, *args, **options):
        made.append(OperatorCall(name, args, options))
        return operator(*args, **options)

    for name in ("pool_mixer", "mlp"):
        operator = getattr(fusion, f"{name}_with_stats")
        monkeypatch.setattr(fusion, f"{name}_with_stats", partial(call, operator, name))
    return made


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """The compiler has seen nothing, and nothing that it sees is left to others."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def sandbox(monkeypatch, tmp_path, capsys) -> Iterator[Sandbox]:
    """For benchmarks and examples: they write in the test's folder and leave this process as it was.

    A benchmark does not restart it for a warm heap.
    """
    load_benchmarks()
    from poolformer_kernels.benchmarks.harness import WARM_HEAP

    for name, value in WARM_HEAP.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield Sandbox(tmp_path, capsys)
    torch.set_num_threads(threads)


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a training run, which is not there yet."""
    return tmp_path / "run"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Sixteen images of cats and dogs to train on, and as many for validation."""
    from support.train import make_folder

    return make_folder(tmp_path / "folder", images=8)


@pytest.fixture(scope="session")
def discs(tmp_path_factory) -> Path:
    """Data of the dense tasks, which no test changes."""
    from support.train_dense import make_discs

    return make_discs(tmp_path_factory.mktemp("discs"))


@pytest.fixture
def stand_in(monkeypatch) -> None:
    """CUDA graphs on the CPU, of recorded operators."""
    graphs.install(monkeypatch)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker hands over what the contract's cases have counted."""
    if hasattr(session.config, "workeroutput") and "contract.cases" in sys.modules:
        counted = sys.modules["contract.cases"].NOT_RUN
        session.config.workeroutput["not run"] = {name: dict(reasons) for name, reasons in counted.items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    node.config.stash[NOT_RUN] = getattr(node, "workeroutput", {}).get("not run", {})  # of all workers alike


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What the contract was not run on, here and in processes of their own; seeds of random problems."""
    counted = config.stash.get(NOT_RUN, None) or getattr(sys.modules.get("contract.cases"), "NOT_RUN", {})
    for name, reasons in counted.items():
        for reason, count in reasons.items():
            if count and (config.option.markexpr == "not long" or "test-long" not in reason):
                terminalreporter.write_line(f"not run on {name}: {count} cases: {reason}")
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    properties = [p for report in reports for p in getattr(report, "user_properties", [])]
    for line in sorted({value for name, value in properties if name == "shown"}):
        terminalreporter.write_line(line)
