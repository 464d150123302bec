"""Our solvers as schedulers of MaxDiffusion: its results, our `sample`, its pipelines' habits."""

import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import maxdiffusion_reference as peers
import numpy as np
import pytest
from closed_forms import Gaussian, normal, reference, run, unoptimised  # noqa: F401
from numpy.testing import assert_allclose

import steindiff_jax as sd
from steindiff_jax.interop.maxdiffusion import Scheduler
from steindiff_jax.interop.schedulers import load_scheduler

SHAPE = peers.noise().shape
SOLVERS = {
    "unipc 1 flow": sd.UniPC(1),
    "unipc 2 flow": sd.UniPC(2),
    "unipc 3 flow": sd.UniPC(3),
    "unipc 2": sd.UniPC(2),
    "euler": sd.Euler(),
    "euler v": sd.Euler(),
    "flow match": sd.Euler(),
    "rectified flow": sd.Euler(),
    "ddim": sd.DDIM(),
    "dpm 2": sd.DPMpp2M(lower_order_final=True),
    "dpm 3": sd.DPMpp3M(kind="midpoint", lower_order_final=True),
}


def recorded(name):
    """A scheduler with theirs' class name, configuration and state, as the reference has them."""
    (_, cls), options = peers.CASES[name][0].split(), peers.CASES[name][1]
    prefix = f"{name}/"
    parts = {
        k.removeprefix(prefix): v
        for k, v in reference("maxdiffusion").items()
        if k.startswith(prefix)
    }
    common = SimpleNamespace(alphas_cumprod=parts.pop("alphas_cumprod", None))
    state = SimpleNamespace(**parts, common=common)
    config = SimpleNamespace(**({"prediction_type": "epsilon"} | options))
    theirs = type(cls, (), {})()
    theirs.config, theirs.create_state = config, lambda: None
    theirs.set_timesteps = lambda *arguments, **keywords: state  # noqa: ARG005
    return theirs, state


def final(name, theirs, state):
    """Their loop with our scheduler in place of theirs."""
    ours = Scheduler.like(theirs, SOLVERS[name])
    prediction = {"x0": "sample", "v": "v_prediction", "flow": "flow_prediction"}
    prediction = prediction.get(ours.prediction, ours.prediction)
    current = ours.set_timesteps(ours.create_state(), peers.STEPS, SHAPE)
    sample = jnp.asarray(peers.noise()) * jnp.float32(current.init_noise_sigma)
    for i, t in enumerate(current.timesteps):
        x_t = ours.scale_model_input(current, sample, t)
        f = jnp.asarray(peers.output(prediction, x_t, *peers.level(name, state, i)), jnp.float32)
        sample, current = ours.step(current, f, t, sample, return_dict=False)
    assert sample.dtype == jnp.float32
    return np.asarray(sample)


@pytest.mark.parametrize("name", peers.CASES)
def test_their_schedulers(name):
    """The same last sample as their own loop, in float32."""
    expected = reference("maxdiffusion")[f"{name}/sample"]
    found = final(name, *recorded(name))
    print(f"{name}: {np.abs(found - expected).max():.1e}")  # pytest -rP shows it
    assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.skipif("MAXDIFFUSION" not in os.environ, reason="MAXDIFFUSION names a checkout")
@pytest.mark.parametrize("name", peers.CASES)
def test_their_schedulers_as_checked_out(name):
    sys.path.insert(0, str(Path(os.environ["MAXDIFFUSION"]) / "src"))
    theirs = peers.build(name)
    state, expected = peers.loop(name, theirs)
    assert_allclose(final(name, theirs, state), expected, rtol=0, atol=1e-6)


# --- Our own -------------------------------------------------------------------------------------

DATA = Gaussian(jnp.full(3, 0.5), jnp.diag(jnp.asarray(peers.VARIANCES[0])))
GRID = sd.flow_sigmas(5, shift=3.0)


def scheduler(solver, schedule=sd.RectifiedFlow(), prediction="flow"):
    return Scheduler(solver, schedule, prediction, lambda steps: GRID)  # noqa: ARG005


def velocity(x_t, i):
    """What a flow network says in step i."""
    sigma = GRID[i]
    x = (1 + sigma) * x_t
    x0 = DATA(x, sigma)
    return (x - x0) / sigma - x0


