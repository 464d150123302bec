"""Every sampler of tests/reference, row by row, in float64, and why the few others differ."""

import re
from itertools import pairwise

import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import REFERENCE, Mixture, reference, run, unoptimised, walk  # noqa: F401
from numpy.testing import assert_allclose

import steindiff_jax as sd

GRIDS = sorted(path.stem for path in REFERENCE.glob("d2_*.npz"))


def lms(order, **options):
    return sd.LMS(order, denoise_last=False, **options)


def ipndm(order):
    return sd.IPNDM(order, denoise_last=False)


def dpm(solver, **options):
    return solver(prediction="epsilon", **options)


LAST = {"lower_order_final": True}
MIDPOINT, LINE = {"kind": "midpoint"}, {"kind": "heun"}
PARITY = [
    # DDIM, by all its names
    (sd.Euler(), "kdiff.sample_euler azula.DDIM azula.Euler diffusers.edm_euler"),
    (sd.DDIM(), "diffusers.euler_discrete diffsampler.euler diffusers.deis1_logrho_lof1"),
    (sd.DDIM(), "diffusers.dpmpp_1M_midpoint_lof0 diffusers.dpmpp_1M_midpoint_lof1"),
    (sd.DDIM(), "diffsampler.dpmpp1_x0_lof0 diffsampler.dpmpp1_x0_lof1"),
    (sd.DDIM(), "diffsampler.dpmpp1_eps_lof1"),
    (sd.DDIM(), "official.dpmsolver_1M_dpmsolver_lof1 official.dpmsolver_1M_taylor_lof1"),
    (sd.DDIM(), "official.dpmsolver++_1M_dpmsolver_lof1 official.dpmsolver++_1M_taylor_lof1"),
    (sd.LMS(1), "kdiff.sample_euler"),
    (sd.DEIS(1), "diffusers.deis1_logrho_lof1"),
    # multistep, exponential in x0
    (sd.DPMpp2M(), "kdiff.sample_dpmpp_2m kdiff.sample_dpmpp_2m_sde_eta0_midpoint"),
    (sd.DPMpp2M(), "diffusers.dpmpp_2M_midpoint_lof0 diffsampler.dpmpp2_x0_lof0"),
    (sd.DPMpp2M(**LAST), "diffusers.dpmpp_2M_midpoint_lof1 diffusers.edm_dpmpp_2M_midpoint"),
    (sd.DPMpp2M(**LAST), "diffsampler.dpmpp2_x0_lof1 official.dpmsolver++_2M_dpmsolver_lof1"),
    (sd.DPMpp2M(**LINE), "diffusers.dpmpp_2M_heun_lof0 kdiff.sample_dpmpp_2m_sde_eta0_heun"),
    (sd.DPMpp2M(**LINE), "azula.xEAB2"),
    (sd.DPMpp2M(**LINE, **LAST), "diffusers.dpmpp_2M_heun_lof1"),
    (sd.DPMpp2M(**LINE, **LAST), "official.dpmsolver++_2M_taylor_lof1"),
    (sd.DPMpp3M(), "kdiff.sample_dpmpp_3m_sde_eta0"),
    (sd.DPMpp3M(curvature=1.0), "azula.xEAB3"),
    (sd.DPMpp3M(**MIDPOINT), "diffusers.dpmpp_3M_midpoint_lof0 diffsampler.dpmpp3_x0_lof0"),
    (sd.DPMpp3M(**MIDPOINT, **LAST), "diffusers.dpmpp_3M_midpoint_lof1"),
    (sd.DPMpp3M(**MIDPOINT, **LAST), "diffusers.edm_dpmpp_3M_midpoint"),
    (sd.DPMpp3M(**MIDPOINT, **LAST), "diffsampler.dpmpp3_x0_lof1"),
    (sd.DPMpp3M(**MIDPOINT, **LAST), "official.dpmsolver++_3M_dpmsolver_lof1"),
    (sd.DPMpp3M(**LAST), "official.dpmsolver++_3M_taylor_lof1"),
    (sd.DEIS(2, prediction="x0"), "azula.xEAB2"),
    (sd.DEIS(3, prediction="x0"), "azula.xEAB3"),
    (sd.DEIS(4, prediction="x0"), "azula.xEAB4"),
    (sd.DPMpp2MSDE(eta=0.0), "kdiff.sample_dpmpp_2m_sde_eta0_midpoint"),
    (sd.DPMpp2MSDE(eta=0.0, **LINE), "kdiff.sample_dpmpp_2m_sde_eta0_heun"),
    # multistep, exponential in the noise
    (sd.DEIS(2), "azula.zEAB2"),
    (sd.DEIS(3), "azula.zEAB3"),
    (sd.DEIS(4), "azula.zEAB4"),
    (sd.DEIS(2, **LAST), "diffusers.deis2_logrho_lof1 diffusers.dpm_2M_heun_lof1"),
    (sd.DEIS(2, **LAST), "official.dpmsolver_2M_taylor_lof1"),
    (sd.DEIS(3, **LAST), "diffusers.deis3_logrho_lof1"),
    (dpm(sd.DPMpp2M, **LAST), "diffusers.dpm_2M_midpoint_lof1 diffsampler.dpmpp2_eps_lof1"),
    (dpm(sd.DPMpp2M, **LAST), "official.dpmsolver_2M_dpmsolver_lof1"),
    (dpm(sd.DPMpp3M, **MIDPOINT, **LAST), "diffusers.dpm_3M_midpoint_lof1"),
    (dpm(sd.DPMpp3M, **MIDPOINT, **LAST), "diffsampler.dpmpp3_eps_lof1"),
    (dpm(sd.DPMpp3M, **MIDPOINT, **LAST), "official.dpmsolver_3M_dpmsolver_lof1"),
    (dpm(sd.DPMpp3M, **LAST), "official.dpmsolver_3M_taylor_lof1"),
    # Adams-Bashforth
    (lms(2), "kdiff.sample_lms_order2 azula.zAB2 diffsampler.deis_rhoab1(=order2)"),
    (lms(2), "diffsampler.ipndm_v2"),
    (lms(3), "kdiff.sample_lms_order3 azula.zAB3 diffsampler.deis_rhoab2(=order3)"),
    (lms(4), "kdiff.sample_lms_order4 azula.zAB4 diffsampler.deis_rhoab3(=order4)"),
    (lms(4), "diffusers.lms4"),
    (lms(2, prediction="flow"), "azula.vAB2"),
    (lms(3, prediction="flow"), "azula.vAB3"),
    (lms(4, prediction="flow"), "azula.vAB4"),
    (ipndm(2), "diffsampler.ipndm2"),
    (ipndm(3), "diffsampler.ipndm3"),
    (ipndm(4), "diffsampler.ipndm4 diffusers.ipndm4"),
    # several stages
    (sd.Heun(), "kdiff.sample_heun diffsampler.heun azula.Heun"),
    (sd.DPM2(), "kdiff.sample_dpm_2 diffsampler.dpm_2_r0.5 official.dpmsolver_2S_dpmsolver"),
    (sd.DPM2(**LINE), "official.dpmsolver_2S_taylor"),
    (sd.DPM2(1.0), "kdiff.sample_heun"),
    (sd.DPMpp2S(), "kdiff.sample_dpmpp_2s_ancestral_eta0 kdiff.sample_dpmpp_sde_eta0"),
    (sd.DPMpp2S(), "official.dpmsolver++_2S_dpmsolver"),
    (sd.DPMpp2S(**LINE), "official.dpmsolver++_2S_taylor"),
    (sd.DPMpp3S(), "official.dpmsolver++_3S_dpmsolver"),
    (sd.DPMpp3S(**LINE), "official.dpmsolver++_3S_taylor"),
    (dpm(sd.DPMpp3S), "official.dpmsolver_3S_dpmsolver"),
    (dpm(sd.DPMpp3S, **LINE), "official.dpmsolver_3S_taylor"),
    (sd.Churn(sd.Heun(), churn=0.0), "kdiff.sample_heun"),
    # UniPC, and SA-Solver without noise, which is the same method
    *[
        (
            sd.UniPC(order, kind, prediction=prediction),
            " ".join(
                f"{library}.unipc{order}_{kind}_{short}_lof1"
                for library in ("diffusers", "diffsampler", "official")
            ),
        )
        for order in (1, 2, 3)
        for kind in ("bh1", "bh2")
        for prediction, short in (("x0", "x0"), ("epsilon", "eps"))
    ],
    *[
        (
            sd.UniPC(order, kind, lower_order_final=False),
            f"diffusers.unipc{order}_{kind}_x0_lof0",
        )
        for order in (1, 2, 3)
        for kind in ("bh1", "bh2")
    ],
    (sd.UniPC(1, "vary_coeff"), "official.unipc1_vary_coeff_x0_lof1"),
    (sd.UniPC(1, "vary_coeff", prediction="epsilon"), "official.unipc1_vary_coeff_eps_lof1"),
    (sd.UniPC(3, "bh1"), "diffusers.sasolver_p3c4_tau0"),
    # analytical first step
    (sd.AnalyticalFirst(sd.DDIM()), "diffsampler.euler_afs"),
    (sd.AnalyticalFirst(ipndm(4)), "diffsampler.ipndm4_afs"),
]
ROWS = [
    pytest.param(solver, key, id=f"{key}-{type(solver).__name__}")
    for solver, keys in PARITY
    for key in keys.split()
]


