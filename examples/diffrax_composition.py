"""diffrax and steindiff_jax, both ways, on the network for handwritten digits.

Runs diffrax's Heun, plain and Stein-corrected, and solvers of this library in `diffeqsolve`, all
with the same term, steps and noise. Then computes log-likelihoods of real and of scrambled digits.
About a minute on two cores.
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


def samples():
    """RMSE to a fine solve from the same noise, for each solver."""
    labels = jnp.arange(BATCH) % 10
    conditional, unconditional = digits.load(labels), digits.load(jnp.full(BATCH, digits.NULL))
    denoiser = sd.guided(conditional, unconditional, SCALE)

    sigmas = sd.log_snr_sigmas(STEPS)
    ts = times(sigmas[:-1])  # -log sigma: it increases; the last step, to sigma = 0, is to_data
    term = probability_flow(denoiser, sigmas)
    noise = sigmas[0] * jax.random.normal(jax.random.key(0), (BATCH, 8, 8, 1), sigmas.dtype)

    def solve(solver, controller):
        solution = diffrax.diffeqsolve(
            term, solver, ts[0], ts[-1], None, noise, stepsize_controller=controller
        )
        return to_data(solution, denoiser)

    fine = solve(diffrax.Tsit5(), diffrax.PIDController(rtol=1e-3, atol=1e-3))
    solvers = {
        "diffrax.Heun()": diffrax.Heun(),
        "SteinCorrected(diffrax.Heun())": SteinCorrected(diffrax.Heun()),
        "as_diffrax(DDIM())": as_diffrax(sd.DDIM()),
        "as_diffrax(IPNDM(3))": as_diffrax(sd.IPNDM(3)),
        "as_diffrax(Stein(IPNDM(3)))": as_diffrax(sd.Stein(sd.IPNDM(3))),
    }
    steps = diffrax.StepTo(ts)
    return {
        name: float(jnp.sqrt(jnp.mean((solve(solver, steps) - fine) ** 2)))
        for name, solver in solvers.items()
    }


def likelihoods():
    """Mean log-density in nats per pixel: real digits, and the same with their pixels permuted."""
    images, _ = digits.images()
    real = images[:BATCH].reshape(BATCH, -1)
    scrambled = np.random.default_rng(0).permuted(real, axis=1)
    x = jnp.asarray(np.concatenate([real, scrambled]).reshape(-1, 8, 8, 1))
    found = log_likelihood(
        probability_flow(digits.load(jnp.full(2 * BATCH, digits.NULL))),
        x,
        sigma_min=0.1,
        estimator=sd.Hutchinson(),
        stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-3),
    )
    return found.reshape(2, BATCH).mean(axis=1) / real.shape[1]


if __name__ == "__main__":
    print(f"{STEPS} steps, guidance {SCALE:g}: RMSE to a fine solve from the same noise")
    for name, error in samples().items():
        print(f"  {name:<30} {error:.3f}")
    real, scrambled = likelihoods()
    print(f"nats per pixel: {real:.2f} for digits, {scrambled:.2f} for scrambled ones")
