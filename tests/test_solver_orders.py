"""Orders of convergence of all solvers, alone and corrected, and the reasons for some of them."""

import numpy as np
import pytest
from closed_forms import mixture, run
from test_order import END, START, X, exact

import steindiff_jax as sd

STEPS = (48, 192)


def graded(start, end, nodes):
    """Log-uniform but for its start, whose steps are O(1/n^2) and may be of lower order."""
    return start * (end / start) ** np.linspace(0, 1, nodes) ** 2


def alternating(start, end, nodes):
    """Steps in log sigma that are long and short in turn: no grid varies less smoothly."""
    ramp = np.append(0.0, np.cumsum(np.tile([1.5, 0.5], nodes)))[:nodes]
    return start * (end / start) ** (ramp / ramp[-1])


def converge(solver, spacing, std=0.5):
    """The order of the error between two numbers of steps, and both solutions."""
    solutions = [run(mixture(std=std), spacing(START, END, n + 1), solver, X) for n in STEPS]
    return order([np.abs(np.asarray(found.x) - exact(std)).max() for found in solutions]), solutions


def order(errors):
    return np.log(errors[0] / errors[1]) / np.log(STEPS[1] / STEPS[0])


ORDERS = [
    # Graded grids: the first steps are so short that their lower order is without influence.
    (sd.LMS(1), graded, 1),
    (sd.LMS(2), graded, 2),
    (sd.LMS(3), graded, 3),
    (sd.LMS(4), graded, 4),
    (sd.LMS(3, prediction="flow"), graded, 3),
    (sd.LMS(4, prediction="flow"), graded, 4),
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
    (sd.DPMpp2M("heun"), np.geomspace, 2),
    (sd.DPMpp2M(prediction="epsilon"), np.geomspace, 2),
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
]


@pytest.mark.parametrize(
    ("solver", "spacing", "nominal"),
    ORDERS,
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_order(solver, spacing, nominal):
    assert abs(converge(solver, spacing)[0] - nominal) < 0.2


@pytest.mark.parametrize("prediction", ["x0", "epsilon"])
@pytest.mark.parametrize("kind", ["heun", "midpoint"])
def test_every_public_3m_is_second_order(kind, prediction):
    """With half of the second difference's exact weight; with all of it, the third order is back.

    The form of the few second-order steps has no part in it.
    """
    options = {"kind": kind, "prediction": prediction}
    assert abs(converge(sd.DPMpp3M(0.5, **options), graded)[0] - 2) < 0.2
    assert abs(converge(sd.DPMpp3M(1.0, **options), graded)[0] - 3) < 0.2


SECOND_ORDER = [
    sd.Heun(),
    sd.Heun(prediction="flow"),
    sd.DPM2(),
    sd.DPMpp2S(),
    sd.DPMpp2M("heun"),
    sd.LMS(2),
    sd.DEIS(2),
    sd.UniPC(1),
]


@pytest.mark.parametrize("solver", SECOND_ORDER, ids=str)
def test_corrected_second_order_solvers_stay_of_second_order(solver):
    """The gamma of `StepEnergy` is 1 - O(step); unclipped above, so that it is never 1."""
    stein = sd.Stein(solver, sd.StepEnergy(gamma_max=9.0))
    measured, solutions = converge(stein, np.geomspace, std=0.2)
    assert abs(measured - 2) < 0.2
    away = [np.abs(np.asarray(found.info.gamma) - 1).max() for found in solutions]
    assert abs(order(away) - 1) < 0.2


@pytest.mark.parametrize("solver", [sd.DPMpp3S(), sd.DEIS(3), sd.LMS(4), sd.UniPC(3)], ids=str)
def test_corrected_solvers_of_higher_order_are_of_second_order_at_least(solver):
    stein = sd.Stein(solver, sd.StepEnergy(gamma_max=9.0))
    assert converge(stein, graded, std=0.2)[0] > 1.8
