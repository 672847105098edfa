"""Values of config.json, read strictly: each is of its type, or a ConfigError names it."""

from __future__ import annotations

from typing import Any

from lfm_edge.errors import ConfigError

_UNSET = object()


def first(raw: dict[str, Any], *names: str, default: Any = _UNSET) -> Any:
    """The value of the first of `names` that is there and not null. Raises ConfigError without a default."""
    for name in names:
        if raw.get(name) is not None:
            return raw[name]
    if default is _UNSET:
        raise ConfigError(f"{' or '.join(names)} is missing")
    return default


def integer(raw: dict[str, Any], *names: str, default: Any = _UNSET) -> int:
    """The same, where it is an integer."""
    value = first(raw, *names, default=default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{names[0]} is {value!r}; expected an integer")
    return value


def number(raw: dict[str, Any], *names: str, default: float) -> float:
    """The same, where it is a number."""
    value = first(raw, *names, default=default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{names[0]} is {value!r}; expected a number")
    return float(value)


def boolean(raw: dict[str, Any], *names: str, default: bool) -> bool:
    """The same, where it is true or false."""
    value = first(raw, *names, default=default)
    if not isinstance(value, bool):
        raise ConfigError(f"{names[0]} is {value!r}; expected true or false")
    return value


def token_id(raw: dict[str, Any], name: str, default: int) -> int | None:
    """A token that need not be there: null says that there is none."""
    return None if name in raw and raw[name] is None else integer(raw, name, default=default)


def token_ids(value: Any) -> tuple[int, ...]:
    """An `eos_token_id`: one, several, or null for none, each once. Raises ConfigError for anything else."""
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not ids or any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise ConfigError(f"eos_token_id is {value!r}; expected an integer, a list of integers, or null")
    return tuple(dict.fromkeys(ids))


def layer_types(raw: dict[str, Any]) -> tuple[str, ...]:
    """The list of `layer_types`. Raises ConfigError where it is none, or is not as long as the model is deep."""
    types, count = raw["layer_types"], raw.get("num_hidden_layers")
    if not isinstance(types, list):
        raise ConfigError("layer_types must be a list")
    if count is not None and count != len(types):
        raise ConfigError(f"layer_types has {len(types)} entries, num_hidden_layers says {count}")
    return tuple(str(kind) for kind in types)
