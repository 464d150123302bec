"""The table of coefficients: replay is the run that it was recorded from; others are refused."""

import dataclasses
import json
from functools import cache

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from closed_forms import mixture, normal
from damage import assert_damage_is_an_error
from jax.tree_util import Partial
from numpy.testing import assert_allclose, assert_array_equal

import steindiff_jax as sd
from steindiff_jax._identity import fingerprint

KEY = jax.random.key(3)
GRID = sd.karras_sigmas(5)
SOLVERS = [
    sd.Stein(sd.DPMpp3M(), sd.StepEnergy(), sd.Tweedie()),
    sd.Stein(sd.IPNDM(3), sd.PosteriorLength(), sd.Hutchinson(2)),
    sd.Stein(sd.Heun(), sd.CleanTarget(0.1, schedule=sd.VPLinear()), sd.Hutchinson()),
]
DEFAULT = SOLVERS[0]


DENOISER, X = mixture(), normal(16, 2, scale=80.0)


@cache
def calibrated(index=0):
    return sd.calibrate(KEY, DENOISER, None, GRID, SOLVERS[index], x_init=X)


def replay(solver, x=X, denoiser=DENOISER, sigmas=GRID):
    return sd.sample(KEY, denoiser, sigmas=sigmas, solver=solver, x_init=x)


@jax.custom_jvp
def opaque(x):
    return x


@opaque.defjvp
def _(*_):
    raise AssertionError("differentiated")


NAMED = pytest.mark.parametrize(
    "index",
    [0, 1, pytest.param(2, marks=pytest.mark.slow)],
    ids=[type(s.rule).__name__ for s in SOLVERS],
)


@NAMED
def test_replay_is_the_run(index):
    """With the same coefficients to the last bit, and without a derivative of the denoiser."""
    live, table = replay(SOLVERS[index]), calibrated(index)
    closed = Partial(lambda denoiser, x, s: opaque(denoiser(x, s)), DENOISER)
    again = replay(table, denoiser=closed)
    assert np.ptp(live.info.gamma) > 0.01
    assert_array_equal(again.info.gamma, live.info.gamma)
    assert_allclose(again.x, live.x, rtol=1e-12, atol=1e-12)
    assert_array_equal(again.info.nfe, live.info.nfe)
    if not isinstance(SOLVERS[index].estimator, sd.Tweedie):
        with pytest.raises(ValueError, match="needs derivatives"):
            replay(SOLVERS[index], denoiser=closed)


def test_replay_takes_no_statistics():
    """A sample alone goes where it went in its batch; with live statistics it does not."""
    x = replay(calibrated()).x[:1]
    assert_allclose(replay(calibrated(), X[:1]).x, x, rtol=1e-10)
    assert np.abs(replay(DEFAULT, X[:1]).x - x).max() > 1e-5


@NAMED
def test_saved_and_loaded(tmp_path, index):
    path, table = tmp_path / "table.json", calibrated(index)
    table.save(path)
    loaded = sd.Calibrated.load(path, SOLVERS[index], DENOISER)
    assert loaded.inner == table.inner
    assert loaded.coefficients._fields == table.coefficients._fields
    for ours, theirs in zip(jax.tree.leaves(table), jax.tree.leaves(loaded), strict=True):
        assert_array_equal(ours, theirs)
        assert jnp.result_type(ours) == jnp.result_type(theirs)
    written = json.loads(path.read_text())  # plain numbers and words
    for name, column in table.coefficients._asdict().items():
        assert_array_equal(written["coefficients"][name], column)
    assert written["solver"].startswith("Stein(inner=")


def test_saved_and_loaded_in_float32(tmp_path):
    path, (denoiser, x) = tmp_path / "table.json", jax.tree.map(jnp.float32, (DENOISER, X))
    table = sd.calibrate(KEY, denoiser, None, jnp.float32(GRID), DEFAULT, x_init=x)
    table.save(path)
    loaded = sd.Calibrated.load(path, DEFAULT, denoiser)
    assert loaded.gamma.dtype == loaded.sigmas.dtype == jnp.float32
    assert_array_equal(loaded.gamma, table.gamma)
    assert_array_equal(loaded.sigmas, table.sigmas)


def test_another_grid_is_refused():
    table = calibrated()
    for other in (sd.log_snr_sigmas(5), GRID[1:], sd.karras_sigmas(6), 1.001 * GRID):
        with pytest.raises(ValueError, match=r"for sigmas=\[80, .* got \["):
            table.init(X, other)
        with pytest.raises(ValueError, match=r"for sigmas=\[80, .* got \["):
            replay(table, sigmas=other)
    with pytest.raises(ValueError, match="5 values that are traced"):
        jax.eval_shape(lambda sigmas: replay(table, sigmas=sigmas), GRID[1:])
    # values that are traced cannot be looked at: the samples say so instead
    solution = jax.jit(lambda sigmas: replay(table, sigmas=sigmas))(sd.log_snr_sigmas(5))
    assert np.all(np.isnan(solution.info.gamma[:-1]))
    assert not np.any(solution.info.finite)
    assert np.all(np.isnan(solution.x))


