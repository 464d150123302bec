"""Orders of convergence of all solvers, alone and corrected, and the reasons for some of them."""

from functools import cache

import numpy as np
import pytest
from closed_forms import mixture, normal, run, unoptimised  # noqa: F401
from scipy.integrate import solve_ivp

import steindiff_jax as sd
from steindiff_jax import solvers

START, END, STEPS = 5.0, 0.3, (48, 192)  # away from sigma -> 0
X = np.asarray(normal(8, 2, seed=4, scale=START))


@cache
def exact(std):
    """The solution of dx/dsigma = (x - D) / sigma at the end by scipy, to 1e-11."""
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
    """Log-uniform but for its start, whose steps are O(1/n^2) and may be of lower order."""
    return start * (end / start) ** np.linspace(0, 1, nodes) ** 2


def alternating(start, end, nodes):
    """Steps in log sigma that are long and short in turn: no grid varies less smoothly."""
    ramp = np.append(0.0, np.cumsum(np.tile([1.5, 0.5], nodes)))[:nodes]
    return start * (end / start) ** (ramp / ramp[-1])


def converge(solver, spacing, steps=STEPS, std=0.5):
    """The order of the error between two numbers of steps, and how far gamma is from 1 in each.

    One program for both: the grid with fewer steps goes on below END, where nobody looks; but not
    for a solver whose last steps, at END, are others.
    """
    errors, away = [], []
    for n in steps:
        more = 0 if getattr(solver, "lower_order_final", False) else steps[-1] - n
        grid = [*spacing(START, END, n + 1), *(END * 0.995 ** np.arange(1, more + 1))]
        solution = run(mixture(std=std), np.array(grid), solver, X, record=state)
        errors.append(np.abs(np.asarray(solution.record[n - 1]) - exact(std)).max())
        away.append(np.abs(np.asarray(solution.info.gamma[:n]) - 1).max())
    measured = order(errors, steps)
    print(f"order {measured:.2f}")  # pytest -rP shows it
    return measured, away


def state(state, step):
    del step
    return state.x


def order(errors, steps=STEPS):
    return np.log(errors[0] / errors[1]) / np.log(steps[1] / steps[0])


ORDERS = [
    (sd.DDIM(), np.geomspace, 1),
    # Graded grids: the first steps are so short that their lower order is without influence.
    (sd.LMS(1), graded, 1),
    (sd.LMS(2), graded, 2),
    (sd.LMS(3), graded, 3),
    (sd.LMS(4), graded, 4),
    (sd.LMS(3, prediction="flow"), graded, 3),
    (sd.LMS(4, prediction="flow"), graded, 4),
    (sd.IPNDM(2), np.linspace, 2),
    (sd.IPNDM(3), np.linspace, 3),
    (sd.IPNDM(3), np.geomspace, 2),
    (sd.IPNDM(4), np.geomspace, 2),
    (sd.IPNDM(4), graded, 2),
    (sd.IPNDM(2), alternating, 1),
    (sd.IPNDM(4), alternating, 1),
    (sd.LMS(2), alternating, 2),
    (sd.DEIS(1), graded, 1),
    (sd.DEIS(2), graded, 2),
    (sd.DEIS(3), graded, 3),
    (sd.DEIS(4), graded, 4),
    (sd.DEIS(4, prediction="x0"), graded, 4),
    (sd.DPMpp2M(), np.geomspace, 2),
    (sd.DPMpp2M("heun"), np.geomspace, 2),
    (sd.DPMpp2M(prediction="epsilon"), np.geomspace, 2),
    (sd.Heun(), np.geomspace, 2),
    (sd.Heun(prediction="flow"), np.geomspace, 2),
    (sd.DPM2(), np.geomspace, 2),
    (sd.DPM2(0.3), np.geomspace, 2),
    (sd.DPM2(kind="heun"), np.geomspace, 2),
    (sd.DPMpp2S(), np.geomspace, 2),
    (sd.DPMpp2S(0.7, "heun"), np.geomspace, 2),
    (sd.DPMpp3S(), np.geomspace, 3),
    (sd.DPMpp3S(kind="heun"), np.geomspace, 3),
    (sd.DPMpp3S(prediction="epsilon"), np.geomspace, 3),
    (sd.DPMpp3S(0.2, 2 / 3), np.geomspace, 3),
    (sd.DPMpp3S(0.25, 0.5), np.geomspace, 2),
    *[
        (sd.UniPC(p, kind, prediction=prediction, lower_order_final=False), graded, p + 1)
        for p, kind, prediction in [
            (1, "bh2", "x0"),
            (2, "bh2", "x0"),
            (3, "bh2", "x0"),
            (1, "bh1", "epsilon"),
            (2, "bh1", "epsilon"),
            (3, "bh1", "epsilon"),
            (2, "vary_coeff", "x0"),
            (3, "vary_coeff", "epsilon"),
        ]
    ],
    # A first-order last step costs an error of second order, once.
    (sd.UniPC(2), np.geomspace, 2),
    (sd.DEIS(4, lower_order_final=True), graded, 2),
    (sd.AnalyticalFirst(sd.DPMpp2M()), graded, 2),
    # The deterministic part of the stochastic ones.
    (sd.DPMpp2MSDE(eta=0.0), np.geomspace, 2),
    (sd.DPMpp3MSDE(1.0, eta=0.0), graded, 3),
    (sd.DPMppSDE(eta=0.0), np.geomspace, 2),
    (sd.Ancestral(sd.DPM2(), eta=0.0), np.geomspace, 2),
    (sd.Churn(sd.Heun(), churn=0.0), np.geomspace, 2),
    # Third order with all of the second difference's weight and second, as every public "3M", with
    # half of it; the form of the few second-order steps has no part in that.
    *[
        (sd.DPMpp3M(curvature, kind, prediction=prediction), graded, p)
        for curvature, p in [(0.5, 2), (1.0, 3)]
        for kind in ("heun", "midpoint")
        for prediction in ("x0", "epsilon")
    ],
]


