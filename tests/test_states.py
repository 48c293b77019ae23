"""The machine's state beside timed calls: the rule on known rates, the loop with a fake probe, the probe."""

import pytest
import torch

from poolformer_kernels.backends import cpp
from poolformer_kernels.profiling import states
from poolformer_kernels.profiling.throughput import Sample, sample_interleaved

BEST = 2e12


def samples(*pairs: tuple[float, float]) -> list[Sample]:
    """Samples between two probes, given as parts of the best rate; a call takes longer at a lower rate."""
    return [Sample(1 / (a + b), a * BEST, b * BEST) for a, b in pairs]


def probe(best: float = BEST) -> states.RateProbe:
    """One that has seen this rate."""
    made = states.RateProbe(lambda: best)
    assert made() == made.best == best
    return made


@pytest.mark.parametrize(
    ("before", "after", "state"),
    [
        (1.0, 0.9, "fast"),
        (0.84, 1.0, "fast"),
        (0.82, 1.0, "throttled"),  # one of them is below
        (0.3, 0.3, "throttled"),
        (0.3, 0.37, "throttled"),
        (0.3, 0.38, "mixed"),
        (1.0, 0.3, "mixed"),
        (0.3, 1.0, "mixed"),
    ],
)
def test_the_state_of_a_sample(before: float, after: float, state: str) -> None:
    (sample,) = samples((before, after))
    assert states.state_of(sample, BEST) == state


def test_each_state_that_every_call_was_in_is_reported() -> None:
    fast, slow, mixed = [(0.9, 1.0)], [(0.3, 0.28)], [(1.0, 0.3)]
    taken = {"a": samples(*fast * 5, *slow * 5, *mixed * 9), "b": samples(*slow * 6, *mixed, *fast * 7)}
    rate = probe()
    assert rate.enough(taken)
    found = rate.split(taken)
    assert {state: {n: len(s) for n, s in group.items()} for state, group in found.items()} == {
        "fast": {"a": 5, "b": 7},
        "throttled": {"a": 5, "b": 6},
    }
    assert states.median_rate(found["fast"]["a"]) == pytest.approx(0.95 * BEST)
    assert states.median_rate(found["throttled"]["b"]) == pytest.approx(0.29 * BEST)
    taken["b"] = taken["b"][:-4]  # three fast ones: too few
    assert list(rate.split(taken)) == ["throttled"]


def test_throttled_samples_are_of_one_depth() -> None:
    deep, light = [(0.25, 0.3)], [(0.6, 0.6)]
    taken = {"a": samples(*deep * 9, *light * 20), "b": samples(*deep * 6, *light * 5, (0.26, 0.26))}
    rate = probe()
    (found,) = rate.split(taken).values()
    assert {name: len(group) for name, group in found.items()} == {"a": 9, "b": 7}
    assert states.median_rate(found["a"]) == pytest.approx(0.275 * BEST)
    taken["b"] = taken["b"][4:]
    assert states.median_rate(rate.split(taken)["throttled"]["a"]) == pytest.approx(0.6 * BEST)
    taken["b"] = taken["b"][:-2]
    assert list(rate.split(taken)) == ["mixed"]


def test_without_a_state_of_every_call_all_samples_are_mixed() -> None:
    taken = {"a": samples(*[(1.0, 1.0)] * 9), "b": samples(*[(0.3, 0.3)] * 9)}
    rate = probe()
    assert not rate.enough(taken)
    assert rate.split(taken) == {"mixed": taken}
    few = {"a": samples((1.0, 1.0)), "b": samples((1.0, 0.9))}  # of a single round
    assert rate.enough(few)
    assert list(rate.split(few)) == ["fast"]


def test_the_state_of_a_case_does_not_depend_on_earlier_cases() -> None:
    rate, taken = probe(), {"a": samples(*[(1.0, 0.9)] * 5, (0.2, 0.9))}  # one was preempted
    assert {state: len(group["a"]) for state, group in rate.split(taken).items()} == {"fast": 5}
    assert list(rate.split({"a": samples(*[(0.3, 0.3)] * 5)})) == ["throttled"]
    assert list(rate.split(taken)) == ["fast"]


