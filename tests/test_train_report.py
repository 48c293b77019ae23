"""What a training run leaves and shows: metrics that read back exactly, curves of them, progress."""

import io
import math
import os
import re
import sys
from pathlib import Path
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
from support.train import require_train
from support.train_report import epoch_row, full, has, pixels, train_row, write

require_train()

from matplotlib import rc_context, rcParams
from matplotlib._pylab_helpers import Gcf

from poolformer_kernels import html_page
from poolformer_kernels.train import report

# ---- metrics.csv


def test_the_columns(tmp_path) -> None:
    report.Metrics(tmp_path)
    assert (tmp_path / "metrics.csv").read_text() == (
        "step,epoch,lr,train_loss,images_per_second,memory_mb,skipped_steps,bad_images,"
        "val_loss,val_top1,val_top5,val_images_per_second,ema_top1\n"
    )
    assert report.Metrics.read(tmp_path) == []


HARD = [0.1 + 0.2, 1 / 3, -0.0, 5e-324, 1.7976931348623157e308, 2**53 + 1.0, math.inf, -math.inf, 1e22]


@pytest.mark.parametrize("value", HARD)
def test_floats_read_back_exactly(tmp_path, value: float) -> None:
    report.Metrics(tmp_path).append({"step": 3, "epoch": value, "lr": value, "ema_top1": value})
    (row,) = report.Metrics.read(tmp_path)
    for name in ("epoch", "lr", "ema_top1"):
        assert (row[name], math.copysign(1, row[name])) == (value, math.copysign(1, value))
    assert row["train_loss"] is None


def test_kinds_of_numbers(tmp_path) -> None:
    row = {"step": np.int64(2**60 + 1), "epoch": 1, "train_loss": np.float32(0.1), "val_loss": math.nan}
    write(tmp_path, [row | {"skipped_steps": 7}])
    (read,) = report.Metrics.read(tmp_path)
    assert (read["step"], read["skipped_steps"]) == (2**60 + 1, 7)
    assert all(type(read[name]) is int for name in ("step", "skipped_steps"))
    assert all(type(read[name]) is float for name in ("epoch", "train_loss"))
    assert read["epoch"] == 1.0
    assert read["train_loss"] == float(np.float32(0.1))
    assert math.isnan(read["val_loss"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"loss": 1.0}, ValueError, "unknown column 'loss'; the columns are step, epoch, lr"),
        ({"step": None}, ValueError, "'step' is missing"),
        ({"epoch": None}, ValueError, "'epoch' is missing"),
        ({"step": 1.0}, TypeError, "'step' must be a whole number or None, got 1.0"),
        ({"step": True}, TypeError, "'step' must be a whole number or None, got True"),
        ({"lr": "0.1"}, TypeError, "'lr' must be a real number or None, got '0.1'"),
        ({"lr": torch.tensor(0.1)}, TypeError, r"'lr' must be a real number or None, got tensor\(0.1000\)"),
    ],
)
def test_a_bad_row_is_an_error_and_writes_nothing(tmp_path, change, error, message) -> None:
    write(tmp_path, [train_row(10)])
    before = (tmp_path / "metrics.csv").read_bytes()
    with pytest.raises(error, match=message):
        write(tmp_path, [train_row(20) | change])
    assert (tmp_path / "metrics.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("step", "kept"), [(0, 0), (9, 0), (10, 1), (19, 1), (20, 3), (25, 3), (30, 4), (99, 4)]
)
def test_truncate_drops_later_rows_and_a_resumed_run_goes_on_after_the_others(
    tmp_path, step: int, kept: int
) -> None:
    rows = [train_row(10, 1 / 3), train_row(20, 0.1), epoch_row(20, 0.7, 55.5), train_row(30, 1e-5)]
    write(tmp_path, rows)
    before = (tmp_path / "metrics.csv").read_text().splitlines(keepends=True)
    metrics = report.Metrics(tmp_path)
    metrics.truncate(step)
    assert (tmp_path / "metrics.csv").read_text() == "".join(before[: kept + 1])
    later = [train_row(100, 1.25), epoch_row(100, 1.0, 60.0)]
    for row in later:
        metrics.append(row)
    assert report.Metrics.read(tmp_path) == full([*rows[:kept], *later])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize("truncate", [False, True])
