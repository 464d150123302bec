"""Diffrax, both ways: parity with `sample`, diffrax alone and numpy; gradients; errors."""

from itertools import pairwise

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import Mixture, gaussian, mixture, normal, run

import steindiff_jax as sd
from steindiff_jax.interop.diffrax import (
    FromDiffrax,
    SigmaInterpolation,
    SteinCorrected,
    as_diffrax,
    probability_flow,
    times,
    to_data,
)

SIGMAS = np.append(np.geomspace(20.0, 0.05, 6), 0.0)
EXPLICIT = [
    diffrax.Euler(),
    diffrax.Heun(),
    diffrax.Midpoint(),
    diffrax.Ralston(),
    diffrax.Bosh3(),
    diffrax.Tsit5(),
    diffrax.Dopri5(),
]


# The rule that the formulas of this file are of; without a derivative, so that they stay short.
ENERGY = {"rule": sd.StepEnergy(), "estimator": sd.Tweedie()}


def name(solver):
    return type(solver).__name__


def solve(solver, y0, sigmas=SIGMAS, denoiser=None, *, grid=False, **kwargs):
    """A solve along the positive sigmas; grid: whether the term knows them."""
    denoiser, ts = denoiser or mixture(), times(sigmas[:-1])
    term = probability_flow(denoiser, sigmas if grid else None)
    kwargs.setdefault("stepsize_controller", diffrax.StepTo(ts))
    return diffrax.diffeqsolve(term, solver, ts[0], ts[-1], kwargs.pop("dt0", None), y0, **kwargs)


class TestAsDiffrax:
    @pytest.mark.parametrize(
        ("dtype", "bound"), [(np.float64, 1e-10), (np.float32, 1e-6)], ids=["float64", "float32"]
    )
    @pytest.mark.parametrize(
        "solver",
        [
            sd.DPMpp2M(),
            pytest.param(sd.UniPC(), marks=pytest.mark.slow),
            sd.Stein(sd.DPMpp3M(), estimator=sd.Hutchinson()),
        ],
        ids=name,
    )
    def test_numbers_of_sample(self, solver, dtype, bound):
        """The history, and the key of the probes, are the same; with the last step by to_data."""
        data = Mixture(mixture().means.astype(dtype), 0.5)
        sigmas, key = SIGMAS.astype(dtype), jax.random.key(3)
        y0 = normal(8, 2, seed=1, scale=20.0).astype(dtype)
        expected = run(data, sigmas, solver, y0, key=key)
        solution = solve(as_diffrax(solver, key=key), y0, sigmas, data, grid=True)
        x = to_data(solution, data)
        assert x.dtype == expected.x.dtype == dtype
        np.testing.assert_allclose(x, expected.x, rtol=0, atol=bound)

    def test_one_trace_for_all_grids(self):
        traces = []

        def denoiser(x, sigma):
            traces.append(sigma)
            return x / (1 + sigma**2)

        y0 = normal(2, 2)
        solve(as_diffrax(sd.DPMpp2M()), y0, denoiser=denoiser, grid=True)
        count = len(traces)
        solve(as_diffrax(sd.DPMpp2M()), y0, 2 * SIGMAS, denoiser, grid=True)
        assert len(traces) == count

    def test_one_step_solvers_need_no_grid(self):
        """A constant step in t on a grid uniform in log sigma."""
        y0, ts = normal(4, 2, scale=20.0), times(SIGMAS[:-1])
        solution = solve(
            as_diffrax(sd.Stein(sd.Heun())),
            y0,
            stepsize_controller=diffrax.ConstantStepSize(),
            dt0=ts[1] - ts[0],
        )
        expected = run(mixture(), SIGMAS, sd.Stein(sd.Heun()), y0).x
        np.testing.assert_allclose(to_data(solution, mixture()), expected, rtol=0, atol=1e-10)


def runge_kutta(method, denoiser):
    """One step of an explicit method from its tableau, in t = -log sigma, written anew."""
    tableau = getattr(method, "tableau", None)
    rows = [] if tableau is None else [np.asarray(row) for row in tableau.a_lower]
    places = [0.0] if tableau is None else [0.0, *tableau.c]
    final = [1.0] if tableau is None else tableau.b_sol

    def step(y, t0, t1):
        slopes = []
        for place, row in zip(places, [[], *rows], strict=True):
            stage = y + (t1 - t0) * sum(a * k for a, k in zip(row, slopes, strict=True))
            slopes.append(denoiser(stage, np.exp(-(t0 + place * (t1 - t0)))) - stage)
        return y + (t1 - t0) * sum(b * k for b, k in zip(final, slopes, strict=True))

    return step