def scanned(ours, sample):
    """A pipeline of theirs: a state with fields set from outside, in the carry of a scan."""
    state = ours.set_timesteps(ours.create_state(), 5, shape=sample.shape)
    state = state.replace(last_sample=jnp.zeros_like(sample), step_index=jnp.array(0, jnp.int32))

    def body(carry, inputs):
        i, t = inputs
        sample, state = carry
        scaled = ours.scale_model_input(state, sample, t)
        return ours.step(state, velocity(scaled, i), t, sample).to_tuple(), None

    times = jnp.asarray(state.timesteps, jnp.int32), jnp.arange(5)
    return jax.lax.scan(body, (sample, state), times[::-1])[0][0]


X = normal(8, 3, seed=3)


def table():
    """A calibrated table of the same grid."""
    solver = sd.Stein(sd.IPNDM(3, prediction="flow"))
    return sd.calibrate(jax.random.key(0), DATA, (64, 3), sigmas=GRID, solver=solver)


@pytest.mark.parametrize(
    "make",
    [
        lambda: sd.UniPC(3),
        lambda: sd.LMS(3, prediction="flow"),
        lambda: sd.Stein(sd.UniPC(2), sd.StepEnergy()),
        lambda: sd.Stein(sd.IPNDM(3)),
        lambda: sd.Stein(sd.DDIM(), statistics="sample"),
        table,
    ],
    ids=["unipc", "lms", "step energy", "default", "sample", "table"],
)
def test_our_samples(make):
    """The loop of a pipeline, jitted, and `sample` from the same noise."""
    solver = make()
    found = jax.jit(partial(scanned, scheduler(solver)))(X)
    expected = run(DATA, GRID, solver, X * (1 + GRID[0])).x
    assert_allclose(found, expected, rtol=1e-9)


def test_half_precision_samples():
    """The state stays as wide as it was; the sample is of theirs' dtype."""
    ours = scheduler(sd.Stein(sd.DDIM()))
    state = ours.set_timesteps(ours.create_state(), 5, SHAPE)
    output = ours.step(state, jnp.ones(SHAPE, jnp.bfloat16), 0, jnp.ones(SHAPE, jnp.bfloat16))
    assert output.prev_sample.dtype == jnp.bfloat16
    assert jax.tree.map(jnp.result_type, output.state) == jax.tree.map(jnp.result_type, state)


def test_a_saved_scheduler(tmp_path):
    """The parts of `load_scheduler` are those of one."""
    file = tmp_path / "scheduler_config.json"
    file.write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}')
    ours = Scheduler(sd.Euler(), **load_scheduler(file)._asdict())
    state = ours.set_timesteps(ours.create_state(), 4, SHAPE)
    ratios = np.asarray(state.sigmas[:4])
    assert_allclose(state.timesteps, 1000 * ratios / (1 + ratios), rtol=1e-6)
    assert ours.config.num_train_timesteps == 1000


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        (sd.Heun(), "asks for another"),
        (sd.DPMpp3S(), "asks for another"),
        (sd.Stein(sd.DPMpp2S()), "asks for another"),
        (sd.Stein(sd.IPNDM(3), estimator=sd.Hutchinson()), "has no evaluation to probe"),
        (sd.DPMpp2MSDE(), "solver must be a deterministic solver"),
    ],
    ids=["heun", "3s", "corrected", "probes", "stochastic"],
)
def test_solvers_that_evaluate_are_refused(solver, message):
    with pytest.raises(ValueError, match=message):
        scheduler(solver)


def test_wrong_arguments():
    ours = scheduler(sd.UniPC(2))
    state = ours.create_state()
    with pytest.raises(ValueError, match="call set_timesteps"):
        ours.step(state, X, 0, X)
    with pytest.raises(ValueError, match="set_timesteps needs shape"):
        ours.set_timesteps(state, 5)
    with pytest.raises(ValueError, match="options are for"):
        ours.set_timesteps(state, 5, SHAPE, shift=3.0)
    with pytest.raises(ValueError, match="prediction must be one of"):
        scheduler(sd.DDIM(), prediction="edm")
    with pytest.raises(ValueError, match=r"scheduler must be one of .* got object"):
        Scheduler.like(object(), sd.DDIM())
    theirs, _ = recorded("ddim")
    theirs.config.prediction_type = "magic"
    with pytest.raises(ValueError, match="prediction_type must be one of"):
        Scheduler.like(theirs, sd.DDIM())


def test_later_begin():
    ours = scheduler(sd.DDIM())
    state = ours.set_begin_index(ours.set_timesteps(ours.create_state(), 5), 2)
    found = ours.step(state, velocity(X, 2), 0, X).prev_sample
    alone = run(DATA, GRID[2:4], sd.DDIM(), X * (1 + GRID[2])).x / (1 + GRID[3])
    assert_allclose(found, alone, rtol=1e-9)
