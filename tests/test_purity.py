"""`sample` as a pure function: what traces again, and jit, vmap, grad and scan around it."""

import dataclasses
import gc
import pickle
import weakref
from functools import partial
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import Mixture, mixture, normal
from flax import linen as nn
from jax import Array
from numpy.testing import assert_allclose, assert_array_equal

import steindiff_jax as sd
from steindiff_jax.stein import default_basis

KEY = jax.random.key(0)
GRID = sd.karras_sigmas(4, sigma_min=0.1, sigma_max=10.0)
TRACES = []


@sd.pytree
class Counted:
    """A mixture that notes when Python runs through it, that is when it is traced."""

    means: Any
    std: Any = 0.5

    def __call__(self, x: Array, sigma: Array) -> Array:
        TRACES.append(None)
        return Mixture(self.means, self.std)(x, sigma)


def traces(call):
    """The number of times that `call` runs a `Counted` denoiser in Python."""
    before = len(TRACES)
    jax.block_until_ready(call())
    return len(TRACES) - before


def draw(denoiser, solver, key=KEY, sigmas=GRID, **kwargs):
    shape = None if "x_init" in kwargs else (6, 2)
    return sd.sample(key, denoiser, shape, sigmas=sigmas, solver=solver, **kwargs)


# --- Tracing -------------------------------------------------------------------------------------


def stein(gamma_max=1.0, curvature=0.5):
    return sd.Stein(sd.DPMpp3M(curvature), sd.StepEnergy(gamma_max=gamma_max), sd.Hutchinson())


def test_traces_once():
    """Another key, grid, float in the solver or array in the denoiser runs the same program."""
    means = normal(5, 2)
    assert traces(lambda: draw(Counted(means), stein())) > 0
    same_program = {
        "key": lambda: draw(Counted(means), stein(), key=jax.random.key(1)),
        "grid": lambda: draw(Counted(means), stein(), sigmas=sd.log_snr_sigmas(4)),
        "numpy grid": lambda: draw(Counted(means), stein(), sigmas=np.array([9.0, 3, 2, 1, 0])),
        "float of the rule": lambda: draw(Counted(means), stein(gamma_max=0.9)),
        "float of the inner solver": lambda: draw(Counted(means), stein(curvature=1.0)),
        "weights": lambda: draw(Counted(means + 1), stein()),
        "float of the denoiser": lambda: draw(Counted(means, 0.3), stein()),
        "all of it again": lambda: draw(Counted(means), stein()),
    }
    for changed, call in same_program.items():
        assert traces(call) == 0, changed


def test_all_kinds_of_numbers_are_one_program():
    """A guidance scale as Python's int and float, numpy's and JAX's, weak and strong."""
    kinds = [int, float, np.float32, np.float64, np.int64, np.asarray, jnp.asarray, jnp.float32]

    def guided(kind):
        return draw(sd.guided(Counted(normal(5, 2)), mixture(), kind(2)), sd.DDIM())

    expected = guided(float).x
    for kind in kinds:
        assert traces(lambda kind=kind: guided(kind)) == 0, kind
        assert_array_equal(guided(kind).x, expected)


def test_traces_anew():
    """Whatever is part of the program: shapes, static fields, the classes themselves."""
    means = normal(5, 2)
    draw(Counted(means), sd.DPMpp2M())
    other_programs = {
        "steps": lambda: draw(Counted(means), sd.DPMpp2M(), sigmas=sd.karras_sigmas(5)),
        "batch": lambda: sd.sample(KEY, Counted(means), (7, 2), sigmas=GRID, solver=sd.DPMpp2M()),
        "order": lambda: draw(Counted(means), sd.IPNDM(2)),
        "another order": lambda: draw(Counted(means), sd.IPNDM(3)),
        "statistics": lambda: draw(Counted(means), sd.Stein(sd.DPMpp2M(), statistics="sample")),
    }
    for changed, call in other_programs.items():
        assert traces(call) > 0, changed


