"""Records on which cases `pool_mixer` and `mlp` are computed while tests run; see `support.cases`.

A case is one call that succeeded: the operator, what computed it, the tensors' shapes, dtypes and layouts,
and the options. Calls are seen where every one of them goes through: below autograd, in the kernel that the
dispatcher has for a device. So fake tensors and compilers' traces are never seen, and the calls of a compiled
graph are.
"""

import functools
import inspect
import itertools
import os
import sys
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from poolformer_kernels import reference
from poolformer_kernels.backends import cpp
from poolformer_kernels.ops import library
from poolformer_kernels.ops.torch_private import dispatch_modes, in_transform

OPERATORS = ("pool_mixer", "mlp")
BACKENDS = ("cpp", "triton", "cuda")
VECTORS = ("weight", "bias", "b1", "b2", "norm_weight", "norm_bias", "layer_scale", "drop_scale")
WEIGHTS = ("w1", "w2")
OPTIONS = (
    *("pool_size", "eps", "residual", "return_stats", "activation", "norm", "save_hidden"),
    *("parameter_grads", "drop_grad", "operand", "allow_tf32"),
)
LOOKED_AT = 2**22  # elements of a tensor whose values are looked at
LAUNCHERS = {  # functions that tests of the Triton kernels call without the operator
    ("pool_mixer", "forward"): "pool_mixer",
    ("pool_mixer", "backward"): "pool_mixer",
    ("mlp", "forward"): "mlp.forward",
    ("mlp", "backward"): "mlp.backward",
}

Row = tuple[tuple[str, Any], ...]
rows: set[Row] = set()
_overridden: list[torch.library.Library] = []  # they hold as long as these objects live


# ---- what a case is ----------------------------------------------------------------------------------------


def layout_of(t: Tensor, letters: str = "bchw") -> str:
    """The strides in words; dimensions of one element have none. "misaligned": not on 16 bytes."""
    if t.numel() == 0:
        return "empty"
    sides = [
        (stride, letter, n) for stride, letter, n in zip(t.stride(), letters, t.shape, strict=False) if n > 1
    ]
    aligned = "" if t.data_ptr() % 16 == 0 else " misaligned"
    expanded = "".join(letter for stride, letter, _ in sides if stride == 0)
    if expanded:
        return f"expanded {expanded}{aligned}"
    sides.sort(key=lambda side: -side[0])
    order = "".join(letter for _, letter, _ in sides)
    cut = [inner[1] for outer, inner in itertools.pairwise(sides) if outer[0] != inner[0] * inner[2]]
    names = {"bchw": "nchw", "bhwc": "channels_last"} if letters == "bchw" else {letters: "dense"}
    kinds = [name for whole, name in names.items() if order == "".join(c for c in whole if c in order)]
    kind = " and ".join(kinds) if kinds else f"permuted {order}"
    cuts = f" cut {''.join(sorted(cut))}" if cut else ""
    strided = " strided" if sides and sides[-1][0] != 1 else ""
    return f"{kind}{cuts}{strided}{aligned}"


def layout_of_weight(w: Tensor) -> str:
    """Of a matrix ``[rows, columns]``, with or without two dimensions more of one element."""
    more = "" if w.dim() == 2 else " conv" if w.stride()[2:] == (1, 1) else " conv channels_last"
    return layout_of(w, "rc") + more


def specials_of(t: Tensor, per_sample: bool = False) -> list[str]:
    """Which hard values a tensor on the CPU holds; nothing on a GPU is waited for."""
    if not t.is_cpu or t.numel() == 0:
        return []
    if t.numel() > LOOKED_AT:
        return ["not looked at"]
    with torch.no_grad():
        flat = t.detach().reshape(len(t) if per_sample else 1, -1).double()
        finite = flat.isfinite()
        found = {"nan": flat.isnan().any(), "inf": flat.isinf().any()}
        largest = flat.where(finite, 0.0).abs().max().item()
        limits = (6e-5, 3e4) if t.dtype == torch.float16 else (1e-20, 1e20)
        found |= {"huge": largest > limits[1], "tiny": 0 < largest < limits[0]}
        if per_sample and flat.shape[1] > 1:
            var, mean = torch.var_mean(flat, 1, correction=0)
            constant = flat.amin(1) == flat.amax(1)
            found["constant"] = constant.any()
            far = (mean.abs() > 50 * var.sqrt()) & ~constant & finite.all(1)
            found["mean > 50 sigma"] = far.any()
        return [name for name, is_so in found.items() if is_so]


