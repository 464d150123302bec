"""Whatever is passed: a finite result of the documented shape, or a ValueError that says why.

Each function of the table draws the arguments of one public name, as documented or, now and then,
not. Those as documented must give a result; others may be refused, with a ValueError alone. Numbers
are Python's, numpy's and JAX's. Left out is what overflows by rights, such as a guidance scale of
1e300: a result that no number can hold is infinite, and marked in `info.finite`.
"""

import math
from functools import cache, partial
from types import SimpleNamespace

import diffrax
import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from closed_forms import mixture
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import steindiff_jax as sd
from steindiff_jax import diagnostics
from steindiff_jax.interop import checkpoints, edm
from steindiff_jax.interop import diffrax as interop

KEY = jax.random.key(0)
NAN, INF = math.nan, math.inf
NO_NUMBER = (NAN, INF, -INF, 1j)
NOT_POSITIVE = (*NO_NUMBER, 0.0, -1.0, -1e-30)
EXTREME = (1e300, 1e-300, 5e-324)
SHAPES = [(3, 2), (1, 2), (3,), (0, 2), (2, 0)]
# Of what is not a shape, the last would be too large for any machine otherwise.
NO_SHAPE = [(-1, 2), (2.0, 2), 3, "ab", (None, 2), (), (2, -(2**40))]
NAMES = ["noise", "", "EPSILON", 3, None, 2.0, NAN]
GRID = np.array([3.0, 1.0, 0.2, 0.0])
GRIDS = [GRID, GRID.tolist(), tuple(GRID), np.float32(GRID), jnp.asarray(GRID, jnp.bfloat16)]
NO_GRID = [
    [],
    [1.0],
    [3, 2, 1],
    [1.0, 2.0],
    [1.0, NAN],
    [INF, 1.0],
    [0.0, 0.0],
    [1.0, -1.0],
    [[2.0, 1.0]],
    2.0,
    [2j, 1j],
    [True, False],
]
DENOISER = mixture()  # in two dimensions


def gaussian(x, sigma):
    """The denoiser of standard normal data, of any event."""
    return x / (1 + sigma**2)


@pytest.fixture(scope="module", autouse=True)
def _quick_and_as_a_user_sees_it():
    """Programs that run once are not worth optimising; errors come before the annotations'."""
    jax.config.update("jax_disable_most_optimizations", True)
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    jax.config.update("jax_disable_most_optimizations", False)


class Draw:
    """Draws arguments; `documented` as long as all of them are as the documentation asks."""

    def __init__(self, data):
        self.data, self.documented = data, True
        # One form a search, for each is a program of its own.
        self.kind = data.draw(st.sampled_from([float, np.float32, jnp.float64]))

    def __call__(self, good, bad=()):
        """One of `good`, now and then one of `bad`."""
        if bad and self.data.draw(st.integers(0, 5)) == 5:
            self.documented = False
            good = bad
        return self.data.draw(st.sampled_from(good))

    def number(self, low, high, bad):
        """A number from low to high, or one of `bad`, in a form that people pass."""
        if self.data.draw(st.integers(0, 5)) == 5:
            self.documented = False
            return self([lambda v: v, np.asarray, jnp.asarray])(self(bad))
        return self.kind(self.data.draw(st.floats(low, high)))

    def count(self, largest=6):
        """How many of something, from 1 on."""
        good = [kind(n) for n in range(1, largest + 1) for kind in (int, np.int64, np.uint8)]
        return self(good, [0, -3, 2.5, 2.0, NAN, None, "3", np.float32(2)])


# --- The table -----------------------------------------------------------------------------------

FUZZ = {}


def fuzz(name, examples):
    """Enters a function into the table, with how many examples of it are quick."""

    def enter(function):
        FUZZ[name] = function, examples
        return function

    return enter


def check_grid(sigmas, steps):
    assert sigmas.shape == (steps + 1,)
    assert sigmas[-1] == 0
    assert np.all(np.diff(sigmas) <= 0)
    assert np.all(sigmas[:-2] > sigmas[1:-1])
    return sigmas


def ends(draw, low=(1e-3, 1.0), high=(2.0, 100.0)):
    bad = NOT_POSITIVE + EXTREME
    return draw.number(*low, bad), draw.number(*high, (*bad, 1e-4))


