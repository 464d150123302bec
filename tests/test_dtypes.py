"""float32, networks in half precision and float64: what is computed in what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import mixture, normal, run
from flax import linen as nn
from numpy.testing import assert_allclose

import steindiff_jax as sd

KEY = jax.random.key(0)
SOLVERS = {
    "DDIM": sd.DDIM(),
    "Heun": sd.Heun(),
    "DPMpp3M": sd.DPMpp3M(),
    "IPNDM": sd.IPNDM(3),
    "Stein": sd.Stein(sd.DPMpp2M(), sd.StepEnergy()),
    "Stein, default": sd.Stein(sd.DPMpp2M()),
    "Stein, probes": sd.Stein(sd.DPMpp2M(), estimator=sd.Hutchinson(2)),
    "Stein, secants": sd.Stein(sd.DPMpp2M(), estimator=sd.Hutchinson(2, "secant")),
    "Stein, clean target": sd.Stein(
        sd.DPMpp2M(), sd.CleanTarget(schedule=sd.VPCosine()), sd.Exact(), statistics="sample"
    ),
}
SCHEDULES = [
    sd.EDM(),
    sd.VPLinear(),
    sd.VPCosine(),
    sd.RectifiedFlow(),
    sd.Discrete(np.linspace(1e-4, 0.02, 100, dtype=np.float32)),
]


def narrow(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def dtypes_of(jaxpr):
    """Of everything computed, in all the programs inside; weak scalars are Python's floats."""
    found = set()
    for equation in jaxpr.eqns:
        values = [v.aval for v in equation.outvars]
        found |= {str(v.dtype) for v in values if v.shape or not v.weak_type}
        for inside in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns")):
            found |= dtypes_of(inside) if hasattr(inside, "eqns") else set()
    return found


@pytest.mark.parametrize("name", SOLVERS)
def test_a_float32_program_computes_nothing_in_float64(name):
    """Though x64 is on: no constant, grid or statistic is wider than its inputs."""
    denoiser, grid = narrow(mixture()), narrow(sd.karras_sigmas(4))

    def program(key, denoiser, solver, x):
        return sd.sample(key, denoiser, sigmas=grid, solver=solver, x_init=x)

    x = narrow(normal(6, 2, scale=80.0))
    found = dtypes_of(jax.make_jaxpr(program)(KEY, denoiser, SOLVERS[name], x).jaxpr)
    assert "float32" in found
    assert "float64" not in found
    solution = program(KEY, denoiser, SOLVERS[name], x)
    assert solution.x.dtype == jnp.float32


def test_bands_in_float32():
    """The cosine transform's matrices and the bands' statistics, by the default solver."""
    x, grid = narrow(normal(4, 16, 16, 3)), narrow(sd.karras_sigmas(4))

    def program(x):
        return sd.sample(KEY, lambda x, sigma: x / (1 + sigma**2), sigmas=grid, x_init=x)

    assert program(x).info.gamma.shape[1] > 1
    assert "float64" not in dtypes_of(jax.make_jaxpr(program)(x).jaxpr)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=type)
@pytest.mark.parametrize("prediction", ["v", "edm"])
def test_adapters_in_float32(schedule, prediction):
    denoiser = sd.Network(lambda _, x, t: x + t[:, None], (), schedule, prediction)
    x, sigma = narrow(normal(4, 2)), narrow(0.7)
    assert denoiser(x, sigma).dtype == jnp.float32
    assert "float64" not in dtypes_of(jax.make_jaxpr(denoiser)(x, sigma).jaxpr)


@pytest.mark.parametrize("name", [name for name in SOLVERS if name[-1] != "s"])
def test_float32_agrees_with_float64(name):
    """To rounding, carried through a flow that expands by no more than a few units."""
    denoiser, grid, solver = mixture(), sd.karras_sigmas(6), SOLVERS[name]
    start = narrow(normal(6, 2, scale=80.0))
    wide = run(denoiser, grid, solver, start.astype(jnp.float64))
    low = run(narrow(denoiser), narrow(grid), solver, start)
    assert low.x.dtype == low.info.gamma.dtype == jnp.float32
    assert wide.x.dtype == wide.info.gamma.dtype == jnp.float64
    assert_allclose(low.info.gamma, wide.info.gamma, rtol=3e-5, atol=3e-5)
    assert_allclose(low.x, wide.x, atol=3e-5)


