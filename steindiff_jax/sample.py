"""The driver: one scan over the sigmas."""

import dataclasses
import weakref
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike

from steindiff_jax import _checks, _random, denoisers
from steindiff_jax._numerics import at_least_float32
from steindiff_jax.grids import check_sigmas
from steindiff_jax.protocols import (
    AnySolver,
    Batch,
    Denoiser,
    Info,
    Key,
    Record,
    Scalar,
    Sigmas,
    Solution,
    State,
)
from steindiff_jax.solvers import IPNDM
from steindiff_jax.stein import Stein

DEFAULT = Stein(IPNDM(3))


def sample(
    key: Key,
    denoiser: Denoiser,
    shape: tuple[int, ...] | None = None,
    *,
    sigmas: ArrayLike,
    solver: AnySolver | None = None,
    x_init: ArrayLike | None = None,
    record: Record | None = None,
    remat: bool = False,
) -> Solution:
    """Sample by integrating the probability-flow ODE dx/dsigma = (x - D(x, sigma)) / sigma.

    Call it as it is, or inside your own jit, vmap, grad and scan. Called as it is, it compiles once
    for each shape and number of steps: another key, another grid, other numbers in the solver and
    other weights in a pytree denoiser do not trace again. A denoiser that is a plain function is
    known by its identity, as under `jax.jit`: what it closes over is read once, and each new one
    compiles again. Pass weights that change in a pytree (`from_linen`, `from_nnx`,
    `jax.tree_util.Partial`).

    Args:
      key: of `jax.random`, for the initial noise and for the solver's probes. Or keys (batch,), one
        for each sample, whose draws then do not depend on the rest of the batch; a sharded array of
        keys also shards the noise, and with it the samples.
      denoiser: (x, sigma) -> x0 estimate, with x = x0 + sigma * noise of shape (batch, *event).
      shape: (batch, *event) of noise to start from.
      sigmas: (steps + 1,) decreasing noise-to-signal ratios, down to 0 or to noise that nobody
        sees, such as `karras_sigmas(steps, to_zero=False)`. Where the last is repeated, that is
        padding: those steps are skipped, and grids padded to one length,
        `jnp.pad(sigmas, (0, n), mode="edge")`, share one compiled program (known by value, so not
        inside your own jit).
      solver: default `Stein(IPNDM(3))`, the best overall in `benchmarks/quality.py`.
      x_init: (batch, *event) start at sigmas[0], in place of sigmas[0] * noise.
      record: (state, step) -> anything; what it returns is stacked over the steps. Of a skipped
        step it is that of the step before.
      remat: for gradients: keep the state of each step alone and compute the step again on the
        way back, which takes one more evaluation and far less memory.

    Returns:
      `Solution`. Its x is in float32 or wider, whatever the network computes in.

    Raises:
      ValueError: for an invalid grid, anything else than a solver, a shape and an x_init that
        disagree, an integer x_init, a denoiser whose result has another shape or dtype than x.
        Non-finite samples raise nothing: they are marked in info.finite and left out of the
        statistics.
    """
    sigmas = at_least_float32(check_sigmas(sigmas))
    solver = DEFAULT if solver is None else solver
    _checks.instance("solver", solver, AnySolver, "a solver such as Stein(IPNDM(3))")
    if not callable(denoiser) or isinstance(denoiser, type):
        raise ValueError(f"denoiser must be a function (x, sigma) -> x0, got {denoiser!r}")
    if not _random.is_key(key):
        raise ValueError(f"key must be of jax.random, such as jax.random.key(0), got {key!r}")
    if not isinstance(sigmas, Tracer):
        solver.check(sigmas)
        denoisers.check(denoiser, sigmas)
    shape = None if shape is None else _checks.shape("shape", shape)
    if x_init is None:
        if not shape:
            raise ValueError(f"shape (batch, *event) or x_init is needed, got shape={shape}")
    else:
        x_init = _checks.batch("x_init", x_init, allow_empty=True)
        if shape not in (None, x_init.shape):
            raise ValueError(f"x_init must have shape {shape}, got {x_init.shape}")
        shape = ()
        if sigmas.dtype != x_init.dtype:
            sigmas = sigmas.astype(x_init.dtype)
    padded = not isinstance(sigmas, Tracer) and bool(np.equal(*np.asarray(sigmas)[-2:]))
    leaves, structure = jax.tree.flatten((denoiser, solver, record))
    data = as_data(leaves, sigmas.dtype)
    program = _program(leaves)
    options = dict(shape=shape, padded=padded, remat=remat)
    return program(key, data, sigmas, x_init, structure=structure, **options)


