"""What holds for every solver, problem and grid: symmetries, exactness, both ends of a grid.

Each solver is compiled once, for problems and grids of one shape; their values are drawn.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import Gaussian, Mixture, normal, run, whitened
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import steindiff_jax as sd

BATCH, DIM = 6, 2

MULTISTEP = [
    sd.LMS(3),
    sd.LMS(4, prediction="flow"),
    sd.IPNDM(3),
    sd.DEIS(3),
    sd.DPMpp2M(),
    sd.DPMpp3M(lower_order_final=True),
    sd.UniPC(3),
]
ONE_STEP = [sd.DDIM(), sd.Heun(), sd.DPM2(), sd.DPMpp2S(), sd.DPMpp3S()]
PLAIN = [*MULTISTEP, *ONE_STEP]
# Exact() draws no probes, which would have directions and belong to places in the batch.
CORRECTED = [sd.Stein(solver, divergence=sd.Exact()) for solver in PLAIN]
CORRECTED[::3] = [sd.Stein(c.inner, sd.StepEnergy(), sd.Exact(), "sample") for c in CORRECTED[::3]]
STOCHASTIC = [sd.Churn(), sd.DPMpp2MSDE()]
ANALYTICAL = [sd.AnalyticalFirst(sd.DPMpp2M())]  # takes the data for standard normal at the start

draws = settings(max_examples=4, deadline=None, derandomize=True, database=None)


def name(solver):
    inner = f" {name(solver.inner)}" if hasattr(solver, "inner") else ""
    return type(solver).__name__ + inner


def solvers(*groups):
    return pytest.mark.parametrize("solver", [s for group in groups for s in group], ids=name)


class Problem(NamedTuple):
    """A mixture, a grid to 0 or above, a start."""

    data: Mixture
    sigmas: jax.Array
    x: jax.Array

    def solve(self, solver):
        """The samples, the states after each step and the steps."""
        return run(self.data, self.sigmas, solver, self.x, record=everything)


def everything(state, step):
    return state.x, step


@st.composite
def problems(draw):
    seed, std = draw(st.integers(0, 99)), draw(st.floats(0.1, 1.0))
    factors = draw(st.lists(st.floats(0.1, 0.9), min_size=4, max_size=4))
    end = draw(st.sampled_from([0.0, 0.3]))
    sigmas = draw(st.floats(2.0, 80.0)) * np.cumprod([1.0, *factors, end])
    means = normal(4, DIM, seed=seed)
    start = normal(BATCH, DIM, seed=seed + 100, scale=sigmas[0])
    return Problem(Mixture(means, jnp.asarray(std, float)), jnp.asarray(sigmas), start)


def assert_same(found, expected):
    assert_allclose(found, expected, rtol=0, atol=1e-9)


@solvers(PLAIN, CORRECTED, STOCHASTIC)
@given(problem=problems(), shift=st.floats(-5, 5))
@draws
def test_translation(solver, problem, shift):
    shift, data = jnp.asarray([[shift, -2 * shift]]), problem.data
    moved = Problem(Mixture(data.means + shift, data.std), problem.sigmas, problem.x + shift)
    assert_same(moved.solve(solver).x, problem.solve(solver).x + shift)


@solvers(PLAIN, CORRECTED, ANALYTICAL)
@given(problem=problems(), angle=st.floats(0, 2 * np.pi))
@draws
def test_rotation(solver, problem, angle):
    c, s = np.cos(angle), np.sin(angle)
    rotation = jnp.asarray([[c, s], [s, -c]])  # and a reflection
    data = problem.data
    turned = Problem(Mixture(data.means @ rotation, data.std), problem.sigmas, problem.x @ rotation)
    assert_same(turned.solve(solver).x, problem.solve(solver).x @ rotation)


@solvers(PLAIN, CORRECTED, STOCHASTIC)
@given(problem=problems(), log_scale=st.floats(-3, 3))
@draws
def test_scale(solver, problem, log_scale):
    """Data, sigmas and start in other units; but a flow's time knows of a unit."""
    if getattr(getattr(solver, "inner", solver), "prediction", "") == "flow":
        return
    scale = np.exp(log_scale)
    other = jax.tree.map(lambda leaf: scale * leaf, problem)
    assert_same(other.solve(solver).x / scale, problem.solve(solver).x)