@fuzz("karras_sigmas", 60)
def _(draw):
    steps, rho = draw.count(), draw.number(0.5, 20.0, NOT_POSITIVE + EXTREME)
    return check_grid(sd.karras_sigmas(steps, *ends(draw), rho), steps)


@fuzz("log_snr_sigmas", 40)
def _(draw):
    steps = draw.count()
    return check_grid(sd.log_snr_sigmas(steps, *ends(draw)), steps)


@fuzz("cosine_sigmas", 40)
def _(draw):
    steps = draw.count()
    return check_grid(sd.cosine_sigmas(steps, *ends(draw)), steps)


@fuzz("flow_sigmas", 40)
def _(draw):
    steps = draw.count()
    shift = draw.number(0.1, 10.0, NOT_POSITIVE + EXTREME)
    t_max = draw.number(0.1, 0.999, (*NOT_POSITIVE, *EXTREME, 1.0, 1 - 1e-17, 2.0))
    return check_grid(sd.flow_sigmas(steps, shift, t_max), steps)


@fuzz("time_sigmas", 60)
def _(draw):
    name, steps = draw(["EDM", "VPLinear", "VPCosine", "RectifiedFlow"]), draw.count()
    low = draw.number(1e-3, 0.2, (*NO_NUMBER, -1.0, 0.7))
    high = draw.number(0.3, 0.99, (*NOT_POSITIVE, 1.0, 1.5, 1e30))
    power = draw.number(0.5, 3.0, NOT_POSITIVE)
    return check_grid(sd.time_sigmas(steps, schedule(name, draw), low, high, power), steps)


@fuzz("ddpm_sigmas", 40)
def _(draw):
    total = draw([1, 2, 7])
    betas = sd.Discrete(np.linspace(0.01, 0.1, total))
    steps = draw([1, np.int8(total)], [0, -1, 1.5, NAN, None, total + 1, 10**30])
    spacing = draw(["leading", "linspace", "trailing"], NAMES)
    return check_grid(sd.ddpm_sigmas(steps, betas, spacing), steps)


def schedule(name, draw):
    """A schedule of that name, with its options."""
    if name == "VPLinear":
        bad = (*NOT_POSITIVE, 1e-30)
        return sd.VPLinear(draw.number(0.01, 1.0, bad), draw.number(1.0, 30.0, bad))
    if name == "VPCosine":
        return sd.VPCosine(draw([0.0, 0.008, 1e-30, np.float32(0.1)], (*NO_NUMBER, -1.0, -1e-30)))
    if name == "RectifiedFlow":
        return sd.RectifiedFlow(draw.number(0.1, 10.0, NOT_POSITIVE))
    if name == "Discrete":
        steps = draw.count(4)
        bad = (*NOT_POSITIVE, 1.0, 2.0)
        low, high = draw.number(1e-4, 0.01, bad), draw.number(0.02, 0.5, bad)
        kind = draw(["linear", "scaled_linear", "cosine", "betas", "rescaled"])
        if kind == "cosine":
            return sd.Discrete.cosine(steps, draw.number(0.5, 0.999, bad))
        if kind == "betas":
            good = [np.linspace(1e-4, 0.5, 5), jnp.full(1, 0.5, jnp.float32), np.full(2, 1e-30)]
            return sd.Discrete(draw(good, [0.5, [[0.5]], np.zeros(0), np.zeros(3), np.arange(4)]))
        if kind == "rescaled":
            draw.documented &= steps in (3, 4)
            return sd.Discrete.linear(steps, low, high).zero_terminal_snr()
        return getattr(sd.Discrete, kind)(steps, low, high)
    return getattr(sd, name)()


def of_a_schedule(name, draw):
    """Times from one end to the other, ratios from 0 to what float32 holds."""
    made = schedule(name, draw)
    last = {"EDM": 80.0, "RectifiedFlow": 0.999, "VPCosine": 0.999, "Discrete": 3.0}.get(name, 1.0)
    kind = draw([float, np.float32, np.float64, jnp.float32, lambda v: np.full(3, v)])
    t = kind(draw([0.0, 1e-30, 1e-3 * last, 0.5 * last, last]))
    ratio = kind(draw([0.0, 1e-38, 1e-30, 1e-19, 1e-3, 1.0, 80.0, 1e4, 1e30]))
    parts = made.alpha(t), made.sigma(t), made.time(ratio), *made.at(ratio)
    for part in parts:
        assert jnp.shape(part) == jnp.shape(t)
        assert jnp.issubdtype(jnp.result_type(part), jnp.floating)
        assert np.all(np.asarray(part) >= 0)
    return parts


