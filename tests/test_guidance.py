"""Variants of guidance: those of diffusers, their invariances, and calls that are saved."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import peers_reference as peers
import pytest
from closed_forms import mixture, normal, reference, run, unoptimised  # noqa: F401
from numpy.testing import assert_allclose, assert_array_equal

import steindiff_jax as sd

D_C, D_U = map(jnp.asarray, peers.predictions())
S = jnp.asarray(0.8)
X = D_C + 0.8 * normal(3, 4, 4, 2, seed=1)
DIFFERENCES = [sd.APG(0.25, 3.0), sd.MAMBOG(2.0), sd.CFGZeroStar()]


def constant(value):
    """A denoiser that returns the same whatever it is asked."""
    return lambda x, sigma: value  # noqa: ARG005


def combined(scale=peers.SCALE, d_c=D_C, d_u=D_U, x=X, sigma=S, **options):
    return sd.guided(constant(d_c), constant(d_u), scale, **options)(x, sigma)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain", {}),
        ("rescale", {"rescale": 0.7}),
        ("APG", {"difference": sd.APG(0.25, 3.0)}),
        ("MAMBO-G", {"difference": sd.MAMBOG(2.0)}),
        ("CFG-Zero*", {"difference": sd.CFGZeroStar(), "rescale": 0.3}),
    ],
)
def test_guiders_of_diffusers(name, options):
    """The arrays that its guiders returned for the same two predictions."""
    expected = reference("peers")[f"guider {name}"].reshape(D_C.shape)
    assert_allclose(combined(**options), expected, rtol=0, atol=1e-7)  # it rounds to float32 once


def quantity(prediction, x0, sigma=0.8, x=X):
    """What a network predicts, from x0."""
    noise = (x - x0) / sigma
    return {
        "x0": x0,
        "epsilon": noise,
        "v": (noise - sigma * x0) / np.hypot(1, sigma),
        "flow": noise - x0,
    }[prediction]


@pytest.mark.parametrize("prediction", ["x0", "epsilon", "v", "flow"])
@pytest.mark.parametrize("options", [{"rescale": 0.7}, {"difference": sd.CFGZeroStar()}], ids=str)
def test_a_variant_of_another_prediction(prediction, options):
    """Combining what the network predicts, and then taking x0 of it."""
    f_c, f_u = quantity(prediction, D_C), quantity(prediction, D_U)
    expected = combined(d_c=f_c, d_u=f_u, **options)
    found = quantity(prediction, combined(**options, prediction=prediction))
    assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def flat(a):
    return np.asarray(a).reshape(len(a), -1)


def test_apg_is_orthogonal_and_short():
    d = flat(sd.APG(norm=2.0)(D_C, D_U))
    assert_allclose((d * flat(D_C)).sum(1), 0, atol=1e-12)
    assert (np.linalg.norm(d, axis=1) <= 2).all()
    assert_allclose(sd.APG(eta=1.0)(D_C, D_U), D_C - D_U, rtol=1e-12)


def test_zero_star_is_the_nearest_multiple():
    """Orthogonal to D_u, and blind to its length."""
    d = sd.CFGZeroStar()(D_C, D_U)
    assert_allclose((flat(d) * flat(D_U)).sum(1), 0, atol=1e-12)
    assert_allclose(sd.CFGZeroStar()(D_C, -3 * D_U), d, rtol=1e-9)


def test_mambo_g_fades_where_the_difference_is_large():
    weights = flat(sd.MAMBOG(8.0)(D_C, D_U))[:, 0] / flat(D_C - D_U)[:, 0]
    sizes = np.linalg.norm(flat(D_C - D_U), axis=1) / np.linalg.norm(flat(D_U), axis=1)
    assert_allclose(weights, np.exp(-8 * sizes), rtol=1e-9)
    assert_allclose(sd.MAMBOG(0.0)(D_C, D_U), D_C - D_U, rtol=1e-12)


def test_rescaled_guidance_has_the_deviation_of_the_conditional():
    found = combined(9.0, rescale=1.0)
    assert_allclose(flat(found).std(1), flat(D_C).std(1), rtol=1e-9)


@pytest.mark.parametrize("difference", [None, *DIFFERENCES], ids=str)
def test_scale_one_is_the_conditional(difference):
    found = combined(1.0, difference=difference, rescale=0.7, prediction="flow")
    assert_allclose(found, D_C, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("difference", [None, *DIFFERENCES], ids=str)
def test_samples_are_by_themselves(difference):
    """A scale for each, rows of a batch, and thresholds around."""
    options = {"difference": difference, "rescale": 0.7}
    scales = jnp.array([1.5, 3.0, 6.0])
    found = combined(scales, **options)
    for i, scale in enumerate(scales):
        one = slice(i, i + 1)
        alone = combined(float(scale), D_C[one], D_U[one], X[one], **options)
        assert_allclose(found[one], alone, rtol=1e-9)
    clipped = sd.StaticThreshold(sd.guided(constant(D_C), constant(D_U), scales, **options))
    assert_allclose(clipped(X, S), jnp.clip(found, -1, 1), rtol=1e-12)


def test_bands_of_a_variant():
    """One scale for all bands is a number."""
    basis = sd.Cosine(bands=2, colour=False)
    bands = len(basis.partition(D_C.shape[1:]).sizes)
    options = {"difference": sd.APG(), "rescale": 0.5}
    found = combined(jnp.full(bands, 4.0), basis=basis, **options)
    assert_allclose(found, combined(4.0, **options), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("difference", [None, *DIFFERENCES], ids=str)
@pytest.mark.parametrize("d_u", [D_C, 0 * D_C, D_U], ids=["same", "zero", "other"])
def test_derivatives_are_finite(difference, d_u):
    def total(d_c, d_u, scale):
        return combined(scale, d_c, d_u, difference=difference, rescale=0.7).sum()

    with jax.debug_nans(True):
        value, slopes = jax.value_and_grad(total, (0, 1, 2))(D_C, d_u, 3.0)
    assert np.isfinite(value)
    assert all(np.isfinite(slope).all() for slope in slopes)


def test_numbers_do_not_trace_again():
    """Scales, ends of an interval and options are data."""
    traces = []

    def conditional(x, sigma):
        traces.append(None)
        return 0.5 * x / (1 + sigma)

    def other(x, sigma):
        return 0 * x + sigma

    def draw(*numbers):
        scale, eta, share = sd.GuidanceInterval(*numbers[:3]), *numbers[3:]
        denoiser = sd.guided(conditional, other, scale, difference=sd.APG(eta), rescale=share)
        return run(denoiser, np.array([3.0, 1.0, 0.0]), sd.DDIM(), normal(4, 3)).x

    first = draw(3.0, 0.1, 5.0, 0.0, 0.7)
    count = len(traces)
    assert np.abs(draw(4, 2.0, 8.0, 0.5, 0.1) - first).max() > 1e-6
    assert len(traces) == count


@pytest.mark.parametrize("one_network", [False, True])
def test_outside_the_interval_the_unconditional_is_not_called(one_network):
    rows = []

    def apply(parameters, x, t, label):
        jax.debug.callback(lambda: rows.append(len(x)))
        return parameters * x / (1 + t[:, None]) + label[:, None]

    def network(label):
        parameters = 0.5 if one_network else 0.5 + label
        return sd.Network(apply, parameters, sd.EDM(), "x0", cond={"label": jnp.full(4, label)})

    grid = np.array([4.0, 2.0, 1.0, 0.5, 0.0])
    scale = sd.GuidanceInterval(3.0, 0.5, 2.0)
    denoiser = sd.guided(network(1.0), network(0.0), scale)
    found = run(denoiser, grid, sd.DDIM(), normal(4, 2, scale=4.0)).x
    jax.effects_barrier()
    guided, alone = ([8], [4]) if one_network else ([4, 4], [4])
    assert rows == [*alone, *guided, *guided, *alone]

    def number(x, sigma):
        return sd.guided(network(1.0), network(0.0), scale(sigma))(x, sigma)

    assert_allclose(run(number, grid, sd.DDIM(), normal(4, 2, scale=4.0)).x, found, rtol=1e-12)


def test_rows_of_an_interval():
    interval = sd.GuidanceInterval(jnp.array([2.0, 3.0, 4.0]), 0.1, 1.0)
    denoiser = sd.guided(lambda x, s: x / (1 + s), lambda x, s: 0 * x + s, interval)
    fewer = denoiser.rows(lambda a: a[1:])
    x = normal(3, 2)
    assert_allclose(fewer(x[1:], S), denoiser(x, S)[1:], rtol=1e-12)
    assert_array_equal(interval(jnp.asarray(2.0)), 1.0)


def test_cfg_pp():
    """A step is x' = D + sigma' (x - D_u) / sigma, D = D_u + strength (D_c - D_u), 2406.08070."""
    conditional, unconditional = mixture(3, 2), mixture(5, 2, seed=1)
    grid, x = np.array([4.0, 1.5, 0.6, 0.1, 0.0]), np.asarray(normal(6, 2, scale=4.0))
    denoiser = sd.guided(conditional, unconditional, sd.CFGpp(0.6, grid))
    found = run(denoiser, grid, sd.DDIM(), x).x
    for sigma, sigma_next in pairwise(grid):
        d_c, d_u = (np.asarray(d(x, sigma)) for d in (conditional, unconditional))
        x = d_u + 0.6 * (d_c - d_u) + sigma_next / sigma * (x - d_u)
    assert_allclose(found, x, rtol=1e-10)


def test_autoguidance():
    """The worse network of the same data in the unconditional's place; arXiv:2406.02507."""
    good, worse = mixture(), mixture(std=0.8)
    x = normal(6, 2)
    found = sd.guided(good, worse, 2.0)(x, S)
    assert_allclose(found, 2 * good(x, S) - worse(x, S), rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rescale": 1.5}, "rescale must be in"),
        ({"prediction": "score"}, "prediction must be one of"),
        ({"scale": np.nan}, "scale must be in"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        combined(**options)
    for wrong in (lambda: sd.APG(norm=0.0), lambda: sd.CFGpp(0.5, np.array([1.0, 2.0]))):
        with pytest.raises(ValueError, match=r"norm|sigmas"):
            wrong()
