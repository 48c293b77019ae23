"""COCO's format: what becomes a target, masks of all kinds, pictures of all kinds, and errors."""

import json
import pickle
import sys

import numpy as np
import pytest
import torch
from support.dense_data import (
    CATEGORIES,
    DISCS,
    SIZE,
    coco_annotation,
    content,
    disc,
    make_coco,
    require_dense_data,
    run_lengths,
    scene,
    write_coco,
)

require_dense_data()

from faster_coco_eval.core import mask as mask_functions
from PIL import Image

from poolformer_kernels.train.coco import open_coco
from poolformer_kernels.train.data import BadImageError
from poolformer_kernels.train.recipe import RecipeError


def edit(root, change, split="train"):
    """Changes a split's JSON file in place."""
    file = root / "annotations" / f"instances_{split}.json"
    found = json.loads(file.read_text())
    found = change(found) or found
    file.write_text(json.dumps(found))
    return root


def refused(root, masks=True) -> str:
    with pytest.raises(RecipeError) as error:
        open_coco(str(root), masks)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("year", ["2017", ""])
def test_a_scene_is_read_as_it_was_written(tmp_path, masks, year) -> None:
    data = open_coco(str(make_coco(tmp_path, year)), masks)
    assert data.classes == ["coin", "ball"]  # by id, not in the file's order
    for images in (data.train, data.val):
        image, found = images[0]
        assert images.category_ids == [4, 9]
        assert (len(images), images.image_id(0), images.size(0)) == (1, 7, SIZE)
        assert np.array_equal(image, scene()[2])
        assert found.labels.tolist() == [1, 0, 1]
        assert found.labels.dtype == torch.int64
        boxes = [[x - r, y - r, x + r + 1, y + r + 1] for x, y, r in DISCS]
        assert found.boxes.equal(torch.tensor(boxes, dtype=torch.float32))
        assert found.size == SIZE
        if not masks:
            assert found.masks is None
            continue
        assert found.masks.dtype == torch.uint8
        assert np.array_equal(found.masks, [disc(*SIZE, *place) for place in DISCS])
    assert data.train.file(0) == str(tmp_path / f"train{year}" / "a.png")
    with pytest.raises(IndexError):
        data.train[1]
    assert sum(len(found.labels) for _, found in data.train) == 3  # it iterates, and ends


def test_the_third_layout(tmp_path) -> None:
    make_coco(tmp_path)
    for split in ("train", "val"):
        (tmp_path / "annotations" / f"instances_{split}.json").rename(
            tmp_path / "annotations" / f"{split}.json"
        )
    assert len(open_coco(str(tmp_path), False).val) == 1


def test_images_travel_to_other_processes(tmp_path) -> None:
    images = open_coco(str(make_coco(tmp_path)), True).train
    (image, found), (again, same) = images[0], pickle.loads(pickle.dumps(images))[0]
    assert np.array_equal(image, again)
    assert found.masks.equal(same.masks)


@pytest.mark.parametrize("masks", [True, False])
def test_what_is_no_target(tmp_path, masks) -> None:
    """Everything of an image of its own; the last annotation alone is usable, and clipped."""
    image, annotations, _ = scene()
    height, width = SIZE
    bad = [
        {"iscrowd": 1},
        {"ignore": 1},
        {"area": 0},
        {"bbox": [5, 5, 0.99, 20]},
        {"bbox": [5, 5, 20, 0.5]},
        {"bbox": [width, 5, 20, 20]},
        {"bbox": [5, -30, 20, 30]},
        {"category_id": 5},
    ]
    found = [{**annotations[0], "id": i, **fields} for i, fields in enumerate(bad, start=1)]
    found.append({**annotations[1], "id": 50, "bbox": [-10.5, 60, 30, 100], "iscrowd": 0})
    make_coco(tmp_path)
    write_coco(tmp_path, "train", content([image], found), {})
    _, target = open_coco(str(tmp_path), masks).train[0]
    assert target.boxes.tolist() == [[0, 60, 19.5, height]]
    assert target.labels.tolist() == [0]
    for fields in bad:  # each alone leaves the training image out, and the validation image empty
        only = content(
            [image, {**image, "id": 8}], [{**annotations[0], **fields}, {**annotations[1], "image_id": 8}]
        )
        for split in ("train", "val"):
            write_coco(tmp_path, split, only, {})
        data = open_coco(str(tmp_path), masks)
        assert [data.train.image_id(i) for i in range(len(data.train))] == [8], fields
        assert [data.val.image_id(i) for i in range(len(data.val))] == [7, 8]
        _, empty = data.val[0]
        assert empty.boxes.shape == (0, 4)
        assert empty.labels.shape == (0,)
        if masks:
            assert empty.masks.shape == (0, *SIZE)


