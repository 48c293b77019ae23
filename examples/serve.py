"""Serves images from several threads with one model, and shows that all of them get the right answers.

Random images stand in for the requests; each thread takes one at a time. Prints the throughput of one thread
and of several. Exit code 1 if an answer of several threads is not that of one thread, to the last bit.

    python examples/serve.py --threads 4 --requests 64
"""

import argparse
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

import poolformer_kernels as pk


def serve(model: torch.nn.Module, requests: list[Tensor], threads: int) -> tuple[list[Tensor], float]:
    """The logits of every request, in their order, and how many were served in a second."""

    def answer(image: Tensor) -> Tensor:
        with torch.inference_mode():  # a mode of the thread: each one sets its own
            return model(image[None])[0]

    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        answers = list(pool.map(answer, requests))
        return answers, len(requests) / (time.perf_counter() - start)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="poolformer_s12", choices=pk.list_models(), metavar="NAME")
    parser.add_argument("--threads", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--requests", type=int, default=64, help="how many images (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=224)
    args = parser.parse_args()

    # Many requests at once: a core each serves more of them than all cores together one after the other
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = pk.create_model(args.model).eval().to(memory_format=torch.channels_last)
    for name, parameter in model.named_parameters():
        if "layer_scale" in name:  # 1e-5 in a new model: the blocks would hardly count
            torch.nn.init.ones_(parameter)
    requests = list(torch.randn(args.requests, 3, args.image_size, args.image_size))

    serve(model, requests[:1], 1)  # the first call prepares the weights
    expected, alone = serve(model, requests, 1)
    answers, together = serve(model, requests, args.threads)
    wrong = sum(not torch.equal(a, b) for a, b in zip(answers, expected, strict=True))
    print(f"1 thread:  {alone:7.1f} images a second")
    print(f"{args.threads} threads: {together:7.1f} images a second")
    print(f"{wrong} of {len(requests)} answers differ from those of one thread")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