@sd.pytree
class Forwards(sd.Solver):
    scale: float = 1.0

    def advance(self, key, denoiser, state, sigma, sigma_next):  # noqa: ARG002
        x0 = denoiser(state.x, sigma)
        return sd.State(state.x + self.scale), sd.Step(x0, 0 * x0)


@sd.pytree
class Backwards(Forwards):
    def advance(self, key, denoiser, state, sigma, sigma_next):  # noqa: ARG002
        x0 = denoiser(state.x, sigma)
        return sd.State(state.x - self.scale), sd.Step(x0, 0 * x0)


def test_classes_with_equal_fields_are_told_apart():
    """`jax.tree_util.register_dataclass` takes one for the other: their structures are equal."""
    x = normal(6, 2)
    ends = [draw(mixture(), solver(), x_init=x).x for solver in (Forwards, Backwards)]
    assert_allclose(ends[0], x + 4, rtol=1e-12)
    assert_allclose(ends[1], x - 4, rtol=1e-12)
    # the same for two with no fields at all
    euler, heun = (draw(mixture(), solver(), x_init=x) for solver in (sd.DDIM, sd.Heun))
    assert np.abs(euler.x - heun.x).max() > 1e-3


INSTANCES = [
    sd.DDIM(),
    sd.Heun(),
    sd.DPMpp2M(),
    sd.DPMpp3M(0.7),
    sd.IPNDM(3, denoise_last=False),
    sd.Stein(sd.IPNDM(2), sd.CleanTarget(0.1, 0.9, sd.VPCosine()), sd.Exact(), statistics="sample"),
    sd.Stein(sd.DPMpp2M(), estimator=sd.Hutchinson(2, "secant"), basis=sd.Cosine(3)),
    sd.AnalyticalFirst(sd.Stein(sd.DDIM(), axis_name="i")),
    sd.Churn(),
    sd.Ancestral(sd.DPM2(), 0.5),
    sd.DPMppSDE(),
    sd.DPMpp3MSDE(),
    sd.APG(0.1, 3.0),
    sd.GuidanceInterval(3.0, 0.1, 5.0),
    sd.CFGpp(0.5, np.array([3.0, 1.0, 0.0])),
    sd.guided(mixture(), mixture(std=0.8), 3.0, difference=sd.MAMBOG(), rescale=0.5),
    sd.EDM(),
    sd.VPLinear(0.2, 10.0),
    sd.RectifiedFlow(),
    sd.Discrete(np.linspace(1e-4, 0.02, 10)),
    sd.from_linen(nn.Dense(2), {}, schedule=sd.EDM(), prediction="x0", cond={"y": np.ones(3)}),
]


def pickled(instance):
    return pickle.loads(pickle.dumps(instance))


@pytest.mark.parametrize("instance", INSTANCES, ids=lambda i: type(i).__name__)
def test_equal_by_value(instance):
    """A copy with leaves of its own and an unpickled one: equal, and of equal hash."""
    copy = jax.tree.map(lambda leaf: leaf + 0, instance)
    copies = [copy] if isinstance(instance, sd.Network) else [copy, pickled(instance)]
    for other in copies:
        assert other == instance
        assert hash(other) == hash(instance)
    assert instance != sd.LMS()
    if jax.tree.leaves(instance):
        assert jax.tree.map(lambda leaf: leaf + 0.001, instance) != instance


def test_what_is_traced_is_data():
    """Two programs of one's own around one denoiser whose arrays are traced in each."""
    ends = [jax.jit(lambda means, i=i: i + draw(Mixture(means, 0.5), sd.DDIM()).x) for i in (0, 1)]
    first, second = (end(normal(5, 2)) for end in ends)
    assert_allclose(second, first + 1, rtol=1e-12)


def test_equal_solvers_are_one_static_argument():
    """Under one's own jit, where a solver is static: an equal one does not trace again."""
    count = []

    @partial(jax.jit, static_argnums=0)
    def program(solver, x):
        count.append(None)
        return draw(mixture(), solver, x_init=x).x

    x = normal(6, 2)
    first = program(sd.DPMpp3M(0.7), x)
    again = program(pickled(sd.DPMpp3M(0.7)), x)
    assert len(count) == 1
    assert_array_equal(first, again)
    program(sd.DPMpp3M(0.8), x)
    assert len(count) == 2


