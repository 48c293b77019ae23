"""Reading one picture from its file, whatever colours and orientation it is stored in."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from .data import BadImageError

__all__ = ["read_rgb", "reading"]

_ORIENTATION = 0x0112  # the EXIF tag; its values 5 to 8 exchange width and height
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow would clip these to 255


@contextmanager
def reading(file: Path, what: str = "image") -> Iterator[None]:
    """``with reading(file):`` turns whatever a decoder raises into a `BadImageError` that names the file."""
    try:
        yield
    except BadImageError:
        raise
    except Exception as error:  # whatever a decoder raises: the file is at fault
        lines = str(error).splitlines()
        reason = getattr(error, "strerror", None) or next(iter(lines), type(error).__name__)
        reason = "no known format" if isinstance(error, UnidentifiedImageError) else reason
        raise BadImageError(f"cannot read {what} {file}: {reason}") from None


def read_rgb(file: Path, size: tuple[int, int], told_by: str) -> Image.Image:
    """The picture of a file in RGB: grey and palette pictures are converted, transparency is dropped.

    Args:
        file: its path.
        size: (height, width) in pixels that the annotations are for. A file stored sideways, which its EXIF
            orientation turns to that size, is turned; any other file is taken as stored.
        told_by: what says so, for the message of an error.

    Raises:
        BadImageError: an unreadable file, one with more than 8 bits a channel, or one of another size.
    """
    with reading(file), Image.open(file) as image:
        if image.mode in _DEEP:
            raise BadImageError(f"image {file} has mode {image.mode}; allowed: 8 bits a channel")
        stored = (image.height, image.width)
        if stored == size:
            return image.convert("RGB")
        if stored == size[::-1] and image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8):
            return ImageOps.exif_transpose(image).convert("RGB")
    raise BadImageError(
        f"image {file} has {stored[1]} x {stored[0]} pixels; {told_by} says {size[1]} x {size[0]}"
        " (width x height), which its EXIF orientation does not explain"
    )
