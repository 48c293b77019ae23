"""Which state a CPU was in while a call was timed: the rate at which it multiplies, right before and after.

A host may throttle a virtual machine for stretches of milliseconds to seconds, AMX most of all: to less than
a third. Times compare within one state only. So a probe (`poolformer_kernels.backends.cpp.multiply_rate`: a
millisecond of products on random data in the L1 caches, on all of torch's threads) is taken between any two
timed calls, and a call is timed in the state in which both probes beside it were:

- ``"fast"``: both above `FAST` of the best rate that the run has seen;
- ``"mixed"``: the two differ by more than `STEADY` allows, so the state changed, or something else ran;
- ``"throttled"``: neither fast nor mixed. Hosts throttle by more or less, and one core or all: of these
  samples only those of one depth count, whose rates differ by no more than `STEADY` allows. It is the depth
  in which there are most.

What is said of a state (medians, rates) is of its samples alone; the rate of a sample is the mean of its two
probes. A state is reported where each of the calls that are compared has `ENOUGH` samples in it, both states
where both have. Where neither has, all samples are reported as ``"mixed"``.

Torch's threads spin for some milliseconds after their work, on cores that a runtime with threads of its own
needs: right after the probe OpenVINO took 13.7 ms for what took it 11.8 ms some 5 ms later. So there is a
pause before the call where torch has several threads.

What the state does not say:

- The best rate that the run has seen is not the best there is: in a run that was throttled all along that
  state is called fast. So the rate is reported with the state.
- The probe sees how fast the processor multiplies, not how fast its caches and its memory are. With a busy
  neighbour S12 was seen to take 1.5 times as long at the same rate of the probe. So what is compared is timed
  in one run, and the rows have the plain copy that was timed beside it.
- A call that takes longer than the stretches is throttled for a part of it, which the probes at its ends may
  miss.
"""

import statistics
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from functools import lru_cache, partial

import torch

from ..backends import cpp
from .throughput import Sample, Samples

__all__ = ["ENOUGH", "RateProbe", "median_rate", "rate_of", "rate_probe", "state_of"]

FAST = 0.83  # a part of the best rate: above it are the fast state's clocks, as they vary
STEADY = 0.8  # the lower of two probes in one state, as a part of the higher, at the least
ENOUGH = 5  # samples of a call in one state, or all of them where fewer are taken
_PROBE_S = 1e-3
_PAUSE_S = 5e-3
_FIRST_PROBES = 100


class RateProbe:
    """The probe, called for FLOPs a second, and what the calls of a run have shown so far.

    Args:
        measure: the rate just now.
        pause_s: seconds after each measurement.

    Attributes:
        best: the highest rate.
    """

    def __init__(self, measure: Callable[[], float], pause_s: float = 0.0) -> None:
        self._measure, self._pause_s = measure, pause_s
        self.best = 0.0

    def __call__(self) -> float:
        rate = self._measure()
        self.best = max(self.best, rate)
        time.sleep(self._pause_s)
        return rate

    def enough(self, samples: Samples) -> bool:
        """Whether there is a state in which every call has `ENOUGH` samples."""
        return bool(_complete(samples, self.best))

    def split(self, samples: Samples) -> dict[str, Samples]:
        """The samples of each state that is reported: see the module."""
        return _complete(samples, self.best) or {"mixed": samples}


def rate_probe(device: torch.device, dtype: torch.dtype) -> RateProbe | None:
    """The run's probe of products of this dtype; None on CUDA and without the extension."""
    if device.type != "cpu" or cpp.UNAVAILABLE is not None:
        return None
    return _rate_probe(dtype == torch.bfloat16, torch.get_num_threads())


@lru_cache
def _rate_probe(bfloat16: bool, threads: int) -> RateProbe:
    measure = partial(cpp.multiply_rate, bfloat16, _PROBE_S)
    probe = RateProbe(measure, _PAUSE_S if threads > 1 else 0.0)
    probe.best = max(measure() for _ in range(_FIRST_PROBES))  # the first sample of a run may be throttled
    return probe


def state_of(sample: Sample, best: float) -> str:
    """``"fast"``, ``"throttled"`` or ``"mixed"``."""
    low, high = sorted((sample.before, sample.after))
    if low < STEADY * high:
        return "mixed"
    return "fast" if low > FAST * best else "throttled"


def rate_of(sample: Sample) -> float:
    """FLOPs a second, beside the sample."""
    return (sample.before + sample.after) / 2


def median_rate(samples: list[Sample]) -> float | None:
    """The median of the samples' rates, FLOPs a second; None where there was no probe."""
    if samples[0].before is None:
        return None
    return statistics.median(map(rate_of, samples))


def _complete(samples: Samples, best: float) -> dict[str, Samples]:
    """The states in which every call has `ENOUGH` samples."""

    def chosen(state: str) -> Samples:
        return {name: [s for s in taken if state_of(s, best) == state] for name, taken in samples.items()}

    found = {"fast": chosen("fast"), "throttled": _of_one_depth(chosen("throttled"))}
    least = {name: min(ENOUGH, len(taken)) for name, taken in samples.items()}
    return {
        state: kept for state, kept in found.items() if all(len(kept[name]) >= n for name, n in least.items())
    }


def _of_one_depth(samples: Samples) -> Samples:
    """Those whose rates are at most ``1 / STEADY`` times the lowest of them.

    They are chosen so that the call that has the fewest of them has as many as can be.
    """
    rates = {name: sorted(map(rate_of, taken)) for name, taken in samples.items()}

    def counts(low: float) -> list[int]:
        return sorted(bisect_right(r, low / STEADY) - bisect_left(r, low) for r in rates.values())

    low = max((rate for r in rates.values() for rate in r), key=counts, default=0.0)
    return {name: [s for s in taken if low <= rate_of(s) <= low / STEADY] for name, taken in samples.items()}
