"""Sharded sampling on eight devices; `test_sharding.py` runs this in a process that has them."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import mixture, normal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose

import steindiff_jax as sd

KEY = jax.random.key(0)
BATCH, D, SIGMA_MAX = 128, 4, 10.0
# Devices add up a batch in another order. Coefficients are quotients of such sums and magnify their
# rounding, so all of it runs in double precision, where a thousand units are still 1e-12.
RTOL_GAMMA = 1e-9
ATOL_X = 1e-9
GRID = np.asarray(sd.karras_sigmas(4, 0.1, SIGMA_MAX), np.float64)
MESHES = {
    kind.name: jax.make_mesh((8,), ("data",), axis_types=(kind,))
    for kind in (AxisType.Auto, AxisType.Explicit)
}
SOLVERS = {
    "default": sd.Stein(sd.IPNDM(3)),
    "energy": sd.Stein(sd.DPMpp2M(), sd.StepEnergy()),
    "clean target": sd.Stein(sd.UniPC(2), sd.CleanTarget(), sd.Hutchinson()),
    "sample": sd.Stein(sd.DPMpp3M(), sd.StepEnergy(), statistics="sample"),
}


DENOISER = mixture(d=D)
START = normal(BATCH, D, scale=SIGMA_MAX)


def draw(key, x, denoiser=DENOISER, solver=SOLVERS["default"]):
    return sd.sample(key, denoiser, sigmas=GRID, solver=solver, x_init=x)


def over(mesh, *axes):
    return NamedSharding(MESHES.get(mesh, mesh), P(*axes))


def assert_same(many, one):
    """Gamma is that of the whole batch, then, and the samples are the same."""
    assert_allclose(many.info.gamma, one.info.gamma, rtol=RTOL_GAMMA)
    assert_allclose(many.x, one.x, rtol=0, atol=ATOL_X)


def collectives(compiled):
    """Names of the collective operations in the whole program, and of those inside its loops."""
    computations = dict(
        re.findall(r"^(?:ENTRY )?(%[\w.-]+) .*?\{\n(.*?)^\}", compiled.as_text(), re.M | re.S)
    )

    def reached(names, seen):
        for name in names & computations.keys():
            if name not in seen:
                seen.add(name)
                reached(set(re.findall(r"%[\w.-]+", computations[name])), seen)
        return seen

    def within(names):
        text = " ".join(computations[name] for name in sorted(reached(names, set())))
        return re.findall(
            r"(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(",
            text,
        )

    loops = set(re.findall(r" while\(.*body=(%[\w.-]+)", compiled.as_text()))
    return within(set(computations)), within(loops)


@pytest.fixture(scope="module")
def one_device():
    return {name: draw(KEY, START, solver=solver) for name, solver in SOLVERS.items()}


@pytest.mark.parametrize(
    ("mesh", "name"), [("Auto", "default"), *(("Explicit", name) for name in SOLVERS)]
)
def test_sharded_batch(mesh, name, one_device):
    """Stays where it is, and all statistics of one step travel in one all-reduce."""
    sharding = over(mesh, "data")
    x = jax.device_put(START, sharding)
    program = jax.jit(lambda key, x: draw(key, x, solver=SOLVERS[name])).lower(KEY, x).compile()
    expected = [] if name == "sample" else ["all-reduce"]
    assert collectives(program) == (expected, expected)
    solution = program(KEY, x)
    assert solution.x.sharding.is_equivalent_to(sharding, 2)
    assert solution.info.finite.sharding.is_equivalent_to(over(mesh, None, "data"), 2)
    assert_same(solution, one_device[name])


@pytest.mark.parametrize("mesh", MESHES)
def test_sharded_images(mesh):
    """The bands of the default basis too travel in one all-reduce; no image is gathered."""
    x = normal(64, 8, 8, 3, scale=SIGMA_MAX)
    bands = len(SOLVERS["default"].basis_of(x.shape).partition(x.shape[1:]).sizes)
    assert bands > 1

    def program(key, x):
        return draw(key, x, lambda x, s: jnp.tanh(x / (1 + s)))

    sharded = jax.device_put(x, over(mesh, "data"))
    compiled = jax.jit(program).lower(KEY, sharded).compile()
    assert collectives(compiled) == (["all-reduce"], ["all-reduce"])
    solution = compiled(KEY, sharded)
    assert solution.info.gamma.shape == (4, bands)
    assert_same(solution, program(KEY, x))


@pytest.mark.parametrize("mesh", MESHES)
def test_called_as_it_is(mesh, one_device):
    solution = draw(KEY, jax.device_put(START, over(mesh, "data")))
    assert solution.x.sharding.is_equivalent_to(over(mesh, "data"), 2)
    assert_same(solution, one_device["default"])


@pytest.mark.parametrize(("mesh", "told_by"), [("Auto", "out_shardings"), ("Explicit", "keys")])
def test_sharded_noise(mesh, told_by):
    """No device draws the whole noise."""

    def program(key):
        return sd.sample(key, DENOISER, (BATCH, D), sigmas=GRID)

    key, given = KEY, {"out_shardings": sd.Solution(over(mesh, "data"), None)}
    if told_by == "keys":
        key, given = jax.device_put(jax.random.split(KEY, BATCH), over(mesh, "data")), {}
    compiled = jax.jit(program, **given).lower(key).compile()
    assert collectives(compiled)[0] == ["all-reduce"]
    assert f"f32[{BATCH},{D}]" not in compiled.as_text()
    solution = compiled(key)
    assert solution.x.sharding.is_equivalent_to(over(mesh, "data"), 2)
    assert_same(solution, program(jax.device_put(key, jax.devices()[0])))


def layer(parameters, x, t, label):
    """A layer whose hidden units may lie on several devices."""
    inside, outside, embedding = parameters
    h = jnp.tanh(x @ inside + embedding[label] + t[:, None])
    return h @ outside


def test_batch_and_network_sharded():
    """Data x model: conditioning follows its samples, guidance in one network call."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    width, label = 16, np.arange(BATCH) % 3
    weights = [
        jnp.asarray(normal(*s, seed=i)) for i, s in enumerate([(D, width), (width, D), (4, width)])
    ]

    def program(weights, label, x, statistics):
        network = dict(schedule=sd.EDM(), prediction="edm")
        conditional = sd.Network(layer, weights, **network, cond={"label": label})
        null = sd.Network(layer, weights, **network, cond={"label": jnp.full_like(label, 3)})
        solver = sd.Stein(sd.DPMpp2M(), sd.StepEnergy(), statistics=statistics)
        return draw(KEY, x, sd.guided(conditional, null, 2.0), solver)

    jitted = jax.jit(program, static_argnums=3)
    places = over(mesh, None, "model"), over(mesh, "model", None), over(mesh, None, "model")
    rows = over(mesh, "data")
    sharded = jax.device_put((weights, label, START), ([*places], rows, rows))
    compiled = {s: jitted.lower(*sharded, s).compile() for s in ("batch", "sample")}
    inside = {s: collectives(c)[1] for s, c in compiled.items()}
    assert set(inside["sample"]) == {"all-reduce"}  # the network's own, over the hidden units
    assert len(inside["batch"]) == len(inside["sample"]) + 1
    solution = compiled["batch"](*sharded)
    assert solution.x.sharding.is_equivalent_to(rows, 2)
    assert_same(solution, jitted(weights, label, START, "batch"))