def test_a_line_cut_anywhere_is_removed(tmp_path, truncate: bool) -> None:
    rows = [train_row(10), epoch_row(20, 0.5, 71.25, ema_top1=70.125)]
    write(tmp_path, rows)
    path = tmp_path / "metrics.csv"
    content = path.read_bytes()
    last = len(content.splitlines(keepends=True)[-1])
    for cut in range(1, last + 1):
        path.write_bytes(content)
        metrics = report.Metrics(tmp_path)
        path.write_bytes(content[:-cut])
        assert report.Metrics.read(tmp_path) == full(rows[:1])
        if truncate:
            metrics.truncate(10)
        else:
            metrics = report.Metrics(tmp_path)
        metrics.append(rows[1])
        assert path.read_bytes() == content


def test_a_header_cut_anywhere_is_written_again(tmp_path) -> None:
    path = report.Metrics(tmp_path).path
    header = path.read_bytes()
    for end in range(len(header)):
        path.write_bytes(header[:end])
        assert report.Metrics.read(tmp_path) == []
        write(tmp_path, [train_row(10)])
        assert report.Metrics.read(tmp_path) == full([train_row(10)])


@pytest.mark.parametrize("content", ["step,loss\n1,2\n", "notes", "step,epoch,lr\n"])
def test_other_columns_are_an_error(tmp_path, content: str) -> None:
    (tmp_path / "metrics.csv").write_text(content)
    said = r"metrics\.csv: the columns are .*, but this version writes step,"
    for use in (report.Metrics, report.Metrics.read, report.draw_curves):
        with pytest.raises(ValueError, match=said):
            use(tmp_path)
    assert (tmp_path / "metrics.csv").read_text() == content


@pytest.mark.parametrize("line", ["1,2", "one" + ",1.0" * 12, ",1.0" + "," * 11, ""])
def test_a_broken_line_is_named(tmp_path, line: str) -> None:
    write(tmp_path, [train_row(10)])
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write(f"{line}\n")
    for use in (report.Metrics.read, lambda run: report.Metrics(run).truncate(5)):
        with pytest.raises(ValueError, match=r"metrics\.csv, line 3: "):
            use(tmp_path)


def test_the_old_file_stays_where_the_new_one_cannot_be_put(tmp_path, monkeypatch) -> None:
    rows = [train_row(10), train_row(20)]
    write(tmp_path, rows)

    def fail(*_):
        raise OSError("killed before the rename")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="killed before"):
            report.Metrics(tmp_path).truncate(10)
    assert report.Metrics.read(tmp_path) == full(rows)


# ---- curves.png


def figure_of(rows: list[dict]):
    return report.curves_figure(full(rows))


def curves(figure) -> dict[str, tuple[list, list]]:
    """By column, or what is drawn besides: the points of the line."""
    lines = [line for ax in figure.axes for line in ax.lines]
    return {line.get_gid(): (list(line.get_xdata()), list(line.get_ydata())) for line in lines}


def texts(figure) -> set[str]:
    legends = [text for ax in figure.axes if ax.get_legend() for text in ax.get_legend().get_texts()]
    return {text.get_text() for text in [*legends, *(text for ax in figure.axes for text in ax.texts)]}


def test_curves_are_the_columns() -> None:
    rows = [train_row(5, 2.0), train_row(10, 1.5), epoch_row(10, 1.6, 40.0, ema_top1=12.0)]
    rows += [train_row(20, 1.0, lr=5e-4), epoch_row(20, 1.2, 62.5, ema_top1=61.0)]
    figure = figure_of(rows)
    assert curves(figure) == {
        "train_loss": ([0.5, 1.0, 2.0], [2.0, 1.5, 1.0]),
        "val_loss": ([1.0, 2.0], [1.6, 1.2]),
        "val_top1": ([1.0, 2.0], [40.0, 62.5]),
        "ema_top1": ([1.0, 2.0], [12.0, 61.0]),
        "best": ([2.0], [62.5]),
        "lr": ([0.5, 1.0, 2.0], [1e-3, 1e-3, 5e-4]),
    }
    assert texts(figure) == {"training", "validation", "model", "moving average (EMA)", "best, 62.50"}
    for ax in figure.axes:
        left, right = ax.get_xlim()
        assert left == 0
        assert right > 2


