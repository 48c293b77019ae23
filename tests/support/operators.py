"""The two operators as the tests of both call them."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from poolformer_kernels import ops
from poolformer_kernels.ops.mlp import mlp_with_stats
from poolformer_kernels.ops.pool_mixer import pool_mixer_with_stats
from support import mlp, pool_mixer
from support.problems import Tensors


@dataclass(frozen=True)
class Operator:
    """``problem`` has its inputs, truth and eager PyTorch; ``norm_weight`` names the norm's weight."""

    name: str
    problem: ModuleType
    call: Callable[..., Tensor]
    with_stats: Callable[..., tuple[Tensor, Tensor | None]]
    of_stats: Callable[..., Tensor]  # y alone
    vectors: tuple[str, ...]
    norm_weight: str

    def __str__(self) -> str:
        return self.name

    @property
    def names(self) -> tuple[str, ...]:
        """Of its tensors."""
        return mlp.NAMES if self is MLP else ("x", *self.vectors)

    def inputs(
        self,
        shape: tuple[int, ...],
        hidden: int | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        vector_dtype: torch.dtype | None = None,
        **options,
    ) -> Tensors:
        """``hidden`` is the MLP's alone."""
        if self is MLP:
            return mlp.make_inputs(shape, hidden or 9, dtype, vector_dtype=vector_dtype, **options)
        return pool_mixer.make_inputs(shape, dtype, parameter_dtype=vector_dtype, **options)

    def grad(self, inputs: Tensors) -> Tensor:
        return self.problem.make_grad(inputs)

    def registered(self, backend: str) -> tuple:
        """A backend's operators of the forward and of the backward."""
        found = torch.ops.poolformer_kernels
        return tuple(getattr(found, f"{self}_{backend}{part}").default for part in ("", "_backward"))


POOL_MIXER = Operator(
    "pool_mixer",
    pool_mixer,
    ops.pool_mixer,
    pool_mixer_with_stats,
    pool_mixer.mixer_with_stats,
    pool_mixer.PARAMETERS,
    "weight",
)
MLP = Operator("mlp", mlp, ops.mlp, mlp_with_stats, mlp.y_of_mlp_with_stats, mlp.VECTORS, "norm_weight")
OPERATORS = {operator.name: operator for operator in (POOL_MIXER, MLP)}


class SubBlock(nn.Module):
    """An operator with parameters, under the names of its arguments."""

    def __init__(
        self,
        operator: Operator,
        shape: tuple[int, ...],
        hidden: int | None = None,
        dtype: torch.dtype = torch.float32,
        **options,
    ) -> None:
        super().__init__()
        self.call = operator.call
        for name, t in operator.inputs(shape, hidden, dtype, **options).items():
            if name not in ("x", "drop_scale"):
                self.register_parameter(name, nn.Parameter(t))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, **dict(self.named_parameters()), residual=True)


EVERY = pytest.mark.parametrize("operator", OPERATORS.values(), ids=str)
