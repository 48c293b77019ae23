"""What the tests of the benchmarks share."""

import pytest

from poolformer_kernels.cli.main import load_benchmarks
from support.peers import require


def require_bench(*packages: str) -> None:
    """Loads the benchmarks, or skips the module without these packages: by default those that most need."""
    for package in packages or ("PIL", "rich", "sklearn", "timm"):
        require(package)
    load_benchmarks()


def row(median_s: float = 1.0, **values):
    """A recorded measurement, by default of poolformer_s12's forward at batch 8."""
    from poolformer_kernels.benchmarks.rows import RecordedRow

    facts = {"device": "Some CPU", "threads": "2", "torch": "2.13.0", "commit": "abc1234"}
    case = {"benchmark": "model", "direction": "forward", "model": "poolformer_s12", "shape": "3x224x224"}
    case |= {"stage": "", "dtype": "bfloat16", "layout": "channels_last", "batch": 8, "provider": "ours"}
    empty = dict.fromkeys(("img_per_s", "gb_per_s", "tflop_per_s", "fraction", "error_l2"))
    times = {"median_s": median_s, "p20_s": 0.8 * median_s, "p80_s": 1.25 * median_s}
    return RecordedRow(**(facts | case | empty | times | values))


def assert_measured(rows: dict[str, dict[str, str]], providers: tuple[str, ...], **fields: str) -> None:
    """These providers have rows with these fields, images per second too; behind them are the two limits."""
    assert list(rows) == [*providers, "copy", "matmul"]
    for provider in providers:
        row = rows[provider]
        assert {name: row[name] for name in fields} == fields
        assert 0 < float(row["p20_s"]) <= float(row["median_s"]) <= float(row["p80_s"])
        rate = int(row["batch"]) / float(row["median_s"])
        assert float(row["img_per_s"]) == pytest.approx(rate, rel=1e-5)
