"""Photos as the models see them, prepared as a model's config says."""

from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..models import ModelConfig
from .errors import CommandError

__all__ = ["crop", "default_photos", "load_photo", "preprocess"]

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def load_photo(path: str | Path) -> Image.Image:
    """The photo as RGB, upright.

    Raises:
        CommandError: it cannot be read as an image.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise CommandError(f"--image {path}: cannot be read as an image: {error}") from None


def default_photos() -> list[str]:
    """The files of the photos that scikit-learn bundles."""
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        raise CommandError(
            "the demo's photos need scikit-learn: pip install 'poolformer_kernels[demo]', or give "
            "--image FILE"
        ) from None
    return load_sample_images().filenames


def crop(photo: Image.Image, config: ModelConfig, size: int) -> Image.Image:
    """What the model sees: the shorter side resized to ``size / crop_pct``, then the central square."""
    shorter = int(size / config.crop_pct)
    scale = shorter / min(photo.size)
    width, height = (shorter if side == min(photo.size) else int(side * scale) for side in photo.size)
    photo = photo.resize((width, height), _FILTERS[config.interpolation])
    left, top = round((width - size) / 2), round((height - size) / 2)
    return photo.crop((left, top, left + size, top + size))


def preprocess(photo: Image.Image, config: ModelConfig, size: int) -> Tensor:
    """The cropped photo as the model's input ``[3, size, size]``, float32, normalised."""
    image = crop(photo, config, size)
    pixels = (
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)
    )
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.mean, config.std))
    return (pixels.contiguous().float() / 255 - mean) / std
