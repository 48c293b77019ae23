"""A checkpoint under another code base's names: `poolformer-kernels export FILE --to timm --out FILE`."""

import argparse
import io
from pathlib import Path

import torch
from torch import Tensor

from ..models import model_config
from ..models.checkpoints import import_safetensors, read_checkpoint
from ..models.export import Weights, read_weights
from .errors import CommandError
from .files import check_writable, write_whole

__all__ = ["run"]

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_HEADS = {
    "official": "{norm}, then the mean over pixels",
    "timm": "the mean over pixels, then LayerNorm",
}
_OF_TARGET = {"official": "official", "transformers": "official", "timm": "timm"}  # its head mode
_CODE = {
    "official": "the official code",
    "mmpretrain": "mmpretrain",
    "huggingface": "transformers",
    "transformers": "transformers",
    "timm": "timm",
}


def run(args: argparse.Namespace) -> int:
    """The command: reads, renames, writes, and says what the target's head does to the logits. Returns 0."""
    out = Path(args.out)
    _check_out(out, args.force)
    if args.model is not None:
        try:
            model_config(args.model)
        except ValueError as error:
            raise CommandError(f"--model: {error}") from None
    try:
        weights = read_weights(read_checkpoint(Path(args.file)), args.model)
        tensors = weights.renamed(args.to)
    except (FileNotFoundError, ImportError) as error:  # they name the file or the package themselves
        raise CommandError(str(error)) from None
    except (TypeError, ValueError) as error:
        raise CommandError(f"checkpoint {args.file}: {error}") from None
    write(out, tensors)
    print(f"read     {args.file}: {_model(weights)}, under the names of {_CODE[weights.source]}")
    may_be_another = args.model is None and weights.structure is None and weights.family == "PoolFormer"
    if may_be_another and weights.source in ("official", "mmpretrain"):
        print(
            "         Another token mixer without weights, pool size, norm or activation would have the same"
            " names: --model NAME says what the weights are of."
        )
    print(f"written  {out}: {len(tensors)} tensors, for {_call(weights, args.to)}")
    print(f"head     {_head(weights, args.to)}")
    return 0


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as safetensors or, for any other suffix, by `torch.save`: see `write_whole`.

    Raises:
        CommandError: it cannot be written; what was at its place still is.
        ImportError: a .safetensors file without the package safetensors.
    """
    # Each tensor in memory of its own: safetensors refuses shared memory, torch.save writes all of it.
    copies = {
        key: value.detach().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()
    }
    if path.suffix == ".safetensors":
        import_safetensors()
        from safetensors.torch import save

        content = save(copies, metadata={"format": "pt"})  # without it, transformers refuses the file
    else:
        buffer = io.BytesIO()
        torch.save(copies, buffer)
        content = buffer.getbuffer()
    write_whole(path, content)


def _check_out(out: Path, force: bool) -> None:
    """Fail before the work, not after it."""
    if out.suffix not in SUFFIXES:
        raise CommandError(f"--out {out}: the suffix is {out.suffix!r}; allowed: {', '.join(SUFFIXES)}")
    if out.is_dir():
        raise CommandError(f"--out {out} is a folder; allowed: a file")
    if (out.exists() or out.is_symlink()) and not force:
        raise CommandError(f"--out {out} exists; allowed: a new file, or --force to overwrite it")
    check_writable(out)
    if out.suffix == ".safetensors":
        try:
            import_safetensors()
        except ImportError as error:
            raise CommandError(str(error)) from None


def _model(weights: Weights) -> str:
    """What the weights are of, in words."""
    if weights.config is None:
        name = f"a MetaFormer with {weights.structure}"
    else:
        name = weights.name or weights.config.name
    parts = [name, f"{weights.in_chans} input channels"]
    parts.append(f"{weights.num_classes} classes" if weights.num_classes else "no classifier")
    return ", ".join(parts)


def _call(weights: Weights, to: str) -> str:
    """The call that makes the model which the written names belong to."""
    classes = f"num_classes={weights.num_classes}"
    channels = "" if weights.in_chans == 3 else f", in_chans={weights.in_chans}"
    config = weights.config
    if to == "transformers":
        channels = "" if weights.in_chans == 3 else f", num_channels={weights.in_chans}"
        sizes = f"depths={list(config.layers)}, hidden_sizes={list(config.dims)}"
        options = f"{sizes}, num_labels={weights.num_classes}{channels}"
        call = f"PoolFormerForImageClassification(PoolFormerConfig({options}))"
    elif to == "timm":
        call = f'timm.create_model("{weights.name}", {classes}{channels})'
        if weights.name is None:
            sizes = f"depths={config.layers}, dims={config.dims}, {classes}{channels}"
            call = (
                f"timm.models.metaformer.MetaFormer with {sizes} and the options of timm's {weights.family}"
            )
    elif weights.family == "PoolFormer":
        call = f"sail-sg/poolformer's {weights.name or 'PoolFormer'} with {classes}{channels}"
    elif weights.family == "PoolFormerV2":
        call = "this package's PoolFormerV2, whose own repository, sail-sg/metaformer, has other names"
    else:
        call = f"this package's {weights.name or 'MetaFormer'} and sail-sg/poolformer's MetaFormers"
    if "norm.weight" not in weights.tensors:
        call += "; it has neither a final norm nor a classifier: load with strict=False"
    return call


def _head(weights: Weights, to: str) -> str:
    """How the head was evaluated, how the target does it, and whether the logits stay what they were."""
    if "norm.weight" not in weights.tensors:
        return "none: the weights are those of a backbone."
    result = "logits" if weights.num_classes else "pooled features"
    same = f"The {result} stay the same, up to rounding."
    if weights.family == "PoolFormerV2":
        return f"PoolFormerV2 has one way only: {_HEADS['timm']}. {same}"
    norm = "the final norm" if weights.family == "MetaFormer" else "GroupNorm"
    heads = {mode: text.format(norm=norm) for mode, text in _HEADS.items()}
    before, after = weights.head_mode, _OF_TARGET[to]
    if weights.head_noted:
        known = f'noted in the file as "{before}": {heads[before]}.'
    else:
        known = f'not noted in the file, so that of {_CODE[weights.source]}, "{before}": {heads[before]}.'
    target = "The official code" if to == "official" else to
    if before == after:
        return f"{known} {target} does the same. {same}"
    return (
        f'{known} {target} evaluates the same weights the other way, "{after}": {heads[after]}. The {result}'
        f' there differ from those of this file (our models compute both: head="{before}" as in this file).'
    )
