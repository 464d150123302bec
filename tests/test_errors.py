"""Bad input is a ValueError that names it; a network that fails on some samples is no error."""

import warnings

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from closed_forms import mixture, normal, run
from jax import Array
from numpy.testing import assert_allclose, assert_array_equal

import steindiff_jax as sd

KEY = jax.random.key(0)
GRID = np.array([3.0, 1.5, 0.5, 0.0])


@pytest.fixture(autouse=True)
def _as_a_user_sees_it():
    """Without the annotations' checks of conftest.py, which would come first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def draw(denoiser=None, shape=(4, 2), sigmas=GRID, **kwargs):
    return sd.sample(KEY, denoiser or mixture(), shape, sigmas=sigmas, **kwargs)


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([1.0, 2.0, 0.0], r"decrease strictly, got .*1\. *2\. *0"),
        ([2.0, 2.0, 0.0], r"decrease strictly, got .*2\. *2\. *0"),
        ([np.inf, 1.0, 0.0], r"finite, got .*inf.*t < 1"),
        ([2.0, np.nan, 0.0], r"finite, got .*nan"),
        ([2.0, 0.0, 1.0], r"decrease strictly, got .*2\. *0\. *1"),
        ([2.0, 0.0, 1.0, 0.0], r"0 only at the end, got .*2\. *0\. *1\. *0"),
        ([2.0, 1.0, -1.0], r"positive, 0 only at the end, got .*-1"),
        ([0.0, 0.0], r"positive, 0 only at the end, got .*0"),
        ([2.0], r"\(steps \+ 1,\) with steps >= 1, got \(1,\)"),
        ([[2.0, 1.0]], r"\(steps \+ 1,\) with steps >= 1, got \(1, 2\)"),
    ],
)
def test_sigmas(sigmas, message):
    with pytest.raises(ValueError, match=message):
        draw(sigmas=np.array(sigmas))


def test_integer_sigmas():
    with pytest.raises(ValueError, match="sigmas must be floating point, got int"):
        draw(sigmas=np.array([3, 2, 1]))


@pytest.mark.parametrize("grid", [sd.karras_sigmas, sd.log_snr_sigmas])
@pytest.mark.parametrize("steps", [0, -3])
def test_fewer_than_one_step(grid, steps):
    with pytest.raises(ValueError, match=f"steps must be at least 1, got {steps}"):
        grid(steps)


BAD = {
    "statistics": (lambda: sd.Stein(sd.DDIM(), statistics="mean"), "'batch', 'sample'.*'mean'"),
    "rule": (lambda: sd.Stein(sd.DDIM(), rule=sd.Tweedie()), r"rule must be a rule.*Tweedie\(\)"),
    "class of a rule": (
        lambda: sd.Stein(sd.DDIM(), sd.StepEnergy),
        "rule must be .*got the class StepEnergy: call it",
    ),
    "estimator": (lambda: sd.Stein(sd.DDIM(), estimator=3), "estimator must be .*got 3"),
    "class of an estimator": (
        lambda: sd.Stein(sd.DDIM(), estimator=sd.Exact),
        "estimator must be .*got the class Exact: call it",
    ),
    "basis": (lambda: sd.Stein(sd.DDIM(), basis=sd.Cosine), "basis must be .*class Cosine"),
    "bands": (lambda: sd.Cosine(0), "bands must be at least 1, got 0"),
    "inner": (
        lambda: sd.Stein(sd.StepEnergy()),
        "inner must be a deterministic .*StepEnergy",
    ),
    "stochastic inner": (
        lambda: sd.Stein(sd.DPMpp2MSDE()),
        "inner must be a deterministic solver.*DPMpp2MSDE",
    ),
    "stochastic first step": (
        lambda: sd.AnalyticalFirst(sd.Churn()),
        "inner must be a deterministic solver.*Churn",
    ),
    "probes": (lambda: sd.Hutchinson(probes=0), "probes must be at least 1, got 0"),
    "derivative": (lambda: sd.Hutchinson(derivative="vjq"), "one of .*'secant'.*got 'vjq'"),
    "solver by its name": (lambda: draw(solver="ddim"), "solver must be a solver.*got 'ddim'"),
    "class of a solver": (lambda: draw(solver=sd.DDIM), "got the class DDIM: call it"),
    "a solver that is none": (lambda: draw(solver=object()), "solver must be a solver.*object"),
    "class of a schedule": (
        lambda: sd.Network(abs, (), sd.VPCosine, "x0"),
        "schedule must be .*got the class VPCosine: call it",
    ),
    "class of a denoiser": (lambda: draw(sd.Network), "denoiser must be a function.*Network"),
    "key 0": (
        lambda: sd.sample(0, mixture(), (4, 2), sigmas=GRID),
        r"key must be of jax.random, such as jax.random.key\(0\), got 0",
    ),
    "float key": (
        lambda: sd.sample(jnp.ones(2), mixture(), (4, 2), sigmas=GRID),
        "key must be of jax.random.*got",
    ),
    "key of numpy": (
        lambda: sd.sample(np.zeros(2, np.uint32), mixture(), (4, 2), sigmas=GRID),
        "key must be of jax.random.*got array",
    ),
    "clip": (lambda: sd.StepEnergy(0.9, 0.1), "must not exceed gamma_max, got 0.9 > 0.1"),
    "clip of the other rule": (lambda: sd.CleanTarget(2.0), "must not exceed .* got 2.0 > 1.0"),
    "order": (lambda: sd.IPNDM(5), "order must be .*got 5"),
    "prediction": (
        lambda: sd.Network(abs, (), sd.EDM(), "noise"),
        "prediction must be one of .*'epsilon'.*got 'noise'",
    ),
    "no shape": (lambda: draw(shape=None), r"shape \(batch, \*event\) or x_init is needed"),
    "empty shape": (lambda: draw(shape=()), r"shape=\(\)"),
    "integer start": (
        lambda: draw(shape=None, x_init=np.arange(6).reshape(3, 2)),
        "x_init must be floating point, got int",
    ),
    "shape of the start": (
        lambda: draw(shape=(4, 2), x_init=np.zeros((4, 3))),
        r"x_init must have shape \(4, 2\), got \(4, 3\)",
    ),
    "shape of the result": (
        lambda: draw(lambda x, _: x[:, :1]),
        r"must return shape \(4, 2\) .*got \(4, 1\)",
    ),
    "dtype of the result": (
        lambda: draw(lambda x, _: x.astype(jnp.float32)),
        "dtype float64 like its input, got .*float32",
    ),
    "option": (lambda: sd.DPMpp3M(np.nan), r"curvature must be in \(-inf, inf\), got nan"),
    "array of options": (
        lambda: sd.guided(abs, abs, np.array([1.0, np.inf])),
        r"scale must be in \(-inf, inf\), got inf",
    ),
    "float order": (lambda: sd.IPNDM(2.0), r"order must be one of \(1, 2, 3, 4\), got 2.0"),
    "betas": (lambda: sd.Discrete(np.array([0.1, 1.0])), r"betas must be in \(0, 1\), got 1.0"),
    "too few betas": (lambda: sd.Discrete.linear(1).zero_terminal_snr(), "needs 3 betas or more"),
    "ends the wrong way round": (
        lambda: sd.karras_sigmas(4, 80.0, 2.0),
        r"sigma_min / sigma_max must be in \[0, 1\], got 40",
    ),
    "no tuple": (lambda: draw(shape=4), "shape must be a tuple of integers, none negative, got 4"),
    "negative shape": (lambda: draw(shape=(-1, 2)), r"none negative, got \(-1, 2\)"),
    "start without a batch": (
        lambda: draw(shape=None, x_init=1.0),
        r"x_init must have shape \(batch, \*event\), got \(\)",
    ),
    "two results": (lambda: draw(lambda x, _: (x, x)), r"must return shape \(4, 2\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_input_inside_jit():
    """The same error, at trace time."""
    with pytest.raises(ValueError, match=r"got \(4, 1\)"):
        jax.jit(lambda: draw(lambda x, _: x[:, :1]))()


# --- Samples that are not finite -----------------------------------------------------------------


def failing(x: Array, sigma: Array) -> Array:
    """A network that returns NaN for what starts beyond 100, as a broken one does."""
    x0 = mixture()(x, sigma)
    return jnp.where(jnp.abs(x).max(axis=1, keepdims=True) > 100, jnp.nan, x0)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
@pytest.mark.parametrize(
    "solver",
    [
        sd.DPMpp2M(),
        sd.Stein(sd.DPMpp2M(), sd.StepEnergy()),
        pytest.param(sd.Stein(sd.DPMpp2M(), estimator=sd.Exact()), marks=pytest.mark.slow),
        sd.Stein(sd.DPMpp2M(), sd.CleanTarget(), statistics="sample"),
    ],
    ids=["plain", "batch", "batch, exact", "per sample"],
)
def test_non_finite_samples_are_marked_and_leave_the_others_alone(solver, value):
    good = normal(4, 2, scale=3.0)
    bad = jnp.concatenate([good[:2], jnp.full((2, 2), value), good[2:]])  # one pair of neighbours
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = run(failing, GRID, solver, bad)
        alone = run(failing, GRID, solver, good)
    others = np.array([0, 1, 4, 5])
    assert alone.info.finite.all()
    assert_array_equal(solution.info.finite[:, others], True)
    assert_array_equal(solution.info.finite[:, 2:4], False)
    assert_allclose(solution.x[others], alone.x, rtol=1e-12)
    if isinstance(solver, sd.Stein):
        kept = solution.info.gamma
        kept = kept[:, others] if solver.statistics == "sample" else kept
        assert_allclose(kept, alone.info.gamma, rtol=1e-12)


def test_a_batch_that_fails_altogether_still_returns():
    solution = run(
        lambda x, _: jnp.full_like(x, jnp.nan), GRID, sd.Stein(sd.DPMpp2M()), normal(3, 2)
    )
    assert not solution.info.finite.any()
    assert solution.x.shape == (3, 2)


def test_probes_of_another_shape():
    x = normal(4, 2)
    with pytest.raises(ValueError, match=r"the shape of x, \(4, 2\), got \(2,\)"):
        sd.from_probes(mixture(), x, jnp.asarray(1.0), x)
