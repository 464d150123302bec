"""Calibration of the digits network, and drift and contractivity of two samplers.

Uses the Stein discrepancy twice: on noised scans (is the network calibrated?) and along a sampler
(do its states hold the noise that their sigma says?). Then prints a contractivity profile and the
report of a run, and writes diagnostics.png. About a minute on two cores.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import digits
import steindiff_jax as sd
from steindiff_jax import diagnostics

PICTURE = Path(__file__).with_suffix(".png")
KEY = jax.random.key(0)
N, GRID = 100, sd.karras_sigmas(6)
SOLVERS = {"DPM++ 3M": sd.DPMpp3M(), "corrected": sd.Stein(sd.DPMpp3M())}
contractivity = jax.jit(diagnostics.contractivity, static_argnames="iterations")
stein_discrepancy = jax.jit(diagnostics.stein_discrepancy)


def calibration(axis):
    """First use, on noised data: the ratio is 1 where the network is a posterior mean."""
    x, label = digits.images()
    pick = jax.random.choice(KEY, len(x), (N,), replace=False)
    sigmas = jnp.geomspace(0.02, 20, 10)
    noise = jax.random.normal(KEY, (len(sigmas), N, 8, 8, 1))
    noised = jnp.asarray(x)[pick] + sigmas[:, None, None, None, None] * noise
    denoiser = digits.load(jnp.asarray(label)[pick])
    found = stein_discrepancy(KEY, denoiser, noised, sigmas)
    print("noised data   sigma " + " ".join(f"{s:6.2f}" for s in sigmas))
    print("              ratio " + " ".join(f"{r:6.3f}" for r in found.ratio))
    print("     standard error " + " ".join(f"{e:6.3f}" for e in found.error))
    axis.errorbar(sigmas, found.ratio, 2 * np.asarray(found.error), fmt=".-", label="noised data")


def drift(name, solver, denoiser, axis):
    """Second use, on a sampler's states: above 1 they hold more noise than their sigma says."""
    solution = sd.sample(
        KEY, denoiser, (N, 8, 8, 1), sigmas=GRID, solver=solver, record=diagnostics.keep
    )
    report = diagnostics.trajectory_report(solution, GRID, denoiser, key=KEY)
    print(f"\n{name}\n{report}")
    axis.plot(report.sigma_next[:-1], report.ratio[:-1], ".-", label=name)
    return report


def main():
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    denoiser = digits.load(jnp.tile(jnp.arange(10), N // 10))
    discrepancy = axes[0, 0]
    calibration(discrepancy)
    for name, solver in SOLVERS.items():
        report = drift(name, solver, denoiser, discrepancy)
    discrepancy.axhline(1.0, color="0.6", linewidth=0.8)
    discrepancy.set(xscale="log", yscale="log", xlabel="sigma", title="Stein discrepancy")
    discrepancy.invert_xaxis()
    discrepancy.legend()
    report.plot(axes[1])
    x_init = GRID[0] * jax.random.normal(KEY, (N, 8, 8, 1))
    for (name, solver), axis in zip(SOLVERS.items(), axes[0, 1:], strict=True):
        profile = contractivity(KEY, denoiser, x_init, GRID, solver, iterations=10)
        profile.plot(axis).set_title(f"contractivity, {name}")
        print(f"\n{name}: share of samples whose step exceeds the certificate", profile.violations)
        print("share of samples that the certificate does not show to contract", profile.expanding)
        print("worst residual of the power iterations", np.max(profile.residual, axis=1).round(2))
    figure.savefig(PICTURE, dpi=110)
    print(f"wrote {PICTURE.name}")


if __name__ == "__main__":
    main()
