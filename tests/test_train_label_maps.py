"""Folders of label maps: what the numbers in a PNG mean, names of classes, and errors."""

import struct
import zlib

import numpy as np
import pytest
import torch
from support.train import message_of, require_train

require_train()

from PIL import Image

from poolformer_kernels.train.data import BadImageError
from poolformer_kernels.train.label_maps import open_label_maps
from poolformer_kernels.train.recipe import RecipeError

LABELS = np.array([[0, 1, 2], [3, 255, 1]], np.uint8)
FIRST_PICTURE, FIRST_MAP = "images/training/a.jpg", "annotations/training/a.png"


def make_maps(root, labels=LABELS, splits=("training", "validation"), maps="annotations", classes=None):
    """Two pictures with the same map in each split."""
    for split in splits:
        for parent in ("images", maps):
            (root / parent / split).mkdir(parents=True, exist_ok=True)
        for name, grey in (("b", 50), ("a", 90)):
            picture = np.full((*labels.shape, 3), grey, np.uint8)
            Image.fromarray(picture).save(root / "images" / split / f"{name}.jpg", quality=100)
            Image.fromarray(labels).save(root / maps / split / f"{name}.png")
    if classes is not None:
        (root / "classes.txt").write_text("\n".join(classes) + "\n", encoding="utf-8")
    return root


def refused(root, zero_label="class", error=RecipeError) -> str:
    return message_of(error, open_label_maps, str(root), zero_label)


def bad_image(root, zero_label="class") -> str:
    images = open_label_maps(str(root), zero_label).train
    return message_of(BadImageError, images.__getitem__, 0)


def write_grey_png(file, values, bits):
    """A grey PNG of 1, 2 or 4 bits, which Pillow reads but does not write; a row must fill its bytes."""
    height, width = values.shape
    places = np.arange(bits - 1, -1, -1)
    rows = np.packbits((values[..., None] >> places & 1).reshape(height, -1), axis=1)
    pixels = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")):
        png += struct.pack(">I", len(content)) + kind + content
        png += struct.pack(">I", zlib.crc32(kind + content))
    file.write_bytes(png)


# ---- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zero_label", "classes", "expected"),
    [
        ("class", ["sky", "sea", "sand", "sun"], [[0, 1, 2], [3, 255, 1]]),
        ("ignore", ["sea", "sand", "sun"], [[255, 0, 1], [2, 255, 0]]),
    ],
)
@pytest.mark.parametrize(
    "folders", [{}, {"splits": ("train", "val")}, {"maps": "labels"}, {"splits": ("training", "val")}]
)
def test_labels_and_names(tmp_path, zero_label, classes, expected, folders) -> None:
    data = open_label_maps(str(make_maps(tmp_path, classes=classes, **folders)), zero_label)
    assert (data.name, data.classes) == (str(tmp_path), classes)
    for images in (data.train, data.val):
        assert (len(images), images.classes) == (2, len(classes))
        assert images.file(0).endswith("a.jpg")  # in the order of names
        for index, grey in enumerate((90, 50)):
            image, labels = images[index]
            assert labels.dtype == torch.uint8
            assert labels.tolist() == expected
            assert image.getpixel((2, 1)) == (grey,) * 3


@pytest.mark.parametrize(
    ("zero_label", "expected"), [("class", ["0", "1", "2", "3"]), ("ignore", ["0", "1", "2"])]
)
def test_classes_without_names_are_numbered_by_the_largest_label_of_all_maps(
    tmp_path, zero_label, expected
) -> None:
    make_maps(tmp_path, LABELS.clip(max=2))
    Image.fromarray(LABELS).save(tmp_path / "annotations" / "validation" / "b.png")
    assert open_label_maps(str(tmp_path), zero_label).classes == expected


def table(names) -> str:
    rows = [f"{i}\t0.1\t5\t6\t{name}" for i, name in enumerate(names, start=1)]
    return "\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]) + "\n"


def test_ade20ks_table(tmp_path) -> None:
    names = ["wall", "building, edifice", 'bed "large"']
    (make_maps(tmp_path, classes=["x", "y"]) / "objectInfo150.txt").write_text(table(names))
    assert open_label_maps(str(tmp_path), "ignore").classes == names
    assert open_label_maps(str(tmp_path), "class").classes == ["other", *names]


def test_numbers_are_kept_whatever_the_png_stores_them_in(tmp_path) -> None:
    """Palette images hold indices; Pillow stretches grey of 2 and 4 bits, which must be undone."""
    make_maps(tmp_path, classes=[f"c{i}" for i in range(16)])
    images, file = open_label_maps(str(tmp_path), "class").train, tmp_path / FIRST_MAP
    values = np.array([[0, 1, 2, 3, 3, 2, 1, 0]] * 2, np.uint8)
    Image.new("RGB", (8, 2)).save(tmp_path / FIRST_PICTURE)

    def read():
        return images[0][1].tolist()

    palette = Image.fromarray(values).convert("P")
    palette.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200, 9, 9, 9])
    for bits in (2, 4, 8):
        palette.save(file, bits=bits)
        assert read() == values.tolist()
    palette.save(file, transparency=0)
    assert read() == values.tolist()
    Image.fromarray(values.astype(np.uint16)).save(file)
    assert read() == values.tolist()
    for bits, grey in ((2, values), (4, values * 5), (1, values % 2)):
        write_grey_png(file, grey, bits)
        assert read() == grey.tolist(), bits


