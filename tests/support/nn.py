"""What the tests of the block and the stage share: random blocks, the official formula, gradients."""

import torch
import torch.nn.functional as F
from torch import nn

from poolformer_kernels.nn import PoolFormerBlock
from support.peers import randomise


def official_block(block, x, pool_size=3, masks=(1.0, 1.0)):
    """The paper's block from this block's parameters, in the dtype of x or as autocast decides."""
    p = dict(block.named_parameters())
    one = torch.ones(())
    s1, s2 = (p.get(f"layer_scale_{i}", one).view(-1, 1, 1) for i in (1, 2))
    m1, m2 = (torch.as_tensor(m, dtype=x.dtype).view(-1, 1, 1, 1) for m in masks)
    n = F.group_norm(x, 1, p["norm1.weight"], p["norm1.bias"], 1e-5)
    x = x + m1 * (s1 * (F.avg_pool2d(n, pool_size, 1, pool_size // 2, count_include_pad=False) - n))
    n = F.group_norm(x, 1, p["norm2.weight"], p["norm2.bias"], 1e-5)
    h = F.gelu(F.conv2d(n, p["mlp.fc1.weight"], p["mlp.fc1.bias"]))
    return x + m2 * (s2 * F.conv2d(h, p["mlp.fc2.weight"], p["mlp.fc2.bias"]))


def make_block(dim=12, seed=0, **options):
    torch.manual_seed(seed)
    block = randomise(PoolFormerBlock(dim, **options))
    for conv in (block.mlp.fc1, block.mlp.fc2):
        nn.init.normal_(conv.weight, std=0.3)
    return block


def gradients(function, block, x, grad):
    """The output, dx and every parameter's gradient."""
    x = x.detach().requires_grad_()
    y = function(block, x)
    grads = torch.autograd.grad(y, [x, *block.parameters()], grad.to(y.dtype))
    names = ["y", "dx", *(name for name, _ in block.named_parameters())]
    return dict(zip(names, [y.detach(), *grads], strict=True))
