"""Predictions, Flax adapters, guidance and thresholds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import mixture, normal, run
from flax import linen as nn
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

import steindiff_jax as sd
from steindiff_jax.denoisers import rows

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


SCHEDULES = {
    "EDM": (sd.EDM(), lambda t: (np.ones_like(t), t)),
    "RectifiedFlow": (sd.RectifiedFlow(), lambda t: (1 - t, t)),
    "VPCosine": (sd.VPCosine(0.0), lambda t: (np.cos(np.pi / 2 * t), np.sin(np.pi / 2 * t))),
}
PREDICTIONS = ["x0", "epsilon", "v", "score", "edm", "flow"]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_predictions(name, prediction):
    schedule, formula = SCHEDULES[name]
    denoiser = sd.Network(network(prediction, formula), (), schedule, prediction, SIGMA_DATA)
    for s in (0.05, 0.7, 30.0):
        y = normal(5, 3, scale=s) + MEAN[None]
        assert_allclose(denoiser(y, jnp.asarray(s)), exact(np.asarray(y), s), atol=1e-10)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_a_network_of_another_shape_is_refused(prediction, channels):
    """One channel for three would broadcast; twice as many is a learned variance."""

    def apply(parameters, x, t):
        del parameters, t
        return jnp.ones((*x.shape[:-1], channels), x.dtype)

    denoiser = sd.Network(apply, (), sd.RectifiedFlow(), prediction)
    message = rf"the shape of its input, \(2, 4, 4, 3\), got \(2, 4, 4, {channels}\)"
    message += "; leave out its learned variance" if channels == 6 else "(?!;)"
    with pytest.raises(ValueError, match=message):
        denoiser(normal(2, 4, 4, 3), jnp.asarray(1.0))
    with pytest.raises(ValueError, match=message):
        sd.sample(jax.random.key(0), denoiser, (2, 4, 4, 3), sigmas=np.array([2.0, 0.0]))


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


def test_a_module_of_the_other_library_is_refused(linen, module):
    with pytest.raises(ValueError, match=r"flax.nnx module \(see also from_linen\), got Linen"):
        sd.from_nnx(linen[0], **FLOW)
    with pytest.raises(ValueError, match=r"flax.linen module \(see also from_nnx\), got Nnx"):
        sd.from_linen(module, {}, **FLOW)
    with pytest.raises(ValueError, match="got the class Linen: call it"):
        sd.from_linen(Linen, linen[1], **FLOW)


def test_cond_of_nested_pytrees_and_none():
    """Each leaf has a row per sample, which `rows` takes and guidance joins; None stays None."""

    def apply(parameters, x, t, text, label):
        assert label is None
        shift = text["tokens"].sum(axis=1) * text["mask"][0]
        return parameters * x + shift[:, None] + t[:, None]

    def network(text):
        cond = {"text": text, "label": None}
        return sd.Network(apply, 0.5, sd.EDM(), "x0", cond=cond)

    text = {"tokens": normal(6, 3), "mask": [jnp.arange(6.0), None]}
    null = jax.tree.map(jnp.zeros_like, text)
    one, other, s = network(text), network(null), jnp.asarray(0.8)
    expected = 0.5 * X + (text["tokens"].sum(1) * jnp.arange(6.0))[:, None] + 0.8
    assert_allclose(one(X, s), expected, rtol=1e-12)
    assert_allclose(rows(one, lambda a: a[1::2])(X[1::2], s), expected[1::2], rtol=1e-12)
    both = sd.guided(one, other, 3.0)
    assert_allclose(both(X, s), by_hand(one, other, 3.0, s), rtol=1e-12)
    taken = rows(both, lambda a: a[1::2])(X[1::2], s)
    assert_allclose(taken, both(X, s)[1::2], rtol=1e-12)
    text["mask"][0] = jnp.ones(5)
    with pytest.raises(ValueError, match=r"cond\['text'\]\['mask'\]\[0\].*leading axis 6"):
        network(text)(X, s)


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


def numbers(value):
    """One number in the forms that people pass."""
    return [
        value,
        int(value),
        np.float64(value),
        np.float32(value),
        np.int32(value),
        jnp.asarray(value),
        jnp.float64(value),
    ]


def test_guidance_scale_is_traced():
    """One program for every scale, alone and vmapped, and for every kind of number."""
    apply, grid = Guide(), sd.karras_sigmas(3)
    one, other = branches(apply)

    def draw(scale):
        denoiser = sd.guided(one, other, scale)
        return sd.sample(jax.random.key(0), denoiser, (6, 2), sigmas=grid, solver=sd.DDIM()).x

    first = draw(1.0)
    count = len(apply.rows)
    fifth = draw(5.0)
    assert np.abs(fifth - first).max() > 1e-3
    for scale in numbers(5.0):
        assert_allclose(draw(scale), fifth, rtol=1e-12)
    assert len(apply.rows) == count
    mapped = jax.vmap(draw)(jnp.array([1.0, 5.0]))
    assert_allclose(mapped, jnp.stack([first, fifth]), rtol=1e-9, atol=1e-12)


# Events whose number of channels is that of the samples, or not: (batch,) must not mean channels.
EVENTS = [(3, 3), (3, 2), (3, 4, 4, 3), (3, 4, 4, 2)]


def shrunk(factor):
    """A network whose conditioning shifts each channel by another amount."""

    def apply(parameters, x, t, shift):
        del t
        rows = shift.reshape(-1, *[1] * (x.ndim - 1))
        return parameters * x + rows * jnp.ones_like(x).cumsum(axis=-1)

    shift = jnp.full(3, factor)
    return sd.Network(apply, 0.5, sd.EDM(), "x0", cond={"shift": shift})


PAIRS = {
    "one network": lambda: (shrunk(1.0), shrunk(-0.5)),
    "two denoisers": lambda: ((lambda x, s: x / (1 + s)), (lambda x, s: x * 0 + s)),
}
W = jnp.array([0.5, 2.0, 5.0])


@pytest.mark.parametrize("shape", EVENTS, ids=str)
@pytest.mark.parametrize("pair", PAIRS)
def test_a_guidance_scale_for_each_sample(pair, shape):
    """Sample i of w (batch,) is sample i of the scale w_i; also as a function of sigma."""
    one, other = PAIRS[pair]()
    x, s = normal(*shape), jnp.asarray(0.8)
    alone = jnp.stack([sd.guided(one, other, float(w))(x, s)[i] for i, w in enumerate(W)])
    assert np.abs(alone[1:] - sd.guided(one, other, 0.5)(x, s)[1:]).max() > 0.1
    assert_allclose(sd.guided(one, other, W)(x, s), alone, rtol=1e-12)
    scaled = sd.guided(one, other, lambda sigma: W * sigma)
    assert_allclose(scaled(x, s), sd.guided(one, other, 0.8 * W)(x, s), rtol=1e-12)
    interval = sd.guided(one, other, lambda sigma: jnp.where(sigma < 1, 3.0, 1.0))
    for sigma, w in ((0.8, 3.0), (1.2, 1.0)):
        expected = sd.guided(one, other, w)(x, jnp.asarray(sigma))
        assert_allclose(interval(x, jnp.asarray(sigma)), expected, rtol=1e-12)


@pytest.mark.parametrize(
    "solver",
    [
        sd.DPMpp2M(),
        pytest.param(sd.Heun(), marks=pytest.mark.slow),
        sd.Stein(sd.IPNDM(3), statistics="sample"),
    ],
    ids=type,
)
@pytest.mark.parametrize("pair", PAIRS)
def test_a_guidance_scale_for_each_sample_through_solvers(pair, solver):
    """Samples that do not see each other: each is that of a run with its scale for all."""
    one, other = PAIRS[pair]()
    grid, x = np.array([3.0, 1.5, 0.5, 0.0]), normal(3, 3, scale=3.0)

    def draw(scale):
        return run(sd.guided(one, other, scale), grid, solver, x).x

    found = draw(W)
    for i, w in enumerate(W):
        assert_allclose(found[i], draw(float(w))[i], rtol=1e-10)


def test_a_guidance_scale_for_each_sample_in_the_default_solver():
    """Where gamma is of the batch: w of equal entries is the number, a callable the array."""
    one, other = PAIRS["one network"]()
    grid, x = np.array([3.0, 1.5, 0.5, 0.0]), normal(3, 4, 4, 3, scale=3.0)

    def draw(scale):
        return run(sd.guided(one, other, scale), grid, None, x).x

    assert_allclose(draw(jnp.full(3, 2.0)), draw(2.0), rtol=1e-10)
    assert_allclose(draw(lambda _: W), draw(W), rtol=1e-10)
    assert np.abs(draw(W) - draw(2.0))[jnp.array([0, 2])].min(axis=(1, 2, 3)).max() > 1e-6


def test_rows_of_a_guided_denoiser_keep_their_scales():
    s, x = jnp.asarray(0.8), normal(3, 2)

    def take(a):
        return a[1:]

    for pair in PAIRS.values():
        denoiser = sd.guided(*pair(), W)
        assert_allclose(rows(denoiser, take)(x[1:], s), denoiser(x, s)[1:], rtol=1e-12)
        for scale in (2.0, lambda _: 2.0):
            denoiser = sd.guided(*pair(), scale)
            assert_allclose(rows(denoiser, take)(x[1:], s), denoiser(x, s)[1:], rtol=1e-12)


def test_guidance_with_a_scale_for_each_band():
    """Equal scales are the plain one; one that differs guides its band alone."""
    one, other = PAIRS["one network"]()
    x, s, basis = normal(3, 8, 8, 3), jnp.asarray(0.8), sd.Cosine(2)
    bands = len(basis.partition((8, 8, 3)).sizes)
    assert bands == 4
    plain = sd.guided(one, other, 3.0)(x, s)
    denoiser = sd.guided(one, other, jnp.full(bands, 3.0), basis=basis)
    assert_allclose(denoiser(x, s), plain, rtol=1e-10, atol=1e-12)
    assert_allclose(rows(denoiser, lambda a: a[1:])(x[1:], s), plain[1:], rtol=1e-10, atol=1e-12)
    scales = jnp.array([3.0, 1.0, 0.0, 2.0])
    for scale in (scales, lambda _: scales):
        found = basis.transform(sd.guided(one, other, scale, basis=basis)(x, s))
        d_u, d_c = basis.transform(other(x, s)), basis.transform(one(x, s))
        expected = d_u + np.asarray(scales)[basis.labels((8, 8, 3))][None] * (d_c - d_u)
        assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [jnp.ones(2), jnp.ones((3, 1)), jnp.ones(4), jnp.ones((1, 3))])
@pytest.mark.parametrize("pair", PAIRS)
def test_a_guidance_scale_of_another_shape_is_refused(pair, scale):
    x, s, one_other = normal(3, 4, 4, 2), jnp.asarray(0.8), PAIRS[pair]()
    for given in (scale, lambda _: scale):
        with pytest.raises(ValueError, match=r"scale must have shape \(\) or \(3,\), got"):
            sd.guided(*one_other, given)(x, s)
        with pytest.raises(ValueError, match="a value for each of 2 bands"):
            sd.guided(*one_other, jnp.ones(3), basis=sd.Cosine(2, colour=False))(x, s)


# --- Thresholds ----------------------------------------------------------------------------------


def spread(x, sigma):
    """A denoiser whose samples have entries up to 2, 4, 6, ... in modulus."""
    del sigma
    scale = 2 * jnp.arange(1, x.shape[0] + 1, dtype=x.dtype)[:, None, None]
    return scale * jnp.tanh(x)


def test_static_threshold():
    x = normal(3, 4, 5)
    assert_array_equal(
        sd.StaticThreshold(spread, 1.5)(x, jnp.asarray(1.0)), np.clip(spread(x, 1.0), -1.5, 1.5)
    )


def test_dynamic_threshold():
    """Section 2.3 of arXiv:2205.11487, each sample by itself, over all axes of the event."""
    x = normal(3, 4, 5)
    found = sd.DynamicThreshold(spread, 0.8, 3.0)(x, jnp.asarray(1.0))
    x0 = np.asarray(spread(x, 1.0))
    for row, expected in zip(found, x0, strict=True):
        s = max(np.quantile(np.abs(expected), 0.8), 3.0)
        assert_allclose(row, np.clip(expected, -s, s) * 3.0 / s, rtol=1e-12)
    assert_array_equal(found[0], x0[0])  # all within the limit: left alone


@pytest.mark.parametrize("wrap", [sd.StaticThreshold, sd.DynamicThreshold])
def test_thresholds_are_denoisers(wrap):
    """Pytrees with the limit as a leaf, inside `sample`, and for some of the samples only."""

    class Labelled:
        def __init__(self, labels):
            self.labels = labels

        def __call__(self, x, sigma):
            del sigma
            return x + self.labels[:, None]

        def rows(self, take):
            return Labelled(take(self.labels))

    labels = jnp.array([0.5, -3.0, 8.0, 1.0])
    x, sigma = normal(4, 2), jnp.asarray(1.0)
    wrapped = wrap(Labelled(labels))
    some = rows(wrapped, lambda a: a[1::2])
    assert_array_equal(some(x[1::2], sigma), wrapped(x, sigma)[1::2])
    solution = run(wrap(mixture(), limit=0.1), sd.karras_sigmas(4), sd.DPMpp2M(), 80 * x)
    assert np.abs(solution.x).max() <= 0.1
    slope = jax.grad(lambda limit: wrap(mixture(), limit=limit)(x, sigma).sum())(0.1)
    assert np.isfinite(slope)
    assert slope != 0
