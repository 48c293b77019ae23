"""Accelerated models in DistributedDataParallel and FSDP2: the gradients of the joined batch."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.accelerate import DEPTHS, image, make_model
from support.peers import relative_error
from support.processes import python
from torch.nn.functional import cross_entropy


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")
def test_two_processes_find_the_gradients_of_the_joined_batch(kernels, tmp_path):
    model = make_model("official").train()
    x, labels = torch.cat([image(seed=0), image(seed=1)]), torch.tensor([0, 3, 6, 2])
    files = [str(tmp_path / name) for name in ("meeting", "given", "found")]
    torch.save((model, x, labels), files[1])
    python(Path(__file__).with_name("support") / "workers" / "accelerate.py", *files)
    model.double()
    loss = cross_entropy(model(x.double()), labels)
    names, parameters = zip(*model.named_parameters(), strict=True)
    right = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    found = torch.load(files[2])
    assert [*found] == ["ddp", "fsdp_later", "fsdp_first"]
    for wrapper, given in found.items():
        assert given.pop("calls") == 2 * sum(DEPTHS), wrapper
        assert given.pop("explained") == f"{2 * sum(DEPTHS)} of {2 * sum(DEPTHS)} on cpp", wrapper
        assert given.keys() == right.keys()
        for name, gradient in given.items():
            if name.endswith("norm1.bias"):  # zero but for rounding errors: pooling keeps constants
                assert gradient.abs().max() <= 1e-6, (wrapper, name)
            else:
                assert relative_error(gradient, right[name]) <= 1e-5, (wrapper, name)
