"""Which cases of a contract's product of parameters a target runs."""

import heapq
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from .targets import Target

NOT_RUN: dict[str, Counter[str]] = {}  # of each target, why how many cases are not run
LONG = "they are left to make test-long"


@dataclass
class Cases:
    """The axes of a test's parameters, of each operator, and whom it concerns.

    ``kernels``: the reference does not promise it. ``once``: it does not depend on the instruction-set level.
    ``pairs``: its cases are cheap; in `make test-long` every target runs each pair of values. ``repeats``: a
    case calls the operator many times; targets that run one case in `make test` leave it to `make test-long`.
    ``where(target, **case)`` says why a target does not run a case, or None. A name with commas is an axis of
    tuples. Parameters that only the other operator has are None.
    """

    axes: dict[str, dict[str, tuple]] = field(default_factory=lambda: {"pool_mixer": {}, "mlp": {}})
    kernels: bool = False
    once: bool = False
    pairs: bool = False
    repeats: bool = False
    where: Callable[..., str | None] | None = None

    @property
    def names(self) -> list[str]:
        return [*dict.fromkeys(name for axes in self.axes.values() for name in names_of(axes))]


def names_of(axes: Iterable[str]) -> list[str]:
    return [name for axis in axes for name in axis.split(", ")]


def over(
    *,
    kernels: bool = False,
    once: bool = False,
    pairs: bool = False,
    repeats: bool = False,
    where: Callable[..., str | None] | None = None,
    also: dict | None = None,
    pool_mixer: dict | None = None,
    mlp: dict | None = None,
    **axes,
):
    """Decorates a test of the contract, whose first parameter is ``target``, with its `Cases`.

    ``also`` has the axes of several names: ``{"shape, hidden": [...]}``. A test of both operators has
    ``operator`` as its second parameter; ``pool_mixer`` and ``mlp`` are the axes that only one of them has.
    """

    def decorate(function):
        mixers, mlps, common = (
            {name: tuple(values) for name, values in found.items()}
            for found in (pool_mixer or {}, mlp or {}, (also or {}) | axes)
        )
        operators = {"pool_mixer": mixers | common, "mlp": mlps | common}
        function.cases = Cases(operators, kernels, once, pairs, repeats, where)
        return function

    return decorate


def covering(
    rows: list[tuple], strength: int | None, sizes: Sequence[tuple[bool, int]] | None = None
) -> set[int]:
    """The numbers of few rows: one (0), those that have every value (1) or every pair (2); None: all.

    The one is that of the smallest of ten ``sizes``, if they are given. Of several the next is always the one
    with the most that is new. What a row adds only ever falls: one that adds what the heap says is the best.
    """
    if strength is None:
        return set(range(len(rows)))
    order = random.Random(0).sample(range(len(rows)), len(rows))
    if strength == 0:
        return {min(order[:10], key=sizes.__getitem__) if sizes else order[0]} if rows else set()
    parts = [set(itertools.combinations(enumerate(map(str, row)), min(strength, len(row)))) for row in rows]
    heap = [(-len(parts[i]), place, i) for place, i in enumerate(order)]
    heapq.heapify(heap)
    seen, found = set(), set()
    while heap:
        added, place, i = heapq.heappop(heap)
        new = parts[i] - seen
        if len(new) != -added:
            heapq.heappush(heap, (-len(new), place, i))
        elif new:
            seen |= new
            found.add(i)
    return found


def selection(target: Target, operator: str, cases: Cases) -> Iterator[tuple[tuple, bool]]:
    """(the values of the parameters, whether the case is left to `make test-long`) of each case."""
    refused = NOT_RUN.setdefault(target.name, Counter())
    axes = cases.axes[operator]
    rows, sizes = [], []
    for row in itertools.product(*axes.values()):
        flat: list = []
        for axis, value in zip(axes, row, strict=True):
            flat += value if ", " in axis else [value]
        case = dict(zip(names_of(axes), flat, strict=True))
        reason = target.refuses(operator, case)
        if cases.kernels and not target.kernels:
            reason = "only kernels promise it"
        if cases.once and target.level:
            reason = "it does not depend on the level"
        reason = reason or (cases.where(target, **case) if cases.where else None)
        if reason:
            refused[reason] += 1
        else:
            rows.append((row, tuple(map(case.get, cases.names))))
            shape = case.get("shape", (1, 1, 2, 2))
            few = min(shape[2:]) < 2  # where a wrong pool may be right
            sizes.append((few, math.prod(shape) * shape[1]))
    pairs = cases.pairs and target.whole is not None and target.device == "cpu"
    strengths = target.short, max(target.whole, 2) if pairs else target.whole
    short, whole = (covering([row for row, _ in rows], n, sizes) for n in strengths)
    if cases.repeats and target.short == 0:
        short = set()
    for i, (_, values) in enumerate(rows):
        if i in short | whole:
            yield values, i not in short
        else:
            refused["each value or pair of values runs in another case"] += 1
