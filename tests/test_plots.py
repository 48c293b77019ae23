"""The plots of the benchmarks: what is drawn from known rows, not how it looks."""

import csv
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from support.bench import require_bench, row

require_bench("matplotlib")

from poolformer_kernels.benchmarks import plots
from poolformer_kernels.benchmarks.rows import RecordedRow, read_results

SEGMENTS = ("stem", "1", "down1", "2", "down2", "3", "down3", "4", "head")


def model_rows() -> list[RecordedRow]:
    times = {"eager": 4.0, "compile": 2.0, "copy": 9.0, "ours": 0.5}
    rows = [row(t, provider=p, dtype=d) for p, t in times.items() for d in ("bfloat16", "float32")]
    # neither counts: the other direction, and another layout of what is there in channels_last
    other = [row(7.0, layout="NCHW"), row(7.0, layout="NCHW", state="fast")]
    return [*rows, row(7.0, direction="backward"), *other]


def bars(ax) -> dict[str, float]:
    """Provider -> width of its bar."""
    names = {y: label.get_text() for y, label in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True)}
    return {names[round(bar.get_y() + bar.get_height() / 2, 6)]: bar.get_width() for bar in ax.patches}


def texts(ax) -> set[str]:
    return {text.get_text().strip() for text in ax.texts}


def lines(ax, name: str) -> list:
    """A provider's lines, or the roof."""
    return [line for line in ax.lines if line.get_gid() == name]


def caption(figure) -> str:
    return " ".join(text.get_text() for text in figure.texts)


@pytest.mark.parametrize("exponent", [0.75, 1.0, 2.0])
def test_fit_is_exact_for_a_power_law(exponent: float) -> None:
    n = [1, 3, 10, 224**2]
    assert plots.fit_power(n, [3e-4 * x**exponent for x in n]) == pytest.approx((3e-4, exponent), rel=1e-12)


def test_fit_minimises_squared_logarithms() -> None:
    a, k = plots.fit_power([1, 10, 100], [1, 1000, 100])
    assert (a, k) == pytest.approx((10 ** (2 / 3), 1.0))
    with pytest.raises(ValueError):
        plots.fit_power([2, 2], [1, 2])


def test_throughput_in_images_per_second() -> None:
    figure = plots.throughput(model_rows())
    assert [ax.get_title("left") for ax in figure.axes] == [
        f"{d}, batch 8, 224x224" for d in ("bfloat16", "float32")
    ]
    for ax in figure.axes:
        assert bars(ax) == pytest.approx({"ours": 16.0, "compile": 4.0, "eager": 2.0})
        assert list(bars(ax)) == ["ours", "compile", "eager"]
        assert texts(ax) == {"poolformer_s12", "16.0", "4.00", "2.00"}
        assert ax.lines[0].get_xdata() == pytest.approx((16 / 1.25, 16 / 0.8))
    for fact in ("Some CPU", "threads: 2", "torch 2.13.0", "abc1234", "bfloat16, float32"):
        assert fact in caption(figure)


def test_throughput_relative_to_compile_else_eager() -> None:
    for ax in plots.throughput(model_rows(), relative=True).axes:
        assert bars(ax) == pytest.approx({"ours": 4.0, "compile": 1.0, "eager": 0.5})
        assert "4.00" in texts(ax)
    # compile is not there for every model: one reference for all
    deeper = [row(t, provider=p, model="poolformer_s24") for p, t in (("eager", 6.0), ("ours", 2.0))]
    ax = plots.throughput([*model_rows(), *deeper], relative=True).axes[0]
    assert sorted(bar.get_width() for bar in ax.patches) == pytest.approx([1.0, 1.0, 2.0, 3.0, 8.0])
    assert "eager" in ax.get_xlabel()
    with pytest.raises(plots.MissingRowsError, match=r"compile, nor eager"):
        plots.throughput([row()], relative=True)


def test_bars_of_a_case_are_of_one_state() -> None:
    def case(state: str, rate: float, times: dict[str, float], **fields) -> list:
        return [row(t, provider=p, state=state, rate_tflops=rate, **fields) for p, t in times.items()]

    slow = {"ours": 2.0, "eager": 6.0}
    rows = case("throttled", 0.6, slow) + case("fast", 2.0, {"ours": 0.5, "eager": 1.0})
    for given in (rows, rows[::-1]):
        figure = plots.throughput(given, relative=True)
        assert bars(figure.axes[0]) == pytest.approx({"ours": 2.0, "eager": 1.0})
        assert "poolformer_s12 (fast, 2.00 TFLOP/s)" in texts(figure.axes[0])
        assert "machine fast, 2.00 TFLOP/s" in caption(figure)
    # a state that most cases were measured in goes first, and one that has more providers before it
    rows += case("throttled", 0.7, slow, batch=1)
    figure = plots.throughput(rows, relative=True)
    for ax in figure.axes:
        assert bars(ax) == pytest.approx({"ours": 3.0, "eager": 1.0})
    assert "machine throttled, 0.600 to 0.700 TFLOP/s" in caption(figure)
    rows += case("fast", 2.0, {"compile": 0.75})
    assert bars(plots.throughput(rows).axes[1]) == pytest.approx(
        {"ours": 16, "compile": 8 / 0.75, "eager": 8}
    )