for name in ("EDM", "VPLinear", "VPCosine", "RectifiedFlow", "Discrete"):
    fuzz(name, 5 if name == "EDM" else 50)(partial(of_a_schedule, name))


# Denoisers


def apply(weight, x, t, label=None):
    del label
    return weight * x + t.reshape(t.shape + (1,) * (x.ndim - 1)) / (1 + t.max(initial=0.0))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, t, label=None):
        return apply(self.param("weight", nn.initializers.ones, ()).astype(x.dtype), x, t, label)


class Nnx(nnx.Module):
    def __init__(self):
        self.weight = nnx.Param(jnp.ones(()))

    def __call__(self, x, t, label=None):
        return apply(self.weight[...].astype(x.dtype), x, t, label)


DTYPES = [np.float64, *3 * [np.float32], np.float64]


def samples(draw):
    return jnp.ones(*draw([*zip(SHAPES, DTYPES, strict=True)]))


def labels(draw, x):
    n = x.shape[0]
    return draw([None, {"label": np.zeros(n, int)}], [{"label": np.zeros(n + 1)}, {"label": 1.0}])


def evaluated(denoiser, x, sigma):
    x0 = denoiser(x, jnp.asarray(sigma, x.dtype))
    assert x0.shape == x.shape
    assert jnp.issubdtype(x0.dtype, jnp.floating)
    return x0


def network(make, draw, x):
    return make(
        schedule=schedule(draw(["EDM", "VPLinear", "VPCosine", "RectifiedFlow"]), draw),
        prediction=draw(["x0", "epsilon", "score", "v", "flow", "edm"], NAMES),
        sigma_data=draw.number(0.1, 2.0, NOT_POSITIVE),
        cond=labels(draw, x),
    )


def by_hand(cond, **options):
    return sd.Network(apply, jnp.ones(()), cond=cond or {}, **options)


ADAPTERS = {
    "Network": by_hand,
    "from_linen": partial(sd.from_linen, Linen(), {"params": {"weight": jnp.ones(())}}),
    "from_nnx": partial(sd.from_nnx, Nnx()),
}


def of_an_adapter(name, draw):
    x = samples(draw)
    made = network(ADAPTERS[name], draw, x)
    return evaluated(made, x, draw([1e-3, 0.5, 80.0]))


for name in ADAPTERS:
    fuzz(name, 30)(partial(of_an_adapter, name))


@fuzz("guided", 30)
def _(draw):
    x, scale = samples(draw), draw.number(-3.0, 10.0, NO_NUMBER)
    a, b = gaussian, DENOISER if x.shape[1:] == (2,) else gaussian
    if draw([True, False]):  # one network, both branches at once
        n = x.shape[0]
        a, b = (
            by_hand({"label": np.full(n, i)}, schedule=sd.EDM(), prediction="x0") for i in range(2)
        )
    rescale = draw.number(0.0, 1.0, (*NO_NUMBER, -0.1, 1.1))
    prediction = draw(["x0", "flow"], ["score", *NAMES])
    return evaluated(sd.guided(a, b, scale, rescale=rescale, prediction=prediction), x, 0.5)


def of_a_guidance(make, draw):
    """A scale or a difference, in a guided denoiser."""
    made, x = make(draw), samples(draw)
    a, b = gaussian, DENOISER if x.shape[1:] == (2,) else gaussian
    if isinstance(made, sd.APG | sd.MAMBOG | sd.CFGZeroStar):
        return evaluated(sd.guided(a, b, 3.0, difference=made), x, 0.5)
    return evaluated(sd.guided(a, b, made), x, 0.5)


