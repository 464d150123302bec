"""Parity in float64 with what public samplers return, on every grid of tests/reference."""

import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import REFERENCE, Mixture, reference, run
from numpy.testing import assert_allclose

import steindiff_jax as sd

GRIDS = sorted(path.stem for path in REFERENCE.glob("d2_*.npz"))
ENDING_ABOVE_ZERO = [grid for grid in GRIDS if "_G0_" not in grid]


SOLVERS = {
    "DDIM": (
        sd.DDIM(),
        "kdiff.sample_euler azula.DDIM azula.Euler diffusers.edm_euler diffusers.euler_discrete "
        "diffusers.dpmpp_1M_midpoint_lof1 diffusers.deis1_logrho_lof1 diffsampler.euler "
        "diffsampler.dpmpp1_x0_lof1 official.dpmsolver++_1M_dpmsolver_lof1",
    ),
    "Heun": (sd.Heun(), "kdiff.sample_heun diffsampler.heun azula.Heun"),
    "DPMpp2M": (
        sd.DPMpp2M(),
        "kdiff.sample_dpmpp_2m kdiff.sample_dpmpp_2m_sde_eta0_midpoint "
        "diffusers.dpmpp_2M_midpoint_lof0 diffsampler.dpmpp2_x0_lof0",
    ),
    "DPMpp3M": (sd.DPMpp3M(), "kdiff.sample_dpmpp_3m_sde_eta0"),
    "3M, midpoint start": (
        sd.DPMpp3M(kind="midpoint"),
        "diffusers.dpmpp_3M_midpoint_lof0 diffsampler.dpmpp3_x0_lof0",
    ),
    "3M, midpoint start, lower orders last": (
        sd.DPMpp3M(kind="midpoint", lower_order_final=True),
        "diffusers.dpmpp_3M_midpoint_lof1 diffusers.edm_dpmpp_3M_midpoint "
        "diffsampler.dpmpp3_x0_lof1 official.dpmsolver++_3M_dpmsolver_lof1",
    ),
    "IPNDM2": (sd.IPNDM(2, denoise_last=False), "diffsampler.ipndm2"),
    "IPNDM3": (sd.IPNDM(3, denoise_last=False), "diffsampler.ipndm3"),
    "IPNDM4": (sd.IPNDM(4, denoise_last=False), "diffsampler.ipndm4 diffusers.ipndm4"),
}


@pytest.fixture(scope="module")
def denoiser():
    problem = reference("problem_d2")
    return Mixture(jnp.asarray(problem["mus"]), float(problem["s0"]))


def check(denoiser, solver, grid, names, ending=()):
    arrays = reference(grid)
    x = run(denoiser, np.append(arrays["sigmas"], ending), solver, arrays["x_T"]).x
    present = [name for name in names.split() if name in arrays]
    assert present  # some keys exist on one kind of grid only, but never none
    for name in present:
        assert_allclose(x, arrays[name], rtol=0, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", SOLVERS)
def test_public_samplers(denoiser, name, grid):
    check(denoiser, SOLVERS[name][0], grid, SOLVERS[name][1])


@pytest.mark.parametrize("grid", ENDING_ABOVE_ZERO)
@pytest.mark.parametrize(
    ("solver", "names"),
    [
        pytest.param(sd.DPMpp3M(curvature=1.0), "azula.xEAB3", id="exact weights"),
        pytest.param(
            sd.DPMpp3M(lower_order_final=True),
            "official.dpmsolver++_3M_taylor_lof1",
            id="exact integral of the line, lower orders last",
        ),
    ],
)
def test_third_order_away_from_zero(denoiser, solver, names, grid):
    check(denoiser, solver, grid, names)


@pytest.mark.parametrize("grid", ENDING_ABOVE_ZERO)
def test_ipndm_denoising_at_the_end(denoiser, grid):
    """diff-sampler's `denoise_to_zero` is a last step to sigma = 0."""
    check(denoiser, sd.IPNDM(4), grid, "diffsampler.ipndm4_dtz", ending=[0.0])


@pytest.mark.parametrize("grid", GRIDS)
def test_problem_is_the_reference_s(denoiser, grid):
    """A fine solve ends at the `exact` that came with the arrays, so no parity is by accident."""
    arrays = reference(grid)
    last = max(arrays["sigmas"][-1], 1e-6)
    fine = np.geomspace(80.0, last, 600)
    assert_allclose(run(denoiser, fine, sd.Heun(), arrays["x_T"]).x, arrays["exact"], atol=1e-3)
