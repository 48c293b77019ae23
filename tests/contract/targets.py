"""What the operators' contract is run on: each target, what it can afford and what it does not support.

A run has the targets that POOLFORMER_TEST_TARGETS names, separated by commas; by default those that compute
in an ordinary process, `reference` and `cpp`. `test_contract.py` runs the others in processes of their own.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from support.problems import HALVES
from support.processes import ROOT
from support.rule import threads

import poolformer_kernels as pk
from poolformer_kernels.backends import cpp, cuda

from . import executor

VARIABLE = "POOLFORMER_TEST_TARGETS"
CUDA_CHANNELS = (64, 96, 128, 192)
CUDA_BACKWARD = (64, 96, 128)


@dataclass(frozen=True)
class Target:
    """A way to compute the operators.

    ``elements`` is the most that a case may have, in x or the hidden activations; ``products`` are these
    times the pixels of their pool.
    ``short`` and ``whole`` say which cases of a product of parameters run in `make test` and in all: ``None``
    is each, 0 one, 1 so many that each value is there, 2 each pair of values.
    ``ulps`` is the floor of the error rule for each operator; ``exact`` is whether a result has the same bits
    however it is asked for, and ``level`` an instruction-set level that is not the chosen one.
    """

    name: str
    backend: str
    device: str = "cpu"
    elements: float = float("inf")
    products: float = float("inf")
    short: int | None = None
    whole: int | None = None
    ulps: tuple[int, int] = (4, 4)  # pool_mixer, mlp
    exact: bool = True
    level: str = ""
    operators: tuple[str, ...] = ("pool_mixer", "mlp")
    architecture: int | None = None  # that the executor pretends to be

    def __str__(self) -> str:
        return self.name

    @property
    def kernels(self) -> bool:
        """Whether this is one of the package's own kernels."""
        return self.backend != "reference"

    def fit(self, channels: int, hidden: int, out: int | None) -> tuple[int, int, int | None]:
        """The channels of an MLP, rounded up to what this target has a kernel for."""
        if self.backend != "cuda":
            return channels, hidden, out
        channels = next(c for c in (*CUDA_CHANNELS, channels) if c >= channels)
        return channels, -(-hidden // 64) * 64, out

    def refuses(self, operator: str, case: dict) -> str | None:
        """Why the target does not run this case: what it has no kernel for, or cannot afford."""
        if operator not in self.operators:
            return f"its {operator} is that of another target"
        if operator == "mlp" and self.backend == "cuda":
            dtype, channels = case.get("dtype", torch.bfloat16), case.get("channels", 64)
            channels = case["shape"][1] if "shape" in case else channels
            channels, hidden, out = self.fit(channels, case.get("hidden", 64), case.get("out"))
            operand = dtype if dtype in HALVES else case.get("weight_dtype") or dtype
            if operand not in HALVES:
                return "no CUDA C++ kernel for products of float32"
            reason = cuda.mlp_unsupported(channels, hidden, out or channels, operand)
            if reason:
                return f"no CUDA C++ kernel for {reason}"
        if "shape" in case:
            batch, channels, height, width = case["shape"]
            if self.backend == "cuda" and operator == "mlp":
                channels = self.fit(channels, 64, None)[0]
            size = batch * height * width * max(channels, case.get("hidden") or 0)
            if size > self.elements:
                return f"more than {self.elements:,} elements"
            pool = case.get("pool_size", 1)
            if size * min(pool, 2 * height - 1) * min(pool, 2 * width - 1) > self.products:
                return f"more than {self.products:,} elements, times the pixels of their pool"
            if self is INTERPRETER and operator == "mlp" and (batch > 100 or (case.get("hidden") or 0) > 600):
                return "more samples or hidden channels than it computes in seconds"
        return None

    def differentiates(self, operator: str, channels: int) -> bool:
        """Whether the gradients are this target's own."""
        return operator != "mlp" or self.backend != "cuda" or channels in CUDA_BACKWARD

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Calls within compute on this target, and on it alone: an explicit choice never falls back."""
        if self.architecture:
            executor.library().executor_architecture(self.architecture)
        if self.level:
            emulated = self.level == "emulated"
            assert ("amx" if emulated else self.level) == cpp.ISA
            assert not emulated or Path(pk.__file__).parents[1] != ROOT  # but a package of its own
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False  # ours are measured by eager's float32
        try:
            with pk.use_backend(self.backend):
                yield
        finally:
            torch.backends.cudnn.allow_tf32 = before

    def again(self) -> Iterator[None]:
        """Other circumstances under which a call has the same bits: ``for _ in target.again(): ...``."""
        if self.backend == "cpp":
            for number in (1, 2, 3) * (1 if self.level else 3):
                with threads(number):
                    yield
        elif self.architecture:
            yield from [None] * 2
            yield from executor.orders()
        else:
            yield from [None] * (9 if self.device == "cuda" or not self.kernels else 1)


REFERENCE = Target("reference", "reference", short=1, whole=2, exact=False)
CPP = Target("cpp", "cpp", short=2)
INTERPRETER = Target(
    "interpreter", "triton", elements=13_000, products=200_000, short=0, whole=1, ulps=(4, 4)
)
EXECUTOR = Target("executor", "cuda", elements=60_000, short=0, whole=1, ulps=(4, 8), architecture=90)
TARGETS = {
    target.name: target
    for target in (
        REFERENCE,
        CPP,
        *(replace(CPP, name=f"cpp {level}", level=level, short=1 if level == "avx2" else 2, whole=2)
          for level in ("baseline", "avx2", "avx512", "avx512_bf16", "amx")),
        replace(CPP, name="cpp emulated", level="emulated", short=2, whole=2, operators=("mlp",)),
        INTERPRETER,
        EXECUTOR,
        replace(EXECUTOR, name="executor sm_80", architecture=80, short=0, whole=1, operators=("mlp",)),
        Target("triton", "triton", "cuda", short=1, whole=1, ulps=(8, 8)),
        Target("cuda", "cuda", "cuda", short=2, whole=3, ulps=(8, 8)),
    )
}  # fmt: skip


def chosen() -> list[Target]:
    """The targets of this run; kernels of the executor are registered before any test runs."""
    names = os.environ.get(VARIABLE) or "reference,cpp"
    found = [TARGETS[name] for name in names.split(",")]
    if any(target.architecture for target in found):
        executor.library()
    return found
