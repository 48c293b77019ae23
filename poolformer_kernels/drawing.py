"""Boxes, masks and label maps drawn on pictures, in colours that colour-blind readers tell apart."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ["colour_of", "draw_detections", "draw_label_map", "paint_labels", "pixel_counts", "png"]

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]

# Okabe and Ito's colours without black, then Tol's "muted" ones
_BASE = (
    *("0072B2", "E69F00", "009E73", "CC79A7", "56B4E9", "D55E00", "F0E442"),
    *("332288", "44AA99", "882255", "999933", "AA4499", "DDCC77", "117733", "88CCEE", "CC6677"),
)
_SHADES = ((0.0, 0), (0.4, 255), (0.4, 0), (0.65, 255), (0.65, 0))  # (share of white or black, which)
_LIGHTEST_FOR_WHITE = 140  # the luminance, 0 to 255, above which text is black
_MASK, _LABELS = 0.5, 0.55  # how much of a colour covers the picture
_MOST_IN_LEGEND = 24


def colour_of(label: int) -> Colour:
    """The colour of a class; 80 different ones, then they repeat."""
    base = _BASE[label % len(_BASE)]
    share, towards = _SHADES[label // len(_BASE) % len(_SHADES)]
    return tuple(round(int(base[i : i + 2], 16) * (1 - share) + towards * share) for i in (0, 2, 4))


def png(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def draw_detections(
    image: Image.Image,
    boxes: Sequence[Box],
    labels: Sequence[int],
    texts: Sequence[str],
    masks: Sequence[np.ndarray] | None = None,
) -> Image.Image:
    """The picture with boxes, what they hold, and masks; a copy.

    Args:
        image: RGB.
        boxes: x1, y1, x2, y2 in pixels, best first: the first is drawn last, over the others. The frame lies
            inside the box, 2 pixels wide, more in pictures of more than 1200 pixels.
        labels: choose the colours, see `colour_of`.
        texts: beside each box, inside the picture.
        masks: ``[H, W]`` of bool, for each box.
    """
    backwards = range(len(boxes) - 1, -1, -1)
    if masks is not None:
        pixels = np.array(image, dtype=np.float32)
        for i in backwards:
            pixels[masks[i]] = (1 - _MASK) * pixels[masks[i]] + _MASK * np.array(colour_of(labels[i]))
        image = Image.fromarray(pixels.round().astype(np.uint8))
    image = image.copy()
    draw, font = ImageDraw.Draw(image), _font(image)
    width = max(2, max(image.size) // 600)
    frames = [_pixels_of(box, image.size) for box in boxes]
    for i in backwards:
        draw.rectangle(frames[i], outline=colour_of(labels[i]), width=width)
    for i in backwards:
        _write(draw, image.size, frames[i], texts[i], colour_of(labels[i]), font)
    return image


def paint_labels(image: Image.Image, labels: np.ndarray, classes: int) -> Image.Image:
    """The picture under the translucent colours of its label map, with white lines between classes.

    Args:
        image: RGB.
        labels: ``[H, W]`` of integers, the picture's size; values from ``classes`` on are left unpainted.
        classes: how many there are.
    """
    palette = np.array([colour_of(label) for label in range(classes)], dtype=np.float32)
    pixels = np.array(image, dtype=np.float32)
    known = labels < classes
    pixels[known] = (1 - _LABELS) * pixels[known] + _LABELS * palette[labels[known]]
    edges = np.zeros(labels.shape, dtype=bool)
    edges[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    edges[1:] |= labels[1:] != labels[:-1]
    pixels[edges] = 255
    return Image.fromarray(pixels.round().astype(np.uint8))


def draw_label_map(image: Image.Image, labels: np.ndarray, names: Sequence[str]) -> Image.Image:
    """`paint_labels`, and below the picture a legend of its classes with their shares of the pixels.

    Args:
        image, labels: see `paint_labels`.
        names: of all classes.
    """
    painted = paint_labels(image, labels, len(names))
    counts = pixel_counts(labels, len(names))
    rows = [(colour_of(c), f"{names[c]}  {share_text(n, labels.size)}") for c, n in counts[:_MOST_IN_LEGEND]]
    if len(counts) > _MOST_IN_LEGEND:
        rest = sum(n for _, n in counts[_MOST_IN_LEGEND:])
        more = len(counts) - _MOST_IN_LEGEND
        rows.append(((128, 128, 128), f"{more} more  {share_text(rest, labels.size)}"))
    return _with_legend(painted, rows)


def pixel_counts(labels: np.ndarray, classes: int) -> list[tuple[int, int]]:
    """(class, pixels) of the classes that a label map has, the largest first."""
    counts = np.bincount(labels[labels < classes].ravel(), minlength=classes)
    order = np.argsort(-counts, kind="stable")
    return [(int(c), int(counts[c])) for c in order if counts[c]]


def share_text(pixels: int, total: int) -> str:
    """A share of a picture in per cent."""
    return "< 0.1 %" if 0 < pixels < 0.001 * total else f"{100 * pixels / total:.1f} %"


# ---- text --------------------------------------------------------------------------------------------------


def _font(image: Image.Image) -> ImageFont.FreeTypeFont:
    """Of a size that can be read where the whole picture is shown."""
    return ImageFont.load_default(min(max(12, max(image.size) // 55), 60))


def _pixels_of(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The first and last column and row of a box, inside the picture."""
    width, height = size
    x1, y1 = (min(max(round(v), 0), side - 1) for v, side in zip(box[:2], size, strict=True))
    return x1, y1, min(max(round(box[2]) - 1, x1), width - 1), min(max(round(box[3]) - 1, y1), height - 1)


