"""Checkpoints of the official code, timm, Hugging Face and mmpretrain, known by their keys and renamed."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .files import FILE_NOTES, import_safetensors, read_checkpoint
from .metaformer import MetaFormerConfig
from .poolformer import HEADS, PoolFormer

__all__ = [
    "FILE_NOTES",
    "CheckpointReport",
    "CheckpointTarget",
    "check_memory",
    "convert_state_dict",
    "download_pretrained",
    "import_safetensors",
    "load_checkpoint",
    "read_checkpoint",
]

_WRAPPERS = ("state_dict", "model", "model_state_dict")
_PREFIXES = r"^(module\.|_orig_mod\.)+"
_OF_ONE_SIZE = (".pos_embed", ".random_matrix", ".token_mixer.fc.weight")  # keys of what fits one image size


@dataclass(frozen=True)
class CheckpointReport:
    """What `load_checkpoint` did.

    ``source`` is ``"official"``, ``"timm"``, ``"huggingface"`` or ``"mmpretrain"``; of a detector or
    segmenter ``"mmdetection"``, ``"mmsegmentation"`` or, under this package's names,
    ``"poolformer_kernels"``.
    ``head_mode`` is the one set on the model, None for a detector or segmenter. ``not_in_model`` are keys of
    the file that the model has no use for (a classifier, for a model without), ``not_in_file`` keys of the
    model that kept their values (the output norms of ``features_only``).
    """

    source: str
    head_mode: str | None
    not_in_model: tuple[str, ...]
    not_in_file: tuple[str, ...]


class CheckpointTarget(nn.Module):
    """What a model that is no PoolFormer but holds one gives `load_checkpoint`, beside its own state dict.

    The detectors and segmenters of `poolformer_kernels.dense` derive from it.
    """

    class_keys: tuple[str, ...]  # keys of the tensors whose first size depends on the number of classes

    def checkpoint_name(self) -> str:
        """How an error names the model: ``"RetinaNet on poolformer_s12"``."""
        raise NotImplementedError

    def from_checkpoint(self, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
        """A file's tensors, `without_prefixes`, under the names of ``state_dict()``, and the file's source.

        Raises:
            ValueError: the file is of another kind of model.
        """
        raise NotImplementedError

    def count_classes(self, tensors: dict[str, Tensor]) -> int:
        """The number of classes of tensors that are under the names of ``state_dict()``."""
        raise NotImplementedError


def convert_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """A state dict of any of the four sources, under our (the official) keys; the tensors are not copied.

    Accepts the wrappers ``{"state_dict": ...}``, ``{"model": ...}`` and ``{"model_state_dict": ...}`` and the
    key prefixes that DistributedDataParallel (``module.``) and torch.compile (``_orig_mod.``) leave, and
    backbones without a head. A key that its source's PoolFormer does not have is kept as it is.

    Raises:
        TypeError: not a mapping of strings to tensors.
        ValueError: keys of none of the sources.
    """
    return recognise(tensors_of(state_dict))[0]


def load_checkpoint(model: PoolFormer | CheckpointTarget, path: str | PathLike[str]) -> CheckpointReport:
    """Load weights of any of the four sources into a model, and set the head mode that belongs to it.

    timm's weights are evaluated with head mode ``"timm"``, the others with ``"official"``; a file that our
    own ``torch.save(model.state_dict(), path)`` or `poolformer-kernels train` wrote remembers its mode. The
    file must have every parameter of the model in its shape and no other, with two exceptions that the report
    lists: a classifier is not used by a model with ``num_classes=0`` or ``features_only``, and the output
    norms of ``features_only`` may be missing, as they are from every classification checkpoint. On any error
    the model is unchanged.

    A detector or segmenter of `poolformer_kernels.dense` takes the official files of mmdetection and
    mmsegmentation, and those with its own names. ImageNet's weights go into its backbone::

        load_checkpoint(create_detector("retinanet"), "retinanet_poolformer_s12_fpn_1x_coco.pth")
        load_checkpoint(create_detector("retinanet").backbone.body, "poolformer_s12.pth.tar")

    Args:
        model: from `create_model`, `create_detector` or `create_segmenter`.
        path: ``.safetensors``, or anything that ``torch.load(weights_only=True)`` reads (.pth, .pth.tar,
            .bin, ...). Or a folder that transformers' ``save_pretrained`` wrote: ``model.safetensors`` or
            ``pytorch_model.bin``, whole or in several files with an index. Its ``config.json`` is not read.

    Raises:
        TypeError: model is none of these, or the file does not hold tensors.
        FileNotFoundError: no such file, or none of these in the folder.
        ValueError: an unreadable file, or one whose keys or shapes do not fit, naming the first that do not;
            or a model on the device ``meta``.
        ImportError: a .safetensors file without the package safetensors.
    """
    if not isinstance(model, (PoolFormer, CheckpointTarget)):
        raise TypeError(
            "model must be a detector or segmenter of poolformer_kernels.dense, or a"
            f" poolformer_kernels.models.PoolFormer, got {type(model).__name__}"
        )
    check_memory(model)
    path = Path(path)
    try:
        return load_content(model, read_checkpoint(path))
    except (TypeError, ValueError) as error:
        raise type(error)(f"checkpoint {path}: {error}") from error


def check_memory(model: nn.Module) -> None:
    """Raises an error where the model has no memory to load weights into."""
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("the model is on the device meta, which has no memory; allowed: another device")


def load_content(model: PoolFormer | CheckpointTarget, content: object) -> CheckpointReport:
    """`load_checkpoint` of what `read_checkpoint` returned.

    Raises:
        TypeError, ValueError: see `load_checkpoint`; the model is unchanged.
    """
    state_dict = tensors_of(content)
    if isinstance(model, CheckpointTarget):
        converted, source = model.from_checkpoint(without_prefixes(state_dict))
        _check_target_fit(model, converted)
        model.load_state_dict(converted)
        return CheckpointReport(source, None, (), ())
    converted, source = recognise(state_dict)
    unused, kept = check_fit(model, converted)
    head_mode = noted_head_mode(state_dict) or usual_head_mode(source)
    head_mode = head_mode if head_mode in model.heads else model.heads[0]
    model.load_state_dict({key: value for key, value in converted.items() if key not in unused}, strict=False)
    model.head_mode = head_mode
    return CheckpointReport(source, head_mode, tuple(unused), tuple(kept))


def download_pretrained(repo_id: str) -> str:
    """The local path of a repository's ``model.safetensors`` on the Hugging Face hub, downloaded if need be.

    Raises:
        ImportError: the package huggingface_hub is missing.
        ConnectionError: the hub cannot be reached, or does not have the file.
    """
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ImportError(
            "pretrained=True needs the package huggingface_hub: pip install huggingface_hub"
        ) from error
    import_safetensors()
    try:
        return hf_hub_download(repo_id, "model.safetensors")
    except Exception as error:  # the client's errors have had no common base class over its versions
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConnectionError(
            f"pretrained=True: cannot get model.safetensors of {repo_id} from the Hugging Face hub:"
            f" {first_line}; offline, pass a local file as checkpoint"
        ) from error


# ---- reading -----------------------------------------------------------------------------------------------


def tensors_of(state_dict: object) -> Mapping[str, Tensor]:
    """The mapping of names to tensors itself, out of the wrappers it came in."""
    if isinstance(state_dict, Mapping):
        wrapped = (state_dict[key] for key in _WRAPPERS if isinstance(state_dict.get(key), Mapping))
        state_dict = next(wrapped, state_dict)
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping of names to tensors, got {type(state_dict).__name__}")
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise TypeError(f"state_dict must map names to tensors, got {type(value).__name__} at {key!r}")
    return state_dict


def without_prefixes(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the prefixes that DistributedDataParallel and torch.compile put before names."""
    return {re.sub(_PREFIXES, "", key): value for key, value in state_dict.items()}


