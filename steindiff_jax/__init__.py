"""Few-step sampling of diffusion and flow models with Stein-corrected ODE steps, in pure JAX."""

from steindiff_jax import diagnostics
from steindiff_jax._typing import Denoiser, Info, Solution, Solver, State, Step, pytree, static
from steindiff_jax.denoisers import (
    DynamicThreshold,
    Network,
    StaticThreshold,
    from_linen,
    from_nnx,
    guided,
)
from steindiff_jax.grids import (
    cosine_sigmas,
    ddpm_sigmas,
    exponential_sigmas,
    flow_sigmas,
    karras_sigmas,
    log_snr_sigmas,
    time_sigmas,
)
from steindiff_jax.many import sample_many
from steindiff_jax.sample import sample
from steindiff_jax.schedules import EDM, Discrete, RectifiedFlow, VPCosine, VPLinear
from steindiff_jax.solvers import (
    DDIM,
    DEIS,
    DPM2,
    IPNDM,
    LMS,
    AnalyticalFirst,
    Churn,
    DPMpp2M,
    DPMpp2MSDE,
    DPMpp2S,
    DPMpp3M,
    DPMpp3S,
    Euler,
    Heun,
    RhoAB,
    UniPC,
)
from steindiff_jax.stein import (
    CleanTarget,
    Exact,
    Hutchinson,
    Jacobian,
    PosteriorLength,
    Stein,
    StepEnergy,
    Tweedie,
)
from steindiff_jax.stein.calibration import Calibrated, calibrate

__version__ = "0.1.0"
