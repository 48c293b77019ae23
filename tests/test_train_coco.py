"""COCO's format: what becomes a target, masks of all kinds, pictures of all kinds, and errors."""

import pickle
import sys

import numpy as np
import pytest
import torch
from support import dense_data
from support.dense_data import CATEGORIES, SIZE, coco_annotation, content, edit_coco, scene, write_coco
from support.train import message_of

dense_data.require_dense_data()

from faster_coco_eval.core import mask as mask_functions
from PIL import Image

from poolformer_kernels.train.coco import open_coco
from poolformer_kernels.train.data import BadImageError
from poolformer_kernels.train.recipe import RecipeError


@pytest.fixture
def root(tmp_path):
    """A folder with a scene in train and one in val."""
    return dense_data.make_coco(tmp_path)


@pytest.fixture
def picture(root):
    """(the file of the training image, which tests write anew; the images)."""
    return root / "train" / "a.png", open_coco(str(root), False).train


def refused(root, masks=True) -> str:
    return message_of(RecipeError, open_coco, str(root), masks)


def bad_image(images) -> str:
    return message_of(BadImageError, images.__getitem__, 0)


# ---- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("year", ["2017", ""])
def test_a_scene_is_read_as_it_was_written(tmp_path, masks, year) -> None:
    data = open_coco(str(dense_data.make_coco(tmp_path, year)), masks)
    assert data.classes == ["coin", "ball"]  # by id, not in the file's order
    for images in (data.train, data.val):
        image, found = images[0]
        assert images.category_ids == [4, 9]
        assert (len(images), images.image_id(0), images.size(0)) == (1, 7, SIZE)
        assert np.array_equal(image, scene()[2])
        assert found.labels.tolist() == [1, 0, 1]
        assert found.labels.dtype == torch.int64
        boxes = [[x - r, y - r, x + r + 1, y + r + 1] for x, y, r in dense_data.DISCS]
        assert found.boxes.equal(torch.tensor(boxes, dtype=torch.float32))
        assert found.size == SIZE
        if not masks:
            assert found.masks is None
            continue
        assert found.masks.dtype == torch.uint8
        assert np.array_equal(found.masks, [dense_data.disc(*SIZE, *place) for place in dense_data.DISCS])
    assert data.train.file(0) == str(tmp_path / f"train{year}" / "a.png")
    with pytest.raises(IndexError):
        data.train[1]
    assert sum(len(found.labels) for _, found in data.train) == 3  # it iterates, and ends


def test_the_third_layout(root) -> None:
    for file in (root / "annotations").iterdir():
        file.rename(file.with_name(file.name.removeprefix("instances_")))
    assert len(open_coco(str(root), False).val) == 1


def test_images_travel_to_other_processes(root) -> None:
    images = open_coco(str(root), True).train
    (image, found), (again, same) = images[0], pickle.loads(pickle.dumps(images))[0]
    assert np.array_equal(image, again)
    assert found.masks.equal(same.masks)


@pytest.mark.parametrize("masks", [True, False])
def test_what_is_no_target(root, masks) -> None:
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
    write_coco(root, "train", content([image], found), {})
    _, target = open_coco(str(root), masks).train[0]
    assert target.boxes.tolist() == [[0, 60, 19.5, height]]
    assert target.labels.tolist() == [0]
    for fields in bad:  # each alone leaves the training image out, and the validation image empty
        only = [{**annotations[0], **fields}, {**annotations[1], "image_id": 8}]
        for split in ("train", "val"):
            write_coco(root, split, content([image, {**image, "id": 8}], only), {})
        data = open_coco(str(root), masks)
        assert [data.train.image_id(i) for i in range(len(data.train))] == [8], fields
        assert [data.val.image_id(i) for i in range(len(data.val))] == [7, 8]
        _, empty = data.val[0]
        assert empty.boxes.shape == (0, 4)
        assert empty.labels.shape == (0,)
        if masks:
            assert empty.masks.shape == (0, *SIZE)


def test_small_images_train_nothing(root) -> None:
    heights = {8: 31, 9: 32}  # by the image's id
    images = [{"id": i, "file_name": f"{i}.png", "height": h, "width": 60} for i, h in heights.items()]
    found = [coco_annotation(i, i, 4, dense_data.disc(h, 60, 10, 10, 5)) for i, h in heights.items()]
    for split in ("train", "val"):
        write_coco(root, split, content(images, found), {})
    data = open_coco(str(root), False)
    assert [data.train.image_id(0), len(data.train), len(data.val)] == [9, 1, 2]
    write_coco(root, "train", content(images[:1], found[:1]), {})
    assert refused(root).endswith("has no image of at least 32 pixels a side with a usable annotation")


