"""The classifier that the tests of Grad-CAM and of the command `cam` share."""

import torch

from poolformer_kernels.models import ModelConfig, PoolFormer
from support.peers import randomise

CLASSES = 5
DIMS = (16, 24, 32, 40)


def tiny(head: str = "official", classes: int = CLASSES, dims=DIMS) -> PoolFormer:
    """Maps of 32, 16, 8 and 4 pixels a side for images of 128."""
    torch.manual_seed(0)
    model = PoolFormer(ModelConfig("tiny", (1, 1, 1, 1), dims, 1e-5, 0.0, None, 1.0), classes, head=head)
    return randomise(model)