@pytest.fixture(scope="module")
def denoiser():
    problem = reference("problem_d2")
    return Mixture(jnp.asarray(problem["mus"]), float(problem["s0"]))


@pytest.fixture(scope="module")
def samples(denoiser):
    known = {}

    def samples(solver, grid):
        if (repr(solver), grid) not in known:
            arrays = reference(grid)
            x = walk(denoiser, solver, arrays["sigmas"], arrays["x_T"])
            known[repr(solver), grid] = np.asarray(x)
        return known[repr(solver), grid]

    return samples


@pytest.mark.parametrize(("solver", "key"), ROWS)
def test_parity(samples, solver, key):
    grids = [grid for grid in GRIDS if key in reference(grid)]
    error = max(np.abs(samples(solver, grid) - reference(grid)[key]).max() for grid in grids)
    print(f"{key}: {error:.1e}, {len(grids)} grids")  # pytest -rP shows it
    assert error <= 1e-9


# What of the arrays is no row above, and why.
ELSEWHERE = {
    r"kdiff\.sample_dpm_fast|diffusers\.dpmpp_2S_midpoint": "composed of steps, below",
    r"diffsampler\.ipndm4_dtz": "one step more, below",
    r"diffsampler\.ipndm_v[34]|official\.unipc[23]_vary_coeff_.*": "wrong, below",
    r"diffusers\.dpmpp_3S_midpoint": "a 3S of its own: its third stage has the midpoint rule",
    r"diffusers\.sasolver_p2c2_tau0": "a corrector of lower order than UniPC's",
    r"diffsampler\.deis_tab[234]": "DEIS in the time of one VP schedule, by a Riemann sum",
    r"azula\.REAB[234]": "a Rosenbrock-type linearisation, by a trapezoidal sum",
}


