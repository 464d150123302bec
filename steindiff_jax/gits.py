"""A grid by dynamic programming: no gradients, one long solve (GITS, arXiv:2405.11326)."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from steindiff_jax import _checks, _random
from steindiff_jax.grids import check_sigmas
from steindiff_jax.protocols import Denoiser, Key, Sigmas, State, Step, ddim
from steindiff_jax.sample import sample


def gits_sigmas(
    key: Key, denoiser: Denoiser, shape: tuple[int, ...], steps: int, teacher: ArrayLike
) -> Sigmas:
    """A grid out of the nodes of a long one, by dynamic programming along its trajectories.

    Chosen is the grid whose first-order steps from states of the long solve err least in sum, each
    by its root mean square over the batch (GITS, Chen et al. 2024, arXiv:2405.11326).

    Args:
      key: as in `sample`.
      denoiser: as in `sample`.
      shape: (batch, *event) of the noise to start from.
      steps: number of steps, fewer than the teacher's.
      teacher: (nodes,) grid of the long solve, which the default solver makes; both ends are kept.

    Returns:
      (steps + 1,) decreasing sigmas.
    """
    sigmas = check_sigmas(teacher)
    if not 1 <= _checks.count("steps", steps) < sigmas.size:
        raise ValueError(f"steps must be below the {sigmas.size} nodes of the teacher, got {steps}")
    x_init = sigmas[0] * _random.normal(key, jnp.zeros(shape, sigmas.dtype))
    record = sample(key, denoiser, sigmas=sigmas, x_init=x_init, record=_trajectory).record
    chosen = shortest_path(np.asarray(_errors(sigmas, x_init, *record)), steps)
    return sigmas[np.array(chosen)]


def shortest_path(costs: np.ndarray, steps: int) -> list[int]:
    """The nodes of the cheapest path from the first to the last in so many steps (steps + 1).

    costs: (nodes, nodes), [i, j] of the step from i to j > i; what is not above the diagonal is not
    looked at.
    """
    costs = np.where(np.triu(np.ones_like(costs), 1) > 0, costs, np.inf)
    total, before = costs[0], []
    for _ in range(steps - 1):
        through = total[:, None] + costs  # [i, j]: the cheapest way to i, and on to j
        before.append(through.argmin(axis=0))
        total = through.min(axis=0)
    path = [len(costs) - 1]
    for previous in reversed(before):
        path.append(int(previous[path[-1]]))
    return [0, *reversed(path)]


def _trajectory(state: State, step: Step) -> tuple[Array, Array]:
    return state.x, step.x0


@jax.jit
def _errors(sigmas: Sigmas, x_init: Array, ends: Array, x0: Array) -> Array:
    """Root mean square error of the first-order step from each node to each later one."""
    x = jnp.concatenate([x_init[None], ends])

    def error(i: Array, j: Array) -> Array:
        i = jnp.minimum(i, len(x0) - 1)
        return jnp.sqrt(jnp.mean((ddim(x[i], x0[i], sigmas[i], sigmas[j]) - x[j]) ** 2))

    index = jnp.arange(sigmas.size)
    return lax.map(lambda i: lax.map(lambda j: error(i, j), index), index)
