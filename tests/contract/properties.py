"""The contract on random problems: shapes, layouts, dtypes, options and parameters drawn by hypothesis.

Each test goes on for its seconds in rounds of a few examples; a round is one seed, which a failure shows and
POOLFORMER_TEST_SEED repeats. In CI, seeds begin with 0; how many there are is a matter of time. What is found
is mended and becomes a case of the contract.
"""

import os
import random
import time
from collections.abc import Callable

import pytest
import torch
from support import mlp as mlp_problem
from support import pool_mixer as mixer_problem
from support.layouts import (
    GRAD_LAYOUTS,
    LAYOUTS,
    VECTOR_LAYOUTS,
    WEIGHT_LAYOUTS,
    as_layout,
    as_vector_layout,
    as_weight_layout,
)
from support.peers import require
from support.pool_mixer import mixer_with_stats
from support.problems import HALVES, Tensors, tiled_stats
from torch import Tensor

from poolformer_kernels.ops import mlp, pool_mixer
from poolformer_kernels.reference import ACTIVATIONS

from .cases import over
from .check import check
from .targets import Target

hypothesis = require("hypothesis")
st = require("hypothesis", "strategies").strategies

OPERATOR = "pool_mixer"
pytestmark = pytest.mark.long
SECONDS = {"cpp": 90.0}  # of each of the two tests; of any other target a third
EXAMPLES = {"interpreter": 2}  # of each seed; of any other target five
DTYPES = (torch.float32, *HALVES)
ULPS = 28  # more than elsewhere: eager's errors are the yardstick, and in small problems they are few
FEW = 64  # numbers: of so few, eager's errors may all be small by chance
FEWEST = 8  # numbers of a sample: a norm of fewer cancels to little but rounding
VARYING = [name for name in GRAD_LAYOUTS if name not in ("expanded_hw", "expanded_all")]  # others cancel to 0


def drive(target: Target, one: Callable[[st.DataObject], None], record_property) -> None:
    """``one`` on new examples until the target's time is over; the summary shows the seeds."""
    given = os.environ.get("POOLFORMER_TEST_SEED")
    seed = int(given) if given else 0 if os.environ.get("CI") else random.randrange(2**31)
    first, examples = seed, EXAMPLES.get(target.name, 5)
    end = time.monotonic() + SECONDS.get(target.name, SECONDS["cpp"] / 3)
    while True:
        print(f"POOLFORMER_TEST_SEED={seed}")
        settings = hypothesis.settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=False,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        hypothesis.seed(seed)(settings(hypothesis.given(st.data())(one)))()
        if given or time.monotonic() > end:
            record_property("shown", f"random problems on {target}: seeds {first} to {seed}, {examples} each")
            return
        seed += 1


def allowance(inputs: Tensors, grad: Tensor, operand: torch.dtype) -> dict[str, float]:
    """The ulps of y and every gradient. One that is few numbers has more where operands are rounded to half.

    Each term of a sum is rounded up to four times on the way, as eager's is, and each time by up to half a
    unit: the error of the sum is about 0.58 units of the scale. The L2 norm of n errors is that on average,
    and three of its deviations, a share of 1 / sqrt(n), more in bad luck.
    """
    half = torch.finfo(operand).eps / torch.finfo(torch.float32).eps if operand in HALVES else 0
    given = {"y": grad} | {f"d{name}": t for name, t in inputs.items() if t is not None}
    few = {name: t.numel() for name, t in given.items() if 0 < t.numel() < FEW}
    return dict.fromkeys(given, ULPS) | {
        name: ULPS + 0.58 * (1 + 3 / n**0.5) * half for name, n in few.items()
    }


def any_shape(data: st.DataObject, target: Target) -> tuple[int, ...]:
    """Of the sizes that the target can afford: the interpreter's are the smallest, `cpp`'s the largest."""
    if target.elements < 2e4:
        most, size = 2, st.sampled_from([1, 3, 6, 8])
        channels = st.integers(1, 20) | st.sampled_from([65, 96, 130])
    else:
        most, side = (3, 12) if target.elements < 1e5 else (6, 24)
        channels = st.integers(1, 40) | st.sampled_from([48, 63, 64, 65, 96, 128, 130])
        size = st.integers(1, 10) | st.integers(1, side)
    shape = tuple(data.draw(s) for s in (st.integers(1, most), channels, size, size))
    hypothesis.assume(shape[1] * shape[2] * shape[3] >= FEWEST)
    return shape