def noted_classes(content: object) -> tuple[str, ...] | None:
    """The names of the classes that a file has, or None: mmcv's ``meta["CLASSES"]``, or our own note.

    Args:
        content: what `read_checkpoint` returned.
    """
    meta = content.get("meta") if isinstance(content, Mapping) else None
    names = meta.get("CLASSES") if isinstance(meta, Mapping) else None
    if names is None and isinstance(content, Mapping):
        names = next(_notes(content, "classes"), None)
    if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
        return tuple(names)
    return None


def noted(content: object, name: str, kind: type | tuple[type, ...]) -> object | None:
    """What `poolformer-kernels train` noted under a name in a .safetensors file, or None.

    Args:
        content: what `read_checkpoint` returned.
        kind: of the value; another is not taken.
    """
    values = _notes(content, name) if isinstance(content, Mapping) else ()
    return next((value for value in values if isinstance(value, kind)), None)


def noted_head_mode(state_dict: Mapping[str, Tensor]) -> str | None:
    """The head mode that our own models write into their state dict's metadata, if it is there."""
    return next((mode for mode in _notes(state_dict, "head_mode") if mode in HEADS), None)


def usual_head_mode(source: str) -> str:
    """The head mode in which the code that a checkpoint's names belong to evaluates it."""
    return "timm" if source == "timm" else "official"