GUIDANCE = {
    "APG": lambda draw: sd.APG(
        draw.number(-1.0, 1.0, NO_NUMBER), draw.number(0.1, 9.0, (NAN, 0.0, -1.0, 1j))
    ),
    "MAMBOG": lambda draw: sd.MAMBOG(draw.number(0.0, 9.0, UNSIGNED)),
    "CFGZeroStar": lambda draw: sd.CFGZeroStar(),  # noqa: ARG005
    "CFGpp": lambda draw: sd.CFGpp(draw.number(-1.0, 1.0, NO_NUMBER), draw(GRIDS, NO_GRID)),
    "GuidanceInterval": lambda draw: sd.GuidanceInterval(
        draw.number(-3.0, 10.0, NO_NUMBER),
        draw.number(0.0, 1.0, (NAN, -1.0, 1j)),
        draw.number(0.4, 9.0, (NAN, -1.0, 1j)),
    ),
}
for name, make in GUIDANCE.items():
    fuzz(name, 12)(partial(of_a_guidance, make))


@fuzz("StaticThreshold", 20)
def _(draw):
    limit = draw.number(0.1, 3.0, NOT_POSITIVE)
    return evaluated(sd.StaticThreshold(gaussian, limit), samples(draw), 0.5)


@fuzz("DynamicThreshold", 40)
def _(draw):
    quantile = draw.number(0.0, 1.0, (*NO_NUMBER, -0.1, 1.1))
    limit = draw.number(0.1, 3.0, NOT_POSITIVE)
    return evaluated(sd.DynamicThreshold(gaussian, quantile, limit), samples(draw), 0.5)


# Samplers


def sampled(solver, x=(3, 2), denoiser=DENOISER, sigmas=GRID, **options):
    solution = sd.sample(KEY, denoiser, x, sigmas=sigmas, solver=solver, **options)
    steps = len(sigmas) - 1
    assert solution.x.dtype in (jnp.float32, jnp.float64)
    assert solution.info.finite.shape == (steps, *solution.x.shape[:1])
    assert solution.info.gamma.shape[0] == steps
    return solution


@fuzz("sample", 18)
def _(draw):
    sigmas = draw(GRIDS, NO_GRID)
    solver = draw([None, sd.Heun()])
    if draw([True, False]):
        shape = draw([*SHAPES, np.array([3, 2]), [3, 2]], NO_SHAPE)
        solution = sampled(solver, shape, gaussian, sigmas)
        assert solution.x.shape == tuple(shape)
        return solution
    x = np.ones(draw(SHAPES, [()]))
    dtype = draw([jnp.bfloat16, np.float16, np.float32, np.float64], [int, bool, complex])
    form = draw([np.asarray, jnp.asarray])
    shape = draw([None, x.shape], [(7,), *NO_SHAPE])
    solution = sampled(solver, shape, gaussian, sigmas, x_init=form(x.astype(dtype)))
    assert solution.x.shape == x.shape
    assert solution.x.dtype == jnp.promote_types(dtype, jnp.float32)
    return solution


@fuzz("sample_many", 12)
def _(draw):
    n, batch_size = draw.count(3), draw.count(2)
    event = draw([(2,), (), [2]], NO_SHAPE)
    stream = sd.sample_many(
        KEY, gaussian, n, batch_size, event, sigmas=draw(GRIDS, NO_GRID), solver=sd.DDIM()
    )
    x = np.concatenate(list(stream))
    assert x.shape == (n, *event)
    return x


ORDERS = [0, -1, 7, 2.0, 1.5, NAN, None, "2", jnp.ones((), int)]
UNSIGNED = (*NO_NUMBER, -1.0, -1e-30)
PLACE = (*NOT_POSITIVE, 1.1)  # not in (0, 1]


def multistep(draw, **options):
    return options | {"lower_order_final": draw([False, True])}


