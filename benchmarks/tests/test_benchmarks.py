"""The benchmarks' own mathematics, and that each of them runs."""

import os
import subprocess
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
import fitting
import guidance
import metrics
import precision
import problems
import quality
import robustness
import steindiff_jax as sd
import sweep
from steindiff_jax.stein import rules

SCRIPTS = sorted(
    path for path in Path(metrics.__file__).parent.glob("*.py") if "__main__" in path.read_text()
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_says_what_it_is_in_a_bare_process(script):
    command = [sys.executable, str(script), "--help"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd="/")
    assert done.stdout.startswith("usage")
    first = script.read_text().split("\n")[0].strip('"').split("(")[0].split()
    assert " ".join(first[:5]) in " ".join(done.stdout.split())


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


def test_covariance_of_a_mixture(mixture):
    """Of n draws; each entry is good to std^2 sqrt(2 / n), here times the largest variance."""
    n, covariance = 200_000, mixture.covariance()
    found = np.cov(mixture.draw(6, n).T)
    np.testing.assert_allclose(found, covariance, atol=5 * covariance.max() * np.sqrt(2 / n))


def test_the_first_class_of_a_mixture(mixture):
    """Of three, a class is one Gaussian; of one, it is all."""
    x, sigma = np.random.default_rng(0).standard_normal((5, 4)), jnp.float64(0.6)
    axes, spread, floor = mixture.axes[0], mixture.spread[0], mixture.floor
    covariance = floor * np.eye(4) + axes * spread @ axes.T
    shrink = covariance @ np.linalg.inv(covariance + sigma**2 * np.eye(4))
    classes = problems.first_class(mixture, 3)
    found = classes.conditional.denoiser(jnp.asarray(x), sigma)
    expected = mixture.means[0] + (x - mixture.means[0]) @ shrink.T
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_allclose(classes.weaker.covariance(), 1.21 * covariance, atol=1e-12)
    found = problems.first_class(mixture, 1).conditional.denoiser(jnp.asarray(x), sigma)
    np.testing.assert_allclose(found, classes.unconditional(jnp.asarray(x), sigma), atol=1e-12)


def test_strength_of_cfgpp():
    """Its scales at the nodes have the guidance as their geometric mean."""
    sigmas = np.asarray(sd.karras_sigmas(5))
    scale = guidance.cfgpp(3.0, np.pad(sigmas, (0, 2)))["scale"]
    scales = [float(scale(jnp.asarray(sigma))) for sigma in sigmas[:-1]]
    assert metrics.geometric_mean(scales) == pytest.approx(3)


def test_waves_are_a_gaussian():
    """Against the posterior mean of the covariance matrix, which is that of the draws."""
    waves = problems.power_law(2.0, 4)
    columns = np.eye(48).reshape(48, 4, 4, 3)
    covariance = waves._filtered(columns, waves.variances, np).reshape(48, 48)
    np.testing.assert_allclose(covariance, covariance.T, atol=1e-14)
    assert np.trace(covariance) == pytest.approx(48 * 0.25)
    x, sigma = np.random.default_rng(0).standard_normal((3, 4, 4, 3)), 0.6
    shrink = covariance @ np.linalg.inv(covariance + sigma**2 * np.eye(48))
    expected = 0.1 + (x - 0.1).reshape(3, 48) @ shrink.T
    found = waves(jnp.asarray(x), jnp.float64(sigma))
    np.testing.assert_allclose(found.reshape(3, 48), expected, atol=1e-12)
    n = 100_000
    draws = np.cov(waves.draw(1, n).reshape(n, 48).T)
    np.testing.assert_allclose(draws, covariance, atol=6 * covariance.max() * np.sqrt(2 / n))


@pytest.mark.parametrize("name", ["few clumps", "spectrum k^-2, 8x8x1"])
def test_distances_of_a_scaled_law(name):
    """Samples twice as long as the law: W2 = 1 along every direction, energies four times its own.

    The exact flow's own samples are as near as 400 draws can be.
    """
    half = "report" if name in problems.REPORT else "tune"
    problem = problems.build(half, name, 0)
    distances = metrics.Distances(problem, 400)
    mean = problem.law.mean(axis=0)
    doubled = mean + 2 * (problem.law[:400] - mean)
    found = distances(doubled, 0)
    assert found.pixels == pytest.approx(1, abs=0.3)
    assert found.bands == pytest.approx(1, abs=0.3)
    assert found.energy == pytest.approx(4, rel=0.5)
    fine = distances(distances.fine[0], 0)
    assert max(fine.pixels, fine.bands) < 0.25
    assert fine.rmse == 0


def test_ratios_of_runs_by_hand(tmp_path):
    """Two problems, the second of fewer seeds; a cell that was not run is left out."""
    runs = {}
    for problem, solver, value in (("p", "2M", 0.5), ("p", "Heun", 0.1), ("q", "2M", 2.0)):
        for seed in range(2):
            at = problem, solver, "plain", "Karras", 4, seed
            runs[sweep.Run(*at)] = metrics.Distance(0.4, 0.1, 1.0, 2.0)
            corrected = metrics.Distance(0.4 * value, 0.1 * value, 1.0, 2.0)
            runs[sweep.Run(*at)._replace(correction="corrected")] = corrected
    del runs["q", "2M", "corrected", "Karras", 4, 1]
    failed = metrics.Distance(np.nan, np.nan, np.nan, np.nan)
    runs[sweep.Run("r", "2M", "plain", "Karras", 4, 0)] = metrics.Distance(1.0, 1.0, 1.0, 1.0)
    runs[sweep.Run("r", "2M", "corrected", "Karras", 4, 0)] = failed
    results = sweep.Results(runs)
    assert results.ratio("pixels", problem="p", solver="2M")[0] == pytest.approx(0.5)
    assert results.best_ratio("bands", problem="p")[0] == pytest.approx(0.5)  # not Heun's
    assert results.ratio("both", problem="q") == pytest.approx((2.0, np.nan), nan_ok=True)
    assert results.ratio("rmse", problem="r")[0] == pytest.approx(sweep.FAILED)
    assert results.cells("both")[1] == (pytest.approx(2.0), "q", "2M", "Karras", 4)
    sweep.write(runs, tmp_path / "some" / "runs.json")
    found = sweep.read(tmp_path / "some" / "runs.json")
    assert found.keys() == runs.keys()
    assert all(found[run] == pytest.approx(runs[run], nan_ok=True) for run in runs)


@pytest.mark.parametrize("event", [(8, 8, 3), (12, 6, 1)])
@pytest.mark.parametrize("basis", [alternatives.Haar(), alternatives.Coefficients()])
def test_bases_are_orthonormal(basis, event):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, *event)))
    c = basis.transform(x)
    np.testing.assert_allclose(basis.inverse(c), x, atol=1e-12)
    np.testing.assert_allclose((c**2).sum(), (x**2).sum(), rtol=1e-12)
    assert basis.partition(event).sizes.sum() == x[0].size