def test_mapped_over_shards(one_device):
    """shard_map with `axis_name`: each shard draws its own rows' noise and probes."""
    mesh = MESHES["Auto"]
    stein = sd.Stein(sd.IPNDM(3), axis_name="data")
    out = sd.Solution(P("data"), sd.Info(P(), P(), P(None, "data")))

    def mapped(program, *specs):
        return jax.jit(jax.shard_map(program, mesh=mesh, in_specs=specs, out_specs=out))

    from_start = mapped(lambda key, x: draw(key, x, solver=stein), P(), P("data"))
    assert collectives(from_start.lower(KEY, START).compile())[1] == ["all-reduce"]
    assert_same(from_start(KEY, START), one_device["default"])

    def from_noise(key, batch=BATCH // 8, solver=stein):
        return sd.sample(key, DENOISER, (batch, D), sigmas=GRID, solver=solver)

    one = from_noise(KEY, BATCH, SOLVERS["default"])
    assert_same(mapped(from_noise, P())(KEY), one)
    keys = jax.random.split(KEY, BATCH)
    one = from_noise(keys, BATCH, SOLVERS["default"])
    assert_same(mapped(from_noise, P("data"))(keys), one)


def test_fitted():
    """Sharded keys shard the batches; the fitted numbers are those of one device."""
    keys, teacher = jax.random.split(KEY, BATCH), sd.log_snr_sigmas(8, 0.1, SIGMA_MAX)
    options = {"teacher": teacher, "iterations": 3, "batches": 1}

    def fit(keys):
        return sd.fit(keys, DENOISER, (BATCH, D), GRID, SOLVERS["default"], **options)

    one, many = fit(keys), fit(jax.device_put(keys, over("Auto", "data")))
    assert not np.array_equal(one.sigmas, GRID)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        assert_allclose(b, a, rtol=1e-7, atol=1e-9)


def test_many(tmp_path):
    """160 samples in batches of 64, the last one ragged: the files hold what one device draws."""
    arguments = KEY, DENOISER, 160, 64, (D,)
    one = np.concatenate(list(sd.sample_many(*arguments, sigmas=GRID)))
    sharding = over("Explicit", "data")
    blocks = list(sd.sample_many(*arguments, sigmas=GRID, sharding=sharding, directory=tmp_path))
    assert [len(block) for block in blocks] == [8] * 20
    assert_allclose(np.concatenate(blocks), one, rtol=0, atol=ATOL_X)
    names = sorted(file.name for file in tmp_path.glob("*.npy"))
    assert names == [f"{i:012d}.npy" for i in range(0, 160, 8)]


@pytest.mark.parametrize("wrap", ["AnalyticalFirst", "Calibrated"])
def test_wrappers_forward_the_mapped_axis(wrap):
    """Every shard starts from noise of its own, under shard_map and under vmap: that of one run."""
    plain, mesh = sd.Stein(sd.DPMpp2M()), MESHES["Auto"]
    stein = dataclasses.replace(plain, axis_name="data")
    if wrap == "AnalyticalFirst":
        solver = sd.AnalyticalFirst(stein)
    else:
        solver = sd.calibrate(KEY, DENOISER, (BATCH, D), GRID, plain)
        solver = dataclasses.replace(
            solver, inner=dataclasses.replace(solver.inner, axis_name="data")
        )
    assert solver.mapped_axis() == "data"

    def shard(key, solver=solver, batch=BATCH // 8):
        return sd.sample(key, DENOISER, (batch, D), sigmas=GRID, solver=solver).x

    one = shard(KEY, dataclasses.replace(solver, inner=plain), BATCH)
    mapped = jax.shard_map(shard, mesh=mesh, in_specs=P(), out_specs=P("data"))
    assert_allclose(jax.jit(mapped)(KEY), one, rtol=0, atol=ATOL_X)
    through_vmap = jax.vmap(lambda _: shard(KEY), axis_name="data")(jnp.arange(8))
    assert_allclose(through_vmap.reshape(BATCH, D), one, rtol=0, atol=ATOL_X)
