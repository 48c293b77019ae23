"""The options of `poolformer-kernels cam`; what the command itself needs is imported when it runs."""

import argparse

from .options import DIGITS, image_size, model

__all__ = ["add_cam"]


def add_cam(commands: argparse._SubParsersAction) -> None:
    """Adds the command's parser to those of `poolformer-kernels`."""
    cam = commands.add_parser(
        "cam",
        help="where models look: Grad-CAM of photos, models side by side",
        description="Grad-CAM of each picture and model, as in the MetaFormer paper's appendix: what of the "
        "last stage speaks for the class, over the picture. A picture is resized to the model's size without "
        "a crop, as the official code does (misc/cam_image.py). DIR holds index.html and a PNG of each.",
    )
    cam.add_argument("images", nargs="+", metavar="IMAGE", help="photos or other pictures")
    cam.add_argument(
        "--model",
        type=model(more=(DIGITS,), timm=True),
        action="append",
        metavar="NAME",
        help="one of ours or timm:NAME, as often as --checkpoint and in its order (default: what the files "
        "say, or a PoolFormer of their shapes)",
    )
    cam.add_argument(
        "--checkpoint", action="append", metavar="FILE", help="weights of a model; may be repeated"
    )
    cam.add_argument(
        "--compare",
        action="extend",
        nargs="+",
        metavar="timm:NAME[=FILE]",
        help="timm's models beside them, with the weights of FILE, else timm's pretrained ones (network)",
    )
    cam.add_argument(
        "--random-weights",
        action="store_true",
        help="--model without --checkpoint (default model: poolformer_s12); such maps mean nothing",
    )
    cam.add_argument(
        "--target",
        default="predicted",
        metavar="CLASS_INDEX|predicted",
        help="the class that is explained (default: the one that each model predicts)",
    )
    cam.add_argument(
        "--classes",
        metavar="FILE",
        help="names of the classes, one a line, by index (default: the checkpoint's, else numbers)",
    )
    cam.add_argument(
        "--image-size",
        type=image_size,
        metavar="N",
        help="side of what a model sees, pixels (default: each model's own, mostly 224)",
    )
    cam.add_argument(
        "--out", default="cam", metavar="DIR", help="folder of the results (default: %(default)s)"
    )
    cam.add_argument(
        "--device", choices=("cpu", "cuda"), help="where it runs (default: cuda if there is one, else cpu)"
    )
    cam.add_argument(
        "--json",
        nargs="?",
        const="",
        metavar="FILE",
        help="write classes and probabilities, to DIR/cam.json or FILE",
    )