SOLVERS = {
    "DDIM": lambda draw: sd.DDIM(),  # noqa: ARG005
    "Euler": lambda draw: sd.Euler(),  # noqa: ARG005
    "Heun": lambda draw: sd.Heun(prediction=draw(["epsilon", "flow"], ["x0", *NAMES])),
    "DPM2": lambda draw: sd.DPM2(
        draw.number(0.1, 1.0, PLACE), prediction=draw(["epsilon", "x0"], NAMES)
    ),
    "DPMpp2S": lambda draw: sd.DPMpp2S(
        draw.number(0.1, 1.0, PLACE), draw(["midpoint", "heun"], NAMES)
    ),
    "DPMpp3S": lambda draw: sd.DPMpp3S(
        draw.number(0.1, 0.4, (*PLACE, 1.0)),
        draw.number(0.5, 1.0, (*PLACE, 0.05)),
        draw(["midpoint", "heun"], NAMES),
    ),
    "DPMpp2M": lambda draw: sd.DPMpp2M(
        draw(["midpoint", "heun"], NAMES), **multistep(draw, prediction=draw(["x0"], NAMES))
    ),
    "DPMpp2MSDE": lambda draw: sd.DPMpp2MSDE(
        draw(["midpoint", "heun"]), draw.number(0.0, 3.0, UNSIGNED)
    ),
    "DPMpp3M": lambda draw: sd.DPMpp3M(
        draw.number(-2.0, 2.0, NO_NUMBER), **multistep(draw, kind=draw(["heun"], NAMES))
    ),
    "DEIS": lambda draw: sd.DEIS(
        draw([1, np.int64(4)], ORDERS), prediction=draw(["epsilon", "x0"], ["flow", *NAMES])
    ),
    "LMS": lambda draw: sd.LMS(draw([1, 4], ORDERS), draw([True, False])),
    "IPNDM": lambda draw: sd.IPNDM(
        draw([2, np.int32(3)], ORDERS), prediction=draw(["epsilon", "flow"], NAMES)
    ),
    "UniPC": lambda draw: sd.UniPC(
        draw([1, 3], ORDERS), draw(["bh1", "bh2"], NAMES), **multistep(draw)
    ),
    "AnalyticalFirst": lambda draw: sd.AnalyticalFirst(draw([sd.Heun(), sd.IPNDM(2)])),
    "DPMpp3MSDE": lambda draw: sd.DPMpp3MSDE(
        draw.number(-2.0, 2.0, NO_NUMBER), draw(["heun"], NAMES), draw.number(0.0, 3.0, UNSIGNED)
    ),
    "DPMppSDE": lambda draw: sd.DPMppSDE(
        draw.number(0.1, 1.0, PLACE), draw.number(0.0, 1.0, (*UNSIGNED, 1.1))
    ),
    "Ancestral": lambda draw: sd.Ancestral(
        draw([sd.DDIM(), sd.DPM2()], [sd.DPMpp2M()]),
        draw.number(0.0, 1.0, (*UNSIGNED, 1.1)),
        draw.number(0.0, 2.0, UNSIGNED),
    ),
    "Churn": lambda draw: sd.Churn(
        draw([sd.Heun(), sd.DDIM()], [sd.DPMpp2M()]),
        draw.number(0.0, 80.0, (NAN, -1.0, -INF, 1j)),
        draw.number(0.0, 1.0, (NAN, -1.0, 1j)),
        draw.number(1.0, 9.0, (NAN, -1.0, 1j)),
        draw.number(0.0, 2.0, UNSIGNED),
    ),
}
# Each choice is a program of its own, so that a few examples have to do.
for name, make in SOLVERS.items():
    fuzz(name, 6)(lambda draw, make=make: sampled(make(draw)))


# Corrections


def clip(draw):
    bad = (NAN, 1j)
    return {
        "gamma_min": draw.number(-1.0, 0.5, (*bad, INF, 9.0)),
        "gamma_max": draw.number(0.5, 8.0, (*bad, -INF, -9.0)),
    }


RULES = {
    "StepEnergy": lambda draw: sd.StepEnergy(**clip(draw)),
    "PosteriorLength": lambda draw: sd.PosteriorLength(
        draw.number(0.5, 8.0, (NAN, 1j, -INF, -9.0))
    ),
    "CleanTarget": lambda draw: sd.CleanTarget(
        **clip(draw), schedule=schedule(draw(["EDM", "VPCosine"]), draw)
    ),
}
ESTIMATORS = {
    "Tweedie": lambda draw: sd.Tweedie(),  # noqa: ARG005
    "Exact": lambda draw: sd.Exact(),  # noqa: ARG005
    "Hutchinson": lambda draw: sd.Hutchinson(
        draw([1, np.int64(2)], [0, -1, 1.5, NAN, None]),
        draw(["jvp", "vjp", "secant"], NAMES),
        draw.number(1e-3, 0.1, NOT_POSITIVE),
    ),
}


