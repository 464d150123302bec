"""The driver: one scan over the sigmas."""

from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike

from steindiff_jax._numerics import accurate, check_batch, fold_in, sample_keys, split
from steindiff_jax._typing import (
    Batch,
    Denoiser,
    Info,
    Key,
    Record,
    Scalar,
    Sigmas,
    Solution,
    Solver,
    State,
    check_shape,
)
from steindiff_jax.grids import check_sigmas
from steindiff_jax.solvers import IPNDM
from steindiff_jax.stein import Stein

DEFAULT = Stein(IPNDM(3))


def sample(
    key: Key,
    denoiser: Denoiser,
    shape: tuple[int, ...] | None = None,
    *,
    sigmas: ArrayLike,
    solver: Solver | None = None,
    x_init: ArrayLike | None = None,
    record: Record | None = None,
    remat: bool = False,
) -> Solution:
    """Sample by integrating the probability-flow ODE dx/dsigma = (x - D(x, sigma)) / sigma.

    Call it as it is, or inside your own jit, vmap, grad and scan. Called as it is, it compiles once
    for each shape and number of steps: another key, another grid, other numbers in the solver and
    other weights in a pytree denoiser do not trace again. A denoiser that is a plain function is
    known by its identity, as under `jax.jit`: what it closes over is read once. Pass weights
    that change in a pytree (`from_linen`, `from_nnx`, `jax.tree_util.Partial`).

    Args:
      key: of `jax.random`, for the initial noise and for the solver's probes. Or keys (batch,), one
        for each sample, whose draws then do not depend on the rest of the batch; a sharded array of
        keys also shards the noise, and with it the samples.
      denoiser: (x, sigma) -> x0 estimate, with x = x0 + sigma * noise of shape (batch, *event).
      shape: (batch, *event) of noise to start from.
      sigmas: (steps + 1,) decreasing noise-to-signal ratios; end in 0 for clean samples. See
        `karras_sigmas`. Further zeros are padding: those steps are skipped, and grids padded to
        one length share one compiled program (known by value, so not inside your own jit).
      solver: default `Stein(IPNDM(3))`, the best overall in `benchmarks/exact_problems.py`.
      x_init: (batch, *event) start at sigmas[0], in place of sigmas[0] * noise.
      record: (state, step) -> anything; what it returns is stacked over the steps.
      remat: for gradients: keep the state of each step alone and compute the step again on the
        way back, which takes one more evaluation and far less memory.

    Returns:
      `Solution`. Its x is in float32 or wider, whatever the network computes in.

    Raises:
      ValueError: for a grid that is not one, a shape and an x_init that disagree, an integer
        x_init, a denoiser whose result has another shape or dtype than x. Non-finite samples
        raise nothing: they are marked in info.finite and left out of the statistics.
    """
    sigmas = accurate(check_sigmas(sigmas))
    solver = DEFAULT if solver is None else solver
    if not isinstance(sigmas, Tracer):  # a solver tied to one grid, such as `Calibrated`
        getattr(solver, "check", lambda _: None)(sigmas)
    shape = None if shape is None else check_shape("shape", shape)
    if x_init is None:
        if not shape:
            raise ValueError(f"shape (batch, *event) or x_init is needed, got shape={shape}")
    else:
        x_init = check_batch("x_init", x_init, empty=True)
        if shape not in (None, x_init.shape):
            raise ValueError(f"x_init must have shape {shape}, got {x_init.shape}")
        shape, sigmas = (), sigmas.astype(x_init.dtype)
    data, program = _split((denoiser, solver, record))
    padded = (
        not isinstance(sigmas, Tracer) and sigmas.size > 2 and bool(np.asarray(sigmas)[-2] == 0)
    )
    return _sample(
        key, data, sigmas, x_init, program=program, shape=shape, padded=padded, remat=remat
    )


@partial(jax.jit, static_argnames=("program", "shape", "padded", "remat"))
def _sample(
    key: Key,
    data: list[Array],
    sigmas: Sigmas,
    x_init: Batch | None,
    *,
    program: tuple,
    shape: tuple[int, ...],
    padded: bool,
    remat: bool,
) -> Solution:
    denoiser, solver, record = _join(data, program)
    key_noise, key_steps = split(key)
    if x_init is None:
        # A solver that knows the mapped axis of the batch would else start every shard alike.
        keys = sample_keys(key_noise, shape[0], getattr(solver, "axis_name", None))
        noise = jax.vmap(lambda key: jax.random.normal(key, shape[1:], sigmas.dtype))(keys)
        x_init = sigmas[0] * noise
    _check_denoiser(denoiser, x_init, sigmas[0])

    def body(state: State, inputs: tuple[Array, Scalar, Scalar]) -> tuple[State, Any]:
        index, sigma, sigma_next = inputs

        def advance(state: State) -> tuple[State, Any]:
            key_step, before = fold_in(key_steps, index), state
            state, step = solver.step(key_step, denoiser, state, sigma, sigma_next)
            # The state keeps its dtypes, whatever those of the solver's own numbers.
            state = jax.tree.map(_like, state, before)
            finite = jnp.isfinite(state.x).all(axis=range(1, state.x.ndim))
            facts = (
                jnp.asarray(step.gamma, sigmas.dtype),
                step.nfe,
                finite,
                record and record(state, step),
            )
            return state, jax.tree.map(jnp.asarray, facts)

        if not padded:
            return advance(state)
        _, facts = jax.eval_shape(advance, state)
        blank = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), facts)
        return lax.cond(sigma > 0, advance, lambda state: (state, blank), state)

    if remat:
        body = jax.checkpoint(body, prevent_cse=False)  # the scan separates the two already
    steps = jnp.arange(sigmas.size - 1)
    start = solver.init(x_init, sigmas)
    end, (gamma, nfe, finite, kept) = lax.scan(body, start, (steps, sigmas[:-1], sigmas[1:]))
    return Solution(end.x, Info(gamma, (nfe * (sigmas[:-1] > 0)).sum(), finite), kept)


def _like(new: ArrayLike, old: Array) -> ArrayLike:
    return new if jnp.result_type(new) == old.dtype else jnp.asarray(new, old.dtype)


def _check_denoiser(denoiser: Denoiser, x: Batch, sigma: Scalar) -> None:
    """ValueError where the denoiser's result is not like its input."""
    x0 = jax.eval_shape(denoiser, x, sigma)
    got = getattr(x0, "shape", x0), getattr(x0, "dtype", None)
    if got != (x.shape, x.dtype):
        raise ValueError(
            f"the denoiser must return shape {x.shape} and dtype {x.dtype} like its input, "
            f"got {got[0]} and {got[1]}"
        )


def _split(tree: Any) -> tuple[list, tuple]:
    """Arrays and floats of a pytree, as data, and all else, as part of the program."""
    leaves, structure = jax.tree.flatten(tree)
    is_data = [isinstance(leaf, get_args(ArrayLike)) for leaf in leaves]
    data = [leaf for leaf, known in zip(leaves, is_data, strict=True) if known]
    rest = tuple(None if known else leaf for leaf, known in zip(leaves, is_data, strict=True))
    return data, (rest, tuple(is_data), structure)


def _join(data: list, program: tuple) -> Any:
    rest, is_data, structure = program
    arrays = iter(data)
    return jax.tree.unflatten(
        structure, [next(arrays) if k else r for r, k in zip(rest, is_data, strict=True)]
    )