def test_no_moving_average_no_validation_no_rows() -> None:
    def drawn(rows: list[dict]) -> tuple[set, set]:
        figure = figure_of(rows)
        figure.draw_without_rendering()
        return set(curves(figure)), texts(figure)

    of_training, of_validation = {"train_loss", "lr"}, {"val_loss", "val_top1", "best"}
    assert drawn([train_row(10), epoch_row(10, 1.0, 50.0)])[0] == of_training | of_validation
    assert drawn([train_row(10)]) == (of_training, {"training", "no validation yet"})
    assert drawn([epoch_row(10, 1.0, 50.0)])[0] == of_validation
    assert drawn([]) == (set(), {"no validation yet"})


@pytest.mark.parametrize(
    ("losses", "marker", "where"),
    [
        ([2.0], "o", [0]),
        ([1.0] * 20 + [math.nan, 1.0, math.nan] + [1.0] * 40 + [math.inf, 1.0], "o", [21, 64]),
        ([1.0] * 60, "None", None),
    ],
    ids=["one", "lonely ones of many", "many"],
)
def test_lonely_points_are_dots(losses, marker, where) -> None:
    line = figure_of([train_row(i, loss) for i, loss in enumerate(losses, 1)]).axes[0].lines[0]
    assert (line.get_marker(), line.get_markevery()) == (marker, where)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("losses", "shown", "said"),
    [
        ([2.0, math.nan, 1.0, math.inf, -math.inf], [0, 2], "not finite"),
        ([math.inf, math.nan], [], "no finite loss"),
        ([2.0, 1.0, 19.0, 1e30, 1.0], [0, 1, 2, 4], "not finite, or over 10 × the first"),
    ],
    ids=["some", "none finite", "diverging"],
)
def test_losses_that_cannot_be_drawn_leave_a_gap_and_a_mark(tmp_path, losses, shown, said) -> None:
    rows = [train_row(10 * i, loss, lr=0.0) for i, loss in enumerate(losses, 1)]
    write(tmp_path, [*rows, epoch_row(60, math.nan, math.nan)])
    figure = report.curves_figure(report.Metrics.read(tmp_path))
    drawn = curves(figure)
    assert drawn["outside"][0] == [*(i + 1.0 for i in range(len(losses)) if i not in shown), 6.0]
    expected = [loss if i in shown else math.nan for i, loss in enumerate(losses)]
    np.testing.assert_array_equal(drawn["train_loss"][1], expected)
    assert figure.axes[0].get_ylim()[1] < 30
    assert {said, "no validation yet"} <= texts(figure)
    report.draw_curves(tmp_path)


def test_the_picture(tmp_path) -> None:
    write(tmp_path, [train_row(10, 2.0), train_row(20, 1.5)])
    path = report.draw_curves(tmp_path)
    assert path == tmp_path / "curves.png"
    before = pixels(path)
    write(tmp_path, [epoch_row(20, 1.7, 40.0)])
    after = pixels(report.draw_curves(tmp_path))
    assert before.shape[1] == after.shape[1] > 1800
    for colour, drawn in (("train", (True, True)), ("val", (False, True)), ("ema", (False, False))):
        assert (has(before, report._LIGHT[colour]), has(after, report._LIGHT[colour])) == drawn
    assert sorted(file.name for file in tmp_path.iterdir()) == ["curves.png", "metrics.csv"]


def test_drawing_leaves_matplotlibs_settings_alone(tmp_path) -> None:
    write(tmp_path, [train_row(10, 2.0), train_row(20, 1.5)])
    usual = pixels(report.draw_curves(tmp_path))
    with rc_context({"axes.facecolor": "pink", "font.size": 20, "savefig.dpi": 50}):
        settings = dict(rcParams)
        assert (pixels(report.draw_curves(tmp_path)) == usual).all()
        assert dict(rcParams) == settings
    assert not Gcf.figs  # pyplot's figures


def test_dark_curves_are_on_the_pages_dark_card() -> None:
    rows = full([train_row(10), epoch_row(10, 1.0, 50.0)])
    light, dark = (pixels(report._png(report.curves_figure(rows, dark))) for dark in (False, True))
    assert (light[0, 0].tolist(), dark[0, 0].tolist()) == ([255, 255, 255], [0x1A, 0x20, 0x29])
    assert f"--card:{report._DARK['card']};" in html_page._STYLE
    assert has(dark, report._DARK["val"])
    assert not has(dark, report._LIGHT["val"])


# ---- progress


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """What the clock shows, in seconds."""
    now = [100.0]
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    return now