@fuzz("Stein", 8)
def _(draw):
    rule, estimator = RULES[draw([*RULES])](draw), ESTIMATORS[draw([*ESTIMATORS])](draw)
    solver = sd.Stein(
        draw([sd.DPMpp2M(), sd.DDIM()], [sd.Churn(), sd.Heun, 3, sd.Tweedie()]),
        rule,
        draw([sd.Tweedie(), estimator], ["exact", sd.Exact]),
        draw([None, sd.Whole()], [sd.Cosine, 3]),
        draw(["batch", "sample"], NAMES),
    )
    return sampled(solver)


BASES = {
    "Whole": lambda draw: sd.Whole(),  # noqa: ARG005
    "Cosine": lambda draw: sd.Cosine(draw.count(), draw([True, False])),
}


def of_a_basis(name, draw):
    """Orthonormal, with bands from 0 on without gaps."""
    basis, event = BASES[name](draw), draw([(2,), (1, 1), (4, 4, 3), (5, 2), (2, 3, 4, 1)])
    x = jnp.arange(2.0 * math.prod(event)).reshape(2, *event)
    back = basis.inverse(basis.transform(x))
    np.testing.assert_allclose(back, x, rtol=1e-9, atol=1e-9)
    partition = basis.partition(event)
    assert (partition.sizes > 0).all()
    assert partition.inner(x, x).shape == (2, len(partition.sizes))
    return back


for name in BASES:
    fuzz(name, 6)(partial(of_a_basis, name))


def of_a_rule(name, draw):
    return sampled(sd.Stein(sd.DPMpp2M(), RULES[name](draw), sd.Exact()))


def of_an_estimator(name, draw):
    """By itself, where the batch may be empty, and not in the least as large as the group."""
    x = samples(draw)
    keys = jax.random.split(KEY, x.shape[0])
    x0, jacobian = ESTIMATORS[name](draw)(keys, gaussian, x, jnp.asarray(0.5, x.dtype))
    assert x0.shape == x.shape
    if jacobian is not None:
        assert jacobian.v.shape == jacobian.jv.shape
        assert jacobian.v.shape[1:] == x.shape
    return x0, jacobian and jacobian[:2]


for name in RULES:
    fuzz(name, 10)(partial(of_a_rule, name))
for name in ESTIMATORS:
    fuzz(name, 12)(partial(of_an_estimator, name))


@fuzz("calibrate", 8)
def _(draw):
    table = sd.calibrate(
        KEY,
        gaussian,
        draw([(3, 2)], NO_SHAPE),
        draw(GRIDS, NO_GRID),
        sd.Stein(sd.DPMpp2M(), statistics=draw(["batch"], ["sample"])),
    )
    assert table.gamma.shape == (3,)
    return table


@fuzz("Calibrated", 5)
def _(draw):
    gamma = draw([np.ones(3), np.zeros(3, np.float32)], [np.ones(2), np.ones((3, 2))])
    gamma = sd.stein.rules.Lengths(jnp.asarray(gamma)[..., None], jnp.zeros((3, 1)))
    table = sd.Calibrated(sd.Stein(sd.DPMpp2M()), jnp.asarray(GRID), gamma)
    return sampled(table, sigmas=draw([GRID, np.pad(GRID, (0, 2))], [GRID[1:], 2 * GRID]))


# Diagnostics


@fuzz("spectral_norm", 8)
def _(draw):
    shape = draw([(3, 2), (1, 2), (3,)], [(0, 2), (2, 0), ()])
    x = jnp.ones(shape, draw([jnp.float32, jnp.float64], [int]))
    found = diagnostics.spectral_norm(KEY, lambda x: gaussian(x, 0.5), x, draw.count(2))
    assert found.value.shape == found.residual.shape == shape[:1]
    return found


def start(draw, good=((3, 2), (2,))):
    return jnp.ones(draw(good, [(0, 2), (2, 0), ()]), draw([jnp.float64], [int, complex]))


@fuzz("contractivity", 4)
def _(draw):
    x, sigmas = start(draw), draw(GRIDS[:3], NO_GRID)
    found = diagnostics.contractivity(KEY, gaussian, x, sigmas, sd.DPMpp2M(), draw.count(2))
    assert found.step.shape == (3, x.shape[0])
    return found, found.violations, found.expanding


