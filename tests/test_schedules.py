"""Schedules with options, the grids in their times, and thresholding of what a denoiser returns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import mixture, normal, run
from numpy.testing import assert_allclose, assert_array_equal

import steindiff_jax as sd
from steindiff_jax.denoisers import rows

# Each schedule and times within its domain, away from kinks.
SCHEDULES = {
    "EDM": (sd.EDM(), np.geomspace(1e-3, 80, 9)),
    "VPLinear": (sd.VPLinear(0.2, 15.0), np.linspace(0.01, 1, 9)),
    "VPCosine": (sd.VPCosine(0.02), np.linspace(0.01, 0.99, 9)),
    "RectifiedFlow": (sd.RectifiedFlow(), np.linspace(0.01, 0.99, 9)),
    "shifted flow": (sd.RectifiedFlow(3.0), np.linspace(0.01, 0.99, 9)),
    "linear": (sd.Discrete.linear(), np.linspace(0.5, 998.3, 9)),
    "scaled linear": (sd.Discrete.scaled_linear(), np.linspace(0.5, 998.3, 9)),
    "cosine": (sd.Discrete.cosine(), np.linspace(0.5, 998.3, 9)),
    "zero terminal SNR": (sd.Discrete.scaled_linear().zero_terminal_snr(), np.arange(0.5, 999, 90)),
}
every_schedule = pytest.mark.parametrize("name", SCHEDULES)


@every_schedule
def test_time_is_the_inverse_of_the_ratio(name):
    """Its value, and by autodiff its slope: dt / dratio = 1 / (d(sigma / alpha) / dt)."""
    schedule, times = SCHEDULES[name]

    def ratio(t):
        return schedule.sigma(t) / schedule.alpha(t)

    for t in jnp.asarray(times):
        value, slope = jax.value_and_grad(ratio)(t)
        back, inverse = jax.value_and_grad(schedule.time)(value)
        assert_allclose(back, t, rtol=1e-9)
        assert_allclose(inverse * slope, 1.0, rtol=1e-6)
        assert_allclose(schedule.at(value), (t, schedule.alpha(t), schedule.sigma(t)), rtol=1e-9)


# Time, alpha and sigma of a ratio, written in another way, for float64.


def circle(r):
    return 1 / jnp.sqrt(1 + r**2), 1 / jnp.sqrt(1 + r**-2)


def line(r):
    return 1 / (1 + r), 1 / (1 + 1 / r)


def vp_linear(r, beta_min=0.2, beta_max=15.0):
    """The root of beta_min t + (beta_max - beta_min) t^2 / 2 = log(1 + r^2)."""
    p, q = beta_min / (beta_max - beta_min), 2 * jnp.log1p(r**2) / (beta_max - beta_min)
    return q / (p + jnp.sqrt(p**2 + q))


def vp_cosine(r, shift=0.02):
    """The difference of two angles, tan(x - y) = (tan x - tan y) / (1 + tan x tan y)."""
    start = np.pi / 2 * shift / (1 + shift)
    square = (r / np.cos(start)) ** 2  # tan(x)^2 - tan(y)^2
    tan = jnp.sqrt(np.tan(start) ** 2 + square)
    difference = square / (tan + np.tan(start)) / (1 + tan * np.tan(start))
    return jnp.arctan(difference) * (1 + shift) * 2 / np.pi


EXACT = {
    "EDM": (lambda r: r, lambda r: (jnp.ones_like(r), r)),
    "VPLinear": (vp_linear, circle),
    "VPCosine": (vp_cosine, circle),
    "RectifiedFlow": (lambda r: line(r)[1], line),
    "shifted flow": (lambda r: line(r / 3.0)[1], line),
}
EPS, TINY = np.finfo(np.float32).eps, np.finfo(np.float32).tiny


@pytest.mark.parametrize("name", EXACT)
def test_float32_extremes_of_the_ratio(name):
    """Rounding is all that time, alpha and sigma lose, and their slopes in log ratio.

    The time of a flow at a ratio of 1e12 is 1 to the last digit; its alpha is not 0 there.
    """
    time, parts = EXACT[name]

    def pair(function, ratios):
        return jax.jvp(lambda r: jnp.stack(function(r)), (ratios,), (ratios,))

    ratios = np.append(np.geomspace(1e-6, 1e6, 25), [1.0, 1e-12, 1e12]).astype(np.float32)
    found = pair(SCHEDULES[name][0].at, jnp.asarray(ratios))
    exact = pair(lambda r: (time(r), *parts(r)), jnp.asarray(ratios, float))
    for value, expected in zip(found, exact, strict=True):
        assert value.dtype == jnp.float32
        assert_allclose(value, expected, rtol=8 * EPS, atol=TINY)
    # Where its square is no float32; slopes there may be 0, but not nan.
    ratios = jnp.asarray([0.0, 1e-30, 1e30], jnp.float32)
    values, slopes = pair(SCHEDULES[name][0].at, ratios)
    wide = ratios[1:].astype(float)
    assert_allclose(values[:, 1:], (time(wide), *parts(wide)), rtol=4 * EPS, atol=TINY)
    assert_array_equal(values[:, 0], [0.0, 1.0, 0.0])
    assert np.isfinite(slopes).all()


@pytest.mark.parametrize("name", EXACT)
def test_float32_extremes_of_the_time(name):
    """As close to 0 and 1 as float32 tells times apart, and there and back again."""
    schedule = SCHEDULES[name][0]
    near = np.geomspace(1e-6, 0.3, 12)
    times = jnp.asarray([*near, *(1 - near)], jnp.float32)

    def pair(t):
        both = jax.jvp(
            lambda t: jnp.stack([schedule.alpha(t), schedule.sigma(t)]), (t,), (jnp.ones_like(t),)
        )
        return [np.asarray(part) for part in both]

    (values, slopes), (exact, exact_slopes) = pair(times), pair(times.astype(float))
    assert values.dtype == slopes.dtype == np.float32
    assert_allclose(values, exact, rtol=4 * EPS)
    # Either slope may vanish beside the other one.
    error = np.linalg.norm(slopes - exact_slopes, axis=0)
    assert (error < 16 * EPS * np.linalg.norm(exact_slopes, axis=0)).all()
    ratios = jnp.asarray(values[1] / values[0])
    back, slope = jax.jvp(schedule.time, (ratios,), (ratios,))
    assert_allclose(back, times, rtol=4 * EPS)
    log_slopes = slopes / values  # of sigma and of alpha; their difference is that of log ratio
    assert_allclose(slope * (log_slopes[1] - log_slopes[0]), 1.0, rtol=8 * EPS)


@pytest.mark.parametrize("name", ["linear", "scaled linear", "cosine", "zero terminal SNR"])
def test_float32_discrete(name):
    """Tables of a thousand float32 betas against the same betas multiplied in float64."""
    betas = jnp.asarray(SCHEDULES[name][0].betas, jnp.float32)
    schedule, n = sd.Discrete(betas), jnp.arange(1000, dtype=jnp.float32)
    squares = np.cumprod(1 - np.asarray(betas, float))
    exact = np.sqrt(1 / squares - 1)
    assert_allclose(schedule.ratio(n), exact, rtol=16 * EPS)
    assert_allclose(schedule.alpha(n), np.sqrt(squares), rtol=16 * EPS)
    assert_allclose(schedule.sigma(n), np.sqrt(1 - squares), rtol=16 * EPS)
    assert_allclose(schedule.time(jnp.asarray(exact, jnp.float32)), n, atol=1000 * 2 * EPS)


def test_time_shift():
    """Of the ratio: times `shift`; and the composition of two shifts is their product."""
    t = jnp.linspace(0.0, 0.99, 12)
    flow, shifted = sd.RectifiedFlow(), sd.RectifiedFlow(3.0)
    assert_allclose(shifted.alpha(t) + shifted.sigma(t), 1.0, rtol=1e-12)
    assert_allclose(shifted.sigma(t) / shifted.alpha(t), 3 * t / (1 - t), rtol=1e-12)
    assert_allclose(sd.RectifiedFlow(2.0).sigma(shifted.sigma(t)), sd.RectifiedFlow(6.0).sigma(t))
    assert_allclose(sd.RectifiedFlow(1.0).sigma(t), flow.sigma(t), rtol=1e-12)


def test_betas():
    assert_allclose(sd.Discrete.linear(10, 0.1, 0.4).betas, np.linspace(0.1, 0.4, 10))
    roots = np.sqrt(sd.Discrete.scaled_linear(10, 0.01, 0.09).betas)
    assert_allclose(roots, np.linspace(0.1, 0.3, 10))
    # Nichol & Dhariwal: beta_n = 1 - f(n + 1) / f(n), f(n) = cos^2((n / N + s) / (1 + s) pi / 2)
    f = np.cos((np.arange(51) / 50 + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    assert_allclose(sd.Discrete.cosine(50).betas, betas, rtol=1e-9)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("make", [sd.Discrete.linear, sd.Discrete.scaled_linear])
def test_zero_terminal_snr(make, dtype):
    """Algorithm 1 of arXiv:2305.08891: alpha shifted to 0 at the end and scaled back at the start.

    But for the last step, whose ratio is finite and still far above all others.
    """
    plain = sd.Discrete(jnp.asarray(make().betas, dtype))
    rescaled = plain.zero_terminal_snr()
    alpha = np.sqrt(np.cumprod(1 - np.asarray(make().betas)))
    expected = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    n = jnp.arange(1000, dtype=dtype)
    found = np.asarray(rescaled.alpha(n))
    assert_allclose(found[:-1], expected[:-1], rtol=1e-5 if dtype == jnp.float32 else 1e-9)
    ratios = np.asarray(rescaled.ratio(n))
    assert np.isfinite(ratios).all()
    assert (np.diff(ratios) > 0).all()
    assert ratios[-1] > 1000
    assert_allclose(rescaled.time(jnp.asarray(ratios)), n, rtol=1e-3)
    assert (np.asarray(rescaled.betas) > 0).all()
    assert (np.asarray(rescaled.betas) < 1).all()


# Grids


def test_exponential_is_log_snr():
    assert sd.exponential_sigmas is sd.log_snr_sigmas


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_time_grid(power):
    """Uniform, or quadratic, in t: equal differences of t^(1 / power)."""
    for schedule in (sd.VPLinear(), sd.VPCosine(), sd.RectifiedFlow()):
        grid = np.asarray(sd.time_sigmas(7, schedule, t_min=0.05, t_max=0.9, power=power))
        t = np.asarray(schedule.time(jnp.asarray(grid[:-1])))
        assert grid[-1] == 0.0
        assert_allclose(t ** (1 / power), np.linspace(0.9 ** (1 / power), 0.05 ** (1 / power), 7))


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


def test_a_flow_from_its_end_is_refused():
    with pytest.raises(ValueError, match="start a flow at t < 1"):
        sd.sample(
            jax.random.key(0),
            mixture(),
            (4, 2),
            sigmas=sd.time_sigmas(5, sd.RectifiedFlow(), t_max=1.0),
        )


# Thresholding


def spread(x, sigma):
    """A denoiser whose samples have entries up to 2, 4, 6, ... in modulus."""
    del sigma
    scale = 2 * jnp.arange(1, x.shape[0] + 1, dtype=x.dtype)[:, None, None]
    return scale * jnp.tanh(x)


def test_static_threshold():
    x = normal(3, 4, 5)
    assert_array_equal(
        sd.StaticThreshold(spread, 1.5)(x, jnp.asarray(1.0)), np.clip(spread(x, 1.0), -1.5, 1.5)
    )


def test_dynamic_threshold():
    """Section 2.3 of arXiv:2205.11487, each sample by itself, over all axes of the event."""
    x = normal(3, 4, 5)
    found = sd.DynamicThreshold(spread, 0.8, 3.0)(x, jnp.asarray(1.0))
    x0 = np.asarray(spread(x, 1.0))
    for row, expected in zip(found, x0, strict=True):
        s = max(np.quantile(np.abs(expected), 0.8), 3.0)
        assert_allclose(row, np.clip(expected, -s, s) * 3.0 / s, rtol=1e-12)
    assert_array_equal(found[0], x0[0])  # all within the limit: left alone


@pytest.mark.parametrize("wrap", [sd.StaticThreshold, sd.DynamicThreshold])
def test_thresholds_are_denoisers(wrap):
    """Pytrees with the limit as a leaf, inside `sample`, and for some of the samples only."""

    class Labelled:
        def __init__(self, labels):
            self.labels = labels

        def __call__(self, x, sigma):
            del sigma
            return x + self.labels[:, None]

        def rows(self, take):
            return Labelled(take(self.labels))

    labels = jnp.array([0.5, -3.0, 8.0, 1.0])
    x, sigma = normal(4, 2), jnp.asarray(1.0)
    wrapped = wrap(Labelled(labels))
    some = rows(wrapped, lambda a: a[1::2])
    assert_array_equal(some(x[1::2], sigma), wrapped(x, sigma)[1::2])
    solution = run(wrap(mixture(), limit=0.1), sd.karras_sigmas(4), sd.DPMpp2M(), 80 * x)
    assert np.abs(solution.x).max() <= 0.1
    slope = jax.grad(lambda limit: wrap(mixture(), limit=limit)(x, sigma).sum())(0.1)
    assert np.isfinite(slope)
    assert slope != 0