def test_lines_off_a_terminal(capsys, now) -> None:
    with report.Progress(1000, done=100) as progress:
        progress.line("[bold]resumed[/] at step 100")
        for step in range(101, 1001):
            now[0] += 2.0
            progress.update(step, f"loss {step / 1000}" if step % 300 == 0 else None)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "[bold]resumed[/] at step 100",
        "step 300/1000: loss 0.3, 0:23:20 left",
        "step 600/1000: loss 0.6, 0:13:20 left",
        "step 900/1000: loss 0.9, 0:03:20 left",
    ]


def test_time_left_of_days_and_none_at_the_ends(capsys, now) -> None:
    progress = report.Progress(101)
    progress.update(0, "first")
    now[0] += 3661.0
    progress.update(1, "one")
    progress.update(101, "last")
    assert capsys.readouterr().err.splitlines() == [
        "step 0/101: first",
        "step 1/101: one, 4 d 5:41:40 left",
        "step 101/101: last",
    ]


def test_other_ranks_show_nothing(capsys) -> None:
    with report.Progress(10, enabled=False) as progress:
        progress.update(5, "loss 1")
        progress.line("validation")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("done", [-1, 11])
def test_progress_checks_what_is_done(done: int) -> None:
    with pytest.raises(ValueError, match=f"done: must be between 0 and total_steps = 10, got {done}"):
        report.Progress(10, done=done)


def read_to_end(terminal: io.TextIOBase, screen: io.RawIOBase) -> str:
    """All that was written to the pseudoterminal; the kernel hands it over in pieces."""
    terminal.write("END")
    terminal.flush()
    shown = b""
    while not shown.endswith(b"END"):
        shown += screen.read(1 << 16)
    return shown.decode().removesuffix("END")


def test_a_bar_on_a_terminal(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("NO_COLOR", "TTY_INTERACTIVE", "TTY_COMPATIBLE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal, os.fdopen(ours, "rb", buffering=0) as screen:
        monkeypatch.setattr(sys, "stderr", terminal)
        with report.Progress(200, done=50) as progress:
            progress.update(51)
            progress.update(100, "epoch 1 [loss 1.25]")
            progress.update(101)
            progress.line("epoch 1: [top-1] 50.0 %")
        shown = read_to_end(terminal, screen)
        with report.Progress(200, enabled=False) as progress:
            progress.update(100, "hidden")
            progress.line("hidden")
        assert read_to_end(terminal, screen) == ""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "epoch 1: [top-1] 50.0 %\r\n" in plain
    assert re.search(r"━+.* 101/200 epoch 1 \[loss 1\.25\] \d:\d\d:\d\d left", plain)
    assert plain.count("epoch 1: [top-1]") == 1


# ---- TensorBoard


def test_rows_go_to_tensorboard(tmp_path, monkeypatch) -> None:
    """With a stand-in for torch's writer, which needs a package that the tests do not."""
    module = Mock()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    board = report.TensorBoard(tmp_path, step=20)
    assert board.unavailable == ""
    board.add(dict.fromkeys(report.COLUMNS) | {"step": 30, "epoch": 1.5, "lr": 0.5, "train_loss": 2.0})
    board.add({"step": 40, "val_top1": 60.0, "val_images_per_second": 7.0, "ema_top1": 61.0})
    board.close()
    module.SummaryWriter.assert_called_once_with(str(tmp_path / "tensorboard"), purge_step=21)
    assert module.SummaryWriter.return_value.mock_calls == [
        call.add_scalar("train/epoch", 1.5, 30),
        call.add_scalar("train/lr", 0.5, 30),
        call.add_scalar("train/loss", 2.0, 30),
        call.flush(),
        call.add_scalar("val/top1", 60.0, 40),
        call.add_scalar("val/images_per_second", 7.0, 40),
        call.add_scalar("ema/top1", 61.0, 40),
        call.flush(),
        call.close(),
    ]
    report.TensorBoard(tmp_path)
    module.SummaryWriter.assert_called_with(str(tmp_path / "tensorboard"), purge_step=None)


def test_without_tensorboard_nothing_is_written(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    board = report.TensorBoard(tmp_path)
    board.add(train_row(10))
    board.close()
    assert re.fullmatch("no TensorBoard events are written: .*tensorboard.*", board.unavailable)
    assert list(tmp_path.iterdir()) == []
