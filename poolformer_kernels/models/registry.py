"""The models by name."""

import difflib
from dataclasses import fields
from fnmatch import fnmatchcase
from typing import Any

from .metaformer import METAFORMER_CONFIGS, MetaFormer, MetaFormerConfig
from .poolformer import CONFIGS, ModelConfig, PoolFormer
from .poolformerv2 import CONFIGS_V2, PoolFormerV2

__all__ = ["list_models", "model_class", "model_config", "structured"]

_CONFIGS = {config.name: config for config in (*CONFIGS, *CONFIGS_V2, *METAFORMER_CONFIGS)}
_V2 = frozenset(config.name for config in CONFIGS_V2)
_OWN = {field.name for field in fields(MetaFormerConfig)} - {field.name for field in fields(ModelConfig)}
_STRUCTURE = (*sorted(_OWN), "layer_scale_init")


def list_models(pattern: str = "*") -> list[str]:
    """The names that `create_model` knows, by family, smallest model first.

    Args:
        pattern: with the wildcards of a shell: ``"poolformer_*"``.
    """
    return [name for name in _CONFIGS if fnmatchcase(name, pattern)]


def model_config(name: str, pattern: str = "*") -> ModelConfig:
    """The configuration of a model, one of ``list_models(pattern)``.

    Raises:
        ValueError: another name.
    """
    names = list_models(pattern)
    if name not in names:
        close = difflib.get_close_matches(str(name), names, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"name is {name!r}; allowed: {', '.join(names)}{hint}")
    return _CONFIGS[name]


def structured(config: ModelConfig, structure: dict[str, Any]) -> ModelConfig:
    """The configuration with keywords of `MetaFormerConfig` changed.

    Raises:
        TypeError: a keyword that it has not, or any for PoolFormerV2.
        TypeError, ValueError: a value of the wrong type or range.
    """
    if not structure:
        return config
    allowed = ", ".join(_STRUCTURE)
    unknown = sorted(set(structure) - set(_STRUCTURE))
    if unknown:
        raise TypeError(f"create_model has no argument {unknown[0]!r}; those of the structure: {allowed}")
    if config.name in _V2:
        raise TypeError(f"{next(iter(structure))} is given; {config.name} takes none of {allowed}")
    given = {field.name: getattr(config, field.name) for field in fields(config)}
    return MetaFormerConfig(**{**given, "params": None, **structure})


def model_class(config: ModelConfig) -> type[PoolFormer]:
    """The class that a configuration belongs to."""
    if config.name in _V2:
        return PoolFormerV2
    return MetaFormer if isinstance(config, MetaFormerConfig) else PoolFormer
