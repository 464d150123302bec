"""The nouns of the library as types: denoiser, solver, state, one step taken apart, solution.

All of it lives in the scaled coordinates y = x / alpha and sigma = noise-to-signal ratio, so
that y = x0 + sigma * noise whatever the schedule of the network; arrays are (batch, *event).
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol, TypeVar, dataclass_transform, runtime_checkable

import jax
from chex import PRNGKey
from jax import Array
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


def check_choices(self: Any) -> None:
    """ValueError unless every field that was given `choices` is one of them."""
    for field in dataclasses.fields(self):
        value, choices = getattr(self, field.name), field.metadata.get("choices")
        if choices and value not in choices:
            raise ValueError(f"{field.name} must be one of {choices}, got {value!r}")


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, static))
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

    x: (batch, *event) sample at the current sigma; history: the solver's own memory, any pytree.
    """

    x: Batch
    history: Any = ()


class Step(NamedTuple):
    """One step taken apart: x_next = q x + (1 - q)(x0 + delta), with q = sigma_next / sigma.

    Of a corrected step these are the parts that the correction started from.

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

    gamma: (steps,), or (steps, batch) with per-sample statistics; 1.0 where nothing was corrected.
    nfe: () evaluations of the denoiser per sample. A Hutchinson probe costs about one more each,
        a guided denoiser runs its network on two rows per evaluation; neither is counted here.
    finite: (steps, batch) whether each sample was finite after each step.
    """

    gamma: Float[Array, " steps *batch"]
    nfe: Int[Array, ""]
    finite: Bool[Array, "steps batch"]


class Solution(NamedTuple):
    """x: (batch, *event) samples; info: per-step facts; record: what the caller asked to keep."""

    x: Batch
    info: Info
    record: Any = None


Record = Callable[[State, Step], Any]