@pytest.mark.parametrize("delta", [1e-4, 0.3, 30.0])
def test_length_only_has_the_length_of_the_exact_step(delta):
    """|gamma delta| = |eta (x - D)|."""
    one = jnp.ones(1)
    none = 0 * one  # confirmed by nothing, so that delta is corrected in full
    m = rules.LengthMoments(2 * one, one, -0.5 * one, delta * one, one, none, none, None)
    at = 10 * one, jnp.float64(0.5), jnp.float64(0.2)
    eta = rules.gaussian(rules.jacobian(m, *at[:2]).mean, at[2] / at[1])
    gamma, drift = alternatives.LengthOnly(gamma_max=np.inf).coefficients(m, *at)
    np.testing.assert_allclose(gamma**2 * delta, (0.5 * eta) ** 2 * m.noise, rtol=1e-5)
    assert not drift.any()


FITTING = ["--problems", "few clumps", "--samples", "20", "--iterations", "2", "--steps", "3"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "prints"),
    [
        (cost, ["--tiny"], "| attention 4 | one probe, secant |"),
        (precision, ["--samples", "16", "--steps", "3", "--draws", "2"], "| 3 | probes | 4 |"),
        (fitting, [*FITTING, "--seeds", "0", "--draws", "1", "--output", os.devnull], "| GITS |"),
        (
            fitting,
            [*FITTING, "4", "--transfer", "--seeds", "0", "--draws", "1"],
            "| its grid at 4 steps |",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_runs_with_a_network(script, arguments, prints, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script.__name__, *arguments])
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        script.main()
    assert prints in capsys.readouterr().out


FEW = ["--samples", "20", "--solvers", "2M"]
GUIDANCE = ["families", "--methods", "CFG++", "APG", "--guidance", "3", "--draws", "20"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "prints"),
    [
        (quality, ["few clumps", "--seeds", "2", "--steps", "3", "4", "--output"], "| **all** |"),
        (alternatives, ["grey patches 6x6", "--steps", "4", "--output"], "| aDDIM in bands |"),
        (robustness, ["few clumps", "--seeds", "2", "--steps", "4"], "| s_max 5 |"),
        (guidance, [*GUIDANCE, "--steps", "4", "--seeds", "2", "--output"], "| CFG++ | 3 |"),
        (diversity, ["few clumps", "--seeds", "1"], "| few clumps | exact draws |"),
        (anatomy, ["ring"], "| ring | 2M |"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_runs(script, arguments, prints, monkeypatch, tmp_path, capsys):
    """One solver and few samples; what it writes goes elsewhere."""
    if arguments[-1] == "--output":
        arguments = [*arguments, str(tmp_path / "runs.json")]
    monkeypatch.setattr(sys, "argv", [script.__name__, *FEW, "--problems", *arguments])
    script.main()
    assert prints in capsys.readouterr().out
