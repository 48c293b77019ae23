"""The model of a run: ours by name, or timm's, accelerated or plain; stochastic depth with keyed draws."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..accelerate import accelerate
from ..models import (
    ModelConfig,
    PoolFormer,
    convert_state_dict,
    create_model,
    list_models,
    load_checkpoint,
    model_config,
)
from ..models.checkpoints import noted_head_mode, read_checkpoint, recognise, tensors_of, usual_head_mode
from ..models.export import export_state_dict
from ..models.poolformerv2 import PoolFormerV2
from ..models.registry import model_class
from ..nn import DropPath
from .data import ImageNorm, key
from .recipe import Recipe, RecipeError, RecipeFields

__all__ = ["DIGITS", "StochasticDepth", "build", "image_norm"]

# of 32 x 32 images: maps of 8, 4, 2 and 1 pixels a side
DIGITS = ModelConfig(
    "poolformer_digits", (1, 1, 2, 1), (32, 64, 128, 256), 0.1, 0.0, None, 1.0, input_size=32
)
_CALLS = 4  # of a DropPath in one forward, at most: two sub-blocks, or two and two more inside the MLP


def config_of(name: str) -> ModelConfig:
    """The configuration of one of our models.

    Raises:
        RecipeError: no such model.
    """
    if name == DIGITS.name:
        return DIGITS
    try:
        return model_config(name)
    except ValueError as error:
        allowed = f"{', '.join(list_models())}, {DIGITS.name}, timm:NAME"
        close = str(error).rpartition(" (did you mean")
        raise RecipeError(
            f"model is {name!r}; allowed: {allowed}{'' if not close[0] else close[1] + close[2]}"
        ) from None


def image_norm(model: nn.Module, recipe: Recipe) -> ImageNorm:
    """How the images of a run are prepared: as the model says, where the recipe does not.

    ``model`` is what `build` made; only of timm's it is asked.
    """
    if not recipe.model.startswith("timm:"):
        config = config_of(recipe.model)
        own = {
            "size": config.input_size,
            "mean": config.mean,
            "std": config.std,
            "interpolation": config.interpolation,
            "crop_pct": config.crop_pct,
        }
    else:
        from timm.data import resolve_data_config

        found = resolve_data_config(model=model)
        own = {
            "size": found["input_size"][-1],
            "mean": found["mean"],
            "std": found["std"],
            "interpolation": found["interpolation"],
            "crop_pct": found["crop_pct"],
        }
    given = {"size": recipe.image_size, "interpolation": recipe.interpolation, "crop_pct": recipe.crop_pct}
    return ImageNorm(**{**own, **{name: value for name, value in given.items() if value is not None}})


def complete(recipe: Recipe) -> Recipe:
    """The recipe with the model's own choices filled in where it had None.

    Raises:
        RecipeError: no such model, or a checkpoint that cannot be read.
    """
    name = recipe.model.removeprefix("timm:")
    if recipe.head is None:
        recipe = replace(recipe, head=_head_of(recipe))
    if recipe.drop_path is not None:
        return recipe
    if name != recipe.model and name not in list_models():
        return replace(recipe, drop_path=0.1)
    return replace(recipe, drop_path=config_of(name).drop_path_rate)


def _head_of(recipe: Recipe) -> str:
    """The head that the weights of a run are for: a checkpoint's, else the model's first."""
    if recipe.eager or recipe.model.startswith("timm:"):
        return "timm"
    config = config_of(recipe.model)
    if model_class(config) is PoolFormerV2:
        return "timm"
    if recipe.checkpoint is None:
        return "official"
    tensors = _read(recipe.checkpoint)
    return noted_head_mode(tensors) or usual_head_mode(recognise(tensors)[1])


def _read(path: str) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint under the names that they have there."""
    try:
        tensors = tensors_of(read_checkpoint(Path(path)))
        recognise(tensors)
    except (OSError, TypeError, ValueError, ImportError) as error:
        text = str(error)
        raise RecipeError(text if text.startswith("checkpoint") else f"checkpoint {path}: {text}") from None
    return tensors


def build(recipe: Recipe, classes: int, new_classifier: bool = True) -> nn.Module:
    """The model of a recipe with its initial weights, in channels_last: a function of the seed alone.

    Args:
        new_classifier: where a checkpoint's is of another number of classes, a new one takes its place.

    Raises:
        RecipeError: an unknown model, one that no kernel accelerates, or a checkpoint that does not fit.
    """
    recipe = complete(recipe)
    torch.manual_seed(key(recipe.seed, "weights"))
    if recipe.checkpoint is not None and not new_classifier:
        found = convert_state_dict(_read(recipe.checkpoint)).get("head.weight")
        if found is not None and len(found) != classes:
            raise RecipeError(f"checkpoint {recipe.checkpoint} has {len(found)} classes, the data {classes}")
    model = _timm_model(recipe, classes) if recipe.model.startswith("timm:") else _our_model(recipe, classes)
    return model.to(memory_format=torch.channels_last)


def _our_model(recipe: Recipe, classes: int) -> nn.Module:
    config = config_of(recipe.model)
    drop_path = recipe.drop_path or 0.0
    try:
        if config is DIGITS:
            model = PoolFormer(DIGITS, num_classes=classes, head=recipe.head, drop_path_rate=drop_path)
        else:
            model = create_model(recipe.model, classes, head=recipe.head, drop_path_rate=drop_path)
    except ValueError as error:
        raise RecipeError(f"model {recipe.model}: {error}") from None
    if recipe.checkpoint is not None:
        _load(model, recipe.checkpoint, classes, recipe.head)
    return _as_timm(model, recipe, classes) if recipe.eager else model