def test_polygons_and_run_lengths_are_the_same_masks(root) -> None:
    """A rectangle of whole pixels, and one of two parts."""
    image, _, _ = scene()
    mask = np.zeros(SIZE, np.uint8)
    mask[10:30, 20:50] = mask[40:45, 60:90] = 1
    polygons = [[20, 10, 50, 10, 50, 30, 20, 30], [60, 40, 90, 40, 90, 45, 60, 45]]
    compressed = mask_functions.encode(np.asfortranarray(mask))
    compressed = {"size": list(SIZE), "counts": bytes(compressed["counts"]).decode()}
    found = [
        coco_annotation(i, 7, 4, mask, segmentation=segmentation)
        for i, segmentation in enumerate((polygons, dense_data.run_lengths(mask), compressed), start=1)
    ]
    write_coco(root, "train", content([image], found), {})
    _, target = open_coco(str(root), True).train[0]
    assert np.array_equal(target.masks, [mask] * 3)


# ---- pictures ----------------------------------------------------------------------------------------------


def test_pictures_of_all_kinds_become_rgb(picture) -> None:
    file, images = picture
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
    assert "a.png has mode I;16; allowed: 8 bits a channel" in bad_image(images)


def test_a_picture_stored_sideways_is_turned_where_the_json_file_has_it_upright(root, picture) -> None:
    file, images = picture
    upright = Image.fromarray(scene()[2])
    for orientation, turn in ((6, Image.Transpose.ROTATE_90), (8, Image.Transpose.ROTATE_270)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        upright.transpose(turn).save(file, exif=exif)
        assert np.array_equal(images[0][0], upright)
        upright.save(file, exif=exif)  # the JSON file speaks of the picture as stored
        assert np.array_equal(images[0][0], upright)
    upright.transpose(Image.Transpose.ROTATE_90).save(file)  # sideways, but nothing says so
    said = f"image {file} has 80 x 96 pixels; {root}/annotations/instances_train.json says 96 x 80"
    assert said in bad_image(images)
    exif[0x0112] = 6
    upright.resize((50, 40)).save(file, exif=exif)
    assert "has 50 x 40 pixels" in bad_image(images)


def test_a_bad_picture_is_named(picture) -> None:
    file, images = picture
    file.write_bytes(file.read_bytes()[:120])
    assert bad_image(images).startswith(f"cannot read image {file}: ")
    file.write_bytes(b"no image")
    assert f"{file}: no known format" in bad_image(images)
    file.unlink()
    assert f"{file}: No such file or directory" in bad_image(images)


# ---- errors ------------------------------------------------------------------------------------------------


def test_missing_folders_and_files_are_named(root) -> None:
    said = "none is not a folder; allowed: one in COCO's layout, with annotations/"
    assert refused(root / "none").endswith(said)
    (root / "val").rename(root / "other")
    assert refused(root) == f"DATA {root} has instances_val.json but no folder val/ of its images"
    (root / "annotations" / "instances_val.json").unlink()
    assert refused(root) == (
        f"DATA {root} has no annotations of val; allowed in annotations/: instances_val2017.json,"
        " instances_val.json, val.json"
    )


@pytest.mark.parametrize("text", ["{", "[1, 2", "\xff", "[" * 100000])
def test_a_file_that_is_no_json(root, text) -> None:
    (root / "annotations" / "instances_train.json").write_text(text, encoding="latin-1")
    assert "instances_train.json is not JSON: " in refused(root)


@pytest.mark.parametrize("part", ["images", "annotations", "categories"])
@pytest.mark.parametrize("value", [None, {}, [1], "text"])
def test_a_missing_list(root, part, value) -> None:
    edit_coco(root, lambda found: found.update({part: value}))
    assert f"instances_train.json has no list '{part}' of objects" in refused(root)
    edit_coco(root, lambda found: [found])
    assert "has no list 'images'" in refused(root)


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
def test_bad_images_of_the_file(root, fields, message) -> None:
    edit_coco(root, lambda found: found["images"][0].update(fields))
    assert refused(root) == f"DATA {root}/annotations/instances_train.json: {message}"


NAN, INFINITE = float("nan"), float("inf")
SECOND, NUMBERS = "annotation 2 of image 7 (a.png)", "allowed: four finite numbers"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id": 1}, "annotation 1 of image 7 (a.png): its id is there twice"),
        ({"id": "x"}, "annotation of image 7: id is 'x'; allowed: an integer"),
        ({"image_id": 99}, "annotation 2: image_id 99 is of no image"),
        ({"image_id": None}, "annotation 2: image_id None is of no image"),
        ({"bbox": [1, 2, 3]}, f"{SECOND}: bbox is [1, 2, 3]; {NUMBERS}"),
        ({"bbox": [1, 2, "3", 4]}, f"bbox is [1, 2, '3', 4]; {NUMBERS}"),
        ({"bbox": [1, 2, NAN, 4]}, f"bbox is [1, 2, nan, 4]; {NUMBERS}"),
        ({"bbox": [INFINITE, 2, 3, 4]}, f"bbox is [inf, 2, 3, 4]; {NUMBERS}"),
        ({"bbox": [1, 2, 10**400, 4]}, f"; {NUMBERS}"),
        ({"bbox": None}, f"{SECOND}: bbox is None; {NUMBERS}"),
        ({"area": NAN}, f"{SECOND}: area is nan; allowed: a finite number"),
        ({"area": None}, "area is None; allowed: a finite number"),
        ({"category_id": "cat"}, "category_id is 'cat'; allowed: an integer"),
        ({"iscrowd": "no"}, f"{SECOND}: iscrowd is 'no'; allowed: 0, 1"),
        ({"ignore": 2}, "ignore is 2; allowed: 0, 1"),
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_bad_annotations(root, fields, message, split) -> None:
    edit_coco(root, lambda found: found["annotations"][1].update(fields), split)
    found = refused(root, masks=False)
    assert found.startswith(f"DATA {root}/annotations/instances_{split}.json: annotation ")
    assert found.endswith(message)


KINDS = "allowed: polygons or run lengths"
EVEN = "allowed: an even number from 6 on"
LIST = "has a polygon that is no list of finite numbers"
SUM = "has run lengths that are not integers with the sum 7680, the image's pixels"
LENGTHS = "has run lengths of size {}; allowed: the image's, [80, 96]"
COUNTS = "has counts of type NoneType; allowed: a list, or a text that compresses it"
UNREADABLE = "has compressed run lengths that cannot be read: "


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, f"segmentation is None; {KINDS}"),
        ([], f"segmentation is []; {KINDS}"),
        ([[1, 2, 3, 4]], f"has a polygon of 4 numbers; {EVEN}"),
        ([[1, 1, 9, 1, 9, 9], [1, 2, 3, 4, 5, 6, 7]], f"has a polygon of 7 numbers; {EVEN}"),
        ([1, 1, 9, 1, 9, 9], LIST),
        ([[1, 1, NAN, 1, 9, 9]], LIST),
        ({"size": [96, 80], "counts": [7680]}, LENGTHS.format([96, 80])),
        ({"counts": [7680]}, LENGTHS.format(None)),
        ({"size": [80, 96], "counts": [5, 7676]}, SUM),
        ({"size": [80, 96], "counts": [-5, 7685]}, SUM),
        ({"size": [80, 96], "counts": None}, COUNTS),
        ({"size": [80, 96], "counts": "zzzz"}, UNREADABLE),
        ({"size": [80, 96], "counts": "é"}, UNREADABLE),
        ({"size": [80, 96], "counts": ""}, UNREADABLE),
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_bad_segmentations(root, segmentation, message, split) -> None:
    bad = {"segmentation": segmentation}
    edit_coco(root, lambda found: found["annotations"][2].update(bad), split)
    found = refused(root)
    file = f"{root}/annotations/instances_{split}.json"
    assert found.startswith(f"DATA {file}: annotation 3 of image 7 (a.png): segmentation ")
    assert message in found
    assert len(open_coco(str(root), masks=False).train[0][1].labels) == 3  # boxes do not need it


