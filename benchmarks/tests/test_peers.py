"""The comparison with other samplers: its formulas and mathematics, and the peers if any."""

import itertools
import json
import os
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import REFERENCE, reference
from numpy.testing import assert_allclose

import problems
import steindiff_jax as sd
from peers import compare, dpm_v3, formulas, grids, libraries, report, speed, stabilisers, together
from peers.compare import Row

# Of the libraries, about each other's versions.
THEIR_WARNINGS = pytest.mark.filterwarnings("ignore")
GRIDS = sorted(path.stem for path in REFERENCE.glob("d2_*.npz"))
FORMULAS = {
    "kdiff.sample_euler": formulas.euler,
    "kdiff.sample_heun": formulas.heun,
    "kdiff.sample_dpm_2": formulas.dpm2,
    "kdiff.sample_dpmpp_2s_ancestral_eta0": formulas.dpmpp_2s,
    "kdiff.sample_dpmpp_2m": formulas.dpmpp_2m,
    "kdiff.sample_dpmpp_3m_sde_eta0": formulas.dpmpp_3m,
    "kdiff.sample_lms_order4": formulas.lms,
    "diffusers.dpmpp_2M_midpoint_lof1": stabilisers.LOWER,
    "diffsampler.ipndm2": partial(formulas.ipndm, order=2),
    "diffsampler.ipndm3": formulas.ipndm,
    "diffsampler.ipndm4": partial(formulas.ipndm, order=4),
    "diffsampler.euler_afs": partial(stabilisers.with_first, formulas.euler),
    "diffsampler.ipndm4_afs": partial(stabilisers.with_first, partial(formulas.ipndm, order=4)),
}


