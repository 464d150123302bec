"""Schedules, predictions, Flax adapters and guidance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import normal
from flax import linen as nn
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

import steindiff_jax as sd
from steindiff_jax.denoisers import with_posterior

BETAS = np.linspace(1e-4, 0.02, 1000)
TABLE = np.cumprod(1 - BETAS)


def linear(t):
    alpha = np.exp(-(0.1 * t + 19.9 * t**2 / 2) / 2)
    return alpha, np.sqrt(1 - alpha**2)


def cosine(t):
    alpha = np.cos((t + 0.008) / 1.008 * np.pi / 2) / np.cos(0.008 / 1.008 * np.pi / 2)
    return alpha, np.sqrt(1 - alpha**2)


def discrete(t):
    ratio = np.exp(np.interp(t, np.arange(1000), np.log((1 - TABLE) / TABLE) / 2))
    return 1 / np.sqrt(1 + ratio**2), ratio / np.sqrt(1 + ratio**2)


# Each schedule, alpha(t) and sigma(t) as its paper writes them, and times within its domain.
SCHEDULES = {
    "EDM": (sd.EDM(), lambda t: (np.ones_like(t), t), np.geomspace(1e-3, 80, 9)),
    "VPLinear": (sd.VPLinear(), linear, np.linspace(0.02, 1, 9)),
    "VPCosine": (sd.VPCosine(), cosine, np.linspace(0.02, 0.99, 9)),
    "RectifiedFlow": (sd.RectifiedFlow(), lambda t: (1 - t, t), np.linspace(0.02, 0.99, 9)),
    "Discrete": (sd.Discrete(BETAS), discrete, np.array([0.0, 1, 1.5, 7, 99.25, 500, 998, 999])),
}


# --- Schedules -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_is_its_paper_s(name):
    schedule, formula, t = SCHEDULES[name]
    alpha, sigma = formula(t)
    assert_allclose(schedule.alpha(jnp.asarray(t)), alpha, rtol=1e-10)
    assert_allclose(schedule.sigma(jnp.asarray(t)), sigma, rtol=1e-10)
    ratio = jnp.asarray(sigma / alpha)
    assert_allclose(schedule.time(ratio), t, rtol=1e-9, atol=1e-12)
    for found, expected in zip(schedule.at(ratio), (t, alpha, sigma), strict=True):
        assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_discrete_table_and_clamping():
    schedule = sd.Discrete(BETAS)
    n = jnp.arange(1000.0)
    assert_allclose(schedule.alpha(n) ** 2, TABLE, rtol=1e-12)
    assert_allclose(schedule.sigma(n) ** 2, 1 - TABLE, rtol=1e-12)
    assert_array_equal(schedule.time(jnp.array([1e-9, 1e9])), [0, 999])


@pytest.mark.parametrize("name", SCHEDULES)
def test_float32_keeps_its_digits_at_the_extremes(name):
    schedule = SCHEDULES[name][0]
    ratio = np.geomspace(0.02, 150, 41) if name == "Discrete" else np.geomspace(1e-4, 1e4, 41)
    narrow = schedule.at(jnp.asarray(ratio, jnp.float32))
    wide = schedule.at(jnp.asarray(np.float64(np.float32(ratio))))
    for a, b in zip(narrow, wide, strict=True):
        assert a.dtype == jnp.float32
        assert_allclose(a, b, rtol=3e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_is_smooth_in_its_ratio(name):
    """Finite derivatives, equal to differences of the wide values."""
    schedule = SCHEDULES[name][0]
    for ratio in (0.1, 1.0, 60.0):
        slopes = jax.jacfwd(lambda r: jnp.stack(schedule.at(r)))(ratio)
        up, down = (jnp.stack(schedule.at(jnp.asarray(ratio * (1 + e)))) for e in (1e-6, -1e-6))
        assert_allclose(slopes, (up - down) / (2e-6 * ratio), rtol=1e-5, atol=1e-9)


# --- Predictions ---------------------------------------------------------------------------------

MEAN, VARIANCE, SIGMA_DATA = np.array([0.3, -1.0, 0.5]), np.array([1.0, 0.2, 0.05]), 0.7


def exact(y, s):
    """The denoiser of Gaussian data with a diagonal covariance."""
    return MEAN + VARIANCE / (VARIANCE + s**2) * (y - MEAN)


def network(prediction, formula):
    """What a perfectly trained network returns for x at time t, in numpy."""

    def apply(parameters, x, t):
        del parameters
        x, t = np.asarray(x), np.asarray(t)[:, None]
        if prediction == "edm":
            s = np.exp(4 * t)
            norm = np.sqrt(s**2 + SIGMA_DATA**2)
            y = x * norm
            skip = SIGMA_DATA**2 / norm**2
            return jnp.asarray((exact(y, s) - skip * y) / (s * SIGMA_DATA / norm))
        alpha, sigma = formula(t)
        x0 = exact(x / alpha, sigma / alpha)
        noise = (x - alpha * x0) / sigma
        return jnp.asarray(
            {
                "x0": x0,
                "epsilon": noise,
                "score": -noise / sigma,
                "v": alpha * noise - sigma * x0,
                "flow": noise - x0,
            }[prediction]
        )

    return apply


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("prediction", ["x0", "epsilon", "v", "score", "edm", "flow"])
def test_predictions(name, prediction):
    schedule, formula, _ = SCHEDULES[name]
    denoiser = sd.Network(network(prediction, formula), (), schedule, prediction, SIGMA_DATA)
    for s in (0.05, 0.7, 30.0):
        y = normal(5, 3, scale=s) + MEAN[None]
        assert_allclose(denoiser(y, jnp.asarray(s)), exact(np.asarray(y), s), atol=1e-10)


# --- Flax ----------------------------------------------------------------------------------------


class Linen(nn.Module):
    """A network with everything that can go wrong: labels, dropout, batch statistics."""

    @nn.compact
    def __call__(self, x, t, label=None, *, train=False):
        h = nn.Dense(8, param_dtype=x.dtype)(jnp.concatenate([x, t[:, None]], axis=1))
        h = nn.BatchNorm(use_running_average=not train, param_dtype=x.dtype)(h)
        h = nn.Dropout(0.5, deterministic=not train)(nn.silu(h))
        if label is not None:
            h = h + nn.Embed(4, 8, param_dtype=x.dtype)(label)
        return nn.Dense(x.shape[1], param_dtype=x.dtype)(h)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 8, param_dtype=jnp.float64, rngs=rngs)
        self.norm = nnx.BatchNorm(8, param_dtype=jnp.float64, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.embed = nnx.Embed(4, 8, param_dtype=jnp.float64, rngs=rngs)
        self.last = nnx.Linear(8, 2, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x, t, label=None, *, train=None):
        h = self.first(jnp.concatenate([x, t[:, None]], axis=1))
        h = self.norm(h, use_running_average=None if train is None else not train)
        h = self.drop(nnx.silu(h), deterministic=None if train is None else not train)
        return self.last(h if label is None else h + self.embed(label))


LABELS = jnp.array([0, 3, 1, 1, 2, 0])
FLOW = {"schedule": sd.RectifiedFlow(), "prediction": "flow"}
X = normal(6, 2, scale=2.0)


@pytest.fixture(scope="module")
def linen():
    module = Linen()
    variables = module.init(jax.random.key(0), X, jnp.ones(6), LABELS)
    # Running averages that are not the identity, or inference and training would look alike.
    return module, jax.tree.map(lambda leaf: leaf + 0.1, variables)


@pytest.fixture(scope="module")
def module():
    module = Nnx(nnx.Rngs(0))
    module.norm.mean = nnx.BatchStat(jnp.linspace(-1, 1, 8))
    module.norm.var = nnx.BatchStat(jnp.linspace(0.5, 2, 8))
    return module


def as_flow(f, x, s):
    """D from a velocity: x_t = x / (1 + s), t = s / (1 + s), D = x_t - t v."""
    return x / (1 + s) - s / (1 + s) * f


@pytest.mark.parametrize("label", [None, LABELS], ids=["without labels", "with labels"])
def test_linen(linen, label):
    cond = {} if label is None else {"label": label}
    denoiser = sd.from_linen(*linen, **FLOW, cond=cond)
    s = 1.5
    f = linen[0].apply(linen[1], X / (1 + s), jnp.full(6, s / (1 + s)), label)
    assert_allclose(denoiser(X, jnp.asarray(s)), as_flow(f, X, s), rtol=1e-12)


@pytest.mark.parametrize("label", [None, LABELS], ids=["without labels", "with labels"])
def test_nnx(module, label):
    """Weights of a module in training mode are read for inference, and the module is left alone."""
    cond = {} if label is None else {"label": label}
    denoiser = sd.from_nnx(module, **FLOW, cond=cond)
    before = jax.tree.leaves(nnx.state(module))
    s = 1.5
    found = denoiser(X, jnp.asarray(s))
    after = jax.tree.leaves(nnx.state(module))
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert not module.drop.deterministic
    f = module(X / (1 + s), jnp.full(6, s / (1 + s)), label, train=False)
    assert_allclose(found, as_flow(f, X, s), rtol=1e-12)


def test_linen_and_nnx_sample_alike_when_their_weights_are_equal():
    class One(nn.Module):
        @nn.compact
        def __call__(self, x, t):
            return nn.Dense(2, param_dtype=jnp.float64)(x) * t[:, None]

    class Other(nnx.Module):
        def __init__(self, kernel, bias):
            self.kernel, self.bias = nnx.Param(kernel), nnx.Param(bias)

        def __call__(self, x, t):
            return (x @ self.kernel[...] + self.bias[...][None]) * t[:, None]

    kernel, bias = normal(2, 2), normal(2)
    edm = {"schedule": sd.EDM(), "prediction": "edm"}
    variables = {"params": {"Dense_0": {"kernel": kernel, "bias": bias}}}
    denoisers = sd.from_linen(One(), variables, **edm), sd.from_nnx(Other(kernel, bias), **edm)
    grid = sd.karras_sigmas(4)
    ends = [sd.sample(jax.random.key(0), d, (3, 2), sigmas=grid).x for d in denoisers]
    assert_allclose(*ends, rtol=1e-12)


def test_training_mode_is_refused(linen, module):
    grid = sd.karras_sigmas(3)
    for denoiser in (
        sd.from_linen(*linen, **FLOW, train=True),
        sd.from_nnx(module, **FLOW, train=True),
    ):
        with pytest.raises(ValueError, match=r"runs in training mode.*train=False"):
            denoiser(X, jnp.asarray(1.0))
        with pytest.raises(ValueError, match=r"runs in training mode.*train=False"):
            sd.sample(jax.random.key(0), denoiser, (6, 2), sigmas=grid)
    assert np.isfinite(sd.from_linen(*linen, **FLOW, train=False)(X, jnp.asarray(1.0))).all()


def test_inference_does_not_couple_samples(linen, module):
    for denoiser in (sd.from_linen(*linen, **FLOW), sd.from_nnx(module, **FLOW)):
        whole = denoiser(X, jnp.asarray(1.0))
        assert_allclose(denoiser(X[:2], jnp.asarray(1.0)), whole[:2], rtol=1e-12)


@pytest.mark.parametrize("wrong", [np.zeros(5, int), np.zeros((1, 6)), np.zeros((), int)])
def test_cond_needs_a_row_per_sample(linen, wrong):
    denoiser = sd.from_linen(*linen, **FLOW, cond={"label": wrong})
    with pytest.raises(ValueError, match=r"cond\['label'\].*leading axis 6"):
        denoiser(X, jnp.asarray(1.0))


def test_adapters_rebuilt_do_not_trace_again(linen):
    """New weights, labels and numbers are data, even in an adapter made anew."""
    traces = []

    class Traced(nn.Module):
        @nn.compact
        def __call__(self, x, t, label):
            traces.append(None)
            return linen[0].apply(self.variables["other"], x, t, label)

    grid = sd.karras_sigmas(3)

    def draw(denoiser):
        return sd.sample(jax.random.key(0), denoiser, (6, 2), sigmas=grid, solver=sd.DDIM()).x

    def build(shift, label):
        variables = {"other": jax.tree.map(lambda leaf: leaf + shift, linen[1])}
        return sd.from_linen(Traced(), variables, **FLOW, cond={"label": label})

    first = draw(build(0.0, LABELS))
    count = len(traces)
    assert count > 0
    assert np.abs(draw(build(0.1, LABELS)) - first).max() > 1e-6
    assert np.abs(draw(build(0.0, LABELS[::-1])) - first).max() > 1e-6
    assert_array_equal(draw(build(0.0, LABELS)), first)
    assert len(traces) == count


# --- Guidance ------------------------------------------------------------------------------------

CENTRES = jnp.array([[0.0, 0.0], [1.0, 0.5], [-1.0, 2.0], [0.4, -2.0]])
NULL = jnp.zeros(6, int)


class Guide:
    """A labelled network that counts its calls and the rows it saw."""

    def __init__(self):
        self.rows = []

    def __call__(self, centres, x, t, label):
        self.rows.append(x.shape[0])
        m = jnp.asarray(centres)[label]
        return m + (x - m) / (1 + t[:, None] ** 2)


def branches(apply, **changes):
    common = {"apply": apply, "parameters": CENTRES, "schedule": sd.EDM(), "prediction": "x0"}
    one = sd.Network(**common, cond={"label": LABELS})
    other = sd.Network(**{**common, "cond": {"label": NULL}, **changes})
    return one, other


def by_hand(one, other, scale, s):
    d_c, d_u = one(X, s), other(X, s)
    return d_u + scale * (d_c - d_u)


def test_guidance_of_one_network_is_one_call():
    apply, s = Guide(), jnp.asarray(0.8)
    one, other = branches(apply)
    expected = by_hand(one, other, 3.0, s)
    apply.rows.clear()
    assert_allclose(sd.guided(one, other, 3.0)(X, s), expected, rtol=1e-12)
    assert apply.rows == [12]


@pytest.mark.parametrize(
    "changes",
    [
        {"parameters": CENTRES + 0.1},
        {"schedule": sd.VPLinear()},
        {"prediction": "epsilon"},
        {"cond": {"label": NULL[:, None]}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_guidance_of_two_networks_is_two_calls(changes):
    def squeeze(centres, x, t, label):
        rows.append(x.shape[0])
        return Guide()(centres, x, t, jnp.asarray(label).reshape(-1))

    rows, s = [], jnp.asarray(0.8)
    one, other = branches(squeeze, **changes)
    expected = by_hand(one, other, 3.0, s)
    rows.clear()
    assert_allclose(sd.guided(one, other, 3.0)(X, s), expected, rtol=1e-12)
    assert rows == [6, 6]


def test_guidance_of_any_two_denoisers():
    one, other = (lambda x, s: x / (1 + s)), (lambda x, s: x * 0 + s)
    expected = by_hand(one, other, 0.5, jnp.asarray(0.8))
    assert_allclose(sd.guided(one, other, 0.5)(X, jnp.asarray(0.8)), expected, rtol=1e-12)


def test_guidance_scales_at_its_landmarks():
    one, other = branches(Guide())
    s = jnp.asarray(0.8)
    assert_allclose(sd.guided(one, other, 1.0)(X, s), one(X, s), rtol=1e-12)
    assert_allclose(sd.guided(one, other, 0.0)(X, s), other(X, s), rtol=1e-12)


def test_posterior_mean_that_guidance_is_made_of():
    """The conditional branch, through thresholds too; any other denoiser is its own."""
    one, other, s = (lambda x, _: x / 2), (lambda x, _: -x), jnp.asarray(0.8)
    inside, outside = sd.guided(one, other, 3.0), sd.guided(sd.guided(one, other, 2.0), one, 5.0)
    for denoiser in (inside, outside, sd.StaticThreshold(inside), sd.DynamicThreshold(inside)):
        value, posterior = with_posterior(denoiser, X, s)
        assert_array_equal(value, denoiser(X, s))
        assert_array_equal(posterior, one(X, s))
    assert_array_equal(with_posterior(one, X, s), [X / 2, X / 2])
    assert_allclose(inside(X, s), 3.5 * X, rtol=1e-12)
    one, other = branches(Guide())
    assert_allclose(with_posterior(sd.guided(one, other, 3.0), X, s)[1], one(X, s), rtol=1e-12)


def test_guidance_scale_is_traced():
    """One program for every scale, alone and vmapped."""
    apply, grid = Guide(), sd.karras_sigmas(3)
    one, other = branches(apply)

    def draw(scale):
        denoiser = sd.guided(one, other, scale)
        return sd.sample(jax.random.key(0), denoiser, (6, 2), sigmas=grid).x

    first = draw(1.0)
    count = len(apply.rows)
    assert np.abs(draw(5.0) - first).max() > 1e-3
    assert len(apply.rows) == count
    mapped = jax.vmap(draw)(jnp.array([1.0, 5.0]))
    assert_allclose(mapped, jnp.stack([first, draw(5.0)]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fraction", [0.5, 0.3])
def test_probes_of_a_part_of_the_batch_keep_each_sample_s_label(fraction):
    """The network then runs on two parts of the batch, with two parts of the conditioning."""
    one, other = branches(Guide())
    keys, s = jax.random.split(jax.random.key(0), 6), jnp.asarray(0.8)
    for denoiser in (one, sd.guided(one, other, 3.0), sd.guided(one, lambda x, _: x, 3.0)):
        x0, _ = sd.Hutchinson(fraction=fraction)(keys, denoiser, X, s)
        assert_allclose(x0, denoiser(X, s), rtol=1e-12)
