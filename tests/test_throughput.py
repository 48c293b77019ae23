"""The timing helper, on calls whose order and duration are known."""

import time

import pytest

from poolformer_kernels.profiling import Timing, time_interleaved


def test_medians_of_known_durations() -> None:
    timings = time_interleaved(
        {"short": lambda: time.sleep(0.004), "long": lambda: time.sleep(0.012)}, rounds=5, warmup=0
    )
    assert 0.004 <= timings["short"].median < timings["long"].median
    assert timings["long"].median >= 0.012
    for t in timings.values():
        assert t.p20 <= t.median <= t.p80
        assert t.rounds == 5


def test_rounds_interleave_and_are_shuffled() -> None:
    order: list[str] = []

    def call(name: str):
        def run() -> None:
            order.append(name)
            time.sleep(0.003)  # longer than a sample: one call a sample

        return run

    def run() -> list[str]:
        order.clear()
        time_interleaved({name: call(name) for name in "abc"}, rounds=8, warmup=1)
        calibration = 3 * 4  # one warm-up and three calls to choose the repeats
        assert order[:calibration] == list("aaaabbbbcccc")
        return ["".join(order[i : i + 3]) for i in range(calibration, len(order), 3)]

    rounds = run()
    assert len(rounds) == 8
    assert {"".join(sorted(names)) for names in rounds} == {"abc"}
    assert len(set(rounds)) > 3
    assert run() == rounds  # random, but the same in every run


def test_budget_ends_the_rounds_but_leaves_three() -> None:
    timings = time_interleaved({"a": lambda: time.sleep(0.003)}, rounds=1000, budget_s=0.0)
    assert timings["a"].rounds == 3


def test_noisy_is_a_twofold_spread() -> None:
    assert not Timing(1.5, 1.0, 2.0, 9).noisy
    assert Timing(1.5, 1.0, 2.1, 9).noisy


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="providers"):
        time_interleaved({})
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        time_interleaved({"a": lambda: None}, rounds=0)
