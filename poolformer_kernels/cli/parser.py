"""The options of every command, as one tree of parsers.

Those of `train`'s recipes and of the benchmarks need extras, so they come when one of these is asked for
(`add_options` of `cli.train`, `parser` of each benchmark).
"""

import argparse

from ..models import list_models
from ..models.export import TARGETS
from ..ops.dispatch import BACKENDS
from .cam_options import add_cam
from .options import DIGITS, DTYPES, Parser, dtypes, image_size, model, models_like_timms, natural, positive
from .predict_options import add_predict

__all__ = ["BENCHMARKS", "parser", "subparsers"]

BENCHMARKS = ("model", "block", "mlp", "pool-mixer", "training", "dense", "loop", "host")
_DATA_HELP = (
    "a folder with train/ and val/, or train.tar and val.tar"
    "; torch/NAME or hfds/NAME of timm; or sample:digits"
)
_TASKS = ("classification", "detection", "instance", "segmentation")


def parser() -> argparse.ArgumentParser:
    """The parser of `poolformer-kernels`, with those of its commands."""
    top = Parser(
        prog="poolformer-kernels",
        description="Fused kernels for PoolFormer: see, inspect, verify, train, predict. Of a model's name "
        "poolformer_ or metaformer_ may be left out: s12 is poolformer_s12, v2_s12 is poolformerv2_s12, "
        "ppaa_s12_224 is metaformer_ppaa_s12_224. Results go below the current folder unless a path is "
        "given; of a path the last folder is made, its parent must exist. Exit codes: 0; 1 where a check "
        "failed; 2 where a request cannot be met; 130 after Ctrl-C; 141 where a pipe was closed.",
    )
    top.add_argument(
        "--version",
        action=_Version,
        nargs=0,
        help="print the versions of this package and PyTorch and what the extension has, and exit",
    )
    commands = top.add_subparsers(
        dest="command",
        required=True,
        metavar="demo | info | verify | bench | profile | export | train | validate | predict | cam",
    )

    demo = commands.add_parser(
        "demo",
        help="run a PoolFormer on photos: equal to timm's, and how much faster",
        description="Runs timm's PoolFormer and ours with the same weights on photos, compares both with "
        "float64, times both, and writes an HTML report. Exit code 1 if our error is above the allowed one.",
    )
    demo.add_argument(
        "--image", nargs="+", metavar="FILE", help="photos (default: two that scikit-learn bundles)"
    )
    demo.add_argument(
        "--model",
        type=model(models_like_timms(), why="timm has none to compare it with"),
        default="poolformer_s12",
        metavar="NAME",
        help="a PoolFormer or PoolFormerV2 (default: %(default)s)",
    )
    demo.add_argument(
        "--checkpoint", metavar="FILE", help="weights (default: random, the same in both models)"
    )
    demo.add_argument(
        "--dtype",
        type=dtypes,
        default="float32,bfloat16",
        metavar="A,B",
        help="dtypes, with commas (default: %(default)s)",
    )
    demo.add_argument(
        "--batch-size", type=positive, metavar="N", help="images of a timed call (default: 8, 64 on CUDA)"
    )
    demo.add_argument(
        "--rounds",
        type=positive,
        default=50,
        metavar="N",
        help="rounds of the timing at the most (default: %(default)s)",
    )
    demo.add_argument(
        "--image-size",
        type=image_size,
        metavar="N",
        help="side of the images, pixels (default: the model's own, 224)",
    )
    demo.add_argument(
        "--device", choices=("cpu", "cuda"), help="where it runs (default: cuda if there is one, else cpu)"
    )
    demo.add_argument(
        "--backend",
        choices=("auto", *BACKENDS),
        help="whose kernels (default: POOLFORMER_KERNELS_BACKEND, else auto, the fastest)",
    )
    demo.add_argument("--no-compile", action="store_true", help="leave torch.compile out of the timing")
    demo.add_argument(
        "--json", metavar="FILE", help="write every figure there (schema: see poolformer_kernels.cli.demo)"
    )
    demo.add_argument(
        "--report", default="report", metavar="DIR", help="where index.html goes (default: %(default)s)"
    )

    info = commands.add_parser(
        "info",
        help="versions, devices, backends and why one is unavailable: for reports of errors",
        description="Prints the versions, the processor, its instruction sets, GPUs, the backends that are "
        "usable and why the others are not, this package's environment variables, and how it was installed.",
    )
    info.add_argument("--json", action="store_true", help="print JSON instead of text")
    info.add_argument(
        "--models", action="store_true", help="the models instead: names, short names, parameters"
    )
    info.add_argument(
        "--kernels",
        action="store_true",
        help="the CUDA kernels instead: registers, spills, shared memory, threads, occupancy",
    )

    verify = commands.add_parser(
        "verify",
        help="errors of every operator against float64, beside eager PyTorch's",
        description="Compares every operator, forward and gradients, with float64, beside eager PyTorch in "
        "the same dtype. Exit code 1 if an error is above 1.5 times eager's plus rounding, 2 if the backend "
        "cannot run.",
    )
    verify.add_argument(
        "--backend", choices=BACKENDS, help="which one (default: every backend that can run on the device)"
    )
    verify.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where it runs (default: %(default)s)"
    )
    verify.add_argument(
        "--dtype",
        type=dtypes,
        default=",".join(DTYPES),
        metavar="A,B",
        help="dtypes, with commas (default: %(default)s)",
    )
    verify.add_argument("--json", metavar="FILE", help="write every error there")

    layers = commands.add_parser(
        "profile",
        help="parameters, MACs, bytes and time of every layer, and the limit it could reach",
        description="Counts and times every layer, stage and the whole model in inference, beside the limits "
        "that a copy and a matrix product set, measured in the same run.",
    )
    layers.add_argument(
        "--model",
        type=model(list_models("poolformer_*"), heads=True, why="its layers are not PoolFormer's"),
        default="poolformer_s12",
        metavar="NAME",
        help="a PoolFormer (default: %(default)s); a detector or segmenter by its head and backbone, part by "
        "part: retinanet_poolformer_s12, mask_rcnn_poolformer_s12, semantic_fpn_poolformer_s12",
    )
    layers.add_argument(
        "--image-size",
        type=image_size,
        nargs="+",
        metavar="N",
        help="of the images, pixels: a side, or height and width (default: the model's own, 224; "
        "detectors 800 1280, segmenters 512)",
    )
    layers.add_argument(
        "--batch-size", type=positive, default=1, metavar="N", help="images of a call (default: %(default)s)"
    )
    layers.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of weights and images (default: %(default)s)"
    )
    layers.add_argument(
        "--device", choices=("cpu", "cuda"), help="where it runs (default: cuda if there is one, else cpu)"
    )
    layers.add_argument("--no-time", action="store_true", help="count only")
    layers.add_argument(
        "--paper",
        action="store_true",
        help="print the paper's Table 1 and the costs in its Table 2 instead, counted from the modules",
    )
    layers.add_argument("--json", metavar="FILE", help="write every figure there, the times in seconds")

    export = commands.add_parser(
        "export",
        help="a checkpoint under the official code's, timm's or transformers' names",
        description="Writes the weights of a checkpoint (of the official code, timm, transformers or "
        "mmpretrain) under another code base's names, and says whether its head gives the same logits.",
    )
    export.add_argument("file", metavar="FILE", help="the checkpoint: .safetensors, .pth, .pth.tar, .bin, …")
    export.add_argument("--to", required=True, choices=TARGETS, help="whose names the weights get")
    export.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help="the new file: .safetensors, or .pth, .pt or .bin (torch.save)",
    )
    export.add_argument(
        "--model",
        type=model(),
        metavar="NAME",
        help="whose weights they are; a MetaFormer must be named (default: a PoolFormer or PoolFormerV2 of "
        "the file's shapes)",
    )
    export.add_argument("--force", action="store_true", help="overwrite a file that exists")

    bench = commands.add_parser(
        "bench",
        help="times of whole models, blocks and operators beside eager, torch.compile, OpenVINO and others",
        description="Measures ours beside what else could run the same model, interleaved in one run, and "
        "writes CSV. `bench model --help` shows a benchmark's own options.",
    )
    bench.add_argument("benchmark", choices=BENCHMARKS, help="what is measured")
    bench.add_argument("arguments", nargs=argparse.REMAINDER, help="the benchmark's options")

    training = commands.add_parser(
        "train",
        help="train a PoolFormer on images with the paper's recipe; survives being killed",
        description="Trains a model on the images of DATA. RUN holds config.yaml, metrics.csv, curves.png, "
        "index.html, checkpoints/ and best.safetensors. A run that was stopped or killed goes on with "
        "--resume. Several processes: torchrun --nproc-per-node N -m poolformer_kernels train DATA --out "
        "RUN.",
    )
    training.add_argument("data", metavar="DATA", help=_DATA_HELP)
    training.add_argument("--task", choices=_TASKS, help="what is learned (default: classification)")
    training.add_argument("--out", required=True, metavar="RUN", help="a new folder, unless --resume")
    training.add_argument("--resume", action="store_true", help="go on with the run in RUN")
    training.add_argument(
        "--recipe",
        choices=("paper", "finetune", "small"),
        help="where the recipe's options start from (default: paper; small for sample:digits)",
    )
    training.add_argument(
        "--config",
        metavar="FILE",
        help="a YAML file of the recipe's fields, as RUN/config.yaml is; options count more",
    )
    training.add_argument(
        "--device", choices=("cpu", "cuda"), help="where it runs (default: cuda if there is one, else cpu)"
    )
    training.add_argument(
        "--timeout",
        type=positive,
        default=600,
        metavar="S",
        help="seconds that processes wait for each other (default: %(default)s)",
    )

    validation = commands.add_parser(
        "validate",
        help="top-1, AP or mIoU, and images per second of a checkpoint",
        description="Evaluates a checkpoint on the validation images of DATA, prepared as its model wants "
        "them: top-1 and top-5, COCO's AP, or mIoU and pixel accuracy.",
    )
    validation.add_argument("data", metavar="DATA", help=_DATA_HELP)
    validation.add_argument(
        "--checkpoint",
        required=True,
        metavar="FILE",
        help="the weights: a run's best.safetensors, or any other",
    )
    validation.add_argument(
        "--task", choices=_TASKS, help="what it is scored for (default: what the file says)"
    )
    validation.add_argument(
        "--model",
        type=model(more=(DIGITS,), heads=True, timm=True),
        metavar="NAME",
        help="whose weights they are (default: what the file says)",
    )
    validation.add_argument(
        "--head",
        choices=("official", "timm"),
        help="norm, then mean (official) or mean, then norm (timm; default: what the file says)",
    )
    validation.add_argument(
        "--image-size", type=image_size, metavar="N", help="side of the images, pixels (default: the model's)"
    )
    validation.add_argument(
        "--precision",
        choices=DTYPES,
        default="float32",
        help="of products, by autocast (default: %(default)s)",
    )
    validation.add_argument(
        "--batch-size",
        type=positive,
        default=64,
        metavar="N",
        help="images of a call, in classification (default: %(default)s)",
    )
    validation.add_argument(
        "--workers",
        type=natural,
        default=0,
        metavar="N",
        help="processes that load images (default: %(default)s)",
    )
    validation.add_argument(
        "--bad-images",
        choices=("fail", "skip"),
        default="fail",
        help="at an unreadable image: end, or leave it out (default: %(default)s)",
    )
    validation.add_argument(
        "--device", choices=("cpu", "cuda"), help="where it runs (default: cuda if there is one, else cpu)"
    )
    validation.add_argument("--json", action="store_true", help="print JSON instead of text")
    validation.add_argument(
        "--at-least",
        type=float,
        metavar="PERCENT",
        help="exit code 1 where top-1 (AP50, mIoU) is lower, per cent",
    )
    add_predict(commands)
    add_cam(commands)
    return top


class _Version(argparse.Action):
    """Prints one line and exits, without a command."""

    def __call__(self, *_) -> None:
        from .info import version_line

        print(version_line())
        raise SystemExit(0)


def subparsers(top: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of the commands by name."""
    (commands,) = (a for a in top._actions if isinstance(a, argparse._SubParsersAction))
    return commands.choices
