"""What could run a PoolFormer, or a part of one: ours, eager, torch.compile, OpenVINO, ONNX Runtime.

The peers run timm's modules, ours run ours, on the same weights; "accelerate" runs a copy of timm's through
`poolformer_kernels.accelerate`. A provider is a name and a builder ``(timm's module, ours, x) -> call``; a
builder raises `UnavailableError` with the reason where it cannot run. Every result is compared with float64
before anything is timed.
"""

import argparse
import contextlib
import copy
import gc
import logging
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

import poolformer_kernels as pk
from poolformer_kernels.accelerate import accelerate
from poolformer_kernels.models import PoolFormer
from poolformer_kernels.numerics import errors
from poolformer_kernels.ops.dispatch import BACKENDS, explain_selection
from poolformer_kernels.ops.torch_private import frozen_weights

from .harness import measure
from .rows import Case, Results, UnavailableError

__all__ = [
    "LAYOUTS",
    "PROVIDERS",
    "Prepared",
    "compare",
    "default_providers",
    "make_pair",
    "prepare",
]

Call = Callable[[], object]
Ours = Callable[[Tensor], Tensor]
# A result is wrong if its relative error is larger. Correct results have a tenth of it; one that leaves a
# sub-block out has more. float32 on CUDA is TF32 by default, whose products have as many digits as float16's.
WRONG = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
# The layout of a provider's input, where it is not channels_last
LAYOUTS = {"eager NCHW": "NCHW", "openvino": "NCHW", "onnxruntime": "NCHW"}


@lru_cache(maxsize=1)
def _models(name: str) -> tuple[nn.Module, nn.Module]:
    from poolformer_kernels.cli.demo import make_models

    return make_models(name, None)


@lru_cache(maxsize=1)
def make_pair(name: str, dtype: torch.dtype, device: str) -> tuple[nn.Module, PoolFormer]:
    """(timm's model, ours) in eval mode and channels_last on the same random weights."""
    options = {"device": device, "dtype": dtype, "memory_format": torch.channels_last}
    peer, ours = (copy.deepcopy(model).to(**options) for model in _models(name))
    return peer, ours


# ---- PyTorch -----------------------------------------------------------------------------------------------


def _ours(peer: nn.Module, ours: Ours, x: Tensor) -> Call:
    return lambda: ours(x)


def _require_backend(backend: str, x: Tensor) -> None:
    with pk.use_backend(backend):
        chosen, reason = explain_selection(x.device, x.dtype)
    if chosen == "none":
        raise UnavailableError(reason)


def _ours_on(backend: str, peer: nn.Module, ours: Ours, x: Tensor) -> Call:
    _require_backend(backend, x)

    def call() -> Tensor:
        with pk.use_backend(backend):
            return ours(x)

    return call


def _ours_graphed(backend: str, peer: nn.Module, ours: Ours, x: Tensor) -> Call:
    _only("cuda", x)
    if not isinstance(ours, nn.Module):
        raise UnavailableError("it captures modules, and this part is a method")
    _require_backend(backend, x)
    with pk.use_backend(backend):
        graphed = pk.graphed(ours, x)
    return lambda: graphed(x)


def _accelerated(peer: nn.Module, ours: Ours, x: Tensor) -> Call:
    try:
        fast = accelerate(peer, inplace=False)
    except ValueError as error:  # this part of the model has no blocks
        raise UnavailableError(str(error)) from None
    return lambda: fast(x)


def _eager(peer: nn.Module, ours: Ours, x: Tensor) -> Call:
    return lambda: peer(x)


def _eager_nchw(peer: nn.Module, ours: Ours, x: Tensor) -> Call:
    peer, x = copy.deepcopy(peer).to(memory_format=torch.contiguous_format), x.contiguous()
    return lambda: peer(x)


def _compiled(mode: str, peer: nn.Module, ours: Ours, x: Tensor) -> Call:
    if mode == "reduce-overhead":
        _only("cuda", x)
    with frozen_weights():
        compiled = torch.compile(peer, dynamic=False, mode=mode)
        for _ in range(3):  # a graph is captured in the second call
            compiled(x)
    return lambda: compiled(x)


def _only(device: str, x: Tensor) -> None:
    if x.device.type != device:
        raise UnavailableError(f"it runs on {device}, not on {x.device.type}")


# ---- other runtimes ----------------------------------------------------------------------------------------