@pytest.mark.parametrize(
    ("solver", "spacing", "nominal"),
    ORDERS,
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_order(solver, spacing, nominal):
    assert abs(converge(solver, spacing)[0] - nominal) < 0.2


def test_every_solver_is_in_the_table():
    classes = {getattr(solvers, name) for name in solvers.__all__}
    assert classes == {type(solver) for solver, _, _ in ORDERS}


# Every deterministic solver once for each order, for the corrections.
CORRECTED = [
    *[(solver, 1) for solver in (sd.DDIM(), sd.LMS(1))],
    *[(solver, 2) for solver in (sd.Heun(), sd.DPM2(), sd.DPMpp2S(), sd.DPMpp2M(), sd.DPMpp3M())],
    *[(sd.DPMpp3S(), 3), (sd.DPMpp3M(curvature=1.0), 3)],
    *[(solver(order), order) for solver in (sd.LMS, sd.DEIS) for order in (2, 3, 4)],
    *[(sd.IPNDM(order), 2) for order in (2, 4)],
    *[(sd.UniPC(order, lower_order_final=False), order + 1) for order in (1, 2, 3)],
]


def corrected(every):
    """All of `CORRECTED`, of which the quick run takes one in `every`."""
    slow = pytest.mark.slow
    rows = [pytest.param(*c, marks=slow if i % every else ()) for i, c in enumerate(CORRECTED)]
    return pytest.mark.parametrize(("solver", "nominal"), rows, ids=str)


@corrected(6)
def test_order_with_step_energy(solver, nominal):
    """Second at most, for its gamma is 1 - O(step); unclipped above, so that it is never 1."""
    steps = (192, 768)
    measured, away = converge(sd.Stein(solver, sd.StepEnergy(gamma_max=9.0)), graded, steps)
    assert abs(measured - min(nominal, 2)) < 0.2
    if nominal == 1:  # then there is nothing to correct
        assert away == [0.0, 0.0]
    else:
        assert abs(order(away, steps) - 1) < 0.2


def test_order_with_step_energy_of_each_sample():
    rule = sd.StepEnergy(gamma_max=9.0)
    solver = sd.Stein(sd.DPMpp2M(), rule, statistics="sample")
    assert abs(converge(solver, np.geomspace, std=0.2)[0] - 2) < 0.2


@corrected(3)
def test_order_with_posterior_length(solver, nominal):
    """The solver's own up to the third, for its gamma is 1 - O(step^2) but in the first steps.

    Those take the length in full, as they know of none before: on a grid whose first step is no
    shorter than the others a one-step solver is of second order. Steps are many, for the correction
    of large ones makes up for most of their error.
    """
    measured, away = converge(sd.Stein(solver), graded, (384, 1536))
    assert measured > 2.8 if nominal == 4 else abs(measured - nominal) < 0.2
    assert away[1] == 0 if nominal == 1 else away[1] > 0


def test_posterior_length_of_one_step_solvers_on_a_geometric_grid():
    """Second order at least: the error of the first step, O(step^2), is only there in the end."""
    assert 1.8 < converge(sd.Stein(sd.DPMpp3S()), np.geomspace)[0] < 2.8
