"""Which packages a command needs beyond PyTorch, and the smallest extra of this package that brings them."""

from importlib import import_module

from .errors import CommandError

__all__ = ["NEEDS", "require"]

_TABLES = ("cli", ("rich",))
_BESIDE_TIMM = ("demo", ("PIL", "rich", "timm"))
_TRAINING = ("train", ("matplotlib", "rich", "safetensors", "timm", "yaml"))

NEEDS: dict[str, tuple[str, tuple[str, ...]]] = {  # command: (extra, modules)
    "bench block": _BESIDE_TIMM,
    "bench dense": ("demo", ("PIL", "rich", "timm", "torchvision")),
    "bench host": _BESIDE_TIMM,
    "bench loop": _TRAINING,
    "bench mlp": _TABLES,
    "bench model": _BESIDE_TIMM,
    "bench pool-mixer": _TABLES,
    "bench training": _BESIDE_TIMM,
    "cam": ("cam", ("captum.attr", "matplotlib", "PIL")),
    "demo": _BESIDE_TIMM,
    "predict": ("predict", ("PIL", "torchvision")),
    "profile": _TABLES,
    "train": _TRAINING,
    "validate": _TRAINING,
}


def require(command: str) -> None:
    """Raise `CommandError` unless what a command needs can be imported; it says how to install that."""
    extra, modules = NEEDS.get(command, ("", ()))
    for module in modules:
        try:
            import_module(module)
        except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision beside a torch without CUDA
            raise CommandError(
                f"packages for {command} are missing ({error}): pip install 'poolformer_kernels[{extra}]'"
            ) from None