_OPENVINO_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def _openvino(peer: nn.Module, ours: Ours, x: Tensor) -> Call:
    _only("cpu", x)
    import openvino

    precision = _OPENVINO_PRECISIONS[x.dtype]
    x = x.float().contiguous()
    model = openvino.convert_model(copy.deepcopy(peer).float(), example_input=x, input=[list(x.shape)])
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(model, "CPU", options)
    taken = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if taken != precision:
        raise UnavailableError(f"asked for {precision}, it took {taken}")
    request, inputs = compiled.create_infer_request(), [x.numpy()]
    return lambda: request.infer(inputs, share_inputs=True, share_outputs=True)[0]


def _onnxruntime(peer: nn.Module, ours: Ours, x: Tensor) -> Call:
    _only("cpu", x)
    if x.dtype != torch.float32:
        raise UnavailableError("it is measured in float32 only")
    import onnxruntime

    x = x.contiguous()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "model.onnx")
        exported = copy.deepcopy(peer).to(memory_format=torch.contiguous_format)
        torch.onnx.export(exported, (x,), file, dynamo=True, external_data=False, verbose=False)
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, inputs)[0]


PROVIDERS: dict[str, Callable[[nn.Module, Ours, Tensor], Call]] = {
    "ours": _ours,
    **{f"ours {backend}": partial(_ours_on, backend) for backend in BACKENDS},
    "ours graphed": partial(_ours_graphed, "auto"),
    **{f"ours {backend} graphed": partial(_ours_graphed, backend) for backend in ("triton", "cuda")},
    "accelerate": _accelerated,
    "eager": _eager,
    "eager NCHW": _eager_nchw,
    "compile": partial(_compiled, "default"),
    "max-autotune": partial(_compiled, "max-autotune"),
    "reduce-overhead": partial(_compiled, "reduce-overhead"),
    "openvino": _openvino,
    "onnxruntime": _onnxruntime,
}


def default_providers(device: str) -> list[str]:
    """What a user would choose from on this device; max-autotune compiles for minutes and is not in it."""
    if device == "cuda":
        return ["ours", "ours graphed", "eager", "eager NCHW", "compile", "reduce-overhead"]
    return ["ours", "accelerate", "eager", "compile", "openvino", "onnxruntime"]


@dataclass
class Prepared:
    """Calls that are right, and their relative L2 errors."""

    calls: dict[str, Call] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


def prepare(
    names: list[str], peer: nn.Module, ours: Ours, x: Tensor, results: Results, case: Case | None = None
) -> Prepared:
    """Build the providers for one input and check each against timm's module in float64.

    Args:
        peer, ours: in x's dtype, channels_last, on its device.
        x: ``[B, C, H, W]``, channels_last.
        results: is told which providers are not among the calls, and why.
        case: what x is of, for the messages.
    """
    torch.compiler.reset()  # else earlier graphs count as recompilations of these
    samples = sorted({0, len(x) - 1})
    with torch.inference_mode():
        exact = copy.deepcopy(peer).to(torch.float64, memory_format=torch.contiguous_format)
        exact = exact(x[samples].double().contiguous()).cpu()
        prepared = Prepared()
        for name in names:
            try:
                with quiet():
                    call = PROVIDERS[name](peer, ours, x)
                    error = errors(torch.as_tensor(call())[samples], exact).relative_l2(exact)
            except Exception as failure:  # the others go on
                results.miss(name, failure, case)
                results.require_device(x.device.type, name)
                continue
            if error <= WRONG[torch.float16 if x.is_cuda and x.dtype == torch.float32 else x.dtype]:
                prepared.calls[name], prepared.errors[name] = call, error
            else:  # or NaN
                results.reject(name, f"relative error {error:.2g} against float64", case)
    return prepared


def compare(
    results: Results,
    case: Case,
    peer: nn.Module,
    ours: Ours,
    x: Tensor,
    args: argparse.Namespace,
    budget_s: float,
    largest: Tensor | None = None,
) -> None:
    """Check and time the providers of ``args`` on one case, whose largest activation is x by default."""
    prepared = prepare(args.providers, peer, ours, x, results, case)
    if prepared.calls:
        options = {
            "rounds": args.rounds,
            "budget_s": budget_s,
            "errors": prepared.errors,
            "layouts": LAYOUTS,
        }
        with torch.inference_mode():
            results.extend(measure(case, prepared.calls, x if largest is None else largest, **options))
    del prepared
    gc.collect()  # compiled models hold copies of the weights


@contextlib.contextmanager
def quiet():
    """Without the many warnings of exporters and tracers."""
    logger, level = logging.getLogger("torch.onnx"), logging.getLogger("torch.onnx").level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
