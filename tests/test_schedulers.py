"""Configurations of diffusers' schedulers: the grids, times and predictions that they compute."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import peers_reference as peers
import pytest
from closed_forms import reference
from numpy.testing import assert_allclose

import steindiff_jax as sd
from steindiff_jax.interop.schedulers import FILE, load_scheduler


def write(folder, config):
    (folder / FILE).write_text(json.dumps(config))
    return folder


def saved(name):
    """The configuration as diffusers wrote it."""
    return json.loads(str(reference("peers")[f"scheduler {name}/config"]))


def arguments(name):
    given = dict(peers.SCHEDULERS[name][3])
    return {"times" if key == "sigmas" else key: value for key, value in given.items()}


@pytest.mark.parametrize("name", peers.SCHEDULERS)
def test_grid_and_times_of_diffusers(name, tmp_path):
    """Its sigmas in float32, and the times that it tells the network, but for its rounding."""
    steps, arrays = peers.SCHEDULERS[name][2], reference("peers")
    sigmas, times = (arrays[f"scheduler {name}/{kind}"] for kind in ("sigmas", "times"))
    loaded = load_scheduler(write(tmp_path, saved(name)))
    found = np.asarray(loaded.grid(steps, **arguments(name)))
    if loaded.prediction == "flow":
        start = np.minimum(sigmas, 1 - 1e-6)
        assert_allclose(found / (1 + found), start, rtol=3e-6, atol=1e-7)
    else:
        assert_allclose(found, sigmas, rtol=2e-5)
    if loaded.prediction != "edm":  # which is told log(sigma) / 4 by itself
        told = loaded.time_scale * loaded.schedule.at(jnp.asarray(found[: len(times)]))[0]
        # Integers are rounded or cut; between them we interpolate log sigma, and they sigma.
        whole = (times == times.round()).all()
        assert_allclose(told, times, rtol=2e-4, atol=1.001 if whole else 0.3)


@pytest.mark.parametrize(
    ("name", "prediction", "schedule", "time_scale"),
    [
        ("ddim", "epsilon", sd.Discrete, 1.0),
        ("unipc flow", "flow", sd.RectifiedFlow, 1000.0),
        ("flow", "flow", sd.RectifiedFlow, 1000.0),
        ("edm", "edm", sd.EDM, 1.0),
    ],
)
def test_network(name, prediction, schedule, time_scale, tmp_path):
    loaded = load_scheduler(write(tmp_path, saved(name)))
    assert loaded.prediction == prediction
    assert isinstance(loaded.schedule, schedule)
    assert loaded.time_scale == time_scale
    assert set(loaded.network) == {"schedule", "prediction", "time_scale", "sigma_data"}


@pytest.mark.parametrize(
    "name", {value[0]: name for name, value in peers.SCHEDULERS.items()}.values()
)
def test_every_key_is_known_or_refused(name, tmp_path):
    """As saved each is read, and no key more."""
    config = saved(name)
    load_scheduler(write(tmp_path, config))
    with pytest.raises(ValueError, match="key 'use_magic' = True is not supported"):
        load_scheduler(write(tmp_path, config | {"use_magic": True}))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("dpm", {"use_beta_sigmas": True}, "key 'use_beta_sigmas'"),
        ("dpm", {"use_flow_sigmas": True}, "'use_flow_sigmas' and prediction_type"),
        ("dpm", {"prediction_type": "flow_prediction"}, "'use_flow_sigmas' and prediction_type"),
        ("dpm", {"beta_schedule": "sigmoid"}, "key 'beta_schedule'"),
        ("dpm", {"beta_end": 2.0}, "betas must lie between 0 and 1"),
        ("dpm flow", {"use_karras_sigmas": True}, "beside other sigmas"),
        ("dpm flow", {"final_sigmas_type": "sigma_min"}, "final_sigmas_type"),
        ("euler", {"timestep_type": "continuous"}, "key 'timestep_type'"),
        ("euler", {"interpolation_type": "log_linear"}, "key 'interpolation_type'"),
        ("edm", {"prediction_type": "v_prediction"}, "key 'prediction_type'"),
        ("flow", {"invert_sigmas": True}, "key 'invert_sigmas'"),
        ("flow", {"_class_name": "LCMScheduler"}, "'_class_name' must be one of .* 'LCMScheduler'"),
        ("flow", {"_class_name": ["x"]}, "'_class_name' must be one of"),
        ("flow", {"shift": "3"}, "key 'shift' must be float, got '3'"),
    ],
)
def test_unsupported_says_which_key(name, change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_scheduler(write(tmp_path, saved(name) | change))


def test_dynamic_shift_by_tokens(tmp_path):
    """The log shift is linear in the length of the sequence, between ends that the file gives."""
    loaded = load_scheduler(write(tmp_path, saved("flow dynamic")))
    for tokens, mu in ((256, 0.5), (4096, 1.15), (2176, 0.825)):
        assert_allclose(loaded.grid(5, tokens=tokens), loaded.grid(5, mu=mu), rtol=1e-6)
    with pytest.raises(ValueError, match="needs mu or tokens"):
        loaded.grid(5)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("ddim", {"mu": 1.0}, "are for flows"),
        ("flow", {"mu": 1.0}, "no dynamic shift"),
        ("flow", {"times": [0.5]}, "times must be 4 numbers"),
        ("dpm flow dynamic", {"tokens": 256}, "needs mu"),
        ("edm", {"times": [0.5]}, "are for flows"),
    ],
)
def test_arguments_of_a_grid(name, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_scheduler(write(tmp_path, saved(name))).grid(4, **arguments)


@pytest.mark.parametrize("name", ["ddim", "flow", "edm"])
@pytest.mark.parametrize("steps", [0, -3])
def test_steps_of_a_grid(name, steps, tmp_path):
    with pytest.raises(ValueError, match="steps must be"):
        load_scheduler(write(tmp_path, saved(name))).grid(steps)


def test_places(tmp_path):
    (tmp_path / "scheduler").mkdir()
    file = write(tmp_path / "scheduler", saved("flow")) / FILE
    for path in (tmp_path, file.parent, file, str(file)):
        assert load_scheduler(path).prediction == "flow"
    with pytest.raises(ValueError, match=r"no scheduler_config\.json in"):
        load_scheduler(tmp_path / "nowhere")


def test_output_objects():
    """Networks of diffusers and MaxDiffusion return their array in a field."""

    def apply(parameters, x, t):
        del t
        return SimpleNamespace(sample=parameters * x)

    denoiser = sd.Network(apply, 0.5, sd.EDM(), "x0")
    assert_allclose(denoiser(jnp.ones((2, 3)), jnp.asarray(1.0)), 0.5)


@pytest.mark.parametrize("adapter", ["Network", "from_linen", "from_nnx"])
def test_time_scale(adapter):
    """The network is told 1000 t; it answers with the time."""
    linen, nnx = pytest.importorskip("flax.linen"), pytest.importorskip("flax.nnx")

    class Linen(linen.Module):
        def __call__(self, x, t):
            return x * 0 + t[:, None]

    class Nnx(nnx.Module):
        def __call__(self, x, t):
            return x * 0 + t[:, None]

    options = {"schedule": sd.RectifiedFlow(), "prediction": "x0", "time_scale": 1000.0}
    denoiser = {
        "Network": lambda: sd.Network(lambda p, x, t: p * x + t[:, None], 0.0, **options),
        "from_linen": lambda: sd.from_linen(Linen(), {}, **options),
        "from_nnx": lambda: sd.from_nnx(Nnx(), **options),
    }[adapter]()
    assert_allclose(denoiser(jnp.ones((2, 3)), jnp.asarray(3.0)), 750.0, rtol=1e-6)