@fuzz("stein_discrepancy", 8)
def _(draw):
    x = start(draw, [(2, 3, 2), (2, 3)])
    x += jnp.arange(math.prod(x.shape)).reshape(x.shape).astype(x.dtype)
    good = [[1.0, 2.0], np.array([1, 2]), np.array([0.5, 80.0], np.float32)]
    sigmas = draw(good, [[1.0, 0.0], [1.0, NAN], [1.0, INF], [-1.0, 1.0], [1.0], 1.0])
    estimator = draw([sd.Hutchinson(), sd.Exact()], [sd.Tweedie()])
    found = diagnostics.stein_discrepancy(KEY, gaussian, x, sigmas, estimator)
    assert found.ratio.shape == (2,)
    return found


@fuzz("perturbation", 8)
def _(draw):
    solver = sd.DDIM()
    state = sd.State(start(draw))
    sigma = draw.number(1.0, 2.0, NOT_POSITIVE)
    sigma_next = draw.number(0.0, 0.9, (*NO_NUMBER, -1.0, 3.0))
    estimator = draw([sd.Hutchinson(), sd.Exact()], [sd.Tweedie()])
    return diagnostics.perturbation(
        KEY, gaussian, state, sigma, sigma_next, solver, estimator=estimator
    )


@fuzz("error_decay", 12)
def _(draw):
    found = diagnostics.error_decay(
        KEY, gaussian, start(draw), draw(GRIDS[:3], NO_GRID), sd.DDIM(), **clip(draw)
    )
    assert found.gamma.shape == found.product.shape == (3,)
    return found


@cache
def recorded():
    return sampled(sd.DDIM(), record=diagnostics.keep)


@fuzz("keep", 4)
def _(draw):
    x = samples(draw)
    return diagnostics.keep(sd.State(x), sd.Step(x, x))


@fuzz("trajectory_report", 8)
def _(draw):
    good = recorded()
    empty = jax.tree.map(lambda a: a[:, :0], good.record)
    solution = draw([good], [good._replace(record=None), good._replace(record=empty)])
    denoiser, key = draw([None, DENOISER]), draw([KEY, None])
    draw.documented &= denoiser is None or key is not None
    sigmas = draw(GRIDS[:3], [GRID[1:], *NO_GRID])
    report = diagnostics.trajectory_report(solution, sigmas, denoiser, key=key)
    assert len(str(report).splitlines()) == 4
    inside = slice(0, 2 if denoiser else 0)  # NaN at sigma_next = 0, and where not asked for
    return report._replace(ratio=report.ratio[inside], implied=report.implied[inside])


# diffrax


@fuzz("times", 20)
def _(draw):
    return interop.times(draw([GRID[:-1], [2.0, 1.0]], [GRID, *NO_GRID]))


@fuzz("ProbabilityFlow", 4)
def _(draw):
    x = samples(draw)
    return interop.ProbabilityFlow(gaussian)(draw([0.0, -4.0, 6.0]), x, None)


@fuzz("probability_flow", 20)
def _(draw):
    term = interop.probability_flow(gaussian, draw([None, *GRIDS], NO_GRID))
    return term.vf(0.0, samples(draw), None)


@fuzz("to_data", 10)
def _(draw):
    x = samples(draw)
    saved = draw([1, 3], [None])
    ts, ys = (None, None) if saved is None else (jnp.arange(1.0 * saved), jnp.stack([x] * saved))
    found = interop.to_data(SimpleNamespace(ts=ts, ys=ys), gaussian)
    assert found.shape == x.shape
    return found


@fuzz("SigmaInterpolation", 4)
def _(draw):
    x = samples(draw)
    path = interop.SigmaInterpolation(t0=0.0, t1=1.0, y0=x, y1=2 * x, x0=3 * x)
    return path.evaluate(draw([0.0, 0.3, 1.0]))


METHODS = [diffrax.Euler(), diffrax.Heun()]
NO_METHOD = [diffrax.Kvaerno3(), diffrax.ReversibleHeun(), diffrax.Tsit5, 3, None]


@fuzz("FromDiffrax", 6)
def _(draw):
    return sampled(interop.FromDiffrax(draw(METHODS, NO_METHOD)))