class TestSteinCorrected:
    @pytest.mark.parametrize("method", EXPLICIT, ids=name)
    def test_corrects_the_step_of_every_method(self, method):
        """Against one step after another from the tableau, corrected by the formula in numpy.

        A stage kept from the uncorrected state would show; so would a gamma that is 1 throughout.
        """
        data, y0 = mixture(), normal(16, 2, seed=2, scale=20.0)
        corrected = SteinCorrected(method, rule=sd.StepEnergy(gamma_max=3.0))
        solution = solve(corrected, y0, saveat=diffrax.SaveAt(steps=True), max_steps=5)
        y, ts, gammas = np.asarray(y0), -np.log(SIGMAS[:-1]), []
        candidate = runge_kutta(method, lambda y, sigma: np.asarray(data(jnp.asarray(y), sigma)))
        for i, (t0, t1) in enumerate(pairwise(ts)):
            sigma, q = np.exp(-t0), np.exp(t0 - t1)
            x0 = np.asarray(data(jnp.asarray(y), sigma))
            anchor, proposal = q * y + (1 - q) * x0, candidate(y, t0, t1)
            # E[d - tr J] of Tweedie over E|e - delta/sigma|^2, with x0 + delta in place of x0.
            length = np.square((y - x0) / sigma).sum()
            target = (proposal - q * y) / (1 - q)
            gamma = np.clip(length / np.square((y - target) / sigma).sum(), 0, 3)
            y = anchor + gamma * (proposal - anchor)
            gammas.append(gamma)
            np.testing.assert_allclose(solution.ys[i], y, rtol=1e-10, atol=1e-10)
        assert np.abs(np.array(gammas) - 1).max() > 0.01

    def test_euler_in_log_sigma_is_damped_towards_ddim(self):
        """Its delta is a multiple of D - y, so Tweedie's gamma is ((1 - q) / h)^2 for any data."""
        y, h = normal(8, 2, seed=3, scale=4.0), 0.7
        t0, t1, q = jnp.asarray(-1.0), jnp.asarray(-1.0 + h), np.exp(-h)
        solver, term = SteinCorrected(diffrax.Euler(), **ENERGY), probability_flow(mixture())
        y1, *_ = solver.step(term, t0, t1, y, None, solver.init(term, t0, t1, y, None), False)
        toward = ((1 - q) + ((1 - q) / h) ** 2 * (h - (1 - q))) * (mixture()(y, np.e) - y)
        np.testing.assert_allclose(y1, y + toward, rtol=1e-12)

    @pytest.mark.parametrize("method", [diffrax.Heun(), diffrax.Dopri5()], ids=name)
    def test_uncorrected_it_is_diffrax(self, method):
        """Uncorrected on both sides: no correction, or none allowed; in `sample` as well."""
        y0 = normal(8, 2, seed=4, scale=20.0)
        expected = to_data(solve(method, y0), mixture())
        rule = sd.StepEnergy(gamma_min=1.0)
        found = to_data(solve(SteinCorrected(method, rule=rule), y0), mixture())
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)
        sampled = run(mixture(), SIGMAS, FromDiffrax(method), y0)
        np.testing.assert_allclose(sampled.x, expected, rtol=0, atol=1e-10)
        assert sampled.info.nfe == 5 * len(method.tableau.b_sol) + 1

    def test_trace_of_the_whole_candidate(self):
        """The paper's rule differentiates through the stages: against the dense Jacobian."""
        data, y = gaussian(), normal(6, 3, seed=5, scale=3.0)
        t0, t1 = -np.log(2.0), -np.log(1.2)
        solver = SteinCorrected(
            diffrax.Heun(), rule=sd.CleanTarget(gamma_max=9.0), estimator=sd.Exact()
        )
        term = probability_flow(data)
        state = solver.init(term, t0, t1, y, None)
        y1 = jax.jit(lambda y: solver.step(term, t0, t1, y, None, state, False)[0])(y)
        step = runge_kutta(diffrax.Heun(), data)
        jacobian = jax.vmap(jax.jacfwd(lambda row: step(row[None], t0, t1)[0]))(y)
        u = y - step(y, t0, t1)
        gamma = 4 * (3 - jnp.trace(jacobian, axis1=1, axis2=2)).sum() / jnp.square(u).sum()
        assert abs(gamma - 1) > 0.01
        np.testing.assert_allclose(y1, y - gamma * u, rtol=1e-10)

    @pytest.mark.slow
    def test_vmap_over_solves(self):
        """Per-sample statistics as in the batch; batch statistics through the name of the axis."""
        y0 = normal(5, 2, seed=6, scale=20.0)

        def each(solver, **axis):
            return jax.vmap(lambda row: solve(solver, row[None]).ys[-1, 0], **axis)(y0)

        for statistics in ("sample", "batch"):
            options = {**ENERGY, "statistics": statistics}
            together = solve(SteinCorrected(diffrax.Euler(), **options), y0).ys[-1]
            if statistics == "batch":
                options["axis_name"] = "samples"
            apart = each(SteinCorrected(diffrax.Euler(), **options), axis_name="samples")
            np.testing.assert_allclose(apart, together, rtol=1e-10, atol=1e-12)

    def test_every_saved_state_is_a_corrected_one(self):
        """steps, ts and dense agree at the steps, and dense agrees with ts in between."""
        y0, ts = normal(4, 2, seed=7, scale=20.0), times(SIGMAS[:-1])
        between = np.sort(np.concatenate([ts, (ts[1:] + ts[:-1]) / 2]))
        saveat = diffrax.SaveAt(
            dense=True,
            subs=[diffrax.SubSaveAt(t0=True, steps=True), diffrax.SubSaveAt(ts=between)],
        )
        solution = solve(SteinCorrected(diffrax.Bosh3()), y0, saveat=saveat, max_steps=9)
        steps, at = solution.ys
        np.testing.assert_allclose(at[::2], steps[: len(ts)], rtol=1e-10)
        dense = jax.vmap(solution.evaluate)(between)
        np.testing.assert_allclose(dense, at, rtol=1e-10)

    def test_to_data_of_padded_states(self):
        y0 = normal(4, 2, seed=7, scale=20.0)
        saveat = diffrax.SaveAt(steps=True)
        padded = solve(as_diffrax(sd.DDIM()), y0, saveat=saveat, max_steps=9)
        assert np.isinf(padded.ts[-1])
        expected = run(mixture(), SIGMAS, sd.DDIM(), y0).x
        np.testing.assert_allclose(to_data(padded, mixture()), expected, rtol=0, atol=1e-10)

    def test_dense_output_is_third_order(self):
        """Locally, between exact states."""
        data, y0 = gaussian(), normal(4, 3, seed=8, scale=3.0)
        steps, errors = np.array([0.4, 0.2, 0.1, 0.05]), []
        for h in steps:
            middle, end = (
                jnp.asarray(data.flow(np.asarray(y0), 2.0, 2.0 * np.exp(-part * h)))
                for part in (0.5, 1.0)
            )
            path = SigmaInterpolation(
                t0=-np.log(2.0), t1=h - np.log(2.0), y0=y0, y1=end, x0=data(y0, 2.0)
            )
            errors.append(np.abs(path.evaluate(h / 2 - np.log(2.0)) - middle).max())
        assert abs(np.polyfit(np.log(steps), np.log(errors), 1)[0] - 3) < 0.2

    def test_adaptive_steps_need_an_error_of_their_own(self):
        """Refused alone; with HalfSolver the error is of second order in the steps accepted."""
        data, y0 = gaussian(), normal(4, 3, seed=9, scale=20.0)
        exact = data.flow(np.asarray(y0), SIGMAS[0], SIGMAS[-2])
        corrected = SteinCorrected(diffrax.Heun(), **ENERGY)

        def error(solver, tolerance):
            controller = diffrax.PIDController(rtol=tolerance, atol=tolerance)
            solution = solve(solver, y0, denoiser=data, stepsize_controller=controller, dt0=0.1)
            return np.abs(solution.ys[-1] - exact).max(), solution.stats["num_accepted_steps"]

        with pytest.raises(RuntimeError, match="error estimates"):
            error(corrected, 1e-3)
        (coarse, few), (fine, many) = (
            error(diffrax.HalfSolver(corrected), t) for t in (1e-3, 1e-6)
        )
        assert fine < 1e-4
        assert abs(np.log(coarse / fine) / np.log(many / few) - 2) < 0.2


