"""What a run reads: orders and draws that are functions of their keys, bad images, bad DATA."""

import random
import tarfile
from dataclasses import replace
from operator import attrgetter

import numpy as np
import pytest
import torch
from support.train import make_folder, message_of, require_train

require_train()

from PIL import Image
from timm.data import Mixup
from timm.data.mixup import mixup_target

from poolformer_kernels.train import data as module
from poolformer_kernels.train.data import BadImageError, EpochOrder, epoch_order, open_data, validation_loader
from poolformer_kernels.train.recipe import RecipeError, resolve

NORM = module.ImageNorm(32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bicubic", 0.9)
PAPER = resolve("paper", {"batch_size": 16, "workers": 0, "epochs": 3, "cooldown_epochs": 0})


@pytest.fixture(scope="module")
def digits():
    return open_data("sample:digits")


def batches(data, recipe, count, rank=0, world=1, first=0):
    loader = iter(module.train_loader(data, recipe, NORM, rank, world, first, False))
    return [next(loader) for _ in range(count)]


def same(a, b) -> bool:
    return a.images.equal(b.images) and a.targets.equal(b.targets) and a.positions == b.positions


# ---- order -------------------------------------------------------------------------------------------------


def test_an_epoch_has_every_image_once_and_another_order_than_the_next() -> None:
    orders = [epoch_order(0, epoch, 1000) for epoch in range(3)]
    assert all(sorted(order) == list(range(1000)) for order in orders)
    assert (orders[0] != orders[1]).mean() > 0.9
    assert (epoch_order(1, 0, 1000) != orders[0]).mean() > 0.9
    assert (epoch_order(0, 2, 1000) == orders[2]).all()


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (1, 4), (4, 2)])
def test_processes_and_micro_batches_divide_the_same_order(world, accumulate) -> None:
    recipe = replace(PAPER, accumulate=accumulate)
    whole = [draw for batch in EpochOrder(PAPER, 70, 0, 1, 0) for draw in batch]
    parts = [list(EpochOrder(recipe, 70, rank, world, 0)) for rank in range(world)]
    assert all(len(part) == 3 * 4 * accumulate for part in parts)  # 70 images are 4 steps of 16
    draws = (draw for part in parts for batch in part for draw in batch)
    assert sorted(draws, key=attrgetter("step", "position")) == whole
    assert [len({d.index for d in whole if d.epoch == e}) for e in range(3)] == [64] * 3


def test_a_later_start_goes_on_in_the_same_order() -> None:
    whole = list(EpochOrder(PAPER, 70, 0, 1, 0))
    for first in (1, 4, 7, 12):
        assert list(EpochOrder(PAPER, 70, 0, 1, first)) == whole[first:]
        assert len(EpochOrder(PAPER, 70, 0, 1, first)) == 12 - first


# ---- draws -------------------------------------------------------------------------------------------------


def test_batches_do_not_depend_on_processes_workers_or_generators(digits) -> None:
    """RandAugment, erasing, Mixup and CutMix on."""
    whole = batches(digits, PAPER, 3)
    random.seed(5), np.random.seed(6), torch.manual_seed(7)
    assert all(map(same, whole, batches(digits, replace(PAPER, workers=2), 3)))
    for world, accumulate in ((2, 1), (1, 2), (2, 2)):
        recipe = replace(PAPER, accumulate=accumulate)
        parts = [batches(digits, recipe, 3 * accumulate, rank, world) for rank in range(world)]
        for step, batch in enumerate(whole):
            mine = [part[step * accumulate + i] for part in parts for i in range(accumulate)]
            assert torch.cat([b.images for b in mine]).equal(batch.images)
            assert torch.cat([b.targets for b in mine]).equal(batch.targets)
    assert same(batches(digits, PAPER, 1, first=2)[0], whole[2])
    assert not same(whole[0], whole[1])


