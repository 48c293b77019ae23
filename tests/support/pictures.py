"""Pictures that commands read, and the folders and pages that these write."""

import re
from pathlib import Path

import numpy as np


def save_picture(path: Path, size: tuple[int, int] = (90, 70)) -> Path:
    """A picture that no part of is like another."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def pictures_on(page: str) -> list[str]:
    """The pictures in a page, as data; nothing is loaded from elsewhere."""
    assert not re.search(r"https?://|<script|<link|@import|url\(|href=\"(?!data:)", page)
    found = re.findall(r'src="data:image/([^"]+)"', page)
    assert len(found) == page.count("src=")
    return found
