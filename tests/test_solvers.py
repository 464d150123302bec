"""Every solver, row by row: public samplers' arrays, numpy references, what equals what."""

import re
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import REFERENCE, Gaussian, Mixture, mixture, normal, reference, run
from numpy.testing import assert_allclose, assert_array_equal

import steindiff_jax as sd

GRIDS = sorted(path.stem for path in REFERENCE.glob("d2_*.npz"))


def lms(order, **options):
    return sd.LMS(order, denoise_last=False, **options)


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
    (sd.DPMpp2M(**LAST), "diffusers.dpmpp_2M_midpoint_lof1 diffusers.edm_dpmpp_2M_midpoint"),
    (sd.DPMpp2M(**LAST), "diffsampler.dpmpp2_x0_lof1 official.dpmsolver++_2M_dpmsolver_lof1"),
    (sd.DPMpp2M(**LINE), "diffusers.dpmpp_2M_heun_lof0 kdiff.sample_dpmpp_2m_sde_eta0_heun"),
    (sd.DPMpp2M(**LINE), "azula.xEAB2"),
    (sd.DPMpp2M(**LINE, **LAST), "diffusers.dpmpp_2M_heun_lof1"),
    (sd.DPMpp2M(**LINE, **LAST), "official.dpmsolver++_2M_taylor_lof1"),
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
    # several stages
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
    (sd.AnalyticalFirst(sd.IPNDM(4, denoise_last=False)), "diffsampler.ipndm4_afs"),
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


@pytest.mark.parametrize(("solver", "key"), ROWS)
def test_parity(denoiser, solver, key):
    """In float64, on every grid that has the key; op by op, as compiling would take minutes."""
    grids = [grid for grid in GRIDS if key in reference(grid)]
    assert grids
    with jax.disable_jit():
        for grid in grids:
            arrays = reference(grid)
            x = run(denoiser, arrays["sigmas"], solver, arrays["x_T"]).x
            assert_allclose(x, arrays[key], rtol=0, atol=1e-9, err_msg=grid)
