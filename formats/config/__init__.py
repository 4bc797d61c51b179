"""config.json -> ModelConfig: reads what is used, refuses what is not implemented, never drops mathematics.

One file per family, and one explicit table; what all have in common is in base.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from typing import Any, get_args, get_type_hints

from formats.config.base import FULL_ATTENTION, LINEAR_ATTENTION, ModelConfig
from formats.config.qwen3_5_moe import Qwen3_5MoeConfig
from formats.config.qwen3_moe import Qwen3MoeConfig
from formats.errors import UnsupportedError
from formats.fields import Fields, parse_json, shown

__all__ = [
    "CONFIG_CLASSES",
    "FULL_ATTENTION",
    "LINEAR_ATTENTION",
    "ModelConfig",
    "Qwen3MoeConfig",
    "Qwen3_5MoeConfig",
    "model_facts",
    "read_config",
    "read_model_facts",
]

_READERS: Mapping[str, Callable[[Fields], ModelConfig]] = {
    "qwen3_5_moe": Qwen3_5MoeConfig.read,
    "qwen3_5_moe_text": Qwen3_5MoeConfig.read,  # the language model saved alone: a flat config
    "qwen3_moe": Qwen3MoeConfig.read,
}
CONFIG_CLASSES: Mapping[str, type[ModelConfig]] = {"qwen3_5_moe": Qwen3_5MoeConfig, "qwen3_moe": Qwen3MoeConfig}


def read_config(raw: bytes, where: str = "config.json") -> ModelConfig:
    """Read a checkpoint's config.json.

    Raises FormatError for wrong values and UnsupportedError for an architecture or a value that is not
    implemented, each naming the key.
    """
    outer = Fields(parse_json(raw, where), where)
    reader = _of_model_type(_READERS, outer)
    for key in ("quantization_config", "quantization"):
        if key in outer:
            raise UnsupportedError(f"{outer.name(key)} is set: quantized sources are not supported yet")
    config = reader(outer)
    config.check(where)
    return config


def model_facts(config: ModelConfig) -> dict[str, Any]:
    """The index's form of a config."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}


def read_model_facts(facts: Fields) -> ModelConfig:
    """Read the index's form strictly. Raises FormatError or UnsupportedError."""
    kind = _of_model_type(CONFIG_CLASSES, facts)
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for field in fields(kind):
        hint = hints[field.name]
        if hint is int:
            values[field.name] = facts.integer(field.name, 1, 2**31)
        elif hint is float:
            values[field.name] = facts.number(field.name)
        elif hint is bool:
            values[field.name] = facts.boolean(field.name)
        elif hint is str:
            values[field.name] = facts.string(field.name)
        else:
            assert get_args(hint) == (str, ...)
            values[field.name] = tuple(facts.strings(field.name))
    facts.close()
    config = kind(**values)
    config.check(facts.where)
    return config


def _of_model_type(table: Mapping[str, Any], source: Fields) -> Any:
    model_type = source.string("model_type")
    if model_type not in table:
        raise UnsupportedError(f"{source.name('model_type')} is {shown(model_type)}, supported are {', '.join(table)}")
    return table[model_type]
