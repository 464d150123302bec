"""Grids of sigmas: their formulas, their ends, what may be traced, and padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import mixture
from numpy.testing import assert_allclose, assert_array_equal

import steindiff_jax as sd

GRIDS = [sd.karras_sigmas, sd.log_snr_sigmas, sd.cosine_sigmas]


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
        above = grid(steps, sigma_min=0.1, sigma_max=3.0, to_zero=False)
        assert_array_equal(above, grid(steps + 1, sigma_min=0.1, sigma_max=3.0)[:-1])


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


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_time_grid(power):
    """Uniform, or quadratic, in t: equal differences of t^(1 / power)."""
    for schedule in (sd.VPLinear(), sd.VPCosine(), sd.RectifiedFlow()):
        grid = np.asarray(sd.time_sigmas(7, schedule, t_min=0.05, t_max=0.9, power=power))
        t = np.asarray(schedule.time(jnp.asarray(grid[:-1])))
        assert grid[-1] == 0.0
        assert_allclose(t ** (1 / power), np.linspace(0.9 ** (1 / power), 0.05 ** (1 / power), 7))
        ends = {"t_min": 0.05, "t_max": 0.9, "power": power}
        assert_array_equal(sd.time_sigmas(6, schedule, **ends, to_zero=False), grid[:-1])


def test_cosine_grid():
    """Tan of uniform angles, which is uniform in the time of the cosine schedule without shift."""
    grid = sd.cosine_sigmas(9, 0.01, 50.0)
    assert_allclose(np.diff(np.arctan(grid[:-1])), np.arctan([0.01, 50.0]) @ [1, -1] / 8, rtol=1e-9)
    ends = 2 / np.pi * np.arctan([0.01, 50.0])
    assert_allclose(grid, sd.time_sigmas(9, sd.VPCosine(0.0), *ends), rtol=1e-9)


def test_flow_grid():
    """T from t_max to 0, shifted as the schedule shifts it."""
    t = np.linspace(0.9, 0.0, 6)
    assert_allclose(sd.flow_sigmas(5, t_max=0.9), t / (1 - t), rtol=1e-12)
    shifted = sd.RectifiedFlow(3.0)
    ratio = shifted.sigma(jnp.asarray(t)) / shifted.alpha(jnp.asarray(t))
    assert_allclose(sd.flow_sigmas(5, shift=3.0, t_max=0.9), ratio, rtol=1e-12)


@pytest.mark.parametrize(
    ("spacing", "steps", "timesteps"),
    [
        # arXiv:2305.08891, table 2, counted from 0
        ("leading", 10, [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]),
        ("linspace", 10, [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]),
        ("trailing", 10, [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]),
        ("leading", 3, [666, 333, 0]),
        ("trailing", 3, [999, 666, 332]),
        ("trailing", 1, [999]),
    ],
)
def test_ddpm_grid(spacing, steps, timesteps):
    schedule = sd.Discrete.scaled_linear()
    grid = sd.ddpm_sigmas(steps, schedule, spacing)
    cumulative = np.cumprod(1 - np.asarray(schedule.betas))[timesteps]
    assert_allclose(grid, [*np.sqrt((1 - cumulative) / cumulative), 0.0], rtol=1e-9)
    assert_allclose(schedule.time(grid[:-1]), timesteps, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sd.cosine_sigmas(0), "steps must be at least 1, got 0"),
        (lambda: sd.time_sigmas(0, sd.EDM()), "steps must be at least 1, got 0"),
        (lambda: sd.flow_sigmas(0), "steps must be at least 1, got 0"),
        (lambda: sd.ddpm_sigmas(0, sd.Discrete.linear()), "between 1 and 1000, got 0"),
        (lambda: sd.ddpm_sigmas(1001, sd.Discrete.linear()), "between 1 and 1000, got 1001"),
        (
            lambda: sd.ddpm_sigmas(5, sd.Discrete.linear(), "even"),
            "spacing must be one of .*'even'",
        ),
    ],
)
def test_wrong_grids(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "grid",
    [
        sd.cosine_sigmas(5),
        sd.time_sigmas(5, sd.VPLinear(), power=2.0),
        sd.flow_sigmas(5, shift=3.0),
        sd.ddpm_sigmas(5, sd.Discrete.linear().zero_terminal_snr()),
        np.array([40.0, 9.0, 3.0, 0.5, 0.1, 0.0]),
        jnp.array([40.0, 9.0, 3.0, 0.5, 0.1, 0.01]),
    ],
)
def test_every_grid_samples(grid):
    """Decreasing, accepted and finite to the end, in a solver that takes logarithms."""
    solution = sd.sample(jax.random.key(0), mixture(), (16, 2), sigmas=grid, solver=sd.UniPC(3))
    assert solution.info.finite.all()
    assert solution.info.nfe == 5


@pytest.mark.parametrize("schedule", [sd.VPCosine(), sd.RectifiedFlow()], ids=type)
def test_a_grid_in_time_from_infinity_is_refused(schedule):
    """By `time_sigmas` itself, in both widths, and with the remedy."""
    for t_max in (1.0, np.float32(1.0), jnp.ones((), jnp.float32)):
        with pytest.raises(ValueError, match=r"t_max=.*1.* has an infinite ratio: start below"):
            sd.time_sigmas(5, schedule, t_max=t_max)
    assert np.isfinite(sd.time_sigmas(5, schedule, t_max=0.999)).all()


@pytest.mark.parametrize(
    ("solver", "to_zero"),
    [
        (sd.Stein(sd.DPMpp3M()), True),
        (sd.Stein(sd.UniPC(3)), False),
        (sd.LMS(3), False),
        pytest.param(sd.Heun(), True, marks=pytest.mark.slow),
        pytest.param(sd.Heun(), False, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_padding_changes_nothing(solver, to_zero):
    """Grids padded with their last level share one program and give what the grid alone gives."""
    traces = []

    @jax.tree_util.Partial
    def denoiser(x, sigma):
        traces.append(None)
        return mixture()(x, sigma)

    def draw(sigmas):
        return sd.sample(
            jax.random.key(0), denoiser, (4, 2), sigmas=sigmas, solver=solver, record=record
        )

    def record(state, step):
        return state.x, step.x0, step.nfe

    grids = [sd.karras_sigmas(n, to_zero=to_zero) for n in (3, 5, 4)]
    alone = [draw(grid) for grid in grids]
    traces.clear()
    padded, traced = [], []
    for grid in grids:
        padded.append(draw(jnp.pad(grid, (0, 9 - grid.size), mode="edge")))
        traced.append(len(traces))
    assert traced[0] == traced[-1] > 0
    for one, other, grid in zip(alone, padded, grids, strict=True):
        steps = grid.size - 1
        assert_allclose(other.x, one.x, rtol=1e-12)
        assert_allclose(other.info.gamma[:steps], one.info.gamma, rtol=1e-12)
        assert_array_equal(other.info.gamma[steps:], 1.0)
        assert other.info.nfe == one.info.nfe
        assert other.info.finite.all()
        # A skipped step repeats the last record, so that record[-1] is that of the last step.
        for kept, expected in zip(other.record, one.record, strict=True):
            assert_allclose(kept[:steps], expected, rtol=1e-12)
            assert_array_equal(kept[steps:], np.broadcast_to(kept[steps - 1], kept[steps:].shape))
        assert_array_equal(other.record[0][-1], other.x)
