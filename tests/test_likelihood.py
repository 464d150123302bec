"""The log-likelihood of the probability flow against densities in closed form."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import Mixture, gaussian, mixture, normal
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

import steindiff_jax as sd
from steindiff_jax.interop.diffrax import log_likelihood, probability_flow

# The prior is wrong by about |mean| |y| / SIGMA_MAX^2, and |y| / SIGMA_MAX by less than 40 here.
SIGMA_MIN, SIGMA_MAX = 0.05, 1e8
FINE = {
    "sigma_min": SIGMA_MIN,
    "sigma_max": SIGMA_MAX,
    "stepsize_controller": diffrax.PIDController(rtol=1e-8, atol=1e-8),
}


def exact(data, x):
    """Log-density of the data with noise of SIGMA_MIN."""
    x = np.asarray(x, np.float64)
    if hasattr(data, "covariance"):
        covariance = data.covariance + SIGMA_MIN**2 * np.eye(x.shape[1])
        return multivariate_normal(data.mean, covariance).logpdf(x)
    variance, (k, d) = data.std**2 + SIGMA_MIN**2, data.means.shape
    distance = np.square(x[:, None] - np.asarray(data.means)).sum(-1)
    return logsumexp(-distance / (2 * variance), axis=1) - np.log(
        k * (2 * np.pi * variance) ** (d / 2)
    )


@pytest.mark.parametrize("data", [gaussian(), mixture(std=0.3)], ids=["gaussian", "mixture"])
def test_closed_form(data):
    """In the bulk and in the tails."""
    x = normal(6, 3 if hasattr(data, "covariance") else 2, seed=1, scale=2.0)
    found = log_likelihood(probability_flow(data), x, **FINE)
    np.testing.assert_allclose(found, exact(data, x), rtol=1e-7, atol=1e-5)


def test_float32():
    """Default tolerances, in the bulk; the prior is wrong by about 3 / 1e4."""
    data = Mixture(mixture().means.astype(jnp.float32), 0.5)
    x = (data.means + normal(5, 2, seed=4, scale=0.5)).astype(jnp.float32)
    found = log_likelihood(probability_flow(data), x, sigma_min=SIGMA_MIN, sigma_max=1e4)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact(data, x), rtol=0, atol=1e-3)


def test_hutchinson_is_unbiased():
    """1600 rows at the same x, each with its own probe; the bound is 4 standard errors."""
    data, x = gaussian(), jnp.tile(normal(1, 3, seed=2), (1600, 1))
    term, key = probability_flow(data), jax.random.key(5)
    found = log_likelihood(term, x, estimator=sd.Hutchinson(), key=key, **FINE)
    error = float(jnp.std(found)) / 40
    assert 1e-3 < error < 0.05  # the probes differ
    assert abs(found.mean() - exact(data, x)[0]) < 4 * error


@pytest.mark.slow
def test_gradient_is_the_score():
    data, x = gaussian(), normal(3, 3, seed=3)
    covariance = np.asarray(data.covariance) + SIGMA_MIN**2 * np.eye(3)
    score = np.linalg.solve(covariance, (np.asarray(data.mean) - np.asarray(x)).T).T
    found = jax.grad(lambda x: log_likelihood(probability_flow(data), x, **FINE).sum())(x)
    np.testing.assert_allclose(found, score, rtol=1e-4, atol=1e-4)


def test_refuses_what_estimates_no_divergence_of_each_sample():
    term, x = probability_flow(gaussian()), normal(4, 3)
    with pytest.raises(ValueError, match="mean over samples only"):
        log_likelihood(term, x, estimator=sd.Tweedie())
    with pytest.raises(ValueError, match="must be probability_flow"):
        log_likelihood(diffrax.ODETerm(lambda t, y, _: -t * y), x)
