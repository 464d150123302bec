"""What holds for every solver, problem and grid: symmetries, exactness, both ends of a grid.

Each solver is compiled once, for problems and grids of one shape; their values are drawn.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import Mixture, normal, run, unoptimised  # noqa: F401
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
QUICK = (sd.IPNDM, sd.DPMpp2M, sd.UniPC, sd.DDIM, sd.Heun)
# Estimators that draw no probes, which would have directions and belong to places in the batch.
CORRECTED = [sd.Stein(solver) for solver in PLAIN[::2]]
CORRECTED += [sd.Stein(sd.Heun(), estimator=sd.Exact())]
# Energies of x - D, which a translation leaves as they are; of D itself only with a batch's mean.
CORRECTED += [sd.Stein(s, sd.StepEnergy(), statistics="sample") for s in (sd.DPMpp2M(), sd.DPM2())]
SAMPLE = [sd.Stein(sd.IPNDM(3), statistics="sample")]
STOCHASTIC = [sd.Churn(), sd.DPMpp2MSDE(), sd.Ancestral(), sd.DPMppSDE()]
ANALYTICAL = [sd.AnalyticalFirst(sd.DPMpp2M())]  # takes the data for standard normal at the start

draws = settings(max_examples=4, deadline=None, derandomize=True, database=None)


def name(solver):
    inner = f" {name(solver.inner)}" if hasattr(solver, "inner") else ""
    return type(solver).__name__ + inner


def solvers(*groups):
    """Those of `QUICK` always, and one of them inside a correction; all with `-m slow`."""
    rows = [s for group in groups for s in group]
    quick = [
        type(s) in QUICK or s in (CORRECTED[1], *SAMPLE, *STOCHASTIC, *ANALYTICAL) for s in rows
    ]
    rows = [
        pytest.param(s, marks=() if q else pytest.mark.slow)
        for s, q in zip(rows, quick, strict=True)
    ]
    return pytest.mark.parametrize("solver", rows, ids=name)


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


@solvers(PLAIN, CORRECTED, SAMPLE, ANALYTICAL)
@given(problem=problems(), angle=st.floats(0, 2 * np.pi))
@draws
def test_rotation(solver, problem, angle):
    c, s = np.cos(angle), np.sin(angle)
    rotation = jnp.asarray([[c, s], [s, -c]])  # and a reflection
    data = problem.data
    turned = Problem(Mixture(data.means @ rotation, data.std), problem.sigmas, problem.x @ rotation)
    assert_same(turned.solve(solver).x, problem.solve(solver).x @ rotation)


@solvers(PLAIN, CORRECTED, SAMPLE, STOCHASTIC)
@given(problem=problems(), log_scale=st.floats(-3, 3))
@draws
def test_scale(solver, problem, log_scale):
    """Data, sigmas and start in other units; but a flow's time knows of a unit."""
    if getattr(getattr(solver, "inner", solver), "prediction", "") == "flow":
        return
    scale = np.exp(log_scale)
    other = jax.tree.map(lambda leaf: scale * leaf, problem)
    assert_same(other.solve(solver).x / scale, problem.solve(solver).x)


@solvers(PLAIN, SAMPLE, ANALYTICAL)
@given(problem=problems(), order=st.permutations(range(BATCH)))
@draws
def test_permutation_of_the_batch(solver, problem, order):
    assert_equivariant(solver, problem, order)


@solvers(CORRECTED)
@given(
    problem=problems(),
    pairs=st.permutations(range(BATCH // 2)),
    swaps=st.lists(st.booleans(), min_size=BATCH // 2, max_size=BATCH // 2),
)
@draws
def test_permutation_of_the_batch_s_pairs(solver, problem, pairs, swaps):
    """Neighbours are each other's mean: of pairs, and of the two in each."""
    order = [2 * pair + (i ^ swap) for pair, swap in zip(pairs, swaps, strict=True) for i in (0, 1)]
    assert_equivariant(solver, problem, order)


def assert_equivariant(solver, problem, order):
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


@solvers(PLAIN, CORRECTED, SAMPLE, ANALYTICAL)
@given(problem=problems())
@draws
def test_steps_taken_apart(solver, problem):
    """A step is q x + (1 - q)(x0 + delta), as it reports itself; both ends of the grid.

    A solver with no history yet, in its first step, adds nothing, and none does in a step to 0,
    which returns what the denoiser does, to the last bit.
    """
    solution, sigmas = problem.solve(solver), problem.sigmas
    states, steps = solution.record
    before = jnp.concatenate([problem.x[None], states[:-1]])
    q = (sigmas[1:] / sigmas[:-1])[:, None, None]
    assert_same(states, q * before + (1 - q) * (steps.x0 + steps.delta))
    if solver not in ANALYTICAL:
        expected = [problem.data(x, s) for x, s in zip(before, sigmas[:-1], strict=True)]
        assert_same(steps.x0, expected)
    if solver in MULTISTEP:
        assert_array_equal(steps.delta[0], 0.0)
    if sigmas[-1] == 0:
        assert_array_equal(solution.x, steps.x0[-1])
        assert_array_equal(steps.delta[-1], 0.0)


@solvers(STOCHASTIC)
@given(problem=problems())
@draws
def test_stochastic_solvers_end_in_the_denoiser(solver, problem):
    solution = problem._replace(sigmas=problem.sigmas.at[-1].set(0.0)).solve(solver)
    assert_array_equal(solution.x, solution.record[1].x0[-1])


@sd.pytree
class Rotated(sd.Basis):
    """Of a user: another orthonormal basis, and within each band of its coefficients too."""

    base: sd.Basis
    rotations: tuple

    def labels(self, event):
        return self.base.labels(event)

    def transform(self, x):
        return self._within_bands(self.base.transform(x), [r.T for r in self.rotations])

    def inverse(self, coefficients):
        return self.base.inverse(self._within_bands(coefficients, self.rotations))

    def _within_bands(self, x, matrices):
        flat, labels = x.reshape(x.shape[0], -1), self.labels(x.shape[1:]).reshape(-1)
        for k, matrix in enumerate(matrices):
            flat = flat.at[:, labels == k].set(flat[:, labels == k] @ matrix)
        return flat.reshape(x.shape)


@pytest.mark.parametrize("rule", [sd.PosteriorLength(), sd.StepEnergy()], ids=type)
def test_the_basis_within_a_band_is_without_influence(rule):
    event, base = (4, 4, 2), sd.Cosine(2)
    sizes = base.partition(event).sizes
    rotations = tuple(jnp.linalg.qr(normal(n, n, seed=n))[0] for n in sizes)
    means, x = normal(4, 32), normal(BATCH, *event, seed=1, scale=3.0)

    def denoiser(x, sigma):
        flat = Mixture(means, 0.5)(x.reshape(x.shape[0], -1), sigma)
        return flat.reshape(x.shape)

    found, expected = (
        run(denoiser, [3.0, 1.5, 0.7, 0.3], sd.Stein(sd.DPMpp2M(), rule, basis=basis), x)
        for basis in (Rotated(base, rotations), base)
    )
    assert_allclose(found.x, expected.x, atol=1e-10)
    assert_allclose(found.info.gamma, expected.info.gamma, rtol=1e-8)
    whole = run(denoiser, [3.0, 1.5, 0.7, 0.3], sd.Stein(sd.DPMpp2M(), rule, basis=sd.Whole()), x)
    assert np.abs(whole.x - expected.x).max() > 1e-3
