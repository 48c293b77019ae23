"""The options of `poolformer-kernels predict`; what the command itself needs is imported when it runs."""

import argparse

from .options import DIGITS, image_size, model

__all__ = ["add_predict"]


def add_predict(commands: argparse._SubParsersAction) -> None:
    """Adds the command's parser to those of `poolformer-kernels`."""
    predict = commands.add_parser(
        "predict",
        help="what a checkpoint finds in pictures: boxes, masks, label maps or classes",
        description="Runs a RetinaNet, Mask R-CNN, Semantic FPN or classifier on pictures, with weights of "
        "mmdetection, mmsegmentation, the official code, timm, transformers, mmpretrain or this package. DIR "
        "holds index.html, predictions.json and each picture with what was found drawn on it.",
    )
    predict.add_argument("images", nargs="+", metavar="IMAGE", help="photos or other pictures")
    predict.add_argument(
        "--checkpoint",
        required=True,
        metavar="FILE",
        help="the weights: a run's best.safetensors, or any other",
    )
    predict.add_argument(
        "--model",
        type=model(more=(DIGITS,), heads=True),
        metavar="NAME",
        help="whose weights they are: poolformer_s12, retinanet_poolformer_s12, …; a MetaFormer must "
        "be named (default: what the file says, or a PoolFormer or PoolFormerV2 of its shapes)",
    )
    predict.add_argument(
        "--out", default="predictions", metavar="DIR", help="folder of the results (default: %(default)s)"
    )
    predict.add_argument(
        "--score",
        type=_score,
        metavar="S",
        help="detections below it are left out, 0 to 1 (default: 0.3)",
    )
    predict.add_argument(
        "--classes",
        metavar="FILE",
        help="names of the classes, one a line (default: the file's; of 1000 without names, ImageNet's)",
    )
    predict.add_argument(
        "--image-size",
        type=image_size,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="limits of the shorter and the longer side, pixels (default: the file's, else 800 1333 for "
        "detectors, 512 2048 for Semantic FPN); a classifier's square has the same number twice",
    )
    predict.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of products, by autocast (default: %(default)s)",
    )
    predict.add_argument(
        "--device", choices=("cpu", "cuda"), help="where it runs (default: cuda if there is one, else cpu)"
    )
    predict.add_argument("--json", metavar="FILE", help="write predictions.json's content there, too")


def _score(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to below 1, got {text!r}")
    return value
