"""Frozen dataclasses as pytrees: numbers and arrays are data, choices are part of the program."""

import dataclasses
import json
from collections.abc import Iterable
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.export
import numpy as np
from jax.core import Tracer

Class = TypeVar("Class")


def static(
    *, default: Any = dataclasses.MISSING, choices: tuple = (), kw_only: bool = False
) -> Any:
    """A dataclass field that is static under `jit`: changing it recompiles."""
    return dataclasses.field(
        default=default, kw_only=kw_only, metadata={"static": True, "choices": choices}
    )


def number(*, default: Any = dataclasses.MISSING, within: str) -> Any:
    """A dataclass field that is data: a number in an interval such as "(0, 1]"."""
    return dataclasses.field(default=default, metadata={"within": within})


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, static, number))
def pytree(cls: type[Class]) -> type[Class]:
    """Frozen dataclass registered as a pytree: leaves, except for the fields marked `static`.

    Two instances are equal if their classes, choices and numbers are; so is an unpickled copy.

    Not `jax.tree_util.register_dataclass`: up to jax 0.10 at least, the tree structures of two such
    classes with equal fields compare equal, and `jit` then takes one solver for another.
    """
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    data = tuple(f.name for f in fields if not f.metadata.get("static"))
    meta = tuple(f.name for f in fields if f.metadata.get("static"))

    def flatten(self: Class) -> tuple[tuple, tuple]:
        children = ((jax.tree_util.GetAttrKey(n), getattr(self, n)) for n in data)
        return tuple(children), (cls, *(getattr(self, n) for n in meta))

    def unflatten(aux: tuple, children: Iterable) -> Class:
        self = object.__new__(cls)  # no checks: JAX puts placeholders into leaves
        for name, value in zip(data + meta, (*children, *aux[1:]), strict=True):
            object.__setattr__(self, name, value)
        return self

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=f"{cls.__module__}.{cls.__qualname__}",
        serialize_auxdata=lambda aux: json.dumps(aux[1:]).encode(),
        deserialize_auxdata=lambda stored: (cls, *json.loads(stored)),
    )
    cls.__eq__ = _equal
    cls.__hash__ = _hash
    return cls


def _equal(self: Any, other: Any) -> Any:
    if type(self) is not type(other):
        return NotImplemented
    (mine, structure), (others, other_structure) = map(jax.tree.flatten, (self, other))
    return structure == other_structure and all(map(_same, mine, others))


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tracer) or isinstance(b, Tracer):
        return False
    if isinstance(a, jax.typing.ArrayLike) and isinstance(b, jax.typing.ArrayLike):
        return np.shape(a) == np.shape(b) and bool(np.all(np.asarray(a) == np.asarray(b)))
    return a == b


def _hash(self: Any) -> int:
    # Leaves may be large arrays, or traced: the structure alone tells nearly all apart.
    return hash(jax.tree.structure(self))
