"""Grids of sigmas: their formulas, their ends, what may be traced, and padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import mixture
from numpy.testing import assert_allclose, assert_array_equal

import steindiff_jax as sd

GRIDS = [sd.karras_sigmas, sd.log_snr_sigmas]


@pytest.mark.parametrize("rho", [1.0, 7.0])
def test_karras(rho):
    """Table 1 of the paper: (s_max^(1/rho) + i / (n - 1) (s_min^(1/rho) - s_max^(1/rho)))^rho."""
    i = np.arange(8) / 7
    expected = (80 ** (1 / rho) + i * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
    assert_allclose(sd.karras_sigmas(8, 0.002, 80.0, rho), [*expected, 0], rtol=1e-10)


def test_log_snr():
    grid = np.asarray(sd.log_snr_sigmas(8, 0.01, 50.0))
    assert_allclose(grid[1:-1] / grid[:-2], (0.01 / 50) ** (1 / 7), rtol=1e-12)
    assert_allclose(grid[[0, -2]], [50, 0.01], rtol=1e-12)


@pytest.mark.parametrize("grid", GRIDS)
def test_ends_and_length(grid):
    for steps in (1, 2, 9):
        sigmas = grid(steps, sigma_min=0.1, sigma_max=3.0)
        assert sigmas.shape == (steps + 1,)
        assert_allclose(sigmas[0], 3.0)
        assert_array_equal(sigmas[-1], 0.0)
        assert np.all(np.diff(sigmas) < 0)
        if steps > 1:
            assert_allclose(sigmas[-2], 0.1)


@pytest.mark.parametrize("grid", GRIDS)
def test_numbers_may_be_traced(grid):
    def second(low, high):
        return grid(4, low, high)[1]

    slopes = jax.jit(jax.grad(second, argnums=(0, 1)))(0.1, 3.0)
    h = 1e-6
    assert_allclose(slopes[0], (second(0.1 + h, 3.0) - second(0.1 - h, 3.0)) / 2e-6, rtol=1e-6)
    assert_allclose(slopes[1], (second(0.1, 3.0 + h) - second(0.1, 3.0 - h)) / 2e-6, rtol=1e-6)
    mapped = jax.vmap(lambda low: grid(4, low))(jnp.array([0.1, 0.01]))
    assert_allclose(mapped[1], grid(4, 0.01), rtol=1e-12)


@pytest.mark.parametrize("solver", [sd.Stein(sd.DPMpp3M()), sd.Heun(), sd.IPNDM(4)], ids=type)
def test_padding_changes_nothing(solver):
    """Grids padded with zeros share one program and give what the grid alone gives."""
    traces = []

    @jax.tree_util.Partial
    def denoiser(x, sigma):
        traces.append(None)
        return mixture()(x, sigma)

    def draw(sigmas):
        return sd.sample(jax.random.key(0), denoiser, (4, 2), sigmas=sigmas, solver=solver)

    grids = [sd.karras_sigmas(n) for n in (3, 5)]
    alone = [draw(grid) for grid in grids]
    traces.clear()
    padded = [draw(jnp.pad(grid, (0, 9 - grid.size))) for grid in grids]
    once = len(traces)
    draw(jnp.pad(sd.karras_sigmas(4), (0, 4)))
    assert len(traces) == once > 0
    for one, other, grid in zip(alone, padded, grids, strict=True):
        steps = grid.size - 1
        assert_allclose(other.x, one.x, rtol=1e-12)
        assert_allclose(other.info.gamma[:steps], one.info.gamma, rtol=1e-12)
        assert_array_equal(other.info.gamma[steps:], 1.0)
        assert other.info.nfe == one.info.nfe
        assert other.info.finite.all()