def _fitted(
    text: str, width: int, font: ImageFont.FreeTypeFont, smallest: float = 9.0
) -> tuple[str, ImageFont.FreeTypeFont]:
    """The text and its font so that it is at most so wide: smaller first, then cut off."""
    while font.getlength(text) > width and font.size > smallest:
        font = font.font_variant(size=max(font.size - 1, smallest))
    if font.getlength(text) > width:
        while text and font.getlength(text + "…") > width:
            text = text[:-1]
        text += "…" if text else ""
    return text, font


def _write(
    draw: ImageDraw.ImageDraw,
    size: tuple[int, int],
    frame: tuple[int, int, int, int],
    text: str,
    colour: Colour,
    font: ImageFont.FreeTypeFont,
) -> None:
    """A text on its colour above a frame; inside it where there is no room above."""
    pad = 3
    text, font = _fitted(text, size[0] - 2 * pad, font)
    if not text:
        return
    ascent, descent = font.getmetrics()
    width, height = round(font.getlength(text)) + 2 * pad, ascent + descent + 2
    x = max(min(frame[0], size[0] - width), 0)
    y = frame[1] - height if frame[1] >= height else min(frame[1], max(size[1] - height, 0))
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
    draw.text((x + pad, y + 1), text, fill=_ink_on(colour), font=font)


def _ink_on(colour: Colour) -> str:
    luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    return "black" if luminance > _LIGHTEST_FOR_WHITE else "white"


def _with_legend(image: Image.Image, rows: Sequence[tuple[Colour, str]]) -> Image.Image:
    font, pad = _font(image), 8
    ascent, descent = font.getmetrics()
    height = ascent + descent + 6
    chip = ascent
    widest = max((font.getlength(text) for _, text in rows), default=0)
    columns = max(1, min(len(rows), int((image.width - pad) // (widest + chip + 3 * pad))))
    lines = -(-len(rows) // columns)
    sheet = Image.new("RGB", (image.width, image.height + lines * height + pad * (lines > 0)), "white")
    sheet.paste(image, (0, 0))
    draw = ImageDraw.Draw(sheet)
    for i, (colour, text) in enumerate(rows):
        column, line = divmod(i, lines)
        x = pad + column * ((image.width - pad) // columns)
        y = image.height + pad // 2 + line * height
        room = (image.width - pad) // columns - chip - 2 * pad
        text, own_font = _fitted(text, room, font)
        draw.rectangle((x, y + 2, x + chip - 1, y + 1 + chip), fill=colour, outline="black")
        draw.text((x + chip + pad, y), text, fill="black", font=own_font)
    return sheet
