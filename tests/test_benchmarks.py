"""The benchmarks' own mathematics, and that each of them runs."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import ot
import pytest
from jax.scipy.stats import multivariate_normal

import alternatives
import anatomy
import cost
import diversity
import metrics
import precision
import problems
import quality
import quality_per_second
import robustness


@pytest.fixture(scope="module")
def mixture():
    return problems.low_rank(3, d=4, rank=2, std=0.2, distance=0.6, anisotropy=3.0, seed=5)


def test_sliced_distance_is_that_of_pot():
    """Along directions divided by the law's std there, which is what makes it relative."""
    rng = np.random.default_rng(0)
    x, law = rng.standard_normal((40, 3)), rng.standard_normal((40, 3)) * [0.3, 1.0, 2.0] + 0.5
    # Each draw four times is the same law, and its quantiles are then those draws exactly.
    distance = metrics.SlicedWasserstein(np.repeat(law, 4, axis=0), len(x), projections=16)
    directions = np.asarray(distance.directions)
    relative = directions / (law @ directions).std(axis=0)
    expected = ot.sliced_wasserstein_distance(x, law, projections=relative)
    assert distance(jnp.asarray(x)) == pytest.approx(expected, rel=1e-9)


def test_sliced_distance_of_gaussians():
    """Along a direction W2^2 of N(m, c^2 S) to N(0, S) is m^2 + (c - 1)^2 S."""
    n, scale, mean = 5_000, 1.3, np.array([0.2, 0.0, -0.4])
    rng = np.random.default_rng(1)
    root = rng.standard_normal((3, 3))
    law = rng.standard_normal((200_000, 3)) @ root.T
    distance = metrics.SlicedWasserstein(law, n, projections=16)
    x = mean + scale * rng.standard_normal((n, 3)) @ root.T
    directions = np.asarray(distance.directions)
    std = np.linalg.norm(root.T @ directions, axis=0)
    expected = np.sqrt(np.mean((mean @ directions / std) ** 2) + (scale - 1) ** 2)
    # A distance moves by no more than the samples do: their mean is good to scale / sqrt(n) stds.
    assert distance(jnp.asarray(x)) == pytest.approx(expected, abs=5 * scale / np.sqrt(n))


def test_posterior_of_a_mixture_from_its_density(mixture):
    """Tweedie, D = x + sigma^2 grad log p, and tr Cov[x0 | x] = sigma^2 tr dD/dx."""
    covariance = jnp.einsum("kdr,kr,ker->kde", mixture.axes, mixture.spread, mixture.axes)

    def log_density(x, sigma):
        total = covariance + (mixture.floor + sigma**2) * jnp.eye(4)[None]
        each = jax.vmap(lambda m, c: multivariate_normal.logpdf(x, m, c))(mixture.means, total)
        return jax.nn.logsumexp(mixture.log_weights + each)

    def tweedie(x, sigma):
        return x + sigma**2 * jax.grad(log_density)(x, sigma)

    @jax.jit
    def both(x, sigma):
        trace = jax.vmap(lambda x: jnp.trace(jax.jacfwd(tweedie)(x, sigma)))(x)
        found = jax.vmap(tweedie, (0, None))(x, sigma), sigma**2 * trace
        return mixture.posterior(x, sigma), found

    for sigma in (0.05, 0.7, 20.0):
        x = jnp.asarray(mixture.draw(2, 6)) + sigma * jax.random.normal(jax.random.key(0), (6, 4))
        (x0, variance), (expected_x0, expected_variance) = both(x, sigma)
        np.testing.assert_allclose(x0, expected_x0, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(variance, expected_variance, rtol=1e-8)


def test_posterior_of_a_mixture_from_its_draws(mixture):
    """Bayes: the mean over draws, weighted with the likelihood of x; within 5 standard errors."""
    sigma, draws = 0.7, mixture.draw(3, 200_000)
    x = draws[:3] + sigma * np.random.default_rng(4).standard_normal((3, 4))
    x0, variance = map(np.asarray, mixture.posterior(jnp.asarray(x), jnp.float64(sigma)))
    for i in range(len(x)):
        weights = np.exp(((x[i] - draws) ** 2).sum(axis=1) / (-2 * sigma**2))
        weights /= weights.sum()
        for exact, values in (
            (x0[i], draws),
            (variance[i, None], ((draws - x0[i]) ** 2).sum(axis=1, keepdims=True)),
        ):
            mean = weights @ values
            error = np.sqrt(weights**2 @ (values - mean) ** 2)
            assert np.all(np.abs(mean - exact) < 5 * error)


def test_modes_of_draws_and_of_a_collapse():
    """Draws far outnumbering 49 equal components find each equally often; a point finds one."""
    grid = problems.REPORT["grid"]()
    covered, entropy = diversity.modes(grid, grid.draw(0, 20_000))
    assert covered == 1
    # H of n draws falls short of log K by (K - 1) / 2n in the mean, with std sqrt(2 (K - 1)) / 2n.
    shortfall = -np.log(entropy) * 2 * 20_000
    assert shortfall == pytest.approx(48, abs=5 * np.sqrt(2 * 48))
    assert diversity.modes(grid, np.tile(grid.means[3], (50, 1))) == pytest.approx((1 / 49, 1 / 49))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "prints"),
    [
        (cost, ["--tiny"], "| attention 4 | Hutchinson 1/32 |"),
        (precision, ["--samples", "16", "--steps", "3", "--draws", "2"], "| 3 | probes | 1/32 |"),
        (quality_per_second, ["--samples", "20", "--seeds", "1"], "| guidance 3 | UniPC-3 |"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_runs_with_a_network(script, arguments, prints, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(script, "__file__", str(tmp_path / Path(script.__file__).name))
    monkeypatch.setattr(sys, "argv", [script.__name__, *arguments])
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        script.main()
    assert prints in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "prints"),
    [
        (quality, ["few clumps", "--seeds", "2", "--solvers", "DDIM", "2M"], "| **all** |"),
        (alternatives, ["clumps"], "| self-consistent in full |"),
        (robustness, ["few clumps", "--seeds", "2"], "| s_max 5 |"),
        (diversity, ["few clumps", "--seeds", "1"], "| few clumps | exact draws |"),
        (anatomy, ["ring"], "| ring | 2M |"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_runs(script, arguments, prints, monkeypatch, tmp_path, capsys):
    """Two solvers at most and few samples; what it writes goes elsewhere."""
    if script is not quality:  # whose processes are new
        monkeypatch.setattr(script, "SOLVERS", {"2M": quality.SOLVERS["2M"]})
    monkeypatch.setattr(script, "__file__", str(tmp_path / Path(script.__file__).name))
    monkeypatch.setattr(sys, "argv", [script.__name__, "--problems", *arguments, "--samples", "20"])
    script.main()
    assert prints in capsys.readouterr().out