def _sample(
    key: Key,
    data: list,
    sigmas: Sigmas,
    x_init: Batch | None,
    *,
    structure: Any,
    shape: tuple[int, ...],
    padded: bool,
    remat: bool,
) -> Solution:
    denoiser, solver, record = structure.unflatten(from_data(data))
    key_noise, key_steps = _random.split(key)
    if x_init is None:
        # A solver that knows the mapped axis of the batch would else start every shard alike.
        keys = _random.sample_keys(key_noise, shape[0], solver.mapped_axis())
        noise = jax.vmap(lambda key: jax.random.normal(key, shape[1:], sigmas.dtype))(keys)
        x_init = sigmas[0] * noise
    _check_denoiser(denoiser, x_init, sigmas[0])

    def advance(state: State, inputs: tuple[Array, Scalar, Scalar]) -> tuple[State, tuple]:
        index, sigma, sigma_next = inputs
        key_step = _random.fold_in(key_steps, index)
        new, step = solver.advance(key_step, denoiser, state, sigma, sigma_next)
        # The state keeps its dtypes, whatever those of the solver's own numbers.
        new = jax.tree.map(lambda a, b: jnp.asarray(a, b.dtype), new, state)
        finite = jnp.isfinite(new.x).all(axis=range(1, new.x.ndim))
        kept = record and record(new, step)
        facts = jnp.asarray(step.gamma, sigmas.dtype), step.nfe, finite, kept
        return new, jax.tree.map(jnp.asarray, facts)

    kept_apart = partial(jax.checkpoint, prevent_cse=False) if remat else lambda body: body
    start = State(x_init, solver.init(x_init, sigmas))
    inputs = jnp.arange(sigmas.size - 1), sigmas[:-1], sigmas[1:]
    if padded:
        end, (gamma, nfe, finite, kept) = _scan_padded(advance, start, inputs, kept_apart)
    else:
        end, (gamma, nfe, finite, kept) = lax.scan(kept_apart(advance), start, inputs)
    return Solution(end.x, Info(gamma, nfe.sum(), finite), kept)


def _scan_padded(body: Any, start: State, inputs: tuple, kept_apart: Any) -> tuple[State, Any]:
    """As `lax.scan`, but of padding nothing is made: it repeats what the last step gave."""
    first = jax.tree.map(lambda a: a[0], inputs)
    blank = jax.tree.map(
        lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(body, start, first)[1]
    )

    def skipped(state: State, facts: tuple) -> tuple[State, tuple]:
        gamma, nfe, *rest = facts
        return state, (jnp.ones_like(gamma), jnp.zeros_like(nfe), *rest)

    def padded(carry: tuple, inputs: tuple) -> tuple[tuple, Any]:
        _, sigma, sigma_next = inputs
        state, facts = lax.cond(sigma_next < sigma, lambda s, _: body(s, inputs), skipped, *carry)
        return (state, facts), facts

    (end, _), facts = lax.scan(kept_apart(padded), (start, blank), inputs)
    return end, facts


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Static:
    """A part of a pytree that belongs to the program: a string, a weak reference to a function."""

    value: Any


_PROGRAMS: dict[tuple, Any] = {}
STATIC = ("structure", "shape", "padded", "remat")


def _program(leaves: list) -> Any:
    """`_sample`, jitted, for the functions among the leaves: freed with the first of them.

    The cache of one `jit` for all would keep each function, and the weights that it closes over.
    """
    functions = tuple(weakref.ref(leaf) for leaf in leaves if _by_identity(leaf))
    if functions not in _PROGRAMS:
        program = jax.jit(partial(_sample), static_argnames=STATIC)
        forget = [weakref.ref(f(), lambda _: _PROGRAMS.pop(functions, None)) for f in functions]
        _PROGRAMS[functions] = program, forget
    return _PROGRAMS[functions][0]


def _by_identity(leaf: Any) -> bool:
    """Whether it is a function, or a like object, that is equal to itself alone.

    Not a method, which is another object each time that it is looked up.
    """
    kind = type(leaf)
    return callable(leaf) and kind.__eq__ is object.__eq__ and kind.__weakrefoffset__ != 0


def as_data(tree: Any, dtype: Any) -> Any:
    """A pytree of anything as an argument of `jit`, see `_as_data`; `from_data` undoes it."""
    return jax.tree.map(partial(_as_data, dtype=dtype), tree)


def from_data(tree: Any) -> Any:
    """What `as_data` was given, but for the dtypes of numbers."""
    return jax.tree.map(_from_data, tree, is_leaf=lambda leaf: isinstance(leaf, Static))


def _as_data(leaf: Any, dtype: Any) -> Any:
    """A leaf as an argument of `jit`: numbers in one dtype, so that all kinds share a program."""
    # Arrays of keys have no weak type.
    weak = isinstance(leaf, Array) and leaf.ndim == 0 and getattr(leaf, "weak_type", False)
    if isinstance(leaf, float | np.floating):
        return np.asarray(leaf, dtype)  # jnp.asarray is slower, and runs in every call
    if weak and jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf.astype(dtype)
    # What is traced is an Array, but no ArrayLike.
    if isinstance(leaf, (Array, ArrayLike)):
        return leaf
    return Static(weakref.ref(leaf) if _by_identity(leaf) else leaf)


def _from_data(leaf: Any) -> Any:
    value = leaf.value if isinstance(leaf, Static) else leaf
    return value() if isinstance(value, weakref.ref) else value


def _check_denoiser(denoiser: Denoiser, x: Batch, sigma: Scalar) -> None:
    """ValueError where the denoiser's result is not like its input."""
    x0 = jax.eval_shape(denoiser, x, sigma)
    got = getattr(x0, "shape", x0), getattr(x0, "dtype", None)
    if got != (x.shape, x.dtype):
        raise ValueError(
            f"the denoiser must return shape {x.shape} and dtype {x.dtype} like its input, "
            f"got {got[0]} and {got[1]}"
        )