def test_the_same_grid_computed_otherwise_is_not_refused():
    table = calibrated()
    single = jnp.asarray(np.asarray(GRID, np.float32), jnp.float64)
    whole = replay(table)
    assert np.all(whole.info.finite)
    assert_array_equal(replay(table, sigmas=single).info.gamma, table.gamma)
    assert_allclose(replay(table, sigmas=jnp.pad(GRID, (0, 3))).x, whole.x, rtol=1e-12)
    above = GRID[:-1]
    table = sd.calibrate(KEY, DENOISER, None, above, DEFAULT, x_init=X)
    padded = replay(table, sigmas=jnp.pad(above, (0, 3), mode="edge"))
    assert_allclose(padded.x, replay(table, sigmas=above).x, rtol=1e-12)


def test_another_solver_or_denoiser_is_refused(tmp_path):
    path = tmp_path / "table.json"
    calibrated().save(path)
    rule, estimator = sd.StepEnergy(), sd.Tweedie()
    others = [
        sd.Stein(sd.DPMpp2M(), rule, estimator),
        sd.Stein(sd.DPMpp3M(curvature=1.0), rule, estimator),
        sd.Stein(sd.DPMpp3M(), sd.StepEnergy(gamma_min=0.1), estimator),
        sd.Stein(sd.DPMpp3M(), rule, sd.Hutchinson()),
    ]
    for other in others:
        with pytest.raises(ValueError, match="was recorded with"):
            sd.Calibrated.load(path, other)
    as_array = dataclasses.replace(DEFAULT, inner=sd.DPMpp3M(curvature=jnp.asarray(0.5)))
    sd.Calibrated.load(path, as_array, DENOISER)
    for other in (mixture(seed=1), mixture(std=0.4), mixture(k=4)):
        with pytest.raises(ValueError, match="another denoiser"):
            sd.Calibrated.load(path, DEFAULT, other)
        sd.Calibrated.load(path, DEFAULT)  # on purpose


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "table.json"
    for text in ("", "[]", "{}", '"words"'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"not a table that Calibrated\.save wrote"):
            sd.Calibrated.load(path, DEFAULT)
    path.write_text('{"format": "steindiff_jax coefficients 1"}')
    with pytest.raises(ValueError, match="coefficients 1"):
        sd.Calibrated.load(path, DEFAULT)


def test_damaged_files_are_errors(tmp_path):
    """Three hundred: either a table of finite numbers or a ValueError that names the file."""
    path = tmp_path / "table.json"
    calibrated().save(path)

    def check(table):
        assert table.sigmas.shape == GRID.shape
        assert table.gamma.shape == (5,)
        assert np.isfinite(table.gamma).all()
        hash(jax.tree.structure(table))  # or `jit` would not take it

    def load(path):
        return sd.Calibrated.load(path, DEFAULT, DENOISER)

    assert_damage_is_an_error(path, load, check, 300)


def test_the_fingerprint_knows_weights_and_guidance_but_no_labels():
    def network(labels, weight=1.0):
        return sd.Network(
            apply=lambda p, x, t, label: p * x + t[:, None] + label[:, None],
            parameters=jnp.array(weight),
            schedule=sd.EDM(),
            prediction="x0",
            cond={"label": labels},
        )

    zeros, ones = jnp.zeros(4), jnp.ones(4)
    assert fingerprint(network(zeros)) == fingerprint(network(ones))
    assert fingerprint(network(zeros)) != fingerprint(network(zeros, weight=1.5))
    a, b = network(zeros), network(ones)
    assert fingerprint(sd.guided(a, b, 2.0)) != fingerprint(sd.guided(a, b, 3.0))


def test_what_cannot_be_calibrated_is_refused(monkeypatch):
    # Without the annotations' checks of conftest.py, which would come first.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="solver must be a Stein"):
        sd.calibrate(KEY, DENOISER, (16, 2), GRID, sd.DPMpp3M())
    with pytest.raises(ValueError, match="statistics='batch'"):
        sd.calibrate(
            KEY, DENOISER, (16, 2), GRID, dataclasses.replace(DEFAULT, statistics="sample")
        )
    x = X.at[4:8].set(jnp.nan)
    with pytest.raises(ValueError, match="25% of the samples"):
        sd.calibrate(KEY, DENOISER, None, GRID, DEFAULT, x_init=x)


def test_tables_are_data():
    """A pytree: averaged with tree_map, differentiated in gamma, one program for all of them."""
    first = calibrated()
    second = sd.calibrate(KEY, DENOISER, None, GRID, DEFAULT, x_init=X[::-1] + 1)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
    assert_allclose(mean.gamma, (first.gamma + second.gamma) / 2)
    traces = []

    @jax.jit
    def final(table):
        traces.append(None)
        return jnp.sum(replay(table, sigmas=table.sigmas).x)

    results = [final(table) for table in (first, second, mean)]
    assert len(traces) == 1
    assert len(set(map(float, results))) == 3

    def at(gamma):
        coefficients = first.coefficients._replace(gamma=gamma[:, None])
        return final(dataclasses.replace(first, coefficients=coefficients))

    # x_next is affine in gamma, so the sum is smooth in it
    gradient = jax.grad(at)(first.gamma)
    for i in (1, 2, 3):
        h = 1e-5 * jnp.eye(5)[i]
        slope = (at(first.gamma + h) - at(first.gamma - h)) / 2e-5
        assert_allclose(gradient[i], slope, rtol=1e-5, atol=1e-6)
    assert gradient[0] == 0  # the first step is first order, whatever gamma