@pytest.mark.parametrize("instance", INSTANCES, ids=lambda i: type(i).__name__)
def test_pytree_round_trip(instance):
    leaves, structure = jax.tree.flatten(instance)
    again = jax.tree.unflatten(structure, leaves)
    assert type(again) is type(instance)
    assert repr(again) == repr(instance)
    assert jax.tree.structure(again) == structure
    assert hash(jax.tree.structure(again)) == hash(structure)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, instance)  # floats are leaves, choices are not
    for two, one in zip(jax.tree.leaves(doubled), leaves, strict=True):
        assert_array_equal(two, 2 * np.asarray(one))
    named = jax.tree_util.tree_leaves_with_path(instance)
    paths = {jax.tree_util.keystr(path) for path, _ in named}
    assert len(paths) == len(leaves)
    assert all(path.startswith(".") for path in paths)  # the names of the fields


# --- Transformations -----------------------------------------------------------------------------

SOLVERS = {
    "2M": sd.DPMpp2M(),
    "Heun": sd.Heun(),
    "Stein 2M": sd.Stein(sd.DPMpp2M(), sd.StepEnergy()),
    "Stein Heun, clean target": sd.Stein(sd.Heun(), sd.CleanTarget(), sd.Exact()),
    "Stein IPNDM": sd.Stein(sd.IPNDM(3)),
    "Stein IPNDM, probes": sd.Stein(sd.IPNDM(3), sd.StepEnergy(), sd.Hutchinson(2)),
}


def test_inside_jit_vmap_and_scan():
    """All of it gives what a loop of eager calls gives."""
    denoiser, solver = mixture(), SOLVERS["Stein IPNDM, probes"]
    keys = jax.random.split(KEY, 3)
    loop = jnp.stack([draw(denoiser, solver, key).x for key in keys])

    def one(key):
        return draw(denoiser, solver, key).x

    assert_allclose(jax.jit(one)(keys[0]), loop[0], rtol=1e-12)
    assert_allclose(jax.jit(jax.vmap(one))(keys), loop, rtol=1e-9, atol=1e-12)
    scanned = jax.lax.scan(lambda carry, key: (carry, one(key)), None, keys)[1]
    assert_allclose(scanned, loop, rtol=1e-9, atol=1e-12)


def test_vmap_over_floats_grids_and_weights():
    def one(curvature, gamma_max, sigmas, means):
        solver = sd.Stein(sd.DPMpp3M(curvature), sd.StepEnergy(gamma_max=gamma_max))
        return draw(Mixture(means, 0.5), solver, sigmas=sigmas).x

    arguments = (
        jnp.array([0.5, 1.0]),
        jnp.array([1.0, 0.8]),
        jnp.stack([GRID, sd.log_snr_sigmas(4)]),
        normal(2, 5, 2),
    )
    loop = jnp.stack([one(*(a[i] for a in arguments)) for i in range(2)])
    assert_allclose(jax.vmap(one)(*arguments), loop, rtol=1e-9, atol=1e-12)


def test_a_grid_for_each_sample():
    """`sample` mapped over single samples: of one grid, a batch with statistics of each sample."""
    x, denoiser = normal(3, 2, scale=10.0), mixture()

    def one(x, sigmas):
        solution = draw(denoiser, sd.Stein(sd.IPNDM(3)), sigmas=sigmas, x_init=x[None])
        return solution.x[0], solution.info.gamma

    mapped = jax.jit(jax.vmap(one))
    batch = draw(denoiser, sd.Stein(sd.IPNDM(3), statistics="sample"), x_init=x)
    same, gamma = mapped(x, jnp.stack([GRID] * 3))
    assert_allclose(same, batch.x, rtol=1e-9, atol=1e-12)
    assert_allclose(gamma, batch.info.gamma.T, rtol=1e-9, atol=1e-12)
    grids = jnp.stack([sd.karras_sigmas(4, 0.1, level) for level in (0.5, 2.0, 10.0)])
    others = mapped(x, grids)[0]
    loop = jnp.stack([one(*pair)[0] for pair in zip(x, grids, strict=True)])
    assert_allclose(others, loop, rtol=1e-9, atol=1e-12)
    assert np.abs(others - same)[:2].max() > 1e-3