def test_small_images_train_nothing(tmp_path) -> None:
    small = coco_annotation(20, 8, 4, disc(31, 60, 10, 10, 5))
    large = coco_annotation(21, 9, 4, disc(32, 60, 10, 10, 5))
    images = [
        {"id": 8, "file_name": "s.png", "height": 31, "width": 60},
        {"id": 9, "file_name": "l.png", "height": 32, "width": 60},
    ]
    make_coco(tmp_path)
    for split in ("train", "val"):
        write_coco(tmp_path, split, content(images, [small, large]), {})
    data = open_coco(str(tmp_path), False)
    assert [data.train.image_id(0), len(data.train), len(data.val)] == [9, 1, 2]
    write_coco(tmp_path, "train", content(images[:1], [small]), {})
    assert refused(tmp_path).endswith("has no image of at least 32 pixels a side with a usable annotation")


def test_polygons_and_run_lengths_are_the_same_masks(tmp_path) -> None:
    """A rectangle of whole pixels, and one of two parts."""
    image, _, _ = scene()
    mask = np.zeros(SIZE, np.uint8)
    mask[10:30, 20:50] = mask[40:45, 60:90] = 1
    polygons = [[20, 10, 50, 10, 50, 30, 20, 30], [60, 40, 90, 40, 90, 45, 60, 45]]
    compressed = mask_functions.encode(np.asfortranarray(mask))
    compressed = {"size": list(SIZE), "counts": bytes(compressed["counts"]).decode()}
    found = [
        coco_annotation(i, 7, 4, mask, segmentation=segmentation)
        for i, segmentation in enumerate((polygons, run_lengths(mask), compressed), start=1)
    ]
    make_coco(tmp_path)
    write_coco(tmp_path, "train", content([image], found), {})
    _, target = open_coco(str(tmp_path), True).train[0]
    assert np.array_equal(target.masks, [mask] * 3)


# ---- pictures ----------------------------------------------------------------------------------------------


def test_pictures_of_all_kinds_become_rgb(tmp_path) -> None:
    make_coco(tmp_path)
    file = tmp_path / "train" / "a.png"
    images = open_coco(str(tmp_path), False).train
    grey = np.arange(SIZE[0] * SIZE[1], dtype=np.uint32).astype(np.uint8).reshape(SIZE)
    Image.fromarray(grey).save(file)
    assert np.array_equal(images[0][0], np.stack([grey] * 3, 2))
    colours = np.stack([grey, grey // 2, 255 - grey], 2)
    Image.fromarray(np.dstack([colours, grey])).save(file)  # RGBA
    assert np.array_equal(images[0][0], colours)
    palette = Image.fromarray(grey % 3).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    palette.save(file)
    assert np.array_equal(images[0][0], np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90]])[grey % 3])
    Image.fromarray(np.uint16(grey) * 200).save(file)
    with pytest.raises(BadImageError, match=r"a\.png has mode I;16; allowed: 8 bits a channel"):
        images[0]