def test_bars_of_several_numbers_of_threads() -> None:
    rows = [row(1.0 / int(n), threads=n) for n in ("1", "2")]
    axes = plots.throughput(rows).axes
    titles = [f"bfloat16, batch 8, 224x224, threads: {n}" for n in "12"]
    assert [ax.get_title("left") for ax in axes] == titles
    assert [bars(ax)["ours"] for ax in axes] == pytest.approx([8.0, 16.0])


def test_stages_stack_and_leave_out_the_incomplete(capsys) -> None:
    times = {"ours": 0.01, "compile": 0.02, "eager": 0.04}
    rows = [
        row(t * (i + 1), benchmark="block", stage=stage, provider=p)
        for p, t in times.items()
        for i, stage in enumerate(SEGMENTS)
        if (p, stage) != ("eager", "head")
    ]
    for relative, unit in ((False, 1e3), (True, 1 / (45 * 0.02))):
        (ax,) = plots.stages(rows, relative).axes
        assert [label.get_text() for label in ax.get_yticklabels()] == ["ours", "compile"]
        widths = [bar.get_width() for bar in ax.patches]
        assert widths == pytest.approx([unit * t * i for t in (0.01, 0.02) for i in range(1, 10)])
        lefts = [bar.get_x() for bar in ax.patches]
        assert lefts[1:9] == pytest.approx([sum(widths[:i]) for i in range(1, 9)])
        assert {"0.50", "1.00"} <= texts(ax) if relative else {"450 ms", "900 ms"} <= texts(ax)
        assert "eager left out of poolformer_s12, batch 8: no rows with stage head" in capsys.readouterr().err
    with pytest.raises(plots.MissingRowsError, match="block"):
        plots.stages(rows[:8])


def test_roofline_points_roofs_and_labels() -> None:
    def kernel(benchmark: str, stage: str, flop_per_byte: float, **fields) -> list:
        rates = {"ours": 80.0, "compile": 40.0, "eager": 20.0}
        given = {"benchmark": benchmark, "stage": stage, **fields}
        return [
            row(provider=p, gb_per_s=g, tflop_per_s=g * flop_per_byte / 1e3, **given)
            for p, g in rates.items()
        ]

    rows = kernel("pool_mixer", "1", 3.0, shape="64x56x56")
    rows += kernel("mlp", "1", 25.0, shape="64x56x56") + kernel("mlp", "2", 25.5, shape="128x28x28")
    rows += kernel("block", "", 12.5, shape="64x56x56") + kernel("block", "stem", 8.0)
    rows += kernel("model", "", 11.0) + kernel("block", "", 24.0, shape="128x28x28")
    rows += kernel("model", "", 99.0, batch=1)  # another batch than most
    # the whole stage gives way to the single block, and an unknown provider is left out
    rows += [*kernel("block", "1", 12.4, shape="64x56x56"), replace(rows[3], provider="eager linear")]
    rows += [row(provider="copy", gb_per_s=g) for g in (90.0, 100.0, 150.0)]
    rows += [row(provider="matmul", tflop_per_s=2.0)]
    for relative, unit in ((False, 1.0), (True, 2.0)):
        figure = plots.roofline(rows, relative)
        (ax,) = figure.axes
        intensities = np.array([3.0, 8.0, 11.0, 12.5, 24.0, 25.0, 25.5])
        for provider, rate in (("ours", 0.08), ("eager", 0.02)):
            points = sorted(tuple(line.get_xydata()[0]) for line in lines(ax, provider))
            assert np.array(points) == pytest.approx(np.stack([intensities, rate * intensities / unit], 1))
        (roof,) = lines(ax, "roof")
        for x, y in roof.get_xydata():
            assert y == pytest.approx(min(100.0 * x / 1e3, 2.0) / unit)
        labels = [text for text in ax.texts if text.get_gid() == "label"]
        expected = {"mixer 1", "MLP 1, 2", "block 1", "block 2", "stem", "s12"}
        assert {text.get_text() for text in labels} == expected
        boxes = [text.get_window_extent() for text in ax.texts if text.get_text()]
        assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    # on the CPU the flat roof is the processor's own rate, beside the rows that are shown
    rated = [replace(r, rate_tflops=5.0, state="fast") for r in rows] + [row(provider="copy", gb_per_s=1.0)]
    (roof,) = lines(plots.roofline(rated).axes[0], "roof")
    for x, y in roof.get_xydata():
        assert y == pytest.approx(min(100.0 * x / 1e3, 5.0))
    with pytest.raises(plots.MissingRowsError, match=r"batch 8 and provider copy, nor matmul"):
        plots.roofline(rows[:-4])  # without the limits


