"""Paths of results: their parent must exist, the last folder is made, a file is written whole or not."""

import errno
import os
from pathlib import Path

import pytest
from support.commands import printed, refused
from support.peers import require

from poolformer_kernels.cli.errors import CommandError
from poolformer_kernels.cli.files import check_writable, make_folder, write_whole
from poolformer_kernels.cli.main import load_benchmark, load_benchmarks


@pytest.fixture
def below(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


NO_PARENT = [
    "verify --json a/b/c.json",
    "profile --no-time --json a/b/c.json",
    "demo --json a/b/c.json",
    "demo --report a/b",
    "predict a.png --checkpoint w.pth --out a/b",
    "cam a.png --random-weights --out a/b",
    "export w.pth --to timm --out a/b/c.pth",
    "train sample:digits --out a/b",
    "bench mlp --csv a/b/c.csv",
    "bench model --json a/b/c.json",
    "bench loop --csv a/b/c.csv",
    "bench host --csv a/b/c.csv",
]


@pytest.mark.parametrize("words", [*NO_PARENT, "verify --json .", "demo --json ."])
def test_an_unwritable_path_ends_before_the_work(words, below, capsys) -> None:
    for package in ("PIL", "captum", "matplotlib", "rich", "safetensors", "timm", "yaml"):
        require(package)
    (below / "w.pth").touch()
    error = refused(capsys, words)
    if words in NO_PARENT:
        assert words.split()[-1] in error
        assert "there is no folder a; only the last folder of a path is made" in error
    else:
        assert error == "cannot write to .: Is a directory"
    assert files(below) == ["w.pth"]


def test_the_last_folder_is_made(below, capsys) -> None:
    require("rich")
    printed(capsys, "profile --paper --json new/p.json")
    assert files(below) == ["new", "new/p.json"]


def test_a_check_leaves_nothing(below) -> None:
    check_writable("new/a.csv", "other")
    check_writable("a.csv")
    assert files(below) == []
    (below / "file").touch()
    for file, folder, reason in (
        ("file/a.csv", None, "file is not a folder"),
        (None, "file", "file is not a folder"),
        (".", None, "Is a directory"),
        ("x/y/a.csv", None, "there is no folder x"),
    ):
        with pytest.raises(CommandError, match=reason):
            check_writable(file, folder)
    with pytest.raises(CommandError, match="cannot write to x/y: No such file"):
        make_folder("x/y")


def test_a_path_that_may_not_be_written_is_refused(below, monkeypatch) -> None:
    (below / "old.csv").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    for file in ("old.csv", "new.csv", "new/a.csv"):
        with pytest.raises(CommandError, match=f"cannot write to {file}: Permission denied"):
            check_writable(file)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr
)
@pytest.mark.parametrize("where", ["fsync", "replace"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_file_is_written_whole_or_not_at_all(exists, where, error, below, monkeypatch) -> None:
    place, sizes = below / "a.json", []
    if exists:
        place.write_text("before")

    def fail(*_) -> None:
        sizes.extend(path.stat().st_size for path in below.glob(".poolformer-kernels.*"))
        raise error

    monkeypatch.setattr(os if where == "fsync" else type(below), where, fail)
    with pytest.raises((CommandError, KeyboardInterrupt)) as raised:
        write_whole(place, "content")
    if isinstance(error, OSError):
        assert str(raised.value) == f"cannot write to {place}: No space left on device"
    assert sizes == [len("content")]  # it was written beside its place
    assert files(below) == (["a.json"] if exists else [])
    assert not exists or place.read_text() == "before"


def test_a_link_stays_one_and_a_device_is_written_to(below) -> None:
    (below / "real.json").write_text("before")
    (below / "link.json").symlink_to("real.json")
    write_whole("link.json", "content")
    assert (below / "link.json").is_symlink()
    assert (below / "real.json").read_text() == "content"
    with pytest.raises(CommandError, match="cannot write to /dev/full: No space left on device"):
        write_whole("/dev/full", "content")
    write_whole("/dev/null", b"content")
    assert Path("/dev/full").is_char_device()


def test_a_pipe_is_written_to(below) -> None:
    read, write = os.pipe()
    check_writable(f"/dev/fd/{write}")
    write_whole(f"/dev/fd/{write}", "content")
    os.close(write)
    with os.fdopen(read) as pipe:
        assert pipe.read() == "content"


def test_a_file_keeps_its_mode_and_a_long_name_is_no_hindrance(below) -> None:
    place = below / ("a" * 250 + ".json")
    write_whole(place, "before")
    place.chmod(0o600)
    write_whole(place, "content")
    assert place.stat().st_mode & 0o777 == 0o600
    assert place.read_text() == "content"


def test_results_go_below_the_current_folder(below) -> None:
    """Wherever the package is: in a source tree, too, never beside its own files."""
    require("rich")
    load_benchmarks()
    from poolformer_kernels.benchmarks import facts

    path = facts.csv_path("mlp", "cpu")
    assert path.resolve().parent.parent == below / "results"
    check_writable(path)
    for name in ("mlp", "host", "loop"):
        assert "default: results/<device>/" in " ".join(load_benchmark(name).parser().format_help().split())


def test_a_training_run_makes_its_folder_alone(below) -> None:
    loop = pytest.importorskip("poolformer_kernels.train.loop", exc_type=ImportError)
    loop.check_new(below / "run")
    with pytest.raises(loop.RecipeError, match="there is no folder"):
        loop.check_new(below / "a" / "run")
    assert files(below) == []