class TestGradients:
    """Of a solve, by its start and by the denoiser's parameters."""

    Y0 = normal(4, 2, seed=10, scale=20.0)
    DIRECTION = normal(*mixture().means.shape, seed=11)

    def loss(self, solver, shift, adjoint):
        data = Mixture(mixture().means + shift * self.DIRECTION, 0.5)
        ys = solve(solver, self.Y0 * (1 + shift), SIGMAS[2:], data, grid=True, adjoint=adjoint).ys
        return jnp.sum(jnp.sin(ys))

    @pytest.mark.parametrize(
        "solver",
        [
            SteinCorrected(diffrax.Bosh3(), rule=sd.StepEnergy(gamma_max=2.0)),
            pytest.param(
                as_diffrax(sd.Stein(sd.DPMpp2M(), estimator=sd.Hutchinson())),
                marks=pytest.mark.slow,
            ),
        ],
        ids=["SteinCorrected", "as_diffrax"],
    )
    def test_adjoints_agree_with_finite_differences(self, solver):
        def derivative(transform, adjoint):
            return jax.jit(transform(lambda shift: self.loss(solver, shift, adjoint)))

        both = derivative(jax.value_and_grad, diffrax.RecursiveCheckpointAdjoint())
        (below, _), (_, gradient), (above, _) = (both(shift) for shift in (-1e-5, 0.0, 1e-5))
        difference = (above - below) / 2e-5
        found = [
            gradient,
            derivative(jax.grad, diffrax.DirectAdjoint())(0.0),
            derivative(jax.jacfwd, diffrax.ForwardMode())(0.0),
        ]
        assert abs(difference) > 0.1
        np.testing.assert_allclose(found, difference, rtol=1e-7)
        np.testing.assert_allclose(found, found[0], rtol=1e-11)