QUICK = ("2M", "Stein IPNDM")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in SOLVERS]
)
def test_gradients(name):
    """With respect to weights, sigmas and x_init, through the step to sigma = 0."""

    def loss(arguments):
        means, sigmas, x = arguments
        sigmas = jnp.append(sigmas, 0.0)
        denoiser = Mixture(means, 0.5)
        return jnp.sin(draw(denoiser, SOLVERS[name], sigmas=sigmas, x_init=x).x).sum()

    arguments = normal(3, 2), jnp.array([5.0, 3.1, 1.4, 0.6]), normal(4, 2, seed=1, scale=5.0)
    gradient = jax.jit(jax.grad(loss))(arguments)
    for part in gradient:
        assert np.isfinite(part).all()
        assert np.abs(part).max() > 1e-6
    value = jax.jit(loss)
    for seed in range(3):  # along random directions, central differences
        rng = np.random.default_rng(seed)
        direction = [jnp.asarray(rng.standard_normal(a.shape)) for a in arguments]
        step = 1e-5
        up, down = (
            value(tuple(a + sign * step * v for a, v in zip(arguments, direction, strict=True)))
            for sign in (1, -1)
        )
        slope = sum(jnp.vdot(g, v) for g, v in zip(gradient, direction, strict=True))
        assert_allclose(slope, (up - down) / (2 * step), rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_gradient_with_respect_to_the_solver_s_floats():
    def loss(curvature):
        return jnp.square(draw(mixture(), sd.DPMpp3M(curvature)).x).sum()

    slope = (loss(0.5 + 1e-5) - loss(0.5 - 1e-5)) / 2e-5
    assert_allclose(jax.grad(loss)(0.5), slope, rtol=1e-6)


def test_noise_is_that_of_the_sample_alone():
    """Sample i of a batch starts from noise of its own index, however large the batch is."""
    small, large = (
        sd.sample(KEY, mixture(), (n, 2), sigmas=GRID, solver=sd.Heun()).x for n in (3, 6)
    )
    assert_allclose(small, large[:3], rtol=1e-10)


def test_the_start_is_noise_at_the_first_sigma():
    def start(state, _):
        return state.x

    @sd.pytree
    class Stay(Forwards):
        def advance(self, key, denoiser, state, sigma, sigma_next):  # noqa: ARG002
            return state, sd.Step(state.x, 0 * state.x)

    x = sd.sample(KEY, mixture(), (4000, 2), sigmas=GRID, solver=Stay(), record=start).record[0]
    error = np.sqrt(2 / x.size)
    assert abs(np.square(x / GRID[0]).mean() - 1) < 4 * error
    assert abs((x / GRID[0]).mean()) < 4 / np.sqrt(x.size)


def test_record_sees_every_step():
    solution = draw(mixture(), sd.Heun(), record=lambda state, step: (state.x, step.x0, step.nfe))
    x, x0, nfe = solution.record
    assert x.shape == x0.shape == (4, 6, 2)
    assert_array_equal(x[-1], solution.x)
    assert_allclose(x0[1], mixture()(x[0], GRID[1]), rtol=1e-12)
    assert_array_equal(nfe, [2, 2, 2, 1])
    assert solution.info.nfe == 7


# --- What is kept --------------------------------------------------------------------------------


def test_what_a_function_holds_is_freed_with_it():
    """And with it its program, which holds the same as constants."""
    held = []

    class Scale:
        def __init__(self, weights):
            self.weights = weights

        def __call__(self, x, s):
            return x * self.weights[None] / (1 + s**2)

    def forget():
        weights = jnp.full(2, 0.5 + len(held))
        held.append(weakref.ref(weights))
        function, record = Scale(weights).__call__, lambda state, step: state.x * weights[None]  # noqa: ARG005
        for denoiser in (
            lambda x, s: function(x, s),
            Scale(weights),
            partial(lambda w, x, s: x * w[None] / (1 + s**2), weights),
            sd.guided(lambda x, s: function(x, s), Scale(weights), 2.0),
        ):
            draw(denoiser, sd.DDIM(), record=record)

    for _ in range(2):
        forget()
    gc.collect()
    assert [reference() for reference in held] == [None] * 2


def test_a_leaf_made_anew():
    """A denoiser whose function is another object whenever its leaves are taken."""

    @jax.tree_util.register_pytree_node_class
    class Anew:
        function = None

        def tree_flatten(self):
            return (self.function or (lambda x, s: x / (1 + s**2)),), None

        @classmethod
        def tree_unflatten(cls, _, children):
            new = cls()
            (new.function,) = children
            return new

        def __call__(self, x, s):
            return self.function(x, s)

    expected = draw(lambda x, s: x / (1 + s**2), sd.DDIM()).x
    assert_allclose(draw(Anew(), sd.DDIM()).x, expected, rtol=1e-12)


def test_weights_that_are_data_are_not_kept():
    """In a pytree denoiser: freed as soon as the caller lets go, and traced once."""

    def apply(weights, x, s):
        TRACES.append(None)
        return x * weights[None] / (1 + s**2)

    held = []

    def forget():
        weights = jnp.full(2, 0.5 + len(held))
        held.append(weakref.ref(weights))
        draw(jax.tree_util.Partial(apply, weights), sd.DDIM())

    forget()
    assert traces(lambda: [forget() for _ in range(3)] and ()) == 0
    gc.collect()
    assert [reference() for reference in held] == [None] * 4


# --- Export --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "event", [pytest.param((3,), marks=pytest.mark.slow), (8, 8, 3)], ids=["vectors", "images"]
)
@pytest.mark.parametrize("statistics", ["batch", pytest.param("sample", marks=pytest.mark.slow)])
def test_export_with_a_symbolic_batch(event, statistics):
    """The numbers of a direct call, as classes, for even and odd batches.

    By default the basis is that of one sample, for nothing more is known of the batch.
    """
    solver = sd.Stein(sd.IPNDM(3), statistics=statistics)
    same = dataclasses.replace(solver, basis=default_basis((1, *event)))

    def program(solver, key, x):
        def denoiser(x, s):
            return jnp.tanh(x / (1 + s))

        return sd.sample(key, denoiser, sigmas=GRID, solver=solver, x_init=x)

    (n,) = jax.export.symbolic_shape("n")
    specs = jax.ShapeDtypeStruct(KEY.shape, KEY.dtype), jax.ShapeDtypeStruct((n, *event), float)
    called = jax.export.export(jax.jit(partial(program, solver)))(*specs).call
    for batch in (4, 5):
        x = normal(batch, *event, scale=10.0)
        found, expected = called(KEY, x), program(same, KEY, x)
        assert isinstance(found, sd.Solution)
        assert isinstance(found.info, sd.Info)
        assert_allclose(found.x, expected.x, rtol=1e-9)
        assert_allclose(found.info.gamma, expected.info.gamma, rtol=1e-9)
        assert_array_equal(found.info.nfe, expected.info.nfe)


def test_export_of_pytrees():
    """A solver and a state are arguments of an exported program, and stay what they are."""
    pytest.importorskip("flatbuffers", reason="what JAX writes exported programs with")
    solver, state = sd.Stein(sd.DPMpp3M(0.7), basis=sd.Cosine(2)), sd.State(normal(4, 2))

    def program(solver, state):
        return solver, state, sd.Step(state.x, 0 * state.x)

    stored = jax.export.export(jax.jit(program))(solver, state).serialize()
    same, again, step = jax.export.deserialize(stored).call(solver, state)
    assert same == solver
    assert isinstance(again, sd.State)
    assert isinstance(step, sd.Step)
    assert_array_equal(again.x, state.x)