def test_a_picture_stored_sideways_is_turned_to_its_map(tmp_path) -> None:
    make_maps(tmp_path, classes=list("abcd"))
    picture = np.zeros((2, 3, 3), np.uint8)
    picture[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.fromarray(picture).transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / FIRST_PICTURE, exif=exif, quality=100)
    image, labels = open_label_maps(str(tmp_path), "class").train[0]
    assert abs(np.asarray(image, int) - picture).max() <= 3  # JPEG
    assert labels.tolist() == LABELS.tolist()


# ---- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zero_label", "classes", "message"),
    [
        ("class", "abc", "has the label 3; allowed: 0 to 2 for 3 classes, and 255, which is ignored"),
        ("ignore", "ab", "has the label 3; allowed: 1 to 2 for 2 classes, and 0 and 255, which are ignored"),
    ],
)
def test_a_label_beyond_the_classes(tmp_path, zero_label, classes, message) -> None:
    make_maps(tmp_path, classes=classes)
    assert bad_image(tmp_path, zero_label) == f"label map {tmp_path / FIRST_MAP} {message}"


def test_labels_of_16_bits_do_not_wrap(tmp_path) -> None:
    make_maps(tmp_path)
    file = tmp_path / FIRST_MAP
    Image.fromarray(np.full((2, 3), 257, np.uint16)).save(file)
    assert refused(tmp_path, error=BadImageError) == f"label map {file} has the label 257; allowed: 0 to 255"
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\n")
    assert "has the label 257; allowed: 0 to 3 for 4 classes" in bad_image(tmp_path)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_a_map_of_colours_is_refused(tmp_path, mode) -> None:
    make_maps(tmp_path, classes=list("abcd"))
    file = tmp_path / FIRST_MAP
    Image.fromarray(LABELS).convert(mode).save(file)
    said = f"label map {file} has mode {mode}; allowed: one channel of class numbers (L, P, I;16)"
    assert bad_image(tmp_path) == said


def test_a_map_of_another_size_and_unreadable_files(tmp_path) -> None:
    make_maps(tmp_path, classes=list("abcd"))
    picture, file = tmp_path / FIRST_PICTURE, tmp_path / FIRST_MAP
    Image.new("RGB", (4, 2)).save(picture)
    said = f"image {picture} has 4 x 2 pixels; its map {file} says 3 x 2 "
    assert bad_image(tmp_path).startswith(said)
    picture.write_bytes(b"no image")
    assert f"cannot read image {picture}: no known format" in bad_image(tmp_path)
    file.write_bytes(b"no image")
    assert f"cannot read label map {file}: no known format" in bad_image(tmp_path)


def test_folders_and_files_that_do_not_match(tmp_path) -> None:
    said = "none is not a folder; allowed: one with images/ and annotations/"
    assert refused(tmp_path / "none").endswith(said)
    root = make_maps(tmp_path / "d", classes=list("abcd"))
    assert refused(root, "drop") == "zero_label is 'drop'; allowed: ignore, class"
    extra = root / "images" / "training" / "c.png"
    Image.new("RGB", (3, 2)).save(extra)
    assert refused(root) == f"DATA {root}: image {extra} has no label map c.png"
    same = extra.rename(extra.with_name("a.png"))
    said = f"DATA: {root / FIRST_PICTURE} and {same} have the same name but for the suffix"
    assert refused(root) == said
    same.unlink()
    (root / "images" / "training" / "b.jpg").unlink()
    lonely = root / "annotations" / "training" / "b.png"
    assert refused(root) == f"DATA {root}: label map {lonely} has no image b.jpg|.jpeg|.png"
    lonely.unlink()
    assert len(open_label_maps(str(root), "class").train) == 1
    for file in root.glob("*/validation/*"):
        file.unlink()
    assert refused(root).startswith(f"DATA {root} has no images of val; allowed: .jpg .jpeg .png")
    (root / "annotations" / "training").rename(root / "annotations" / "other")
    allowed = "annotations/training, annotations/train, labels/training, labels/train"
    assert refused(root) == f"DATA {root} has no folder for train; allowed: {allowed}"
    (root / "images").rename(root / "pictures")
    assert refused(root) == f"DATA {root} has no folder for train; allowed: images/training, images/train"


def test_names_that_cannot_be_used(tmp_path) -> None:
    root = make_maps(tmp_path)
    classes, ade = root / "classes.txt", root / "objectInfo150.txt"
    classes.write_text("a\nb\na\n")
    assert refused(root) == f"DATA {classes}: class 3 'a' is there twice; allowed: a name of its own for each"
    classes.write_text("a\n\nb\n")
    assert refused(root) == f"DATA {classes}: class 2 has no name; allowed: a name of its own for each"
    classes.write_bytes(b"\xff\xfe\xfa")
    assert refused(root) == f"DATA {classes}: not a text"
    classes.write_text("a\n")
    assert refused(root) == f"DATA {root} has 1 classes; allowed: 2 to 255"
    hint = "zero_label class would count label 0 too"
    assert refused(root, "ignore") == f"DATA {root} has 1 classes; allowed: 2 to 254; {hint}"
    classes.write_text("\n".join(map(str, range(256))))
    assert refused(root) == f"DATA {root} has 256 classes; allowed: 2 to 255"
    ade.write_text("wall\nfloor\n")
    assert refused(root) == f"DATA {ade} has the columns ['wall']; allowed: tab separated, with Idx and Name"
    ade.write_text("")
    assert refused(root) == f"DATA {ade} has the columns []; allowed: tab separated, with Idx and Name"
    ade.write_text(table(["wall", "floor"]).replace("2\t", "3\t"))
    assert refused(root).endswith("row 2 is ['3', '0.1', '5', '6', 'floor']; allowed: Idx 2 and a Name")