def test_every_array_is_accounted_for():
    names = {key for _, keys in PARITY for key in keys.split()}
    keys = {key for grid in GRIDS for key in reference(grid) if "." in key}
    for pattern in ELSEWHERE:
        found = {key for key in keys if re.fullmatch(pattern, key)}
        assert found
        assert not found & names
        keys -= found
    assert keys == names


def chain(denoiser, x, pieces):
    """Steps of different one-step solvers, one after another."""
    for solver, *ends in pieces:
        x = walk(denoiser, solver, ends, x)
    return x


@pytest.mark.parametrize("grid", GRIDS)
def test_singlestep_on_the_nodes_of_a_grid(denoiser, grid):
    """Diffusers' 2S: every other node is the second stage, wherever that lies; DDIM at the end."""
    arrays = reference(grid)
    sigmas, pieces, i = arrays["sigmas"], [], 0
    while i + 3 < sigmas.size:
        start, middle, stop = sigmas[i : i + 3]
        pieces.append((sd.DPMpp2S(np.log(middle / start) / np.log(stop / start)), start, stop))
        i += 2
    pieces += [(sd.DDIM(), *ends) for ends in pairwise(sigmas[i:])]
    x = chain(denoiser, arrays["x_T"], pieces)
    assert_allclose(x, arrays["diffusers.dpmpp_2S_midpoint"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("n", [4, 5, 8, 10])
def test_dpm_solver_fast(denoiser, n):
    """DPM-Solver-fast: n evaluations in steps of third order and a rest (arXiv:2206.00927, B)."""
    arrays = reference(f"d2_G0_n{n}")
    count = n // 3 + 1
    orders = [3] * (count - 2) + [2, 1] if n % 3 == 0 else [3] * (count - 1) + [n % 3]
    solvers = {1: sd.DDIM(), 2: sd.DPM2(), 3: sd.DPMpp3S(prediction="epsilon")}
    ends = pairwise(np.geomspace(80.0, 0.002, count + 1))
    pieces = [(solvers[order], *end) for order, end in zip(orders, ends, strict=True)]
    x = chain(denoiser, arrays["x_T"], pieces)
    assert_allclose(x, arrays["kdiff.sample_dpm_fast"], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("solver", "key"),
    [
        (sd.DDIM(), "kdiff.sample_euler"),
        (sd.Heun(), "kdiff.sample_heun"),
        (sd.DPMpp3M(), "kdiff.sample_dpmpp_3m_sde_eta0"),
        (sd.UniPC(3), "diffusers.unipc3_bh2_x0_lof1"),
    ],
)
def test_sample_takes_these_steps(denoiser, solver, key):
    """The rows above are walked step by step; `sample` scans over the same."""
    arrays = reference("d2_G0_n5")
    x = run(denoiser, arrays["sigmas"], solver, arrays["x_T"]).x
    assert_allclose(x, arrays[key], rtol=0, atol=1e-9)


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if "_G0_" not in grid])
def test_ipndm_denoising_at_the_end(denoiser, grid):
    """diff-sampler's `denoise_to_zero` is a last step to sigma = 0."""
    arrays = reference(grid)
    x = walk(denoiser, sd.IPNDM(4), [*arrays["sigmas"], 0.0], arrays["x_T"])
    assert_allclose(x, arrays["diffsampler.ipndm4_dtz"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("grid", GRIDS)
def test_problem_is_the_reference_s(denoiser, grid):
    """A fine solve ends at the `exact` that came with the arrays, so no parity is by accident."""
    arrays = reference(grid)
    last = max(arrays["sigmas"][-1], 1e-6)
    fine = np.geomspace(80.0, last, 600)
    assert_allclose(run(denoiser, fine, sd.Heun(), arrays["x_T"]).x, arrays["exact"], atol=1e-3)


# Defects that are not copied


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("grid", [grid for grid in GRIDS if "_G0_" not in grid])
def test_variable_step_adams_bashforth(samples, order, grid):
    """A method of order p must integrate sigma^k, k < p, exactly; iPNDM_v's does up to p = 2.

    So LMS is the method that iPNDM_v stands for, and diff-sampler's array is another one from the
    third order on, although its coefficients are right on uniform grids.
    """
    sigmas = reference(grid)["sigmas"]
    rows = np.asarray(sd.LMS(order).weights(jnp.asarray(sigmas)))
    for i in range(order - 1, len(sigmas) - 1):
        nodes = sigmas[i : i - order if i >= order else None : -1]
        weights = np.array([1 - rows[i].sum(), *rows[i]])
        for k in range(order):
            exact = (sigmas[i + 1] ** (k + 1) - sigmas[i] ** (k + 1)) / (k + 1)
            assert_allclose(np.diff(sigmas)[i] * weights @ nodes**k, exact, rtol=1e-9)
    difference = np.abs(samples(lms(order), grid) - reference(grid)[f"diffsampler.ipndm_v{order}"])
    assert difference.max() < 1e-9 if order == 2 else difference.max() > 1e-3


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("prediction", ["x0", "epsilon"])
def test_unipc_with_varying_coefficients(samples, order, prediction):
    """Is a method of order `order` + 1 by `test_solver_orders`; the official one is another.

    Its corrector leaves out all but the last term of the sum over the new node's coefficients.
    """
    short = {"x0": "x0", "epsilon": "eps"}[prediction]
    key = f"official.unipc{order}_vary_coeff_{short}_lof1"
    x = samples(sd.UniPC(order, "vary_coeff", prediction=prediction), "d2_G1_n10")
    assert np.abs(x - reference("d2_G1_n10")[key]).max() > 1e-3