class TestErrors:
    def test_solver(self):
        for solver in (diffrax.Kvaerno3(), diffrax.ReversibleHeun(), diffrax.LeapfrogMidpoint()):
            with pytest.raises(ValueError, match="only explicit Runge-Kutta"):
                SteinCorrected(solver)
        with pytest.raises(ValueError, match="deterministic"):
            as_diffrax(sd.DPMpp2MSDE())
        with pytest.raises(ValueError, match="statistics must be"):
            SteinCorrected(diffrax.Heun(), statistics="each")

    def test_term(self):
        with pytest.raises(ValueError, match="must be probability_flow"):
            diffrax.diffeqsolve(
                diffrax.ODETerm(lambda t, y, _: -t * y),
                as_diffrax(sd.DDIM()),
                0,
                1,
                0.5,
                normal(2, 2),
            )
        with pytest.raises(ValueError, match="pass it as"):
            solve(as_diffrax(sd.Stein(sd.DPMpp2M())), normal(2, 2))

    def test_grid(self):
        with pytest.raises(ValueError, match="infinity"):
            times(SIGMAS)
        with pytest.raises(ValueError, match="decrease"):
            probability_flow(mixture(), SIGMAS[::-1])

    def test_steps_off_the_grid(self):
        with pytest.raises(RuntimeError, match="not one of the grid's"):
            solve(
                as_diffrax(sd.DPMpp2M()),
                normal(2, 2),
                grid=True,
                stepsize_controller=diffrax.ConstantStepSize(),
                dt0=0.5,
            )

    def test_rising_sigma(self):
        """Time is negated by diffrax; the sigmas are still the true ones."""
        ts = times(SIGMAS[:-1])
        with pytest.raises(RuntimeError, match="sigma must decrease"):
            diffrax.diffeqsolve(
                probability_flow(mixture()),
                SteinCorrected(diffrax.Euler()),
                ts[-1],
                ts[0],
                ts[0] - ts[1],
                normal(2, 2),
            )

    def test_nothing_saved(self):
        solution = solve(as_diffrax(sd.DDIM()), normal(2, 2), saveat=diffrax.SaveAt(dense=True))
        with pytest.raises(ValueError, match="saved no state"):
            to_data(solution, mixture())


def test_example():
    """Under a user's settings."""
    pytest.importorskip("sklearn", reason="examples need pip install -e '.[dev]'")
    import diffrax_composition

    with jax.numpy_rank_promotion("allow"), jax.enable_x64(False):
        error = diffrax_composition.samples()
        real, scrambled = diffrax_composition.likelihoods()
    assert error["SteinCorrected(diffrax.Heun())"] < error["diffrax.Heun()"]
    assert real > scrambled
