"""A MetaFormer with a token mixer of one's own in its last stages, and PoolFormer's pooling in the first.

The mixer makes each pixel the mean of its row and its column, less itself. It is a plain `nn.Module`; the
MLPs, norms and residuals around it stay the package's operators. Prints what runs where, how far the logits
are from plain PyTorch's in float64, and how the loss falls on one random batch. Exit code 1 if the logits
differ by more than rounding, or if the loss does not halve.

    python examples/own_metaformer.py
"""

import argparse
import copy
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import poolformer_kernels as pk


class StripPooling(nn.Module):
    """`y = (mean over the row + mean over the column) / 2 - x`, for maps `[B, C, H, W]`."""

    def __init__(self, dim: int) -> None:  # a mixer with weights would make them for so many channels
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return (x.mean(2, keepdim=True) + x.mean(3, keepdim=True)) / 2 - x


def difference(model: nn.Module, images: Tensor) -> float:
    """How far the logits are from those of the reference, which is plain PyTorch, in float64."""
    with torch.inference_mode():
        found = model.eval()(images)
        with pk.use_backend("reference"):
            expected = copy.deepcopy(model).double()(images.double())
    return ((found - expected).norm() / expected.norm()).item()


def losses(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
    found = []
    for _ in range(steps):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=8, help="of training (default: %(default)s)")
    args = parser.parse_args()

    torch.manual_seed(0)
    mixers = ("pooling", "pooling", StripPooling, StripPooling)  # one for each of the four stages
    model = pk.create_model("metaformer_s12", 10, token_mixers=mixers, layer_scale_init=1.0)
    print(pk.explain(model))

    images, labels = torch.randn(8, 3, 64, 64), torch.arange(8)
    apart = difference(model, images)
    print(f"relative difference of the logits: {apart:.1e}")
    found = losses(model, images, labels, args.steps)
    print(f"loss in {args.steps} steps: {found[0]:.3f} -> {found[-1]:.3f}")
    return 0 if apart < 1e-5 and found[-1] < found[0] / 2 else 1


if __name__ == "__main__":
    sys.exit(main())
