"""The comparison with other samplers: its formulas and mathematics, and the peers if any."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import REFERENCE, reference
from numpy.testing import assert_allclose

import problems
import steindiff_jax as sd
from peers import compare, formulas, libraries, report, speed, stabilisers
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


@pytest.mark.parametrize("peer", libraries.of_formulas(), ids=lambda peer: peer.name)
@pytest.mark.parametrize("budget", [3, 4, 8])
def test_no_sampler_takes_more_than_its_evaluations(denoise, peer, budget):
    """As many as fit: another step would be one too many."""
    taken = []
    fixed = {"limit": 1.0, "data_variance": 0.25}
    needed = {name: fixed[name] for name in peer.needs}
    for steps in (peer.steps(budget), peer.steps(budget) + 1):
        sigmas = [float(s) for s in compare.grids(peer, steps)["Karras"]]
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
    at = {"problem": "p", "guidance": 3.0, "grid": "Karras", "evaluations": 5, "seed": 0} | rest
    return Row(side=side, sampler=sampler, distance=distance, rmse=distance**2, **at)


def test_best_of_each_side():
    """By hand: two problems, the best of two samplers, one of them not finite."""
    rows = [
        row("peer", "a", 0.4),
        row("peer", "b", np.inf),
        row("ours", "c", 0.2),
        row("plain", "d", 0.1),
        row("peer", "a", 0.2, problem="q"),
        row("ours", "c", 0.8, problem="q"),
        row("ours", "c", 0.4, problem="r"),  # no peer was run on it
    ]
    comparison = report.Comparison(rows)
    cases = comparison.cases()
    assert sorted(case[0] for case in cases) == ["p", "q"]
    assert comparison.ratio("ours", cases) == pytest.approx(np.sqrt(0.5 * 4.0))
    assert comparison.ratio("any of ours", cases) == pytest.approx(np.sqrt(0.25 * 4.0))
    first = comparison.one(lambda problem: problem in "pq", 3.0, 5)[0]
    assert first[1:] == ("peer", "a", "Karras")
    assert first[0] == pytest.approx(np.sqrt(0.4 * 0.2))


def records():
    """Ours is twice as slow in one case, and twice as fast in the other."""
    made = []
    for case, peer in (("network", 1.0), ("overhead", 4.0)):
        for program, milliseconds in (("ours: default", 2.0), ("x (peer)", peer), ("bare: y", 0.5)):
            made.append({"case": case, "program": program, "milliseconds": milliseconds})
            made[-1] |= {"compile": 1.0, "memory": None}
    return made


def test_report_says_first_where_a_peer_wins(tmp_path):
    rows = [
        row(side, sampler, distance, problem=problem, evaluations=n, guidance=w)
        for problem in ("clumps", compare.NETWORK)
        for w in (1.0, 7.0)
        for n in (5, 10)
        for side, sampler, distance in (
            ("peer", "DPM++ 2M (diffusers)", 0.2 if n == 5 else 0.02),
            ("ours", "default", 0.1),
            ("plain", "DPM++ 2M", 0.3),
        )
    ]
    rows.append(row("peer", "broken", np.inf, problem="clumps", guidance=7.0))
    compare.write(rows, tmp_path / "quality.csv")
    assert compare.read(tmp_path / "quality.csv")[0]._replace(
        modes=0, precision=0, recall=0
    ) == rows[0]._replace(modes=0, precision=0, recall=0)
    (tmp_path / "speed.json").write_text(json.dumps(records()))
    known = report.facts(compare.Sizes(), False, tmp_path / "none")
    (tmp_path / "facts.json").write_text(json.dumps(known))
    text = report.write(tmp_path)
    assert (tmp_path / "report.md").read_text() == text
    assert (tmp_path / "quality.png").stat().st_size > 1000
    assert (tmp_path / "speed.png").stat().st_size > 1000
    wins, *_, best = text.split("## Where a peer wins")[1].partition("## Best against best")
    assert "above 1 in 4 of 8 cases" in wins
    assert "| clumps | 7 | 10 | 5.00 | DPM++ 2M (diffusers), Karras |" in wins
    assert "default, network: 2.00 times" in wins
    assert "overhead" not in wins
    assert "| exact mixtures | 7 | 0.50 (0.50) | 5.00 (5.00)* |" in best
    assert "broken, Karras: not finite in 1 of 1 runs" in text
    assert f"jax {jax.__version__}" in text
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.MARKS[0]}\nof old\n{report.MARKS[1]}\nafter\n")
    for _ in range(2):
        report.to_readme(tmp_path, readme)
        lines = readme.read_text().splitlines()
        assert (lines[0], lines[-1]) == ("before", "after")
        assert "of old" not in lines
        assert (
            "| best peer | 0.200 | 0.020 | 0.200 | 0.020 | 0.200 | 0.020 | 0.200 | 0.020 |" in lines
        )


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
    peers = {peer.name: peer for peer in libraries.peers()}
    sigmas = compare.common_grids(6)["Karras"]
    for name, solver in same.items():
        x, _ = compare.draw(peers[name], problem.denoiser, start, sigmas, {})
        x_init = sigmas[0] * start
        key = jax.random.key(0)
        ours = sd.sample(key, problem.denoiser, sigmas=sigmas, solver=solver, x_init=x_init).x
        # Some of diffusers' schedulers round to float32 on their way.
        assert_allclose(x, ours, rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.slow
@THEIR_WARNINGS
def test_all_of_it(tmp_path, monkeypatch):
    """On the smallest configuration, with whatever peers there are."""
    sizes = compare.Sizes(
        samples=20,
        network_samples=10,
        evaluations=(3, 5),
        network_evaluations=(3,),
        guidance=(1.0, 7.0),
        draws=20,
        fine=10,
    )
    few = ("default", "DPM++ 2M", "Stein DPM++ 2M")
    monkeypatch.setattr(libraries, "OURS", {name: libraries.OURS[name] for name in few})
    try:
        with jax.numpy_rank_promotion("allow"):
            rows = compare.run("grid", sizes) + compare.run(compare.NETWORK, sizes)
    finally:  # each run sets the precision of its process
        jax.config.update("jax_enable_x64", True)
    compare.write(rows, tmp_path / "quality.csv")
    (tmp_path / "speed.json").write_text(json.dumps(records()))
    (tmp_path / "facts.json").write_text(json.dumps(report.facts(sizes, True, tmp_path / "none")))
    text = report.write(tmp_path)
    assert "| exact mixtures | 7 |" in text
    assert "| digits network | 7 |" in text
    plain = [r for r in rows if r.sampler == "DPM++ 2M" and r.grid == "Karras"]
    theirs = [r for r in rows if r.sampler == "DPM++ 2M (k-diffusion's formulas)"]
    by_case = {(r.problem, r.guidance, r.evaluations): r for r in theirs if r.grid == "Karras"}
    for r in plain:  # the two sides share noise, grid and denoiser
        other = by_case[r.problem, r.guidance, r.evaluations]
        assert r.distance == pytest.approx(other.distance, rel=1e-6)


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
