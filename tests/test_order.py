"""Orders of convergence on mixtures, away from sigma -> 0, against scipy's high-order solution."""

from functools import cache

import numpy as np
import pytest
from closed_forms import gaussian, mixture, normal, run
from scipy.integrate import solve_ivp

import steindiff_jax as sd

START, END, STEPS = 5.0, 0.3, (64, 256)
X = np.asarray(normal(8, 2, seed=4, scale=START))


@cache
def exact(std):
    """The solution of dx/dsigma = (x - D) / sigma at the end, to 1e-11."""
    means = np.asarray(mixture().means)

    def slope(sigma, flat):
        x = flat.reshape(X.shape)
        variance = std**2 + sigma**2
        logits = -np.square(x[:, None] - means).sum(-1) / (2 * variance)
        weights = np.exp(logits - logits.max(1, keepdims=True))
        mean = weights / weights.sum(1, keepdims=True) @ means
        return ((x - mean - std**2 / variance * (x - mean)) / sigma).ravel()

    solution = solve_ivp(slope, (START, END), X.ravel(), "DOP853", rtol=1e-12, atol=1e-12)
    return solution.y[:, -1].reshape(X.shape)


def graded(start, end, nodes):
    """Log-uniform but for its start: the first step is O(1/n^2), so it may be first order."""
    return np.geomspace(start, end, 10**6 + 1)[
        np.rint(10**6 * np.linspace(0, 1, nodes) ** 2).astype(int)
    ]


def converge(solver, spacing=np.geomspace, std=0.5):
    solutions = [run(mixture(std=std), spacing(START, END, n + 1), solver, X) for n in STEPS]
    return [np.abs(np.asarray(s.x) - exact(std)).max() for s in solutions], solutions


def order(errors):
    return -np.polyfit(np.log(STEPS), np.log(errors), 1)[0]


@pytest.mark.parametrize(
    ("solver", "spacing", "nominal"),
    [
        pytest.param(sd.DDIM(), np.geomspace, 1, id="DDIM"),
        pytest.param(sd.Heun(), np.geomspace, 2, id="Heun"),
        pytest.param(sd.DPMpp2M(), np.geomspace, 2, id="DPMpp2M"),
        # After a first step of first order, of third order only where that step is small.
        pytest.param(sd.DPMpp3M(), graded, 2, id="DPMpp3M"),
        pytest.param(sd.DPMpp3M(curvature=1.0), graded, 3, id="DPMpp3M, exact weights"),
        pytest.param(sd.IPNDM(2), np.linspace, 2, id="IPNDM, uniform grid"),
        pytest.param(sd.IPNDM(2), np.geomspace, 2, id="IPNDM, smooth grid"),
    ],
)
def test_order(solver, spacing, nominal):
    assert abs(order(converge(solver, spacing)[0]) - nominal) < 0.2


@pytest.mark.parametrize(("statistics", "std"), [("batch", 0.5), ("sample", 0.2)])
def test_stein_keeps_second_order(statistics, std):
    """Because 1 - gamma = O(step); unclipped above, so that it is never 1."""
    stein = sd.Stein(sd.DPMpp2M(), sd.StepEnergy(gamma_max=9.0), statistics=statistics)
    errors, solutions = converge(stein, std=std)
    assert abs(order(errors) - 2) < 0.2
    away = [np.abs(np.asarray(solution.info.gamma) - 1).max() for solution in solutions]
    assert abs(order(away) - 1) < 0.2


def test_stein_of_the_third_order_solver():
    """Second order at least, with and without the clip at 1."""
    for gamma_max in (1.0, 9.0):
        stein = sd.Stein(sd.DPMpp3M(curvature=1.0), sd.StepEnergy(gamma_max=gamma_max))
        assert order(converge(stein, graded)[0]) > 1.8


def test_closed_form():
    """On Gaussian data, against the flow sqrt((C + s'^2) / (C + s^2)) (x - m)."""
    data, start = gaussian(), np.asarray(normal(4, 3, scale=START))
    end = data.flow(start, START, END)
    found = [run(data, np.geomspace(START, END, n + 1), sd.Heun(), start).x for n in STEPS]
    assert abs(order([np.abs(x - end).max() for x in found]) - 2) < 0.2