class Halved(nn.Module):
    """A network that computes in half precision with float32 parameters, as is usual."""

    dtype: jnp.dtype = jnp.bfloat16

    @nn.compact
    def __call__(self, x, t):
        h = jnp.concatenate([x, t[:, None]], axis=1)
        h = nn.silu(nn.Dense(16, dtype=self.dtype, param_dtype=jnp.float32)(h))
        return nn.Dense(2, dtype=self.dtype, param_dtype=jnp.float32)(h)


@pytest.mark.parametrize("half", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["Heun", "Stein", "Stein, default"])
def test_narrow_network(name, half):
    """State, statistics and coefficients stay in float32, near those of the float32 network."""
    x, grid = narrow(normal(64, 2)), narrow(sd.karras_sigmas(4, 0.02, 10.0))
    variables = Halved().init(KEY, x, x[:, 0])
    results = []
    for dtype in (half, jnp.float32):
        module = Halved(dtype)
        assert module.apply(variables, x, x[:, 0]).dtype == dtype
        denoiser = sd.from_linen(module, variables, schedule=sd.EDM(), prediction="edm")
        solution = run(
            denoiser, grid, SOLVERS[name], 10 * x, record=lambda state, step: (state, step)
        )
        leaves = jax.tree.leaves((solution.x, solution.info.gamma, solution.record))
        floats = {leaf.dtype for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)}
        assert half not in floats
        assert solution.x.dtype == jnp.float32
        assert solution.info.finite.all()
        results.append(solution)
    narrow_run, single = results
    rounding = float(jnp.finfo(half).eps)  # of one number of the network, 0.8% or 0.1%
    assert_allclose(narrow_run.info.gamma, single.info.gamma, rtol=rounding)
    distance = jnp.linalg.norm(narrow_run.x - single.x) / jnp.linalg.norm(single.x)
    assert distance < rounding


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_narrow_start_is_widened(dtype):
    start = normal(4, 2).astype(dtype)
    grid = narrow(sd.karras_sigmas(3, 0.1, 1.0))
    low = run(narrow(mixture()), grid, sd.Stein(sd.DPMpp2M()), start)
    wide = run(narrow(mixture()), grid, sd.Stein(sd.DPMpp2M()), start.astype(jnp.float32))
    assert low.x.dtype == jnp.float32
    np.testing.assert_array_equal(low.x, wide.x)


@pytest.mark.parametrize(
    "option", [np.float64(0.5), pytest.param(jnp.float64(0.5), marks=pytest.mark.slow)], ids=type
)
def test_wider_options_and_grids_change_no_dtype(option):
    """The start decides: what comes in float64 is rounded to it."""
    start, grid, denoiser = narrow(normal(4, 2)), sd.karras_sigmas(3), narrow(mixture())
    for make in (sd.DPMpp2S, sd.DPMpp3M, lambda eta: sd.DPMpp2MSDE(eta=eta)):
        wide, plain = (run(denoiser, grid, make(r), start) for r in (option, 0.5))
        assert wide.x.dtype == plain.x.dtype == jnp.float32
        assert_allclose(wide.x, plain.x, rtol=1e-4)


def test_a_narrow_grid_is_widened():
    grid = jnp.array([2.0, 1.0, 0.5, 0.0], jnp.bfloat16)
    solution = sd.sample(KEY, narrow(mixture()), (4, 2), sigmas=grid, solver=sd.Heun())
    assert solution.x.dtype == jnp.float32


def test_means_do_not_lose_digits_in_float32():
    """Statistics of 40000 samples in float32 against float64."""
    start = normal(40000, 2, scale=3.0)
    grid, solver = np.array([3.0, 1.5, 0.9]), sd.Stein(sd.DPMpp2M(), sd.StepEnergy())
    wide = run(mixture(), grid, solver, start)
    low = run(narrow(mixture()), narrow(grid), solver, narrow(start))
    assert_allclose(low.info.gamma, wide.info.gamma, rtol=2e-6)