@solvers(PLAIN, CORRECTED, ANALYTICAL)
@given(problem=problems(), order=st.permutations(range(BATCH)))
@draws
def test_permutation_of_the_batch(solver, problem, order):
    order = jnp.asarray(order)
    permuted = problem._replace(x=problem.x[order])
    assert_same(permuted.solve(solver).x, problem.solve(solver).x[order])


@solvers(PLAIN, CORRECTED, STOCHASTIC, ANALYTICAL)
@given(several=st.tuples(problems(), problems()))
@settings(draws, max_examples=2)
def test_vmap_is_a_loop(solver, several):
    """Over data, grids, to 0 and not, and starts."""
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *several)
    found = vmapped(together, solver)
    assert_same(found, jnp.stack([problem.solve(solver).x for problem in several]))


@jax.jit
def vmapped(problems, solver):
    return jax.vmap(lambda problem: problem.solve(solver).x)(problems)


@solvers(PLAIN, CORRECTED)
@given(problem=problems())
@draws
def test_constant_denoiser(solver, problem):
    """Data at one point c: x' = c + (sigma' / sigma)(x - c) is exact, and every solver's result."""
    data = Mixture(jnp.tile(problem.data.means[:1], (4, 1)), jnp.zeros(()))
    x, sigmas, point = problem.x, problem.sigmas, data.means[:1]
    exact = point + sigmas[-1] / sigmas[0] * (x - point)
    assert_allclose(problem._replace(data=data).solve(solver).x, exact, rtol=0, atol=1e-12)


@solvers(PLAIN, CORRECTED, ANALYTICAL)
@given(problem=problems())
@draws
def test_steps_taken_apart(solver, problem):
    """A step is q x + (1 - q)(x0 + gamma delta), as it reports itself; both ends of the grid.

    T = A where there is no history, that is in the first step of a multistep solver, and in a step
    to 0, which returns what the denoiser does, to the last bit.
    """
    solution, sigmas = problem.solve(solver), problem.sigmas
    states, steps = solution.record
    before = jnp.concatenate([problem.x[None], states[:-1]])
    q = (sigmas[1:] / sigmas[:-1])[:, None, None]
    gamma = steps.gamma.reshape(len(q), -1, 1)
    assert_same(states, q * before + (1 - q) * (steps.x0 + gamma * steps.delta))
    if solver not in ANALYTICAL:
        expected = [problem.data(x, s) for x, s in zip(before, sigmas[:-1], strict=True)]
        assert_same(steps.x0, expected)
    first_order = [0] if getattr(solver, "inner", solver) in MULTISTEP else []
    if sigmas[-1] == 0:
        first_order += [-1]
        assert_array_equal(solution.x, steps.x0[-1])
    for i in first_order:
        assert_array_equal(steps.delta[i], 0.0)
        assert_array_equal(steps.gamma[i], 1.0)


@solvers(STOCHASTIC)
@given(problem=problems())
@draws
def test_stochastic_solvers_end_in_the_denoiser(solver, problem):
    solution = problem._replace(sigmas=problem.sigmas.at[-1].set(0.0)).solve(solver)
    assert_array_equal(solution.x, solution.record[1].x0[-1])


@solvers([sd.Heun(), sd.LMS(2), sd.IPNDM(2), sd.DPMpp2M()])
@given(std=st.floats(0.2, 2.0), factors=st.lists(st.floats(0.1, 0.9), min_size=3, max_size=3))
@draws
def test_exact_on_isotropic_gaussians(solver, std, factors):
    """Second-order solvers, with their length from `PosteriorLength`, however large the steps.

    On N(m, v) their delta has the exact one's direction. The length is taken in full here, and the
    means over the batch are the law's own, for which the first step, of first order, is short.
    """
    rule = sd.PosteriorLength(gamma_max=np.inf, surprise_max=1e-20)
    data = Gaussian(jnp.full(DIM, 0.7), std**2 * jnp.eye(DIM))
    sigmas = 5.0 * np.cumprod([1.0, 1 - 1e-7, *factors])
    x = 0.7 + whitened(BATCH, DIM) * np.hypot(std, sigmas[0])
    found = run(data, sigmas, sd.Stein(solver, rule, sd.Exact()), x).x
    assert_allclose(found, data.flow(x, sigmas[0], sigmas[-1]), rtol=0, atol=1e-6)
