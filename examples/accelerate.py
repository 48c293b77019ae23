"""Makes one of timm's PoolFormers faster and shows that its logits stay the same.

Needs timm and no files: the weights are random. Prints the time of a batch before and after, how far the
logits are apart, and what runs where. Exit code 1 if the logits differ by more than rounding.

    python examples/accelerate.py --model poolformer_s12 --batch-size 8
"""

import argparse
import statistics
import sys
import time

import timm
import torch

import poolformer_kernels as pk


def logits_of(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(images)


def milliseconds(model: torch.nn.Module, images: torch.Tensor, rounds: int) -> float:
    """The median of several calls, after one that compiles and allocates what later calls reuse."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        logits_of(model, images)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--model", default="poolformer_s12", help="a PoolFormer of timm (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=20, help="calls that are timed (default: %(default)s)")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = timm.create_model(args.model).eval().to(memory_format=torch.channels_last)
    for name, parameter in model.named_parameters():
        if "layer_scale" in name:  # 1e-5 in a new model: the blocks would hardly count
            torch.nn.init.ones_(parameter)
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size)
    images = images.to(memory_format=torch.channels_last)

    expected = logits_of(model, images)
    before = milliseconds(model, images, args.rounds)
    pk.accelerate(model)
    found = logits_of(model, images)
    after = milliseconds(model, images, args.rounds)

    difference = ((found - expected).norm() / expected.norm()).item()
    print(f"timm's modules   {before:8.1f} ms for {args.batch_size} images")
    print(f"accelerated      {after:8.1f} ms, {before / after:.2f} times as fast")
    print(f"relative difference of the logits: {difference:.1e}")
    print(pk.explain(model).summary)
    return 0 if difference < 1e-5 else 1


if __name__ == "__main__":
    sys.exit(main())