def test_calls_lie_between_two_probes_and_share_them() -> None:
    log: list[str] = []
    rates = iter(range(1, 100))

    def measure() -> int:
        log.append("probe")
        return next(rates)

    calls = {name: lambda name=name: log.append(name) for name in "ab"}
    taken = sample_interleaved(calls, rounds=3, warmup=0, probe=measure)
    first = log.index("probe")
    repeats = {name: log[:first].count(name) for name in "ab"}
    assert repeats == {"a": 3, "b": 3}  # to choose how many calls make a sample
    in_order = sorted((s for group in taken.values() for s in group), key=lambda s: s.before)
    assert [(s.before, s.after) for s in in_order] == [(i, i + 1) for i in range(1, 7)]
    runs = " ".join(log[first:]).split("probe")
    assert runs[0] == runs[-1] == ""
    assert [len(set(run.split())) for run in runs[1:-1]] == [1] * 6  # one provider between two probes


@pytest.mark.parametrize(("answers", "rounds"), [([True], 2), ([False, False, True], 4), ([False] * 9, 6)])
def test_rounds_go_on_until_they_are_enough(answers: list[bool], rounds: int) -> None:
    given = iter(answers)
    taken = sample_interleaved({"a": int}, rounds=2, probe=lambda: 1.0, enough=lambda samples: next(given))
    assert len(taken["a"]) == rounds


@pytest.mark.parametrize(("budget_s", "calls"), [(1e-9, 0), (0.5, 1)])
def test_the_budget_grows_threefold(budget_s: float, calls: int, monkeypatch) -> None:
    seconds = iter(range(1000))  # each look at the clock is a second later
    monkeypatch.setattr("poolformer_kernels.profiling.throughput._sample_cpu", lambda call, repeats: 1.0)
    monkeypatch.setattr("time.perf_counter", lambda: 0.4 * next(seconds))
    asked = []
    options = {"rounds": 100, "warmup": 0, "probe": lambda: 1.0, "budget_s": budget_s}
    taken = sample_interleaved({"a": int}, enough=lambda samples: bool(asked.append(1)), **options)
    assert (len(taken["a"]), len(asked)) == (3 + calls, calls)


def test_only_the_cpu_is_probed(monkeypatch) -> None:
    assert states.rate_probe(torch.device("cuda"), torch.bfloat16) is None
    monkeypatch.setattr(cpp, "UNAVAILABLE", "not built")
    assert states.rate_probe(torch.device("cpu"), torch.bfloat16) is None
    assert states.median_rate([Sample(1.0)]) is None


def test_a_run_has_a_probe_of_each_kind(kernels, monkeypatch) -> None:
    rates = iter(range(10**6))
    monkeypatch.setattr(cpp, "multiply_rate", lambda bfloat16, seconds: next(rates) + 1000 * bfloat16)
    states._rate_probe.cache_clear()
    try:
        half, single = (states.rate_probe(torch.device("cpu"), t) for t in (torch.bfloat16, torch.float32))
        assert states.rate_probe(torch.device("cpu"), torch.float16) is single is not half
        assert half.best == 1000 + states._FIRST_PROBES - 1  # it has been called before it is used
    finally:
        states._rate_probe.cache_clear()


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("level", cpp.build_info().get("isa_supported", []))
def test_each_level_multiplies(level: str, bfloat16: bool) -> None:
    assert 1e8 < cpp.multiply_rate(bfloat16, 1e-4, level) < 1e15


@pytest.mark.parametrize("count", [1, 3])
def test_torchs_threads_multiply(count: int, kernels: str) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        assert 1e8 < cpp.multiply_rate(torch.get_num_threads() == 1, 1e-3) < 1e15
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("seconds", [0.0, -1.0, 61.0, float("nan")])
def test_seconds_that_are_none(seconds: float, kernels: str) -> None:
    with pytest.raises(ValueError, match="seconds must be above 0 and at most 60"):
        cpp.multiply_rate(False, seconds)


def test_an_unknown_level(kernels: str) -> None:
    with pytest.raises(ValueError, match="level is 'sse9', which this machine or this build has not"):
        cpp.multiply_rate(False, 1e-3, "sse9")
