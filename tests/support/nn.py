"""What the tests of layers share: random blocks, the official formula, gradients, changes that are noted."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from poolformer_kernels.nn import Mlp, PoolFormerBlock, PoolFormerStage
from support.peers import block_formula, randomise
from support.problems import randn

Change = Callable[[nn.Module, list], object]  # of a module; what is called then adds to the list


class OperatorCall(NamedTuple):
    name: str
    args: tuple
    options: dict


def official_block(block, x, masks=(1.0, 1.0)):
    return block_formula(dict(block.named_parameters()), x, block.token_mixer.pool_size, masks)


def official_stage(stage, x):
    for block in stage:
        x = official_block(block, x)
    return x


def make_block(dim=12, seed=0, **options) -> PoolFormerBlock:
    torch.manual_seed(seed)
    block = randomise(PoolFormerBlock(dim, **options))
    for conv in (block.mlp.fc1, block.mlp.fc2):
        nn.init.normal_(conv.weight, std=0.3)
    return block


def make_stage(blocks=3, **options) -> PoolFormerStage:
    return PoolFormerStage(*(make_block(seed=i, **options) for i in range(blocks)))


def make_mlp(*args, seed=0, dtype=torch.float32, **options) -> Mlp:
    mlp = Mlp(*args, **options)
    with torch.no_grad():
        for i, p in enumerate(mlp.parameters()):
            p.copy_(randn(*p.shape, mean=0.1, sigma=0.3, seed=seed + i))
    return mlp.to(dtype)


def gradients(module, x, grad, function=None) -> dict[str, Tensor]:
    """The output, dx and every parameter's gradient, of the module or of ``function(module, x)``."""
    x = x.detach().requires_grad_()
    y = module(x) if function is None else function(module, x)
    grads = torch.autograd.grad(y, [x, *module.parameters()], grad.to(y.dtype))
    names = ["y", "dx", *(name for name, _ in module.named_parameters())]
    return dict(zip(names, [y.detach(), *grads], strict=True))


def saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved_and_loaded,
}

# ---- changes of a part that is named by its path -----------------------------------------------------------


def setting(path: str, value: object) -> Callable[[nn.Module], None]:
    """A change that sets an attribute, or puts in a module."""
    owner, _, name = path.rpartition(".")
    return lambda module: setattr(module.get_submodule(owner), name, value)


_REGISTER = {
    "forward": nn.Module.register_forward_hook,
    "pre": nn.Module.register_forward_pre_hook,
    "backward": nn.Module.register_full_backward_hook,
}


def hook(path: str, kind: str = "forward") -> Change:
    """The change returns the handle that removes the hook."""
    return _named(
        lambda module, fired: _REGISTER[kind](module.get_submodule(path), lambda *_: fired.append(path)),
        f"{kind} hook of {path or 'itself'}",
    )


def instance_forward(path: str) -> Change:
    def change(module, fired):
        part = module.get_submodule(path)
        original = part.forward
        part.forward = lambda x: fired.append(path) or original(x)

    return _named(change, f"forward set on {path or 'itself'}")


def subclass(path: str) -> Change:
    """The part's class becomes one with a forward of its own."""

    def change(module, fired):
        part = module.get_submodule(path)

        class Own(type(part)):
            def forward(self, x):
                fired.append(path)
                return super().forward(x)

        part.__class__ = Own

    return _named(change, f"subclass of {path or 'itself'}")


def _named(change: Change, name: str) -> Change:
    change.__name__ = name  # the test's id
    return change
