"""Networks of EDM, guided-diffusion and consistency models: the same outputs, from inert files."""

import json
import sys
from functools import cache, partial

import edm_reference as peer
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import snapshots
from diffusers_reference import draw
from numpy.testing import assert_allclose, assert_array_equal

import steindiff_jax as sd
from steindiff_jax.interop.edm import load_edm


@cache
def reference():
    with np.load(peer.FILE) as arrays:
        return dict(arrays)


NAMES = [name.removesuffix("/config") for name in reference() if name.endswith("/config")]


def configuration(name):
    return json.loads(str(reference()[f"{name}/config"]))


@cache
def weights(name):
    shapes = configuration(name)["shapes"]
    return {key: draw(key, tuple(shape)) for key, shape in shapes.items()}


def write(folder, name, arrays=None, **config):
    """A network's file as their code writes it."""
    arrays = weights(name) if arrays is None else arrays
    config = configuration(name) | config
    if "class" in config:
        file = folder / "network-snapshot.pkl"
        file.write_bytes(snapshots.snapshot(config, arrays))
    else:
        file = folder / "weights.pt"
        file.write_bytes(snapshots.zipped({k: snapshots.tensor(a) for k, a in arrays.items()}))
    return file


# Without XLA's optimisations: compiled sooner, and each network runs twice.
@partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def evaluate(denoiser, x, sigma):
    return denoiser(x, sigma)


@pytest.mark.parametrize("name", NAMES)
def test_denoiser_is_theirs(name, tmp_path):
    """What torch computed from the same weights, in float32, with their preconditioning."""
    config = configuration(name)
    loaded = load_edm(write(tmp_path, name), **config.get("flags", {}))
    knows = getattr(loaded.module, "label_dim", None) or getattr(
        loaded.module, "num_class_embeds", None
    )
    cond = {"class_labels": peer.LABELS} if knows else {}
    denoiser = sd.from_linen(**loaded._asdict(), cond=cond)
    for sigma, expected in zip(np.float32(config["sigmas"]), reference()[f"{name}/outputs"]):
        found = evaluate(denoiser, peer.inputs() * np.hypot(1, sigma), sigma)
        print(name, sigma, np.abs(found - expected).max())
        assert_allclose(found, expected, rtol=0, atol=1e-5)
