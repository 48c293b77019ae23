"""Median times of several implementations, measured side by side in one run."""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Sample", "Timing", "sample_interleaved", "time_interleaved"]

_SAMPLE_S = 2e-3  # one sample repeats a call until it lasts this long: timer and wake-up noise stay below 1 %


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median of ``rounds`` samples, and the 20th and 80th percentile around it."""

    median: float
    p20: float
    p80: float
    rounds: int

    @property
    def noisy(self) -> bool:
        """The percentiles differ by more than a factor of 2: the machine was busy, ratios mean little."""
        return self.p80 > 2 * self.p20

    @staticmethod
    def of(samples: list[float]) -> "Timing":
        """Of the seconds of each round's call."""
        if len(samples) == 1:
            return Timing(samples[0], samples[0], samples[0], 1)
        cuts = statistics.quantiles(samples, n=5, method="inclusive")
        return Timing(statistics.median(samples), cuts[0], cuts[3], len(samples))


@dataclass(frozen=True)
class Sample:
    """Seconds of one call, and what a probe of the machine gave right before it and right after it."""

    seconds: float
    before: float | None = None
    after: float | None = None


Samples = dict[str, list[Sample]]


def time_interleaved(
    providers: dict[str, Callable[[], object]],
    *,
    device: torch.device | str = "cpu",
    rounds: int = 20,
    warmup: int = 2,
    budget_s: float = float("inf"),
) -> dict[str, Timing]:
    """`sample_interleaved`'s samples as medians and percentiles: the same arguments, without a probe."""
    options = {"device": device, "rounds": rounds, "warmup": warmup, "budget_s": budget_s}
    samples = sample_interleaved(providers, **options)
    return {name: Timing.of([sample.seconds for sample in taken]) for name, taken in samples.items()}


def sample_interleaved(
    providers: dict[str, Callable[[], object]],
    *,
    device: torch.device | str = "cpu",
    rounds: int = 20,
    warmup: int = 2,
    budget_s: float = float("inf"),
    probe: Callable[[], float] | None = None,
    enough: Callable[[Samples], bool] | None = None,
) -> Samples:
    """Time every provider, one sample of each per round, each round in another order.

    Interleaved, because a machine's speed drifts (turbo, neighbours): a drift then hits all of them alike,
    and medians ignore the rounds in which a thread was preempted. Shuffled, because a call is slower after
    some calls than after others. The orders are random, but the same in every run.

    Args:
        providers: name -> call without arguments.
        device: where the calls run; on CUDA a sample is taken between two events on the current stream.
        rounds: samples per provider.
        warmup: calls of each provider before the first round.
        budget_s: stop after this many seconds, but not before 3 rounds (or ``rounds``, if fewer).
        probe: called between the samples; a sample has what it gave before and after it.
        enough: whether the samples are; where they are not, ``rounds`` and ``budget_s`` are three times as
            large at the most.

    Raises:
        ValueError: no provider, or ``rounds`` < 1.
    """
    if not providers:
        raise ValueError("providers must hold at least one call, got none")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    device = torch.device(device)
    sample = _sample_cuda if device.type == "cuda" else _sample_cpu
    repeats = {name: _repeats(call, sample, warmup) for name, call in providers.items()}
    order, shuffle = list(providers), random.Random(0).shuffle
    samples: Samples = {name: [] for name in order}
    start = time.perf_counter()
    before = probe and probe()
    for done in range(1, 3 * rounds + 1):
        shuffle(order)
        for name in order:
            seconds = sample(providers[name], repeats[name])
            after = probe and probe()
            samples[name].append(Sample(seconds, before, after))
            before = after
        spent = time.perf_counter() - start
        over = done >= rounds or (done >= 3 and spent > budget_s)
        if over and (enough is None or spent > 3 * budget_s or enough(samples)):
            break
    return samples


def _repeats(call: Callable[[], object], sample: Callable[..., float], warmup: int) -> int:
    """How many calls make a sample that is long enough."""
    for _ in range(warmup):
        call()
    fastest = sample(call, 1)
    if fastest < 0.1:  # a short call may have been preempted, and would get too few repeats
        fastest = min(fastest, sample(call, 1), sample(call, 1))
    return max(1, min(1000, round(_SAMPLE_S / max(fastest, 1e-7))))


def _sample_cpu(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _sample_cuda(call: Callable[[], object], repeats: int) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) * 1e-3 / repeats
