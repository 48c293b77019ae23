"""Photos as the models see them, prepared as a model's config says."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..models import ModelConfig
from .errors import CommandError

__all__ = ["FILTERS", "crop", "default_photos", "load_photo", "normalise", "preprocess"]

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def load_photo(path: str | Path, option: str = "--image") -> Image.Image:
    """The photo as RGB, upright; ``option`` is what an error calls the argument that named it.

    Of 16-bit grey the upper eight bits are kept.

    Raises:
        CommandError: it cannot be read as an image.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode in ("I", "F"):
                raise ValueError(f"its pixels are of mode {image.mode}, 32 bits; allowed: 8 or 16 bits")
            if image.mode.startswith("I;16"):  # Pillow's own conversion makes everything above 255 white
                import numpy as np

                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise CommandError(f"{option} {path}: cannot be read as an image: {error}") from None


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
    photo = photo.resize((width, height), FILTERS[config.interpolation])
    left, top = round((width - size) / 2), round((height - size) / 2)
    return photo.crop((left, top, left + size, top + size))


def preprocess(photo: Image.Image, config: ModelConfig, size: int) -> Tensor:
    """The cropped photo as the model's input ``[3, size, size]``, float32, normalised."""
    return normalise(crop(photo, config, size), config.mean, config.std)


def normalise(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """An RGB picture as a model's input ``[3, height, width]``, float32: ``(pixels / 255 - mean) / std``."""
    width, height = image.size
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
    return (pixels.permute(2, 0, 1).contiguous().float() / 255 - mean) / std