def test_an_image_is_augmented_anew_in_each_epoch(digits) -> None:
    """But not in another way where its neighbours in the batch are others."""
    recipe = replace(PAPER, mixup=0.0, cutmix=0.0)
    steps = len(digits.train) // 16
    first = {
        d.index: (b, i)
        for b, batch in enumerate(EpochOrder(recipe, 1437, 0, 1, 0))
        for i, d in enumerate(batch)
        if d.epoch == 0
    }
    second = next(iter(EpochOrder(recipe, 1437, 0, 1, steps)))
    index = next(d.index for d in second if d.index in first)
    before = batches(digits, recipe, 1, first=first[index][0])[0].images[first[index][1]]
    after = batches(digits, recipe, 1, first=steps)[0].images[[d.index for d in second].index(index)]
    assert not before.equal(after)
    alone = replace(recipe, batch_size=2)
    position = list(epoch_order(0, 0, 1437)).index(index)
    assert batches(digits, alone, 1, first=position // 2)[0].images[position % 2].equal(before)


def test_pairs_are_mixed_as_timm_mixes_a_batch_of_two(digits) -> None:
    plain = batches(digits, replace(PAPER, mixup=0.0, cutmix=0.0, label_smoothing=0.0), 1)[0]
    mixed = batches(digits, PAPER, 1)[0]
    labels = plain.targets.argmax(1)
    timm = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=10)
    weights = set()
    for i in range(0, 16, 2):
        np.random.seed(module.key(0, "mixup", 0, i // 2) % 2**32)
        x, target = timm(plain.images[i : i + 2].clone(), labels[i : i + 2])
        assert x.equal(mixed.images[i : i + 2])
        assert target.equal(mixed.targets[i : i + 2])
        weights.add(round(target.max().item(), 4))
    assert len(weights) > 4  # each pair has a draw of its own


def test_timms_highest_magnitude_is_black() -> None:
    """Posterize keeps 4 - 4 bits at level 10, which Pillow refuses since version 12."""
    white = Image.new("RGB", (32, 32), (255, 255, 255))
    recipe = replace(PAPER, auto_augment="rand-m10-mstd0-n9-inc1")
    transform = module.train_loader(
        open_data("sample:digits"), recipe, NORM, 0, 1, 0, False
    ).dataset.transform
    operations = (op for step in transform.transforms for op in getattr(step, "ops", ()))
    (operation,) = (op for op in operations if "Poster" in op.name)
    operation.prob = 1.0
    assert operation(white).getextrema() == ((0, 0),) * 3
    operation.magnitude = 0
    assert operation(white).getextrema() == ((240, 240),) * 3


def test_smoothed_targets_without_mixup_are_timms(digits) -> None:
    for smoothing in (0.0, 0.1):
        recipe = replace(PAPER, mixup=0.0, cutmix=0.0, label_smoothing=smoothing)
        targets = batches(digits, recipe, 1)[0].targets
        expected = mixup_target(targets.argmax(1), 10, 1.0, smoothing)
        torch.testing.assert_close(targets, expected, rtol=0, atol=1e-7)


def test_the_digits_are_split_by_class_and_always_alike(digits) -> None:
    from sklearn.datasets import load_digits

    assert (len(digits.train), len(digits.val)) == (1437, 360)
    counts = np.bincount([digits.val[i][1] for i in range(360)])
    assert (abs(counts - np.bincount(load_digits().target) * 0.2) < 1).all()
    again = open_data("sample:digits")
    assert all(np.array_equal(again.val[i][0], digits.val[i][0]) for i in range(360))
    pixels = {digits.train[i][0].tobytes() for i in range(1437)}
    assert sum(digits.val[i][0].tobytes() in pixels for i in range(360)) == 0


# ---- folders, archives, bad images -------------------------------------------------------------------------


def test_folders_and_archives_give_the_same_images(tmp_path) -> None:
    folder = make_folder(tmp_path / "folder", ("b", "a", "c10", "c9"))
    archive = tmp_path / "archive"
    archive.mkdir()
    for split in ("train", "val"):
        with tarfile.open(archive / f"{split}.tar", "w") as tar:
            tar.add(folder / split, split)
    one, two = open_data(str(folder)), open_data(str(archive))
    assert one.classes == two.classes == ["a", "b", "c9", "c10"]
    assert len(one.train) == len(two.train) == 24
    for i in range(24):
        (x, c), (y, d) = one.train[i], two.train[i]
        assert c == d
        assert np.array_equal(x, y)
    assert one.train[23][0].size == (45, 40)


def test_other_names_of_the_validation_folder(folder) -> None:
    (folder / "val").rename(folder / "validation")
    assert len(open_data(str(folder)).val) == 16


def test_torchvisions_sets(folder) -> None:
    found = open_data(f"torch/image_folder:{folder}")
    assert found.classes == ["cat", "dog"]
    assert (len(found.train), len(found.val)) == (16, 16)
    assert found.train[0][0].mode == "RGB"
    (folder / "val" / "cat").rename(folder / "val" / "zebra")
    said = "classes of train and val differ: 'cat' is only in train"
    assert said in message_of(RecipeError, open_data, f"torch/image_folder:{folder}")


def test_a_grey_image_with_alpha_becomes_rgb(folder) -> None:
    Image.new("LA", (40, 40), (7, 9)).save(folder / "train" / "cat" / "grey.png")
    data = open_data(str(folder))
    index = next(i for i in range(len(data.train)) if data.train.file(i).endswith("grey.png"))
    assert data.train[index][0].getpixel((3, 3)) == (7, 7, 7)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.long)])
