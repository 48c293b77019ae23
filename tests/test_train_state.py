"""Checkpoints: complete or absent, the last kept, damage named, a full disk without loss."""

import errno
import math
import os
from unittest.mock import DEFAULT, Mock

import pytest
import torch
from support.commands import small_disk
from support.train import differing, message_of, require_train

require_train()

from safetensors.torch import load_file

from poolformer_kernels.train import state as module
from poolformer_kernels.train.state import Checkpoints, StateError, write_weights

TENSORS = {"model/a": torch.arange(6.0).view(2, 3), "optimizer/a/step": torch.tensor(3.0)}
FULL = OSError(errno.ENOSPC, "No space left on device")
FACTS = {"step": 1, "totals": {"loss": 0.1 + 0.2, "last": float("nan")}}


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=3)


def saved(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(step, {"model/a": torch.full((2,), float(step))}, {"step": step})


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def test_what_is_saved_is_read_exactly(checkpoints) -> None:
    checkpoints.save(1, TENSORS, FACTS)
    tensors, facts, damaged = checkpoints.newest()
    assert differing(tensors, TENSORS) == []
    assert facts["totals"]["loss"] == 0.1 + 0.2
    assert math.isnan(facts["totals"]["last"])
    assert damaged == []
    files = sorted(path.name for path in (checkpoints.folder / "step_00000001").iterdir())
    assert files == ["state.json", "state.safetensors"]  # nothing is pickled


def test_none_yet(checkpoints) -> None:
    assert checkpoints.newest() == (None, None, [])


def test_the_last_are_kept_also_past_eight_digits(checkpoints) -> None:
    saved(checkpoints, 9, 10, 99_999_999, 100_000_000)
    assert names(checkpoints) == ["step_00000010", "step_100000000", "step_99999999"]
    assert checkpoints.newest()[1] == {"step": 100_000_000}


def test_the_same_step_again(checkpoints) -> None:
    saved(checkpoints, 5)
    checkpoints.save(5, {"model/a": torch.ones(1)}, {"step": 5, "again": True})
    assert names(checkpoints) == ["step_00000005"]
    assert checkpoints.newest()[1]["again"]


def damage(path, how: str) -> None:
    tensors, facts = path / "state.safetensors", path / "state.json"
    if how == "bit":
        *content, last = tensors.read_bytes()
        tensors.write_bytes(bytes([*content, last ^ 1]))
    elif how == "short":
        tensors.write_bytes(tensors.read_bytes()[:-1])
    elif how == "empty":
        tensors.write_bytes(b"")
    elif how == "gone":
        tensors.unlink()
    elif how == "facts":
        facts.write_text(facts.read_text().replace('\\"step\\": 3', '\\"step\\": 4'))
    elif how == "no facts":
        facts.unlink()
    else:
        facts.write_text(facts.read_text()[:-5])


@pytest.mark.parametrize("how", ["bit", "short", "empty", "gone", "facts", "no facts", "short facts"])
def test_a_damaged_newest_one_is_named_and_the_one_before_taken(checkpoints, how) -> None:
    saved(checkpoints, 1, 2, 3)
    path = checkpoints.folder / "step_00000003"
    before = (path / "state.json").read_text()
    damage(path, how)
    assert how != "facts" or (path / "state.json").read_text() != before
    tensors, facts, damaged = checkpoints.newest()
    assert facts == {"step": 2}
    assert tensors["model/a"].tolist() == [2.0, 2.0]
    assert len(damaged) == 1
    assert damaged[0].startswith(f"checkpoint {path} is damaged: ")


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_one_does_not_count_among_those_that_are_kept(tmp_path, keep) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep)
    saved(Checkpoints(checkpoints.folder, 3), 11, 22)
    damage(checkpoints.folder / "step_00000022", "bit")
    assert checkpoints.newest()[1] == {"step": 11}
    saved(checkpoints, 15, 19)
    assert checkpoints.steps() == [15, 19][-keep:]
    assert checkpoints.newest()[1:] == ({"step": 19}, [])
    assert (checkpoints.folder / "damaged_step_00000022").is_dir()  # nothing that was made is lost


@pytest.mark.parametrize("end", [FULL, KeyboardInterrupt()], ids=repr)
def test_an_end_between_the_two_renames_of_the_same_step_loses_nothing(checkpoints, monkeypatch, end) -> None:
    saved(checkpoints, 5)
    second_fails = Mock(wraps=os.replace, side_effect=[DEFAULT, end, DEFAULT])  # the third undoes the first
    monkeypatch.setattr(module.os, "replace", second_fails)
    with pytest.raises((StateError, KeyboardInterrupt)):
        checkpoints.save(5, {"model/a": torch.ones(1)}, {"step": 5, "again": True})
    monkeypatch.undo()
    assert checkpoints.newest()[1] == {"step": 5}
    saved(checkpoints, 6)
    assert names(checkpoints) == ["step_00000005", "step_00000006"]


def test_all_damaged(checkpoints) -> None:
    saved(checkpoints, 1, 2)
    for step in (1, 2):
        damage(checkpoints.folder / f"step_{step:08d}", "bit")
    with pytest.raises(StateError, match=r"no checkpoint in .* can be read: .*step_00000002 is damaged"):
        checkpoints.newest()


def test_what_a_kill_leaves_is_no_checkpoint_and_goes(checkpoints) -> None:
    saved(checkpoints, 1)
    part = checkpoints.folder / ".step_00000002.part"
    part.mkdir()
    (part / "state.safetensors").write_bytes(b"half")
    assert checkpoints.newest()[1] == {"step": 1}
    saved(checkpoints, 3)
    assert names(checkpoints) == ["step_00000001", "step_00000003"]


@pytest.mark.parametrize("where", ["save_file", "_sync", "os.replace"])
def test_a_full_disk_is_one_line_and_loses_nothing(checkpoints, monkeypatch, where) -> None:
    saved(checkpoints, 1, 2, 3)
    target = module.os if where == "os.replace" else module
    monkeypatch.setattr(target, where.removeprefix("os."), Mock(side_effect=FULL))
    assert message_of(StateError, saved, checkpoints, 4) == (
        f"cannot write checkpoint {checkpoints.folder}/step_00000004: No space left on device;"
        " the last one is of step 3"
    )
    monkeypatch.undo()
    assert names(checkpoints) == [f"step_0000000{i}" for i in (1, 2, 3)]
    assert checkpoints.newest()[1] == {"step": 3}


def test_a_limit_of_the_system_is_reported_as_a_full_disk_is(tmp_path) -> None:
    """A real failure inside safetensors: files may not be longer than 10 kB."""
    with small_disk(10_000):
        line = message_of(StateError, Checkpoints(tmp_path, 3).save, 7, {"a": torch.zeros(100_000)}, {})
    assert line.startswith(f"cannot write checkpoint {tmp_path}/step_00000007: ")
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_not_taken_for_a_full_disk(checkpoints) -> None:
    with pytest.raises(TypeError):
        checkpoints.save(1, {"a": torch.zeros(2)}, {"not for json": object()})
    assert names(checkpoints) == []


def test_weights_are_replaced_whole(tmp_path, monkeypatch) -> None:
    path = tmp_path / "best.safetensors"
    weights = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    write_weights(path, {"a": weights}, {"format": "pt"})
    assert load_file(path)["a"].shape == (2, 3, 4, 5)
    before = path.read_bytes()
    monkeypatch.setattr(module, "_sync", Mock(side_effect=FULL))
    with pytest.raises(StateError, match=r"cannot write .*best\.safetensors: No space left"):
        write_weights(path, {"a": torch.ones(2)}, {})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["best.safetensors"]