def noted_structure(state_dict: Mapping[str, Tensor]) -> str | None:
    """How the model of ours that wrote the state dict differs from a PoolFormer, or None: it is not said."""
    return next((text for text in _notes(state_dict, "structure") if isinstance(text, str)), None)


def _notes(state_dict: Mapping[str, Tensor], name: str) -> Iterator[object]:
    """What the metadata has under a name, of the model or, where it was wrapped, of a module in it."""
    metadata = getattr(state_dict, "_metadata", None)
    entries = metadata.values() if isinstance(metadata, Mapping) else ()
    return (entry[name] for entry in entries if isinstance(entry, Mapping) and name in entry)


# ---- renaming ----------------------------------------------------------------------------------------------

# (the other code's name, ours), for both directions. A stage of theirs, 0 to 3, is two entries of `network`
# in ours: its blocks at 2 * stage, and before them, but for the first stage, its downsample at 2 * stage - 1.
TIMM = (
    ("stem.conv.{name}", "patch_embed.proj.{name}"),
    ("stem.norm.{name}", "patch_embed.norm.{name}"),
    ("stages.{stage}.downsample.conv.{name}", "network.{downsample}.proj.{name}"),
    ("stages.{stage}.downsample.norm.{name}", "network.{downsample}.norm.{name}"),
    ("stages.{stage}.blocks.{i}.layer_scale{n}.scale", "network.{blocks}.{i}.layer_scale_{n}"),
    ("stages.{stage}.blocks.{i}.res_scale{n}.scale", "network.{blocks}.{i}.res_scale_{n}"),
    ("stages.{stage}.blocks.{i}.norm{n}.{name}", "network.{blocks}.{i}.norm{n}.{name}"),
    ("stages.{stage}.blocks.{i}.mlp.fc{n}.{name}", "network.{blocks}.{i}.mlp.fc{n}.{name}"),
    ("stages.{stage}.blocks.{i}.mlp.act.{name}", "network.{blocks}.{i}.mlp.act.{name}"),
    ("head.norm.{name}", "norm.{name}"),
    ("head.fc.{name}", "head.{name}"),
)
HUGGINGFACE = (
    ("encoder.patch_embeddings.0.projection.{name}", "patch_embed.proj.{name}"),
    ("encoder.patch_embeddings.{stage}.projection.{name}", "network.{downsample}.proj.{name}"),
    ("encoder.block.{stage}.{i}.layer_scale_{n}", "network.{blocks}.{i}.layer_scale_{n}"),
    ("encoder.block.{stage}.{i}.before_norm.{name}", "network.{blocks}.{i}.norm1.{name}"),
    ("encoder.block.{stage}.{i}.after_norm.{name}", "network.{blocks}.{i}.norm2.{name}"),
    ("encoder.block.{stage}.{i}.output.conv{n}.{name}", "network.{blocks}.{i}.mlp.fc{n}.{name}"),
    ("norm.{name}", "norm.{name}"),
    ("classifier.{name}", "head.{name}"),
)
# (a key that only this kind of model has, the kind, the source)
_DENSE_KEYS = (
    ("bbox_head.retina_cls.weight", "RetinaNet", "mmdetection"),
    ("roi_head.bbox_head.fc_cls.weight", "Mask R-CNN", "mmdetection"),
    ("decode_head.scale_heads.0.0.conv.weight", "Semantic FPN", "mmsegmentation"),
    ("head.classification_head.cls_logits.weight", "RetinaNet", "poolformer_kernels"),
    ("roi_heads.box_predictor.cls_score.weight", "Mask R-CNN", "poolformer_kernels"),
    ("scale_heads.0.0.weight", "Semantic FPN", "poolformer_kernels"),
)
_FIELDS = {
    "stage": r"[0-3]",
    "blocks": r"[0246]",
    "downsample": r"[135]",
    "i": r"\d+",
    "n": r"[12]",
    "name": r"\w+",
    "rest": r".+",
}