def test_a_picture_stored_sideways_is_turned_where_the_json_file_has_it_upright(tmp_path) -> None:
    make_coco(tmp_path)
    file = tmp_path / "train" / "a.png"
    images = open_coco(str(tmp_path), False).train
    upright = Image.fromarray(scene()[2])
    for orientation, turn in ((6, Image.Transpose.ROTATE_90), (8, Image.Transpose.ROTATE_270)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        upright.transpose(turn).save(file, exif=exif)
        assert np.array_equal(images[0][0], upright)
        upright.save(file, exif=exif)  # the JSON file speaks of the picture as stored
        assert np.array_equal(images[0][0], upright)
    upright.transpose(Image.Transpose.ROTATE_90).save(file)  # sideways, but nothing says so
    with pytest.raises(BadImageError) as error:
        images[0]
    assert (
        f"image {file} has 80 x 96 pixels; {tmp_path}/annotations/instances_train.json says 96 x 80"
        in str(error.value)
    )
    exif[0x0112] = 6
    upright.resize((50, 40)).save(file, exif=exif)
    with pytest.raises(BadImageError, match="has 50 x 40 pixels"):
        images[0]


def test_a_bad_picture_is_named(tmp_path) -> None:
    make_coco(tmp_path)
    file = tmp_path / "train" / "a.png"
    images = open_coco(str(tmp_path), False).train
    file.write_bytes(file.read_bytes()[:120])
    with pytest.raises(BadImageError, match=r"cannot read image .*/train/a\.png: "):
        images[0]
    file.write_bytes(b"no image")
    with pytest.raises(BadImageError, match=r"/train/a\.png: no known format"):
        images[0]
    file.unlink()
    with pytest.raises(BadImageError, match=r"/train/a\.png: No such file or directory"):
        images[0]


# ---- errors ------------------------------------------------------------------------------------------------


def test_missing_folders_and_files_are_named(tmp_path) -> None:
    assert refused(tmp_path / "none").endswith(
        "none is not a folder; allowed: one in COCO's layout, with annotations/"
    )
    root = make_coco(tmp_path / "d")
    (root / "val").rename(root / "other")
    assert refused(root) == f"DATA {root} has instances_val.json but no folder val/ of its images"
    (root / "annotations" / "instances_val.json").unlink()
    assert refused(root) == (
        f"DATA {root} has no annotations of val; allowed in annotations/: instances_val2017.json,"
        " instances_val.json, val.json"
    )


@pytest.mark.parametrize("text", ["{", "[1, 2", "\xff", "[" * 100000])
def test_a_file_that_is_no_json(tmp_path, text) -> None:
    make_coco(tmp_path)
    (tmp_path / "annotations" / "instances_train.json").write_text(text, encoding="latin-1")
    assert "instances_train.json is not JSON: " in refused(tmp_path)


@pytest.mark.parametrize("part", ["images", "annotations", "categories"])
@pytest.mark.parametrize("value", [None, {}, [1], "text"])
def test_a_missing_list(tmp_path, part, value) -> None:
    edit(make_coco(tmp_path), lambda found: found.update({part: value}))
    assert f"instances_train.json has no list '{part}' of objects" in refused(tmp_path)
    edit(tmp_path, lambda found: [found])
    assert "has no list 'images'" in refused(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id": "7"}, "image a.png: id is '7'; allowed: an integer"),
        ({"id": True}, "image a.png: id is True; allowed: an integer"),
        ({"file_name": None}, "image 7: file_name is None; allowed: a file's name"),
        ({"height": 0}, "image 7 (a.png): height, width are 0, 96; allowed: positive integers"),
        ({"width": 96.5}, "image 7 (a.png): height, width are 80, 96.5; allowed: positive integers"),
    ],
)
def test_bad_images_of_the_file(tmp_path, fields, message) -> None:
    edit(make_coco(tmp_path), lambda found: found["images"][0].update(fields))
    assert refused(tmp_path) == f"DATA {tmp_path}/annotations/instances_train.json: {message}"


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id": 1}, "annotation 1 of image 7 (a.png): its id is there twice"),
        ({"id": "x"}, "annotation of image 7: id is 'x'; allowed: an integer"),
        ({"image_id": 99}, "annotation 2: image_id 99 is of no image"),
        ({"image_id": None}, "annotation 2: image_id None is of no image"),
        (
            {"bbox": [1, 2, 3]},
            "annotation 2 of image 7 (a.png): bbox is [1, 2, 3]; allowed: four finite numbers",
        ),
        ({"bbox": [1, 2, "3", 4]}, "bbox is [1, 2, '3', 4]; allowed: four finite numbers"),
        ({"bbox": [1, 2, NAN, 4]}, "bbox is [1, 2, nan, 4]; allowed: four finite numbers"),
        ({"bbox": [INFINITE, 2, 3, 4]}, "bbox is [inf, 2, 3, 4]; allowed: four finite numbers"),
        ({"bbox": [1, 2, 10**400, 4]}, "; allowed: four finite numbers"),
        ({"bbox": None}, "annotation 2 of image 7 (a.png): bbox is None; allowed: four finite numbers"),
        ({"area": NAN}, "annotation 2 of image 7 (a.png): area is nan; allowed: a finite number"),
        ({"area": None}, "area is None; allowed: a finite number"),
        ({"category_id": "cat"}, "category_id is 'cat'; allowed: an integer"),
        ({"iscrowd": "no"}, "annotation 2 of image 7 (a.png): iscrowd is 'no'; allowed: 0, 1"),
        ({"ignore": 2}, "ignore is 2; allowed: 0, 1"),
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_bad_annotations(tmp_path, fields, message, split) -> None:
    edit(make_coco(tmp_path), lambda found: found["annotations"][1].update(fields), split)
    found = refused(tmp_path, masks=False)
    assert found.startswith(f"DATA {tmp_path}/annotations/instances_{split}.json: annotation ")
    assert found.endswith(message)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, "segmentation is None; allowed: polygons or run lengths"),
        ([], "segmentation is []; allowed: polygons or run lengths"),
        ([[1, 2, 3, 4]], "has a polygon of 4 numbers; allowed: an even number from 6 on"),
        (
            [[1, 1, 9, 1, 9, 9], [1, 2, 3, 4, 5, 6, 7]],
            "has a polygon of 7 numbers; allowed: an even number from 6 on",
        ),
        ([1, 1, 9, 1, 9, 9], "has a polygon that is no list of finite numbers"),
        ([[1, 1, NAN, 1, 9, 9]], "has a polygon that is no list of finite numbers"),
        (
            {"size": [96, 80], "counts": [7680]},
            "has run lengths of size [96, 80]; allowed: the image's, [80, 96]",
        ),
        ({"counts": [7680]}, "has run lengths of size None; allowed: the image's, [80, 96]"),
        (
            {"size": [80, 96], "counts": [5, 7676]},
            "has run lengths that are not integers with the sum 7680, the image's pixels",
        ),
        (
            {"size": [80, 96], "counts": [-5, 7685]},
            "has run lengths that are not integers with the sum 7680, the image's pixels",
        ),
        (
            {"size": [80, 96], "counts": None},
            "has counts of type NoneType; allowed: a list, or a text that compresses it",
        ),
        ({"size": [80, 96], "counts": "zzzz"}, "has compressed run lengths that cannot be read: "),
        ({"size": [80, 96], "counts": "é"}, "has compressed run lengths that cannot be read: "),
        ({"size": [80, 96], "counts": ""}, "has compressed run lengths that cannot be read: "),
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_bad_segmentations(tmp_path, segmentation, message, split) -> None:
    def change(found):
        found["annotations"][2]["segmentation"] = segmentation

    edit(make_coco(tmp_path), change, split)
    start = (
        f"DATA {tmp_path}/annotations/instances_{split}.json: annotation 3 of image 7 (a.png): segmentation "
    )
    found = refused(tmp_path)
    assert found.startswith(start)
    assert message in found
    assert len(open_coco(str(tmp_path), masks=False).train[0][1].labels) == 3  # boxes do not need it


