"""Configurations in JSON, read into dataclasses whose annotations say what they may hold."""

import contextlib
import dataclasses
import json
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin


def load(file: Path) -> dict[str, Any]:
    """The object in a file, or a ValueError."""
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(config).__name__}")
    return config


def known(cls: type, config: dict[str, Any], file: Path) -> dict[str, Any]:
    """The fields of a dataclass that config gives, as their annotations have them."""
    found = {}
    for field in dataclasses.fields(cls):
        if field.name in config and field.name not in ("name", "parent"):  # flax's own
            try:
                found[field.name] = _read(config[field.name], field.type)
            except TypeError as error:
                kind = field.type.__name__ if isinstance(field.type, type) else field.type
                raise ValueError(
                    f"{file}: key {field.name!r} must be {kind}, got {config[field.name]!r}"
                ) from error
    return found


def _read(value: Any, kind: Any) -> Any:
    """A value from JSON as an annotation has it, or TypeError; int is a count, from 1 to 2^20."""
    args = get_args(kind)
    if get_origin(kind) is Literal and value in args:
        return args[args.index(value)]
    if get_origin(kind) is tuple and isinstance(value, list) and value:
        return tuple(_read(one, args[0]) for one in value)
    if isinstance(value, bool | None):
        if kind is type(value):
            return value
    elif kind is int and isinstance(value, int) and 1 <= value <= 2**20:
        return value
    elif kind is float and isinstance(value, int | float) and abs(value) <= 2**20:
        return float(value)
    if get_origin(kind) in (Union, UnionType):
        for one in args:
            with contextlib.suppress(TypeError):
                return _read(value, one)
    raise TypeError