def test_scaling_points_and_exponents() -> None:
    def time(p: str, batch: int, size: int, depth: int) -> float:
        return {"ours": 1e-3, "compile": 2e-3}[p] * batch**0.9 * (size / 224) ** 2.2 * (depth / 12) ** 0.8

    cases = {(batch, 224, 12) for batch in (1, 2, 4, 8)} | {(1, size, 12) for size in (224, 512, 1024)}
    cases |= {(8, 224, depth) for depth in (12, 24, 36)}
    rows = []
    for p in ("ours", "compile"):
        for batch, size, depth in sorted(cases):
            model = {"model": f"poolformer_s{depth}", "shape": f"3x{size}x{size}", "batch": batch}
            rows.append(row(time(p, batch, size, depth), benchmark="scaling", provider=p, **model))
    sizes = ([1, 2, 4, 8], [224**2, 512**2, 1024**2], [12, 24, 36])
    for relative in (False, True):
        axes = plots.scaling(rows, relative).axes
        for ax, k, n in zip(axes, ("0.90", "1.10", "0.80"), sizes, strict=True):
            labels = {text.get_text() for text in ax.get_legend().get_texts()}
            assert labels == {f"ours: k = {k}", f"torch.compile: k = {k}"}
            (ours,) = lines(ax, "ours")
            assert list(ours.get_xdata()) == n
        # one millisecond at the smallest batch and image
        batch = axes[0].lines[0].get_ydata()
        assert list(batch) == pytest.approx([b**0.9 for b in sizes[0]])
        depth = lines(axes[2], "ours")[0].get_ydata()
        assert list(depth) == pytest.approx([(1 if relative else 8**0.9) * m**0.8 for m in (1, 2, 3)])
    with pytest.raises(plots.MissingRowsError, match="blocks"):
        plots.scaling([r for r in rows if r.model == "poolformer_s12"])


def write(path: Path, rows: list, drop: tuple[str, ...] = (), **changes: str) -> None:
    lines = [{k: v for k, v in asdict(r).items() if k not in drop} for r in rows]
    lines[-1] |= changes
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)


def test_rows_survive_the_file_and_those_from_before_the_state_was_known_are_read(tmp_path: Path) -> None:
    old = [row(0.25), row(0.5, provider="eager")]
    write(tmp_path / "old.csv", old, drop=("rate_tflops", "state"))
    assert "state" not in (tmp_path / "old.csv").read_text()
    young = [row(img_per_s=32.0, rate_tflops=1.5, state="throttled"), row(provider="copy", gb_per_s=3.5)]
    write(tmp_path / "young.csv", young)
    assert read_results(tmp_path) == old + young
    assert plots.main(["--results", str(tmp_path)]) == 0


def test_files_of_one_run_and_of_the_next_are_the_same(tmp_path: Path, capsys) -> None:
    write(tmp_path / "model.csv", model_rows())
    command = ["--results", str(tmp_path), "--dtype", "float32", "--relative", "--out"]
    for out in ("first", "second"):
        assert plots.main([*command, str(tmp_path / out)]) == 0
    names = {"throughput_relative.png", "throughput_relative.svg"}
    assert {path.name for path in (tmp_path / "first").iterdir()} == names
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert "dc:date" not in (tmp_path / "first" / "throughput_relative.svg").read_text()
    skipped = capsys.readouterr().err.splitlines()
    assert skipped[0] == "plots: stages_float32 skipped: no rows with benchmark block, direction forward"
    expected = [f"{name}_float32" for name in ("stages", "roofline", "scaling")]
    assert [line.split()[1] for line in skipped[:3]] == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop": ("gb_per_s",)}, "model.csv: missing columns: gb_per_s"),
        ({"median_s": "fast"}, "model.csv, line 3: median_s is 'fast', not a number"),
        ({"p20_s": ""}, "line 3: p20_s is '', not a number"),
        ({"state": "slow"}, "line 3: state is 'slow'; allowed: nothing, fast, throttled, mixed"),
        ({"device": "Another CPU"}, "rows of several devices, Another CPU, Some CPU"),
        (
            {"benchmark": "mlp", "dtype": "float16"},
            "--dtype is 'float64'; the results hold bfloat16, float16",
        ),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, capsys, changes: dict, message: str) -> None:
    write(tmp_path / "model.csv", [row(), row()], **changes)
    assert plots.main(["--results", str(tmp_path), "--dtype", "float64"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "plots").exists()


def test_a_folder_without_rows_is_an_error(tmp_path: Path, capsys) -> None:
    assert plots.main(["--results", str(tmp_path)]) == 2
    assert "no CSV file" in capsys.readouterr().err