def target_of(backend: str, x: Tensor) -> str:
    """What computes a call of this backend on x."""
    if x.is_cuda:
        return f"{backend} {'null GPU' if os.environ.get('NULL_GPU') else 'GPU'}"
    if backend == "cpp":
        return f"cpp {cpp.build_info().get('isa_chosen')}"
    if backend == "cuda":
        return f"cuda executor sm_{_executor().executor_chosen_architecture()}"
    return f"{backend} interpreter" if backend == "triton" else backend


@functools.cache
def _executor():
    import ctypes

    return ctypes.CDLL(os.environ["POOLFORMER_KERNELS_TEST_EXECUTOR"])


def row_of(operator: str, direction: str, target: str, values: dict[str, Any]) -> Row:
    """One row: fields and their values, lists for what a call has several of."""
    x, grad = values["x"], values.get("grad")
    given = {name: values[name] for name in VECTORS if values.get(name) is not None}
    weights = {name: values[name] for name in WEIGHTS if name in values}
    row: dict[str, Any] = {
        "operator": operator,
        "direction": direction,
        "target": target,
        "x": tuple(x.shape),
    }
    if weights:
        row |= {
            "hidden": len(weights["w1"]),
            "out": len(weights["w2"]),
            "weight dtype": _name(weights["w1"].dtype),
        }
    row |= {"dtype": _name(x.dtype), "vector dtypes": _several(_name(p.dtype) for p in given.values())}
    row["layout of x"] = layout_of(x)
    row |= {f"layout of {name}": layout_of_weight(w) for name, w in weights.items()}
    layouts = {name: layout_of(p, "c") for name, p in given.items()}
    row["layouts of vectors"] = _several(
        f"{name} {kind}" for name, kind in layouts.items() if kind != "dense"
    )
    row["given"] = " ".join(given) or "nothing"
    if direction == "forward":
        wanted = [name for name in ("x", *WEIGHTS, *VECTORS) if _requires_grad(values.get(name))]
        row["gradients"] = " ".join(wanted) or "none"
        stats = values.get("stats")
        partials = 0 if stats is None else stats.shape[1]
        row["stats given"] = "none" if stats is None else "one partial" if partials == 1 else "several"
        if stats is not None:
            row["layout of stats"] = layout_of(stats, "bts")
    elif "hidden" in values:
        row["hidden given"] = values["hidden"] is not None
    row |= {name: _name(values[name]) for name in OPTIONS if name in values}
    row["special x"] = _several(specials_of(x, per_sample=True))
    parameters = (weights | given).values()
    row["special parameters"] = _several(name for p in parameters for name in specials_of(p))
    return tuple(row.items()) + (() if grad is None else _of_gradient(grad))


def _of_gradient(grad: Tensor) -> Row:
    return ("layout of grad", layout_of(grad)), ("special grad", _several(specials_of(grad, per_sample=True)))


def _several(values) -> tuple[str, ...]:
    return tuple(sorted(set(values)))


