"""The nouns of the library as types: denoiser, solver, state, one step taken apart, solution.

All of it lives in the scaled coordinates y = x / alpha and sigma = noise-to-signal ratio, so
that y = x0 + sigma * noise whatever the schedule of the network; arrays are (batch, *event).
"""

import dataclasses
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol, TypeVar, dataclass_transform, runtime_checkable

import jax
import numpy as np
from chex import PRNGKey
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

Batch = Float[Array, "batch *event"]
Scalar = Float[Array, ""]
Rows = Float[Array, " batch"]
Sigmas = Float[Array, " nodes"]  # one more than steps
Numeric = Any  # a number or a scalar array; a leaf, so JAX may put anything else there
Key = PRNGKey

Class = TypeVar("Class")


def static(
    *, default: Any = dataclasses.MISSING, choices: tuple = (), kw_only: bool = False
) -> Any:
    """A dataclass field that is part of the program rather than of its data."""
    return dataclasses.field(
        default=default, kw_only=kw_only, metadata={"static": True, "choices": choices}
    )


def number(*, default: Any = dataclasses.MISSING, within: str) -> Any:
    """A dataclass field that is data: a number in an interval such as "(0, 1]"."""
    return dataclasses.field(default=default, metadata={"within": within})


def check_fields(self: Any) -> None:
    """ValueError unless every field is one of its `choices`, or `within` its interval."""
    for field in dataclasses.fields(self):
        value, choices = getattr(self, field.name), field.metadata.get("choices")
        # 2.0 equals 2, but does not count.
        if choices and not (isinstance(value, type(choices[0]) | np.integer) and value in choices):
            raise ValueError(f"{field.name} must be one of {choices}, got {value!r}")
        if within := field.metadata.get("within"):
            check_number(field.name, value, within)


def check_number(name: str, value: Any, within: str) -> None:
    """ValueError unless a number, or all of an array, lies in an interval such as "(0, 1]".

    What is traced, or is a placeholder of JAX's, passes unseen.
    """
    if isinstance(value, Tracer) or not isinstance(value, ArrayLike):
        return
    known, (low, high) = np.asarray(value), map(float, within[1:-1].split(","))
    if known.dtype.kind not in "biufV":  # V: bfloat16
        raise ValueError(f"{name} must be a real number, got {value!r}")
    inside = (known >= low) if within[0] == "[" else (known > low)
    inside &= (known <= high) if within[-1] == "]" else (known < high)
    if not inside.all():
        raise ValueError(f"{name} must be in {within}, got {known[~inside][0]}")


def check_count(name: str, value: Any) -> int:
    """The number as an int, or a ValueError unless it is an integer from 1 on."""
    if not isinstance(value, int | np.integer):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)


def check_shape(name: str, shape: Any) -> tuple[int, ...]:
    """The shape as a tuple of ints, or a ValueError."""
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        sizes = (-1,)
    if min(sizes, default=0) < 0:
        raise ValueError(f"{name} must be a tuple of integers, none negative, got {shape!r}")
    return sizes


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, static, number))
def pytree(cls: type[Class]) -> type[Class]:
    """Frozen dataclass registered as a pytree: leaves, but for the fields marked `static`.

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
    return cls


@runtime_checkable
class Denoiser(Protocol):
    """Estimates the clean sample, E[x0 | x], from x = x0 + sigma * noise."""

    def __call__(self, x: Batch, sigma: Scalar, /) -> Batch: ...


class State(NamedTuple):
    """What the next step needs.

    Attributes:
      x: (batch, *event) sample at the current sigma.
      history: the solver's own memory, any pytree.
    """

    x: Batch
    history: Any = ()


class Step(NamedTuple):
    """One step taken apart: x_next = q x + (1 - q)(x0 + delta), with q = sigma_next / sigma.

    Of a corrected step these are the parts that the correction started from.

    Attributes:
      x0: (batch, *event) denoiser at the start of the step, which alone makes the first-order step.
      delta: (batch, *event) what the solver adds to it; exactly 0 where the step is first order.
      gamma: () or (batch,) the coefficient of the correction, 1 where nothing was corrected.
      nfe: () evaluations of the denoiser.
    """

    x0: Batch
    delta: Batch
    gamma: Any = 1.0
    nfe: Any = 1


@runtime_checkable
class Solver(Protocol):
    """Two pure functions; everything a solver must offer, and all that `Stein` knows of one."""

    def init(self, x: Batch, sigmas: Sigmas) -> State: ...

    def step(
        self, key: Key, denoiser: Denoiser, state: State, sigma: Scalar, sigma_next: Scalar
    ) -> tuple[State, Step]: ...


class Info(NamedTuple):
    """What a person wants to see of a run; nothing in it steers the solver.

    Attributes:
      gamma: (steps,), or (steps, batch) with per-sample statistics; 1 where nothing was corrected.
      nfe: () evaluations of the denoiser per sample. A Hutchinson probe costs about one more each,
        a guided denoiser runs its network on two rows per evaluation; neither is counted here.
      finite: (steps, batch) whether each sample was finite after each step.
    """

    gamma: Float[Array, " steps *batch"]
    nfe: Int[Array, ""]
    finite: Bool[Array, "steps batch"]


class Solution(NamedTuple):
    """What `sample` returns.

    Attributes:
      x: (batch, *event) samples.
      info: per-step facts.
      record: what the caller asked to keep, stacked over the steps.
    """

    x: Batch
    info: Info
    record: Any = None


Record = Callable[[State, Step], Any]
