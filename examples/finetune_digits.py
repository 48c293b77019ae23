"""Fine-tunes a small PoolFormer on scikit-learn's handwritten digits, in a minute on a CPU.

There are no weights to download, so it makes its own: a model learns the ten digits on 1200 images, and its
weights are saved. Then comes what one does with any checkpoint: load the file, give the model a new
classifier, here of even and odd digits, and train on 40 other images. A model that starts from random weights
and sees the same 40 is the comparison. Exit code 1 if the fine-tuned one gets less than 85 % of the unseen
images right, or no more than the comparison.

    python examples/finetune_digits.py
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import poolformer_kernels as pk

# of 32 x 32 images: maps of 8, 4, 2 and 1 pixels a side
SMALL = pk.models.ModelConfig("small", (1, 1, 2, 1), (32, 64, 128, 256), 0.1, 0.0, None, 1.0, input_size=32)


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int, body: float, head: float) -> None:
    """With a learning rate for what has been learned already, and one for the classifier."""
    kept = [parameter for name, parameter in model.named_parameters() if not name.startswith("head.")]
    optimizer = torch.optim.AdamW([{"params": kept}, {"params": model.head.parameters()}])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [body, head], total_steps=steps)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(images), (40,))
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.inference_mode():
        return (model.eval()(images).argmax(1) == labels).double().mean().item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="of the first training (default: %(default)s)")
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    images = F.interpolate(images, size=32, mode="bilinear").to(memory_format=torch.channels_last)
    digit = torch.from_numpy(digits.target).long()
    most, few, unseen = slice(0, 1200), slice(1200, 1240), slice(1240, None)

    first, tuned, random = (pk.models.PoolFormer(SMALL, num_classes=n, in_chans=1) for n in (10, 10, 2))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "digits.pth"
        train(first, images[most], digit[most], steps, 2e-3, 2e-3)
        torch.save(first.state_dict(), file)
        pk.load_checkpoint(tuned, file)
    tuned.reset_classifier(2)

    odd = digit % 2
    right = []
    runs = ("the checkpoint", tuned, 1e-5, 1e-2), ("random weights", random, 2e-3, 2e-3)
    for name, model, body, head in runs:
        train(model, images[few], odd[few], 60, body, head)
        right.append(accuracy(model, images[unseen], odd[unseen]))
        print(f"40 images, from {name}: {right[-1]:.1%} of {len(odd[unseen])} unseen images are right")
    return 0 if right[0] >= 0.85 and right[0] > right[1] else 1


if __name__ == "__main__":
    sys.exit(main())