def test_an_unreadable_image_fails_with_its_name_or_is_replaced_and_counted(folder, workers) -> None:
    bad = folder / "train" / "dog" / "3.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    data = open_data(str(folder))
    recipe = replace(PAPER, workers=workers)
    with pytest.raises(BadImageError, match=r"cannot read image .*train/dog/3.jpg: "):
        batches(data, recipe, 1)
    skipping = replace(recipe, bad_images="skip", mixup=0.0, cutmix=0.0)
    (batch,) = batches(data, skipping, 1)
    assert batch.images.shape == (16, 3, 32, 32)
    assert len(batch.bad) == 1
    assert "dog/3.jpg" in batch.bad[0]
    assert batch.targets.argmax(1).bincount().tolist() == [8, 8]  # its neighbour is a dog, too

    (folder / "val" / "cat" / "0.jpg").write_bytes(b"no image")
    data = open_data(str(folder))
    with pytest.raises(BadImageError, match=r"val/cat/0\.jpg"):
        list(validation_loader(data.val, NORM, 4, workers, skip=False))
    found = list(validation_loader(data.val, NORM, 4, workers, skip=True))
    assert sum(len(b.targets) for b in found) == 15
    assert sum(len(b.bad) for b in found) == 1


def test_no_image_can_be_read(folder) -> None:
    for file in (folder / "train").rglob("*.jpg"):
        file.write_bytes(b"no image")
    with pytest.raises(BadImageError, match="none of 16 images can be read; the first: "):
        batches(open_data(str(folder)), replace(PAPER, bad_images="skip"), 1)


def test_processes_share_the_validation_images(digits) -> None:
    parts = [list(validation_loader(digits.val, NORM, 50, 0, False, rank, 3)) for rank in range(3)]
    labels = [torch.cat([b.targets for b in part]) for part in parts]
    expected = torch.tensor([digits.val[i][1] for i in range(360)])
    assert torch.stack(labels, 1).flatten().equal(expected)


def test_bad_data_is_named(folder, tmp_path) -> None:
    def message(name) -> str:
        return message_of(RecipeError, open_data, str(name))

    assert message(tmp_path / "none").endswith("allowed: one with train/ and val/, torch/, hfds/, sample:")
    (folder / "val" / "cat").rename(folder / "val" / "cow")
    assert message(folder).endswith("classes of train and val differ: 'cat' is only in train")
    (folder / "val").rename(folder / "other")
    assert message(folder).endswith("has neither val/ nor val.tar")
    empty = tmp_path / "empty"
    (empty / "train").mkdir(parents=True), (empty / "val").mkdir()
    assert "has no images in folders of classes" in message(empty)
    single = make_folder(tmp_path / "single", ("only",))
    assert "has no two classes in train: found only 'only'" in message(single)
    assert message("sample:faces") == "DATA is 'sample:faces'; allowed of samples: sample:digits"
    assert "wds/ is read as a stream" in message("wds/imagenet")
    assert "cannot open split train" in message(f"torch/image_folder:{tmp_path / 'none'}")
