"""Schedules: their papers' formulas, inverses, and every digit of float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import steindiff_jax as sd

BETAS = np.linspace(1e-4, 0.02, 1000)
TABLE = np.cumprod(1 - BETAS)


def linear(t):
    alpha = np.exp(-(0.1 * t + 19.9 * t**2 / 2) / 2)
    return alpha, np.sqrt(1 - alpha**2)


def cosine(t):
    alpha = np.cos((t + 0.008) / 1.008 * np.pi / 2) / np.cos(0.008 / 1.008 * np.pi / 2)
    return alpha, np.sqrt(1 - alpha**2)


def discrete(t):
    ratio = np.exp(np.interp(t, np.arange(1000), np.log((1 - TABLE) / TABLE) / 2))
    return 1 / np.sqrt(1 + ratio**2), ratio / np.sqrt(1 + ratio**2)


# Each schedule, alpha(t) and sigma(t) as its paper writes them, and times within its domain.
PUBLISHED = {
    "EDM": (sd.EDM(), lambda t: (np.ones_like(t), t), np.geomspace(1e-3, 80, 9)),
    "VPLinear": (sd.VPLinear(), linear, np.linspace(0.02, 1, 9)),
    "VPCosine": (sd.VPCosine(), cosine, np.linspace(0.02, 0.99, 9)),
    "RectifiedFlow": (sd.RectifiedFlow(), lambda t: (1 - t, t), np.linspace(0.02, 0.99, 9)),
    "Discrete": (sd.Discrete(BETAS), discrete, np.array([0.0, 1, 1.5, 7, 99.25, 500, 998, 999])),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_schedule_is_its_paper_s(name):
    schedule, formula, t = PUBLISHED[name]
    alpha, sigma = formula(t)
    assert_allclose(schedule.alpha(jnp.asarray(t)), alpha, rtol=1e-10)
    assert_allclose(schedule.sigma(jnp.asarray(t)), sigma, rtol=1e-10)
    ratio = jnp.asarray(sigma / alpha)
    assert_allclose(schedule.time(ratio), t, rtol=1e-9, atol=1e-12)
    for found, expected in zip(schedule.at(ratio), (t, alpha, sigma), strict=True):
        assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_discrete_table_and_clamping():
    schedule = sd.Discrete(BETAS)
    n = jnp.arange(1000.0)
    assert_allclose(schedule.alpha(n) ** 2, TABLE, rtol=1e-12)
    assert_allclose(schedule.sigma(n) ** 2, 1 - TABLE, rtol=1e-12)
    assert_array_equal(schedule.time(jnp.array([1e-9, 1e9])), [0, 999])


# --- With options -------------------------------------------------------------------------------

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

    @jax.jit
    @jax.vmap
    def there_and_back(t):
        value, slope = jax.value_and_grad(ratio)(t)
        back, inverse = jax.value_and_grad(schedule.time)(value)
        parts = jnp.stack([t, schedule.alpha(t), schedule.sigma(t)])
        return back, inverse * slope, jnp.stack(schedule.at(value)), parts

    back, product, at, parts = there_and_back(jnp.asarray(times))
    assert_allclose(back, times, rtol=1e-9)
    assert_allclose(product, 1.0, rtol=1e-6)
    assert_allclose(at, parts, rtol=1e-9)


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
        return jax.jit(lambda r: jax.jvp(lambda r: jnp.stack(function(r)), (r,), (r,)))(ratios)

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

    @jax.jit
    def pair(t):
        def both(t):
            return jnp.stack([schedule.alpha(t), schedule.sigma(t)])

        return jax.jvp(both, (t,), (jnp.ones_like(t),))

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


@pytest.mark.parametrize(
    "make", [sd.Discrete.linear, sd.Discrete.scaled_linear, sd.Discrete.cosine]
)
def test_betas_without_x64(make):
    """Those of float64, rounded: the time of a step is a thousand times as sensitive."""
    with jax.enable_x64(False):
        found = make().betas
    assert found.dtype == jnp.float32
    assert_allclose(found, make().betas, rtol=2 * EPS)


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


# --- The ends of a schedule, and grids beyond them ------------------------------------------------


def test_ends_of_a_schedule():
    """The ratios at its first and last time, as its paper gives them."""
    assert_allclose(sd.VPLinear().sigma_max, np.sqrt(np.exp(0.1 + 19.9 / 2) - 1), rtol=1e-12)
    table = sd.Discrete(BETAS)
    ratios = np.sqrt((1 - TABLE) / TABLE)
    assert_allclose(table.sigma_min, ratios[0], rtol=1e-12)
    assert_allclose(table.sigma_max, ratios[-1], rtol=1e-12)


@pytest.mark.parametrize("schedule", [sd.VPLinear(), sd.Discrete(BETAS)], ids=type)
def test_a_grid_far_above_the_schedule_warns(schedule):
    """Through guidance and thresholds too; a schedule without an end takes any grid."""

    def apply(parameters, x, t):
        del t
        return parameters * x

    network = sd.Network(apply, 0.5, schedule, "x0")
    last = float(schedule.sigma_max)

    def draw(denoiser, sigma_max):
        grid = sd.karras_sigmas(2, sigma_max=sigma_max)
        return sd.sample(jax.random.key(0), denoiser, (2, 2), sigmas=grid, solver=sd.DDIM())

    for denoiser in (network, sd.guided(network, network, 2.0), sd.StaticThreshold(network)):
        with pytest.warns(UserWarning, match="pass sigma_max=schedule.sigma_max"):
            draw(denoiser, 1.2 * last)
        draw(denoiser, 1.05 * last)  # a warning would be an error
    draw(sd.Network(apply, 0.5, sd.EDM(), "x0"), 1e4)
