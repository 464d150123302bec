"""diffrax and steindiff_jax, both ways, on the network for handwritten digits.

Diffrax's solvers, plain and Stein-corrected, and solvers of this library in `diffeqsolve`: one
term, the same steps, the same start. Then a trajectory from SaveAt, and log-likelihoods. About a
minute on two cores.
"""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import digits
import steindiff_jax as sd
from steindiff_jax.interop.diffrax import (
    SteinCorrected,
    as_diffrax,
    log_likelihood,
    probability_flow,
    times,
    to_data,
)

SCALE, STEPS, BATCH = 3.0, 8, 20

labels = jnp.arange(BATCH) % 10
conditional, unconditional = digits.load(labels), digits.load(jnp.full(BATCH, digits.NULL))
denoiser = sd.guided(conditional, unconditional, SCALE)

sigmas = sd.log_snr_sigmas(STEPS)
ts = times(sigmas[:-1])  # -log sigma: it increases; the last step, to sigma = 0, is to_data
term = probability_flow(denoiser, sigmas)
noise = sigmas[0] * jax.random.normal(jax.random.key(0), (BATCH, 8, 8, 1), sigmas.dtype)


def solve(solver, controller=diffrax.StepTo(ts), **options):
    return diffrax.diffeqsolve(
        term, solver, ts[0], ts[-1], None, noise, stepsize_controller=controller, **options
    )


def samples():
    """Prints each sample's distance to the flow itself, from the same noise."""
    flow = to_data(solve(diffrax.Tsit5(), diffrax.PIDController(rtol=1e-3, atol=1e-3)), denoiser)
    solvers = {
        "diffrax.Euler": diffrax.Euler(),
        "diffrax.Heun": diffrax.Heun(),
        "diffrax.Bosh3": diffrax.Bosh3(),
        "SteinCorrected(diffrax.Euler)": SteinCorrected(diffrax.Euler()),
        "SteinCorrected(diffrax.Heun)": SteinCorrected(diffrax.Heun()),
        "SteinCorrected(diffrax.Bosh3)": SteinCorrected(diffrax.Bosh3()),
        "as_diffrax(DDIM)": as_diffrax(sd.DDIM()),
        "as_diffrax(DPMpp3M)": as_diffrax(sd.DPMpp3M()),
        "as_diffrax(Stein(DPMpp3M))": as_diffrax(sd.Stein(sd.DPMpp3M())),
    }
    print(f"{STEPS} steps, guidance {SCALE:g}: RMSE to the flow")
    for name, solver in solvers.items():
        x = to_data(solve(solver), denoiser)
        print(f"  {name:<30} {jnp.sqrt(jnp.mean((x - flow) ** 2)):.3f}")
    return x


if __name__ == "__main__":
    samples()
