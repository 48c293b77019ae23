"""Exports a PoolFormer to ONNX and to AOTInductor, and compares both with the model itself.

ONNX has no operators of this package: the file holds the plain layers and runs wherever ONNX does. A package
of AOTInductor calls this package's kernels: a process that loads it imports poolformer_kernels first. Prints
each format's relative difference for two batch sizes. Exit code 1 if one is above rounding. ONNX needs onnx,
onnxscript and onnxruntime; AOTInductor needs a C++ compiler.

    python examples/export.py --out exported
    python examples/export.py --out exported --formats onnx
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import poolformer_kernels as pk

Run = Callable[[Tensor], Tensor]


def onnx(model: torch.nn.Module, example: Tensor, file: Path) -> Run:
    import onnxruntime

    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.onnx.export(model, (example,), dynamo=True, dynamic_shapes=shapes, verbose=False)
    program.save(file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def aoti(model: torch.nn.Module, example: Tensor, file: Path) -> Run:
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    program = torch.export.export(model, (example,), dynamic_shapes=shapes)
    torch._inductor.aoti_compile_and_package(program, package_path=str(file))
    return torch._inductor.aoti_load_package(str(file))


FORMATS = {"onnx": (onnx, "model.onnx"), "aoti": (aoti, "model.pt2")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="poolformer_s12", choices=pk.list_models(), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("exported"), help="a folder (default: %(default)s)")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--image-size", type=int, default=224)
    args = parser.parse_args()

    torch.manual_seed(0)
    model = pk.create_model(args.model).eval()
    for name, parameter in model.named_parameters():
        if "layer_scale" in name:  # 1e-5 in a new model: the blocks would hardly count
            torch.nn.init.ones_(parameter)
    batches = [torch.randn(size, 3, args.image_size, args.image_size) for size in (2, 5)]
    args.out.mkdir(parents=True, exist_ok=True)

    worst = 0.0
    with torch.no_grad():
        expected = [model(batch) for batch in batches]
        for name in args.formats:
            export, file = FORMATS[name]
            run = export(model, batches[0], args.out / file)
            for batch, logits in zip(batches, expected, strict=True):
                difference = ((run(batch) - logits).norm() / logits.norm()).item()
                print(f"{args.out / file}, {len(batch)} images: relative difference {difference:.1e}")
                worst = max(worst, difference)
    return 0 if worst < 1e-5 else 1


if __name__ == "__main__":
    sys.exit(main())