def test_masks_that_nobody_reads_may_be_bad(root) -> None:
    """Of a training annotation that is no target; the evaluation reads all of the validation set's."""
    bad = {"iscrowd": 1, "segmentation": [[1, 2]]}
    edit_coco(root, lambda found: found["annotations"][2].update(bad))
    assert len(open_coco(str(root), masks=True).train[0][1].labels) == 2
    edit_coco(root, lambda found: found["annotations"][2].update(bad), "val")
    said = "instances_val.json: annotation 3 of image 7 (a.png): segmentation has a polygon"
    assert said in refused(root)


def test_categories(root) -> None:
    file = f"DATA {root}/annotations/instances_train.json"
    edit_coco(root, lambda found: found.update(categories=[]))
    assert refused(root) == f"{file} has no categories; allowed: at least one"
    edit_coco(root, lambda found: found.update(categories=[*CATEGORIES, {"id": 9, "name": "z"}]))
    assert refused(root) == f"{file}: category id 9 is there twice"
    edit_coco(root, lambda found: found.update(categories=[{"id": 9}]))
    assert refused(root) == f"{file}: category {{'id': 9}}; allowed: an integer id and a name"
    differ = f"DATA {root}: categories of train and val differ: "
    edit_coco(root, lambda found: found.update(categories=[{"id": 4, "name": "orb"}, CATEGORIES[0]]))
    assert refused(root) == f"{differ}id 4 is 'orb' in train, 'coin' in val"
    edit_coco(root, lambda found: found.update(categories=CATEGORIES[:1]))
    assert refused(root) == f"{differ}id 4 is missing in train, 'coin' in val"


def test_duplicate_images_and_no_images(root) -> None:
    edit_coco(root, lambda found: found["images"].append(found["images"][0]))
    assert refused(root).endswith("instances_train.json: image id 7 is there twice")
    edit_coco(dense_data.make_coco(root), lambda found: found.update(images=[], annotations=[]), "val")
    assert refused(root).endswith("instances_val.json has no image")


def test_without_faster_coco_eval_masks_are_refused_and_boxes_are_not(root, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval.core", None)
    message = "COCO's masks and metrics need faster-coco-eval: pip install 'poolformer_kernels[dense]'"
    assert refused(root, masks=True) == message
    assert len(open_coco(str(root), masks=False).train) == 1