def _load(model: PoolFormer, path: str, classes: int, head: str) -> None:
    """Weights of a file; of another number of classes, all but the classifier's."""
    fresh = model.head
    found = convert_state_dict(_read(path)).get("head.weight")
    try:
        if found is not None and found.dim() == 2 and len(found) != classes:
            model.reset_classifier(len(found))
        load_checkpoint(model, path)
    except (OSError, TypeError, ValueError, ImportError) as error:
        raise RecipeError(str(error)) from None
    if model.num_classes != classes:
        model.head, model.num_classes = fresh, classes
    model.head_mode = head


def _as_timm(model: PoolFormer, recipe: Recipe, classes: int) -> nn.Module:
    """timm's plain modules with the weights of ours."""
    import timm
    from timm.models.metaformer import GroupNorm1, MetaFormer, checkpoint_filter_fn

    config = model.config
    drop_path = recipe.drop_path or 0.0
    if config is DIGITS:
        plain = MetaFormer(
            depths=config.layers,
            dims=config.dims,
            downsample_norm=None,
            mlp_act=nn.GELU,
            mlp_bias=True,
            norm_layers=GroupNorm1,
            layer_scale_init_values=config.layer_scale_init,
            res_scale_init_values=None,
            use_mlp_head=False,
            num_classes=classes,
            drop_path_rate=drop_path,
        )
    else:
        try:
            plain = timm.create_model(config.name, num_classes=classes, drop_path_rate=drop_path)
        except RuntimeError as error:
            raise RecipeError(
                f"model {config.name}: timm has none of this name, which eager needs: {error}"
            ) from None
    plain.load_state_dict(checkpoint_filter_fn(dict(model.state_dict()), plain))
    _key_drop_paths(plain)
    return plain


def _timm_model(recipe: Recipe, classes: int) -> nn.Module:
    import timm

    name = recipe.model.removeprefix("timm:")
    if not timm.is_model(name):
        raise RecipeError(f"model is {recipe.model!r}; allowed after timm: a name of timm.list_models()")
    model = timm.create_model(name, num_classes=classes, drop_path_rate=recipe.drop_path or 0.0)
    if recipe.checkpoint is not None:
        _load_timm(model, recipe.checkpoint)
    _key_drop_paths(model)
    if recipe.eager:
        return model
    try:
        return accelerate(model)
    except ValueError as error:
        raise RecipeError(f"model {recipe.model}: {error}; allowed without eager: a PoolFormer") from None


def _load_timm(model: nn.Module, path: str) -> None:
    """Weights of any of the four sources, or of another of timm's models under timm's names."""
    from timm.models import load_state_dict

    try:
        try:
            weights = export_state_dict(read_checkpoint(Path(path)), "timm")
        except (TypeError, ValueError):
            weights = load_state_dict(path, device="cpu", weights_only=True)
        own = model.state_dict()
        weights = {
            k: v for k, v in weights.items() if k not in own or own[k].shape == v.shape or "head" not in k
        }
        left = model.load_state_dict(weights, strict=False)
    except Exception as error:  # of the file system, torch, safetensors and timm: the file is at fault
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise RecipeError(f"checkpoint {path}: {reason}") from None
    missing = [name for name in left.missing_keys if "head" not in name]
    if missing or left.unexpected_keys:
        first = (missing or left.unexpected_keys)[0]
        raise RecipeError(f"checkpoint {path} does not fit {type(model).__name__}: the first key is {first}")


# ---- stochastic depth --------------------------------------------------------------------------------------


def _key_drop_paths(model: nn.Module) -> None:
    """Puts our DropPath, whose draws can be given, in the place of timm's."""
    for parent in model.modules():
        for name, module in parent.named_children():
            if type(module).__name__ == "DropPath" and not isinstance(module, DropPath):
                setattr(parent, name, DropPath(float(module.drop_prob or 0.0)))


class StochasticDepth:
    """The draws of all DropPaths of a model by (seed, step, position in the step's batch).

    A block has them row by row in the order of its sub-blocks, whether it has one DropPath that both call or
    one for each: so our block and timm's drop the same paths.
    """

    def __init__(
        self, model: nn.Module, recipe: RecipeFields, micro_batch: int, device: torch.device
    ) -> None:
        self.seed, self.batch_size = recipe.seed, recipe.batch_size
        blocks = [[m for m in block.children() if isinstance(m, DropPath)] for block in model.modules()]
        blocks = [paths for paths in blocks if any(m.drop_prob > 0 for m in paths)]
        self.modules = [m for paths in blocks for m in paths]
        self._step, self._all = -1, None
        self.uniform = torch.empty(len(blocks), _CALLS, micro_batch, device=device)
        for paths, uniform in zip(blocks, self.uniform, strict=True):
            for i, module in enumerate(paths):
                module.draws = uniform[i :: len(paths)]

    def set(self, step: int, positions: list[int]) -> None:
        """Draws for a micro-batch, before its forward."""
        if not self.modules:
            return
        if step != self._step:
            generator = torch.Generator().manual_seed(key(self.seed, "drop_path", step))
            shape = (len(self.uniform), _CALLS, self.batch_size)
            self._step, self._all = step, torch.rand(shape, generator=generator)
        own = self._all[:, :, positions]
        if self.uniform.is_cuda:
            own = own.pin_memory()  # the host does not wait for the copy
        self.uniform.copy_(own, non_blocking=True)
        for module in self.modules:
            module.calls = 0