def test_masks_that_nobody_reads_may_be_bad(tmp_path) -> None:
    """Of a training annotation that is no target; the evaluation reads all of the validation set's."""
    bad = {"iscrowd": 1, "segmentation": [[1, 2]]}
    edit(make_coco(tmp_path), lambda found: found["annotations"][2].update(bad))
    assert len(open_coco(str(tmp_path), masks=True).train[0][1].labels) == 2
    edit(make_coco(tmp_path), lambda found: found["annotations"][2].update(bad), "val")
    assert "instances_val.json: annotation 3 of image 7 (a.png): segmentation has a polygon" in refused(
        tmp_path
    )


def test_categories(tmp_path) -> None:
    file = f"DATA {tmp_path}/annotations/instances_train.json"
    make_coco(tmp_path)
    edit(tmp_path, lambda found: found.update(categories=[]))
    assert refused(tmp_path) == f"{file} has no categories; allowed: at least one"
    edit(tmp_path, lambda found: found.update(categories=[*CATEGORIES, {"id": 9, "name": "z"}]))
    assert refused(tmp_path) == f"{file}: category id 9 is there twice"
    edit(tmp_path, lambda found: found.update(categories=[{"id": 9}]))
    assert refused(tmp_path) == f"{file}: category {{'id': 9}}; allowed: an integer id and a name"
    differ = f"DATA {tmp_path}: categories of train and val differ: "
    edit(tmp_path, lambda found: found.update(categories=[{"id": 4, "name": "orb"}, CATEGORIES[0]]))
    assert refused(tmp_path) == f"{differ}id 4 is 'orb' in train, 'coin' in val"
    edit(tmp_path, lambda found: found.update(categories=CATEGORIES[:1]))
    assert refused(tmp_path) == f"{differ}id 4 is missing in train, 'coin' in val"


def test_duplicate_images_and_no_images(tmp_path) -> None:
    make_coco(tmp_path)
    edit(tmp_path, lambda found: found["images"].append(found["images"][0]))
    assert refused(tmp_path).endswith("instances_train.json: image id 7 is there twice")
    make_coco(tmp_path)
    edit(tmp_path, lambda found: found.update(images=[], annotations=[]), "val")
    assert refused(tmp_path).endswith("instances_val.json has no image")


def test_without_faster_coco_eval_masks_are_refused_and_boxes_are_not(tmp_path, monkeypatch) -> None:
    make_coco(tmp_path)
    monkeypatch.setitem(sys.modules, "faster_coco_eval.core", None)
    message = "COCO's masks and metrics need faster-coco-eval: pip install 'poolformer_kernels[dense]'"
    assert refused(tmp_path, masks=True) == message
    assert len(open_coco(str(tmp_path), masks=False).train) == 1