@cache
def _pattern(template: str) -> re.Pattern[str]:
    """The regular expression of the names that a template of the tables stands for, one group a field."""
    return re.compile(re.sub(r"\\{(\w+)\\}", lambda m: f"(?P<{m[1]}>{_FIELDS[m[1]]})", re.escape(template)))


def rename(key: str, rules: Iterable[tuple[str, str]]) -> str | None:
    """The name on the right side of the first rule whose left side the key fits, or None if it fits none."""
    for left, right in rules:
        match = _pattern(left).fullmatch(key)
        if match:
            fields = match.groupdict()
            if "stage" in fields:
                stage = int(fields["stage"])
                fields |= {"blocks": str(2 * stage), "downsample": str(2 * stage - 1)}
            elif "blocks" in fields or "downsample" in fields:
                fields["stage"] = str((int(fields.get("blocks") or fields.get("downsample")) + 1) // 2)
            return right.format(**fields)
    return None


def dense_kind(tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """(kind, source) where the tensors, `without_prefixes`, are a detector's or segmenter's, else None."""
    return next(((kind, source) for key, kind, source in _DENSE_KEYS if key in tensors), None)


def recognise(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The tensors under our keys, and the name of the source."""
    tensors = without_prefixes(state_dict)
    dense = dense_kind(tensors)
    if dense is not None:
        raise ValueError(
            f"it is of a {dense[0]}, under the names of {dense[1]}; allowed: a classifier's or a backbone's"
            " keys, or load it into a detector or segmenter of poolformer_kernels.dense"
        )
    if "stem.conv.weight" in tensors:
        # feature extractors of timm have stages_0 for stages.0
        tensors = {re.sub(r"^stages_(?=\d)", "stages.", key): value for key, value in tensors.items()}
        return {rename(key, TIMM) or key: value for key, value in tensors.items()}, "timm"
    plain = {key.removeprefix("poolformer."): value for key, value in tensors.items()}
    if "encoder.patch_embeddings.0.projection.weight" in plain:
        return {rename(key, HUGGINGFACE) or key: value for key, value in plain.items()}, "huggingface"
    if "backbone.patch_embed.proj.weight" in tensors:
        ours = {key.removeprefix("backbone."): value for key, value in tensors.items()}
        # norm6 belongs to the last stage: a classifier's final norm, unless norm0 marks a dense backbone
        final = "norm6." if "norm0.weight" in ours else "norm."
        rules = (("norm6.{name}", final + "{name}"), ("head.fc.{name}", "head.{name}"))
        return {rename(key, rules) or key: value for key, value in ours.items()}, "mmpretrain"
    if "patch_embed.proj.weight" in tensors:
        return tensors, "official"
    first = f"its first key is {next(iter(tensors))!r}" if tensors else "it is empty"
    raise ValueError(
        f"not a PoolFormer checkpoint: {first}; allowed: keys of the official code (patch_embed.proj.weight),"
        " timm (stem.conv.weight), Hugging Face (poolformer.encoder.patch_embeddings.0.projection.weight)"
        " or mmpretrain (backbone.patch_embed.proj.weight)"
    )


# ---- checking ----------------------------------------------------------------------------------------------


def check_fit(model: PoolFormer, tensors: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """The file's keys that are not used and the model's that keep their values; an error if more differs."""
    own = model.state_dict()
    headless = ("norm.", "head.") if model.features_only else ("head.",) if model.num_classes == 0 else ()
    optional = ("norm0.", "norm2.", "norm4.", "norm6.") if model.features_only else ()
    headless += _left_out(model)
    missing = [key for key in own if key not in tensors]
    unexpected = [key for key in tensors if key not in own]
    unused = [key for key in unexpected if key.startswith(headless)]
    kept = [key for key in missing if key.startswith(optional)]
    problems, wrong = _differences(own, tensors, {*unused, *kept})
    if problems:
        message = f"does not fit {model.config.name}: {'; '.join(problems)}"
        sizes = [weights["head.weight"].shape[1:] for weights in (own, tensors) if "head.weight" in weights]
        of_classes = wrong[:1] == ["head.weight"] and sizes[0] == sizes[1]
        if not missing and not unexpected and of_classes:
            message += f" (load with num_classes={len(tensors['head.weight'])}, then call reset_classifier)"
        if isinstance(model.config, MetaFormerConfig) and any(key.endswith(_OF_ONE_SIZE) for key in wrong):
            message += f" (the model is for image_size={model.config.image_sides}: make it for the file's)"
        raise ValueError(message)
    return unused, kept


def _left_out(model: PoolFormer) -> tuple[str, ...]:
    """What begins the keys of whole backbones that a model with ``out_indices`` has not."""
    if not model.features_only:
        return ()
    stages = len(model.config.dims)
    norms = (2 * stage for stage in range(stages) if stage not in model.feature_info.out_indices)
    network = range(len(model.network), 3 * stages)
    return *(f"norm{i}." for i in norms), *(f"network.{i}." for i in network)


def _check_target_fit(model: CheckpointTarget, tensors: dict[str, Tensor]) -> None:
    """An error unless the tensors have every key of the model in its shape, and no other."""
    own = model.state_dict()
    problems, wrong = _differences(own, tensors, set())
    if not problems:
        return
    message = f"does not fit {model.checkpoint_name()}: {'; '.join(problems)}"
    of_classes = all(
        key in model.class_keys and own[key].shape[1:] == tensors[key].shape[1:] for key in wrong
    )
    if len(problems) == 1 and wrong and of_classes:
        classes, others = model.count_classes(own), model.count_classes(tensors)
        message += f" (the model has {classes} classes: make it with num_classes={others})"
    raise ValueError(message)


def _differences(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], excused: set[str]
) -> tuple[list[str], list[str]]:
    """(what is wrong with the tensors of a file, in words; the keys whose shape is another)."""
    problems = []
    missing = [key for key in own if key not in tensors and key not in excused]
    unexpected = [key for key in tensors if key not in own and key not in excused]
    for what, keys in (("missing", missing), ("unexpected", unexpected)):
        if keys:
            problems.append(f"{len(keys)} {what} keys, the first {keys[0]}")
    wrong = [key for key in own if key in tensors and own[key].shape != tensors[key].shape]
    if wrong:
        first = wrong[0]
        shapes = f"{list(tensors[first].shape)} in the file, {list(own[first].shape)} in the model"
        problems.append(f"{len(wrong)} keys of another shape, the first {first}: {shapes}")
    return problems, wrong
