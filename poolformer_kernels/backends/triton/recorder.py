"""Writes down what a call launches, so that C++ can run it again: csrc/launch/tape.h."""

import torch
from torch import Tensor

from ...ops.torch_private import OpOverload, TorchDispatchMode, outside_modes

__all__ = ["Recorder", "fact"]

_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
}
_CALLS = {_aten.mm.dtype_out}  # operators that the kernels' launchers call


def fact(t: Tensor) -> tuple[int, str, list[int], list[int]]:
    """A tensor for the extension: address, dtype, sizes and strides."""
    return t.data_ptr(), str(t.dtype).removeprefix("torch."), [*t.shape], [*t.stride()]


class Recorder(TorchDispatchMode):
    """Within, the tape gets what memory is taken and which operators are called, as it gets launches."""

    def __init__(self, tape) -> None:
        super().__init__()
        self.tape = tape

    def __enter__(self) -> "Recorder":
        self.tape.start()
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self.tape.stop()

    def __torch_dispatch__(self, op: OpOverload, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = op(*args, **kwargs)
        if op in _ALLOCATIONS:
            self.tape.allocate(out.data_ptr(), out.untyped_storage().nbytes())
        elif op in _CALLS:
            self._write_down(op, args, kwargs, out)
        elif not _only_looks(op, args, out):
            self.tape.refuse(f"{op} is no kernel's launch")
        return out

    def call(self, op: OpOverload, *args) -> Tensor | tuple[Tensor, ...]:
        """Calls an operator and writes it down."""
        with outside_modes():
            out = op(*args)
        self._write_down(op, args, {}, out)
        return out

    def _write_down(self, op: OpOverload, args: tuple, kwargs: dict, out: object) -> None:
        schema = op._schema
        arguments = []
        for i, wanted in enumerate(schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(wanted.name, wanted.default_value)
            if isinstance(value, Tensor):
                value = (fact(value), str(wanted.type).startswith("Optional"))
            elif isinstance(value, torch.dtype):
                value = (str(value).removeprefix("torch."),)
            elif str(wanted.type) == "float" and value is not None:
                value = float(value)
            arguments.append(value)
        outputs = out if isinstance(out, (list, tuple)) else (out,)
        results = [
            None if returned.alias_info is not None else fact(t)
            for t, returned in zip(outputs, schema.returns, strict=True)
        ]
        self.tape.call(schema.name, schema.overload_name, arguments, results)


def _only_looks(op: OpOverload, inputs: tuple, outputs: object) -> bool:
    """Whether an operator computed nothing: its results are its inputs' memory, which it has not changed."""
    memory = {t.untyped_storage().data_ptr() for t in inputs if isinstance(t, Tensor)}
    outputs = outputs if isinstance(outputs, (list, tuple)) else (outputs,)
    return not op._schema.is_mutable and all(
        isinstance(t, Tensor) and t.untyped_storage().data_ptr() in memory for t in outputs
    )