def solved(solver, draw, sigmas=GRID):
    term = interop.probability_flow(DENOISER, draw([sigmas], [None]))
    ts = interop.times(sigmas[:-1])
    solution = diffrax.diffeqsolve(
        term, solver, ts[0], ts[-1], None, jnp.ones((3, 2)), stepsize_controller=diffrax.StepTo(ts)
    )
    return interop.to_data(solution, DENOISER)


@fuzz("as_diffrax", 5)
def _(draw):
    return solved(interop.as_diffrax(draw([sd.DDIM(), sd.IPNDM(2)], [sd.Churn()])), draw)


@fuzz("AsDiffrax", 4)
def _(draw):
    return solved(interop.AsDiffrax(draw([sd.DDIM()], [sd.DPMpp2MSDE()]), KEY), draw)


@fuzz("SteinCorrected", 5)
def _(draw):
    method, statistics = draw(METHODS, NO_METHOD), draw(["batch"], NAMES)
    return solved(interop.SteinCorrected(method, statistics=statistics), draw)


@fuzz("log_likelihood", 5)
def _(draw):
    found = interop.log_likelihood(
        draw([interop.probability_flow(gaussian)], [diffrax.ODETerm(gaussian)]),
        start(draw, [(3, 2)]),
        sigma_min=draw.number(0.1, 0.5, (*NOT_POSITIVE, 90.0)),
        sigma_max=draw.number(1.0, 5.0, NOT_POSITIVE),
        estimator=draw([sd.Exact()], [sd.Tweedie()]),
    )
    assert found.shape == (3,)
    return found


# --- The tests -----------------------------------------------------------------------------------

ELSEWHERE = {
    "pytree": "a decorator of classes: test_purity.py",
    "static": "a field of such a class",
    "number": "a field of such a class",
    "ddim": "a formula of arrays: test_solvers.py",
    "evaluate": "a call of the denoiser: test_solvers.py",
    "noise": "draws from keys: test_sample_many.py",
    "from_probes": "what `Exact` calls: test_errors.py",
    **dict.fromkeys(
        ("Solver", "StochasticSolver", "Wrapper", "Rule", "Estimator", "Basis"),
        "a class to derive one's own from: test_purity.py",
    ),
    "load_diffusers": "reads files: test_checkpoints.py",
    "load_edm": "reads files: test_edm.py",
    "ADM": "what a file says: test_edm.py",
    "LogSigma": "the schedule of a file: test_edm.py",
    "Steps": "the schedule of a file: test_edm.py",
    "SubVP": "the schedule of a file: test_edm.py",
    "Betas": "what a file says: test_checkpoints.py",
    "fit": "minutes of descent: test_fitting.py",
    "gits_sigmas": "a long solve: test_fitting.py",
    "Fitted": "what `fit` makes: test_fitting.py",
}


def public():
    """Classes and functions, without those that only hold or describe values."""
    things = {name: thing for name, thing in vars(sd).items() if callable(thing)}
    for module in (diagnostics, interop, checkpoints, edm):
        for name, thing in vars(module).items():
            if callable(thing) and getattr(thing, "__module__", "") == module.__name__:
                things[name] = thing
    return {
        name
        for name, thing in things.items()
        if not name.startswith("_")
        and not (isinstance(thing, type) and issubclass(thing, tuple))  # named tuples
        and not getattr(thing, "_is_protocol", False)
    }


def test_every_public_name_is_in_the_table():
    assert public() == FUZZ.keys() | ELSEWHERE.keys()


def check(name, factor):
    function, examples = FUZZ[name]

    # The same search in every quick run, another one in each long one.
    @settings(
        max_examples=max(1, factor * examples // 6),
        derandomize=factor == 1,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def search(data):
        draw, refusal, result = Draw(data), None, None
        try:
            # numpy's scalars warn before they overflow; that they did is what is refused.
            with np.errstate(all="ignore"):
                result = function(draw)
        except ValueError as error:
            refusal = error
        if refusal is not None:
            assert not draw.documented, refusal
            assert str(refusal)
        for leaf in jax.tree.leaves(result):
            if jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                assert np.all(np.isfinite(np.asarray(leaf, np.float64)))

    search()


@pytest.mark.parametrize("name", FUZZ)
def test_finite_or_a_value_error(name):
    check(name, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", FUZZ)
def test_finite_or_a_value_error_at_length(name):
    check(name, 15)
