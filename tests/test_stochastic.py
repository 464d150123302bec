"""Solvers that draw noise against k-diffusion's and diffusers', with the same noise."""

import dataclasses
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import peers_reference as peers
import pytest
from closed_forms import (  # noqa: F401
    Gaussian,
    Mixture,
    mixture,
    normal,
    reference,
    run,
    unoptimised,
)
from numpy.testing import assert_allclose

import steindiff_jax as sd
from steindiff_jax import _random

MEANS, START = map(jnp.asarray, peers.problem())
SIGMAS = jnp.asarray(peers.grid())


@pytest.fixture
def given(monkeypatch):
    """Solvers draw the reference's noise, in its order; returns a function that says of which step.

    A solver is stepped as it is, without `jit`, so that each draw is one call here.
    """
    left = []
    monkeypatch.setattr(_random, "normal", lambda key, x: jnp.asarray(left.pop(0)))  # noqa: ARG005

    def of(step):
        left[:] = peers.noise(step)

    return of


def walk(given, solver, denoiser, sigmas, x):
    states = [sd.State(x, solver.init(x, sigmas))]
    for step, ends in enumerate(pairwise(sigmas)):
        given(step)
        states.append(solver.advance(jax.random.key(0), denoiser, states[-1], *ends)[0])
    return jnp.stack([state.x for state in states])


@pytest.mark.parametrize("eta", peers.ETAS)
@pytest.mark.parametrize(
    ("name", "solver"),
    [
        ("sample_euler_ancestral", lambda eta: sd.Ancestral(sd.DDIM(), eta, noise=1.01)),
        ("sample_dpm_2_ancestral", lambda eta: sd.Ancestral(sd.DPM2(), eta)),
        ("sample_dpmpp_2s_ancestral", lambda eta: sd.Ancestral(sd.DPMpp2S(), eta)),
        ("sample_dpmpp_sde", lambda eta: sd.DPMppSDE(eta=eta)),
        ("sample_dpmpp_2m_sde", lambda eta: sd.DPMpp2MSDE(eta=eta)),
        ("sample_dpmpp_3m_sde", lambda eta: sd.DPMpp3MSDE(eta=eta)),
    ],
)
def test_samplers_of_k_diffusion(given, name, solver, eta):
    found = walk(given, solver(eta), Mixture(MEANS, 0.2), SIGMAS, START)[-1]
    assert_allclose(found, reference("peers")[f"{name} {eta}"], rtol=0, atol=1e-9)


def test_ddim_of_diffusers_with_eta(given):
    """Its states, on its own integer steps, in its own scaling of x."""
    arrays = reference("peers")
    alphas = np.append(np.sqrt(arrays["ddim alphas_cumprod"][arrays["ddim timesteps"]]), 1.0)
    sigmas = jnp.asarray(np.sqrt(1 / alphas**2 - 1))
    states = arrays["ddim 0.6"] / alphas[:, None, None]

    def denoiser(x, sigma):
        return 0.3 * jnp.sin(x / jnp.sqrt(1 + sigma**2))

    found = walk(given, sd.Ancestral(eta=0.6), denoiser, sigmas, jnp.asarray(states[0]))
    assert_allclose(found, states, rtol=1e-6)  # it computes square roots of float32


SOLVERS = [
    sd.Ancestral(),
    sd.Ancestral(sd.DPM2(), eta=0.7),
    sd.Ancestral(sd.DPMpp2S()),
    sd.DPMppSDE(),
    sd.DPMppSDE(r=0.8, eta=0.5),
    sd.DPMpp3MSDE(),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_the_variance_is_kept(solver):
    """On Gaussian data, from the exact law at the start: many steps end in the data's variance.

    The mean of n squares of variance v is known to v sqrt(2 / n).
    """
    n, std = 20_000, 0.5
    data = Gaussian(jnp.zeros(1), jnp.full((1, 1), std**2))
    start = normal(n, 1, seed=7, scale=np.hypot(10.0, std))
    sigmas = np.append(np.geomspace(10.0, 0.005, 160), 0.0)
    x = run(data, sigmas, solver, start).x
    error = abs(np.mean(np.square(x)) - std**2)
    first_order = 0.02 if solver == sd.Ancestral() else 0.0  # of its 160 steps
    assert error < 4 * std**2 * np.sqrt(2 / n) + first_order
    assert abs(np.corrcoef(x[:, 0], start[:, 0])[0, 1]) < 0.9


@pytest.mark.parametrize(
    ("solver", "plain"),
    [
        (sd.Ancestral(sd.Heun(), eta=0.0), sd.Heun()),
        (sd.DPMppSDE(eta=0.0), sd.DPMpp2S()),
        (sd.DPMpp3MSDE(eta=0.0), sd.DPMpp3M()),
        (sd.DPMpp3MSDE(1.0, eta=0.0), sd.DPMpp3M(1.0)),
    ],
    ids=str,
)
def test_without_noise_it_is_the_ode(solver, plain):
    found, expected = (run(mixture(4, 2), SIGMAS, s, START) for s in (solver, plain))
    assert_allclose(found.x, expected.x, rtol=1e-9)
    assert found.info.nfe == expected.info.nfe


@pytest.mark.parametrize("solver", SOLVERS[::2], ids=str)
def test_derivatives_are_finite(solver):
    """By eta and by the grid, also where it ends in 0."""

    def total(eta, sigmas):
        new = dataclasses.replace(solver, eta=eta)
        return run(mixture(4, 2), sigmas, new, START).x.sum()

    for eta in (0.0, 0.5, 1.0):
        slopes = jax.grad(total, (0, 1))(eta, SIGMAS)
        assert all(np.isfinite(slope).all() for slope in slopes)


def test_ancestral_refuses_a_memory():
    with pytest.raises(ValueError, match="Ancestral needs a solver without memory"):
        run(mixture(), SIGMAS, sd.Ancestral(sd.DPMpp2M()), START)
    with pytest.raises(ValueError, match="eta must be in"):
        sd.Ancestral(eta=1.5)