def _name(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _requires_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


# ---- where calls are seen ----------------------------------------------------------------------------------


def _is_real(values: dict[str, Any]) -> bool:
    tensors = [value for value in values.values() if isinstance(value, Tensor)]
    return all(type(t) in (Tensor, torch.nn.Parameter) and t.device.type in ("cpu", "cuda") for t in tensors)


def _add(operator: str, direction: str, backend: str, values: dict[str, Any]) -> None:
    if _is_real(values):
        rows.add(row_of(operator, direction, target_of(backend, values["x"]), values))


def _named(op: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """An operator's arguments by name, those that were left out by their defaults."""
    arguments = op._schema.arguments
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
    return defaults | dict(zip((a.name for a in arguments), args, strict=False)) | kwargs


def _override(operator: str, direction: str, backend: str, op: Any, device: str) -> None:
    """The device's kernel of an operator, with a row for each call that it has computed."""
    kernel = torch.library.get_kernel(op, device)

    def recorded(keys, *args, **kwargs):
        results = kernel.call_boxed(keys, *args, **kwargs)
        _add(operator, direction, backend, _named(op, args, kwargs))
        return results

    ours = torch.library.Library(library.NAMESPACE, "IMPL")
    with warnings.catch_warnings():  # that a kernel is overridden
        warnings.simplefilter("ignore")
        ours.impl(op, recorded, device, with_keyset=True, allow_override=True)
    _overridden.append(ours)


def _override_replay(operator: str, direction: str, op: Any) -> None:
    """Calls on CUDA that are replayed do not reach the dispatcher."""
    replay = library._REPLAYS.get(op)
    if replay is None:
        return

    def recorded(args):
        results = replay(args)
        if results is not None:
            _add(operator, direction, "triton", _named(op, args, {}))
        return results

    library._REPLAYS[op] = recorded


def _override_launcher(operator: str, direction: str, module: ModuleType) -> None:
    launcher = getattr(module, direction)
    signature = inspect.signature(launcher)

    @functools.wraps(launcher)
    def recorded(*args, **kwargs):
        results = launcher(*args, **kwargs)
        if not dispatch_modes():
            _add(operator, direction, "triton", signature.bind(*args, **kwargs).arguments)
        return results

    setattr(module, direction, recorded)


def _override_reference(operator: str) -> None:
    """Calls of the reference as a backend, and not as what tests compare with: by who calls."""
    function = getattr(reference, operator)
    signature = inspect.signature(function)

    @functools.wraps(function)
    def recorded(*args, **kwargs):
        y = function(*args, **kwargs)
        if torch.compiler.is_compiling():
            return y
        caller = sys._getframe(1)
        if caller.f_globals["__name__"] != f"poolformer_kernels.ops.{operator}":
            return y
        if torch.jit.is_tracing() or dispatch_modes() or in_transform():
            return y
        values = signature.bind(*args, **kwargs)
        values.apply_defaults()
        values = values.arguments | {"return_stats": caller.f_locals["return_stats"]}
        if not _is_real(values):
            return y
        row = row_of(operator, "forward", "reference", values)
        rows.add(row)
        if y.requires_grad:  # y is differentiated as it would be without the hook, which returns nothing
            left_out = ("gradients", "return_stats", "stats given", "layout of stats", "direction")
            kept = tuple((name, value) for name, value in row if name not in left_out)

            def add(grad: Tensor) -> None:
                if type(grad) is Tensor and not dispatch_modes() and not in_transform():
                    rows.add((("direction", "backward"), *kept, *_of_gradient(grad)))

            y.register_hook(add)
        return y

    setattr(reference, operator, recorded)


def install() -> None:
    """Records from now on, once all kernels are registered."""
    if _overridden:
        return
    for operator in OPERATORS:
        _override_reference(operator)
        for direction, suffix in (("forward", ""), ("backward", "_backward")):
            for backend in BACKENDS:
                op = getattr(torch.ops.poolformer_kernels, f"{operator}_{backend}{suffix}").default
                for device in ("CPU", "CUDA"):
                    if torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), device):
                        _override(operator, direction, backend, op, device)
                _override_replay(operator, direction, op)
            module = sys.modules.get(f"poolformer_kernels.backends.triton.{LAUNCHERS[operator, direction]}")
            if module is not None:
                _override_launcher(operator, direction, module)