@over(kernels=True)
def test_random_token_mixers(target, record_property):
    def one(data: st.DataObject) -> None:
        shape, dtype = any_shape(data, target), data.draw(st.sampled_from(DTYPES))
        floats = data.draw(st.booleans())
        inputs = mixer_problem.make_inputs(
            shape,
            dtype,
            parameters=tuple(data.draw(st.sets(st.sampled_from(mixer_problem.PARAMETERS)))),
            parameter_dtype=torch.float32 if floats else dtype,
            mean=data.draw(st.sampled_from([-2.3, 0.0, 5.0])),
            seed=data.draw(st.integers(0, 1000)),
        )
        pool_size = data.draw(st.sampled_from([3, 3, 1, 5, 7, 9, 13]))
        case = {"shape": shape, "dtype": dtype, "pool_size": pool_size}
        hypothesis.assume(not target.refuses("pool_mixer", case))
        strange_vectors(data, inputs, mixer_problem.PARAMETERS)
        grad = as_layout(mixer_problem.make_grad(inputs), data.draw(st.sampled_from(VARYING)))
        layout = data.draw(st.sampled_from(LAYOUTS))
        tiles = data.draw(st.none() | st.integers(1, 40))
        function, given = pool_mixer, {}
        if tiles:
            stats = tiled_stats(as_layout(inputs["x"], layout), tiles)
            function, given = mixer_with_stats, {"stats": stats.to(target.device)}
        options = {"pool_size": pool_size, "residual": data.draw(st.booleans())}
        check(target, mixer_problem, function, inputs, grad, layout=layout, given=given, ulps=ULPS, **options)

    drive(target, one, record_property)


@over(kernels=True, where=lambda target: target.refuses("mlp", {"dtype": torch.bfloat16}))
def test_random_mlps(target, record_property):
    def one(data: st.DataObject) -> None:
        shape, dtype = any_shape(data, target), data.draw(st.sampled_from(DTYPES))
        hidden = data.draw(st.integers(1, 80) | st.sampled_from([96, 127, 128, 129, 200, 256, 300]))
        out = data.draw(st.none() | st.none() | st.integers(1, 70))  # mostly C: only then are kernels fused
        kind = {torch.float32: DTYPES}.get(dtype, (dtype, torch.float32))
        weight_dtype = data.draw(st.sampled_from(kind))
        channels, hidden, out = target.fit(shape[1], hidden, out)
        shape = (shape[0], channels, *shape[2:])
        case = {"shape": shape, "channels": channels, "hidden": hidden, "out": out, "dtype": dtype}
        hypothesis.assume(not target.refuses("mlp", case | {"weight_dtype": weight_dtype}))
        vectors = [torch.float32, weight_dtype if dtype == torch.float32 else dtype]
        half = dtype in HALVES or weight_dtype in HALVES
        names = [n for n in ACTIVATIONS if n != "relu" or not half]  # there rounding decides the sign of h
        inputs = mlp_problem.make_inputs(
            shape,
            hidden,
            dtype,
            out=out,
            parameters=tuple(data.draw(st.sets(st.sampled_from(mlp_problem.VECTORS)))),
            weight_dtype=weight_dtype,
            vector_dtype=data.draw(st.sampled_from(vectors)),
            conv=data.draw(st.booleans()),
            mean=data.draw(st.sampled_from([-2.3, 0.0, 5.0])),
            seed=data.draw(st.integers(0, 1000)),
        )
        strange_vectors(data, inputs, mlp_problem.VECTORS)
        # in half precision neither rows of weights nor pixels of the gradient are all equal: they are rounded
        # alike, so that their errors add up, and eager's may not; `both.py` and `mlp.py` have such cases
        for name in mlp_problem.WEIGHTS:
            layouts = [n for n in WEIGHT_LAYOUTS if not (half and n == "expanded")]
            layout = data.draw(st.none() | st.sampled_from(layouts))
            if layout and (layout != "channels_last" or inputs[name].dim() == 4):
                inputs[name] = as_weight_layout(inputs[name], layout)
        grad_layouts = VARYING if half else GRAD_LAYOUTS
        grad = as_layout(mlp_problem.make_grad(inputs), data.draw(st.sampled_from(grad_layouts)))
        check(
            target,
            mlp_problem,
            mlp,
            inputs,
            grad,
            layout=data.draw(st.sampled_from(LAYOUTS)),
            given={"save_hidden": data.draw(st.sampled_from([None, False, True]))},
            ulps=allowance(inputs, grad, dtype if dtype in HALVES else weight_dtype),
            residual=out in (None, channels) and data.draw(st.booleans()),
            activation=data.draw(st.sampled_from(names)),
        )  # fmt: skip

    drive(target, one, record_property)


def strange_vectors(data: st.DataObject, inputs: dict, names: tuple[str, ...]) -> None:
    for name in names:
        layout = data.draw(st.none() | st.sampled_from(VECTOR_LAYOUTS))
        if layout and inputs[name] is not None:
            inputs[name] = as_vector_layout(inputs[name], layout)