@pytest.fixture(scope="module")
def denoise():
    """The problem that the reference arrays are of, in NumPy."""
    problem = reference("problem_d2")
    means, variance = problem["mus"], float(problem["s0"]) ** 2

    def denoise(x, sigma):
        total = variance + sigma**2
        difference = x[:, None] - means[None]
        log_weights = (difference**2).sum(2) / (-2 * total)
        weights = np.exp(log_weights - log_weights.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        return weights @ means * (sigma**2 / total) + variance / total * x

    return denoise


@pytest.mark.parametrize("key", FORMULAS)
def test_formulas_are_those_of_the_libraries(denoise, key):
    grids = [grid for grid in GRIDS if key in reference(grid)]
    assert grids
    for grid in grids:
        arrays = reference(grid)
        x = FORMULAS[key](denoise, arrays["x_T"], [float(s) for s in arrays["sigmas"]])
        assert_allclose(x, arrays[key], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "peer",
    [*libraries.of_formulas(), *libraries.of_stabilisers()],
    ids=lambda peer: peer.name,
)
@pytest.mark.parametrize("budget", [3, 4, 8])
def test_no_sampler_takes_more_than_its_evaluations(denoise, peer, budget):
    """As many as fit: another step would be one too many."""
    taken = []
    fixed = {"limit": 1.0, "data_variance": 0.25, "statistics": known(2, 1.0)}
    needed = {name: fixed[name] for name in peer.needs}
    for steps in (peer.steps(budget), peer.steps(budget) + 1):
        sigmas = [float(s) for s in grids.of(peer, steps)["Karras"]]
        calls = []

        def counted(x, sigma, calls=calls):
            calls.append(sigma)
            return denoise(x, sigma)

        start = 80.0 * np.random.default_rng(0).standard_normal((5, 2))
        choice = peer.choices[0] if peer.choices else {}
        x = peer.run(counted, start, sigmas, **choice, **needed)
        assert np.isfinite(x).all()
        taken.append(len(calls))
    assert taken[0] <= budget < taken[1]


def known(d: int, slope, levels: int = 4001) -> dpm_v3.Statistics:
    """Nothing but l, the same at all levels or a function of lambda."""
    lambdas = np.linspace(-np.log(80.0), -np.log(0.002), levels)
    values = slope(lambdas) if callable(slope) else slope
    l = np.broadcast_to(values, (d, levels)).T  # noqa: E741
    return dpm_v3.Statistics(lambdas, l, np.zeros_like(l), np.zeros_like(l))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpm_solver_v3_without_statistics_is_dpm_solver_pp(denoise, order):
    """With l = 1 alone; order 1: DDIM; else the first full step of the exponential integrator.

    That is of Lagrange polynomials of x0 in lambda, integrated by quadrature. On levels of the
    table, so that nothing is rounded; it has 4,001 levels, whose trapezoids err by 1e-6.
    """
    table = known(2, 1.0)
    x = 80.0 * np.random.default_rng(0).standard_normal((5, 2))
    nodes = table.lambdas[[0, 900, 1700, 2600, 3100, 3300, 3500, 4000]]
    sigmas = [float(s) for s in np.exp(-nodes)]
    calls = []

    def recorded(x, sigma):
        calls.append((x, denoise(x, sigma)))
        return calls[-1][1]

    found = dpm_v3.sample(recorded, x, sigmas, table, order=order)
    if order == 1:
        assert_allclose(found, formulas.euler(denoise, x, sigmas), atol=1e-5)
    k = order - 1
    here = np.linspace(nodes[k], nodes[k + 1], 20_001)
    weight = np.exp(here - nodes[k + 1])
    expected = np.exp(nodes[k] - nodes[k + 1]) * calls[k][0]
    for i in range(order):
        others = [j for j in range(order) if j != i]
        lagrange = np.prod([(here - nodes[j]) / (nodes[i] - nodes[j]) for j in others], axis=0)
        expected = expected + np.trapezoid(weight * lagrange, here) * calls[i][1]
    assert_allclose(calls[k + 1][0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [3, 5, 6, 8])
def test_dpm_solver_v3_is_exact_where_its_statistics_are(steps):
    """On Gaussian data with independent pixels and its l, whatever the steps."""
    variance = 0.3

    def gaussian(x, sigma):
        return x * variance / (variance + sigma**2)

    table = known(2, lambda lam: np.exp(-2 * lam) / (variance + np.exp(-2 * lam)))
    x = 80.0 * np.random.default_rng(0).standard_normal((5, 2))
    sigmas = [float(s) for s in np.geomspace(80.0, 0.002, steps + 1)]
    expected = x * np.sqrt((variance + 0.002**2) / (variance + 80.0**2))
    assert_allclose(dpm_v3.sample(gaussian, x, sigmas, table), expected, rtol=1e-4)


def test_statistics_of_dpm_solver_v3():
    """Of Gaussian data, where l is sigma^2 / (v + sigma^2) and f is minus l times the mean.

    Probes are exact here, for the Jacobian is diagonal, and so are s and b: f does not vary, s is 0
    and b is f'.
    """
    variance, mean = np.array([0.3, 2.0]), np.array([1.0, -0.5])
    law = mean + np.sqrt(variance) * np.random.default_rng(0).standard_normal((64, 2))
    mixture = problems.mixture(mean[None], 0.1, np.eye(2)[None], variance[None] - 0.01)
    found = dpm_v3.statistics(mixture, law, 32, levels=401, points=64)
    square = np.exp(-2 * found.lambdas)[:, None]
    assert_allclose(found.l, square / (variance + square), rtol=1e-8)
    assert found.evaluations == 5 * 401 * 64
    inside = slice(2, -2)  # where the slope of l is a central difference
    slope = -2 * square * variance / (variance + square) ** 2
    assert_allclose(found.s, 0.0)
    assert_allclose(found.b[inside], -(mean * slope)[inside], atol=2e-3)


def test_addim_has_the_length_of_its_name(denoise):
    """The squared distance from x0 grows by the variance, the direction stays."""
    x = np.random.default_rng(0).standard_normal((5, 2))
    x0, snr = denoise(x, 2.0), 0.25
    moved = formulas.addim(denoise, x, [2.0, 0.5]) - x0
    ddim = formulas.euler(denoise, x, [2.0, 0.5]) - x0
    variance = 0.1 / (2 + snr) * (1 - 0.5 / 2.0) ** 2
    noise = (x - x0) / 2.0
    scale = np.sqrt(0.5**2 + variance / (noise**2).mean(1, keepdims=True)) / 0.5
    assert_allclose(moved, scale * ddim, rtol=1e-12)


def test_published_grids():
    """Align Your Steps as sigmas, which its authors and others list, before they are rescaled."""
    listed = {
        "AYS SD1.5": [14.615, 6.475, 3.864, 2.695, 1.884, 1.394, 0.964, 0.652, 0.398, 0.152],
        "AYS SDXL": [14.615, 6.318, 3.768, 2.181, 1.341, 0.862, 0.555, 0.380, 0.233, 0.111],
    }
    for name, sigmas in listed.items():
        share = np.log(np.array(sigmas) / 0.0291672) / np.log(14.6146 / 0.0291672)
        found = grids.published(10)[name]
        assert found[-1] == 0
        assert_allclose(found[:-1], 0.002 * 40_000**share, rtol=1e-2)
        for steps in (3, 7, 16):
            grid = grids.published(steps)[name]
            assert len(grid) == steps + 1
            assert (np.diff(grid) < 0).all()
            assert grid[0] == pytest.approx(80.0)


def test_epsilon_scaling_scales_the_noise(denoise):
    x, sigma = np.random.default_rng(0).standard_normal((5, 2)), 0.7
    noise = (x - stabilisers.epsilon_scaling(denoise, 1.25)(x, sigma)) / sigma
    assert_allclose(1.25 * noise, (x - denoise(x, sigma)) / sigma, rtol=1e-12)


def test_dynamic_threshold_is_the_library_s():
    x = 3 * np.random.default_rng(0).standard_normal((6, 40))

    def identity(x, sigma):
        return x + 0 * sigma

    ours = sd.DynamicThreshold(identity, quantile=0.9, limit=1.5)(jnp.asarray(x), jnp.float64(1.0))
    theirs = stabilisers.dynamic_threshold(identity, 0.9, 1.5)(x, 1.0)
    assert_allclose(theirs, ours, rtol=1e-12)


def test_time_and_level_are_inverse():
    sigmas = np.geomspace(0.002, 80.0, 20)
    assert_allclose(stabilisers.level(stabilisers.time(sigmas)), sigmas, rtol=1e-9)
    schedule = sd.VPLinear()
    t = jnp.linspace(0.1, 1.0, 5)
    assert_allclose(
        stabilisers.level(np.asarray(t)), schedule.sigma(t) / schedule.alpha(t), rtol=1e-6
    )


@pytest.mark.parametrize("true", [2.0, 2.6])
def test_time_shift_finds_the_level_that_the_state_has(true):
    """Where the first step leads to a state of another level than the grid's 2, that is told.

    Data and noise of 40,000 entries: a variance is good to 0.7%, a level here to half of that.
    """
    rng = np.random.default_rng(0)
    x0, noise = rng.standard_normal((10, 4000)) * 0.5, rng.standard_normal((10, 4000))
    state = (x0 + true * noise) * np.hypot(1.0, 2.0) / np.hypot(1.0, true)
    told = []

    def denoise(x, sigma):
        told.append(sigma)
        return (state - 2 / 5 * x) / (1 - 2 / 5) if len(told) == 1 else x0

    stabilisers.time_shift(denoise, 5 * noise, [5.0, 2.0, 0.5], 400, 200, data_variance=0.25)
    time = stabilisers.time(true)
    spacing = stabilisers.level(time + 0.4 / 64) - true
    assert told[0] == 5.0
    assert told[1] == pytest.approx(true, abs=spacing + 5 * 0.0035 * true)


def test_half_of_a_mixture():
    """Every other component, with its share of what is left."""
    means = np.random.default_rng(0).standard_normal((4, 2))
    half = compare.half(problems.mixture(means, 0.1, weights=[0.1, 0.2, 0.3, 0.4]))
    alone = problems.mixture(means[::2], 0.1, weights=[0.25, 0.75])
    x = jnp.asarray(means)
    assert_allclose(half(x, jnp.float64(0.5)), alone(x, jnp.float64(0.5)), rtol=1e-12)


def row(side, sampler, distance, **rest):
    at = {"problem": "clumps", "guidance": 3.0, "grid": "Karras", "evaluations": 5, "seed": 0}
    at |= {"taken": 5, "steps": 5} | rest
    return Row(side=side, sampler=sampler, pixels=distance, bands=distance, rmse=0.5, **at)


def test_best_of_each_side():
    """By hand: two problems, the best of two samplers, one of them not finite, and no peer."""
    rows = [
        row("peer", "a", 0.4),
        row("peer", "b", np.inf),
        row("ours", "c", 0.2),
        row("ours", "d", 0.1),
        row("peer", "a", 0.2, problem="grid"),
        row("peer", "b", 0.1, problem="grid"),
        row("ours", "c", 0.8, problem="grid"),
        row("ours", "c", 0.4, problem="curve"),
        row("fine", "fine solve", 0.1, grid="log-SNR", evaluations=40),
        row("fine", "fine solve", 0.1, grid="log-SNR", evaluations=40, problem="grid"),
    ]
    comparison = report.Comparison(rows)
    cases = comparison.cases("vectors, guided", 5)
    assert sorted(case[0] for case in cases) == ["clumps", "grid"]
    assert comparison.best("peer", cases) == ("a", "Karras")
    assert comparison.best("ours", cases) == ("c", "Karras")
    assert comparison.against("one", cases)[0] == pytest.approx(np.sqrt(0.5 * 4.0))
    assert comparison.against("fine", cases)[0] == pytest.approx(np.sqrt(0.25 * 0.5))


def test_a_seed_without_all_cases_is_left_out():
    """By hand: ratios of 2 and of 8 with one seed; of 2 alone with another, which is less."""
    rows = [row("peer", "a", 0.1, seed=seed) for seed in (0, 1)]
    rows += [row("ours", "c", 0.2, seed=seed) for seed in (0, 1)]
    rows += [row("peer", "a", 0.1, problem="grid"), row("ours", "c", 0.8, problem="grid")]
    comparison = report.Comparison(rows)
    cases = comparison.cases("vectors, guided", 5)
    assert comparison.against("one", cases)[0] == pytest.approx(4.0)


def records():
    """Ours is twice as slow in one case, and twice as fast in the other."""
    made = []
    for case, peer in (("network", 1.0), ("overhead", 4.0)):
        for program, milliseconds in (("ours: default", 2.0), ("x (peer)", peer), ("bare: y", 0.5)):
            made.append({"case": case, "program": program, "milliseconds": milliseconds})
            made[-1] |= {"compile": 1.0, "memory": None}
    return made


def put(rows, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '["cut sh')


def test_report_says_first_where_a_peer_wins(tmp_path):
    grids_of = dict(report.OURS)
    rows = [
        row(
            side,
            sampler,
            distance,
            problem=problem,
            grid=grids_of.get(sampler, "Karras"),
            evaluations=n,
            guidance=w,
            seed=seed,
        )
        for problem in (*compare.PROBLEMS,)
        for w in (1.0, 7.0)
        for n in (3, 4, 5, 6, 8, 10, 16)
        for seed in range(5)
        for side, sampler, distance in (
            ("peer", "DPM++ 2M (k-diffusion's formulas)", 0.2 if n == 5 else 0.02 + 0.001 * seed),
            ("ours", "default (ours)", 0.1),
            ("fine", "fine solve", 0.01),
        )
    ]
    rows.append(row("peer", "broken", np.inf, guidance=7.0))
    put(rows, tmp_path / "runs" / "all.jsonl")
    assert compare.read(tmp_path / "runs" / "all.jsonl") == rows
    (tmp_path / "speed.json").write_text(json.dumps(records()))
    known = together.facts(compare.Sizes(), {"flax": tmp_path / "none"})
    (tmp_path / "facts.json").write_text(json.dumps(known))
    text = report.write(tmp_path)
    assert (tmp_path / "report.md").read_text() == text
    assert len(text.splitlines()) <= 80
    assert (tmp_path / "quality.png").stat().st_size > 1000
    ratio = report.cell(report.Comparison(rows).against("default", [("clumps", 7.0, 4)]))
    assert ratio.startswith("**4.5")
    assert f"default / best of their defaults | {ratio}" in text
    assert "ahead of the best of ours in 192 of 224 cases" in text
    assert "network, our default 2.00 times x (peer); overhead" in text
    full = (tmp_path / "full.md").read_text()
    assert "broken, Karras: in 1 of 1 runs" in full
    assert "The fine solve itself: 0.010." in full


def test_fitted_against_fitted(tmp_path):
    """By hand: of two other fits the better by both distances, on two seeds; plain is no fit."""
    distances = {"all": [0.1, 0.4], "GITS": [0.8, 0.8], "grid alone (LD3)": [0.4, 0.4]}
    distances |= {"plain": [0.01, 0.01]}
    at = {"problem": "clumps", "steps": 4}
    runs = [
        at | {"method": method, "seed": seed, "distance": [*distance, 1.0, 1.0]}
        for method, distance in distances.items()
        for seed in range(2)
    ]
    path = tmp_path / "fitting.json"
    assert report.fitted(path) == []
    path.write_text(json.dumps({"runs": runs}))
    *_, table = report.fitted(path)
    assert "clumps | 0.50 ± 0.00 grid alone (LD3)" in table


@pytest.mark.slow
@THEIR_WARNINGS
def test_the_digits_network_in_torch():
    torch = pytest.importorskip("torch", reason="the peers are not installed")
    import digits
    from peers import twin

    label = np.arange(22) % 11
    x = np.random.default_rng(0).standard_normal((22, 8, 8, 1)).astype(np.float32)
    denoiser, theirs = digits.load(jnp.asarray(label)), twin.Denoiser(label)
    with jax.numpy_rank_promotion("allow"):
        for sigma in (0.002, 0.1, 1.0, 80.0):
            ours = denoiser(jnp.asarray(sigma * x), jnp.float32(sigma))
            assert_allclose(theirs(torch.tensor(sigma * x), sigma), ours, rtol=0, atol=3e-6)


@pytest.mark.slow
@THEIR_WARNINGS
def test_libraries_take_the_steps_that_their_names_say():
    """Each against our own solver of that name, on one exact problem in float64."""
    pytest.importorskip("azula", reason="the peers are not installed")
    pytest.importorskip("diffusers", reason="the peers are not installed")
    problem = problems.exact(problems.ring(), draws=100)
    start = np.random.default_rng(0).standard_normal((20, 2))
    same = {
        "DPM++ 2M (diffusers)": sd.DPMpp2M(lower_order_final=True),
        "DPM++ 3M (diffusers)": sd.DPMpp3M(kind="midpoint", lower_order_final=True),
        "EDM DPM++ 2M (diffusers)": sd.DPMpp2M(lower_order_final=True),
        "UniPC-3 (diffusers)": sd.UniPC(3),
        "Heun (diffusers)": sd.Heun(),
        "Heun (diffrax)": sd.Heun(),
        "iPNDM-4 (diffusers)": sd.IPNDM(4, denoise_last=False),
        "AB-3 (azula)": sd.LMS(3, denoise_last=False),
        "v-AB-3 (azula)": sd.LMS(3, denoise_last=False, prediction="flow"),
    }
    parts = ("diffusers", "azula", "diffrax")
    peers = {peer.name: peer for part in parts for peer in libraries.of(part)}
    sigmas = grids.common(6)["Karras"]
    for name, solver in same.items():
        x, _ = compare.draw(peers[name], problem.denoiser, start, sigmas, {})
        x_init = sigmas[0] * start
        key = jax.random.key(0)
        ours = sd.sample(key, problem.denoiser, sigmas=sigmas, solver=solver, x_init=x_init).x
        # Some of diffusers' schedulers round to float32 on their way.
        assert_allclose(x, ours, rtol=0, atol=1e-4, err_msg=name)


def batch_addim(denoise, x, sigmas):
    """hackable-diffusion's: the length of the noise is a mean over the batch too."""
    return formulas.addim(lambda x, sigma: denoise(x[0], sigma)[None], x[None], sigmas)[0]


def grouped(denoise, x, sigmas):
    """Two steps of one evaluation, the middle on the grid, are one of DPM++ 2S on this one."""
    return formulas.dpmpp_2s(denoise, x, [*sigmas[:-1:2], sigmas[-1]])


def in_flow_time(middle: bool, denoise, x, sigmas):
    """Heun in t = sigma / (1 + sigma), or DPM++ 2S with the middle of that; then the denoiser."""
    for sigma, sigma_next in itertools.pairwise(sigmas[:-1]):
        t, t_next = sigma / (1 + sigma), sigma_next / (1 + sigma_next)
        x0 = denoise(x, sigma)
        if middle:
            t_mid = (t + t_next) / 2
            sigma_mid = t_mid / (1 - t_mid)
            x_mid = denoise(x0 + sigma_mid / sigma * (x - x0), sigma_mid)
            share = np.log(sigma / sigma_mid) / np.log(sigma / sigma_next)
            clean = x0 + (x_mid - x0) / (2 * share)
            x = clean + sigma_next / sigma * (x - clean)
        else:
            y = x * (1 - t)
            slope = (y - x0) / t
            end = y + (t_next - t) * slope
            slope_next = (end - denoise(end / (1 - t_next), sigma_next)) / t_next
            x = (y + (t_next - t) * (slope + slope_next) / 2) / (1 - t_next)
    return denoise(x, sigmas[-2])


SAME = {
    "DDIM": formulas.euler,
    "Euler": formulas.euler,
    "Heun": formulas.heun,
    "DPM++ 2M": stabilisers.LOWER,
    "DPM++ 3M": sd.DPMpp3M(kind="midpoint", lower_order_final=True),
    "UniPC-2": sd.UniPC(2),
    "UniPC-3": sd.UniPC(3),
    "LMS-4": formulas.lms,
    "aDDIM": batch_addim,
    "DPM++ 2S grouped": grouped,
    "Heun in flow time": partial(in_flow_time, False),
    "DPM++ 2S, middle in flow time": partial(in_flow_time, True),
}


@pytest.mark.slow
@THEIR_WARNINGS
@pytest.mark.parametrize("part", ["dewml", "diffuse-jax", "hackable-diffusion", "maxdiffusion"])
def test_libraries_in_jax(part):
    """As many evaluations as they should take; by formulas, by ours, or near to a fine solve."""
    if part == "maxdiffusion" and "MAXDIFFUSION" in os.environ:
        sys.path.append(str(Path(os.environ["MAXDIFFUSION"]) / "src"))
    peers = libraries.of(part)
    if not peers:
        pytest.skip(f"{part} is not installed")
    problem = problems.exact(problems.ring(), draws=100)
    start = np.random.default_rng(0).standard_normal((20, 2))
    denoise = compare.Counted(problem.denoiser, "numpy")
    for peer in peers:
        steps = peer.steps(7 if peer.method in SAME else 60)
        sigmas = grids.of(peer, steps)["log-SNR"]
        with jax.numpy_rank_promotion("allow"):
            x, calls = compare.draw(peer, problem.denoiser, start, sigmas, {})
        assert calls == (peer.stages * (steps - 1) + 1 if peer.to_zero else steps), peer.name
        reference, first = SAME.get(peer.method, sd.DDIM()), sigmas[0] * start
        if isinstance(reference, sd.Solver):
            grid = sigmas if peer.method in SAME else sd.log_snr_sigmas(4000)
            solved = {"sigmas": grid, "solver": reference, "x_init": first}
            expected = sd.sample(jax.random.key(0), problem.denoiser, **solved).x
        else:
            expected = reference(denoise, first, [float(s) for s in sigmas])
        error = np.abs(x - np.asarray(expected)).max()
        print(f"{peer.name}: {error:.1e}")  # pytest -rP shows it
        assert error < (1e-6 if peer.method in SAME else 0.01), peer.name


@pytest.mark.slow
@THEIR_WARNINGS
def test_what_was_stopped_goes_on(tmp_path, monkeypatch):
    """On the smallest configuration, with whatever peers there are; the second run adds a seed."""
    sizes = together.QUICK._replace(samples=20, evaluations=(4,))
    monkeypatch.setattr(libraries, "SOLVERS", {"DPM++ 2M": sd.DPMpp2M()})
    where = "grey patches 8x8", 3.0
    path = tmp_path / "runs" / "a.jsonl"
    path.parent.mkdir()
    try:
        with jax.numpy_rank_promotion("allow"):
            compare.run(*where, "ours", sizes, path)
            text = path.read_text()
            path.write_text(text[: len(text) * 2 // 3])
            compare.run(*where, "ours", sizes._replace(seeds=2), path)
            for part in libraries.PARTS:
                compare.run(*where, part, sizes, path.with_name(f"{part}.jsonl"))
    finally:  # each run sets the precision of its process
        jax.config.update("jax_enable_x64", True)
    rows = compare.read(path)
    assert len({r.run for r in rows}) == len(rows) == 2 * (1 + 3 * 6)
    first = compare.read(path.with_name("ours.jsonl"))
    assert sorted(r for r in rows if r.seed == 0) == sorted(first)
    everything = compare.read(*path.parent.glob("*.jsonl"))
    assert all(r.taken <= r.evaluations for r in everything if r.side != "fine")
    known = together.facts(sizes, {"flax": tmp_path / "none"})
    (tmp_path / "facts.json").write_text(json.dumps(known))
    assert "| images, guided |" in report.write(tmp_path)


@pytest.mark.slow
@THEIR_WARNINGS
def test_timed_programs_solve_the_same_problem():
    """Natively in JAX and in torch: the same samples from the same start."""
    pytest.importorskip("azula", reason="the peers are not installed")
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        for case in speed.SHAPES:
            ours, theirs = speed.of_jax(case), speed.of_torch(case)
            expected = np.asarray(ours["ours: DPM++ 2M"]())
            assert_allclose(theirs["DPM++ 2M (formulas in torch)"](), expected, atol=2e-3)
            assert_allclose(ours["ours: DPM++ 2M in one's own jit"](), expected, atol=1e-5)
